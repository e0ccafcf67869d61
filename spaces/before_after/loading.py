"""Loads a base model and its adapters, and refuses with a sentence what the page could not show as it is."""

import dataclasses
import tempfile
from pathlib import Path

import torch
from adapter_check import Shapes, check_adapter, check_weights, plain_name, read_config, trained_vocabulary
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from peft import PeftConfig, PeftModel, PeftModelForCausalLM, load_peft_weights
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME, get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM


DTYPES = ("auto", "float32", "bfloat16", "float16")


def file_of(source: str, name: str) -> Path | None:
    """A file of the folder or Hub repository `source`; None if there is none of this name."""
    if Path(source).is_dir():
        path = Path(source) / name
        return path if path.is_file() else None
    try:
        return Path(hf_hub_download(source, name))
    except LocalEntryNotFoundError:  # the Hub could not be asked; it is a subclass of what follows
        raise
    except EntryNotFoundError:
        return None


def load_configs(adapters: dict[str, str]) -> dict[str, PeftConfig]:
    """The configuration of each adapter, by its name on the page.

    Raises:
        ValueError: for a source that is no adapter, or one that the page cannot show.
    """
    configs = {}
    for name, source in adapters.items():
        try:
            path = file_of(source, CONFIG_NAME)
        except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ValueError(
                f"{name}: there is no folder {source} here, and no adapter of this id could be read from the Hub "
                f"({type(error).__name__}: {reason}). Train it first, or set ADAPTERS to a folder or id of an adapter."
            ) from None
        if path is None:
            raise ValueError(f"{name}: {source} is no adapter, as it has no {CONFIG_NAME}.")
        configs[name] = read_config(name, source, str(path.parent))
        check_adapter(name, source, configs[name])
    return configs


def load_base(base: str, dtype: str) -> nn.Module:
    """The base model, on the CPU.

    Raises:
        ValueError: if it is no model that continues text, some of its weights are missing, it is quantized in a way
            that this machine cannot read, or `dtype` is none of `DTYPES`.
    """
    if dtype not in DTYPES:
        raise ValueError(f"DTYPE must be one of {', '.join(DTYPES)}, not {dtype!r}.")
    config = AutoConfig.from_pretrained(base)
    if config.is_encoder_decoder:
        raise ValueError(
            f"{base} is an encoder-decoder model ({config.model_type}). This page shows models that continue a text, "
            "which AutoModelForCausalLM loads."
        )
    quantization = getattr(config, "quantization_config", None)
    try:
        model, report = AutoModelForCausalLM.from_pretrained(base, dtype=dtype, output_loading_info=True)
    except (ImportError, RuntimeError) as error:
        if not quantization:
            raise
        raise ValueError(
            f"{base} is quantized and cannot be loaded here: {error}. Add what is missing to requirements.txt, or set "
            "BASE_MODEL to the model without quantization."
        ) from error
    if report["missing_keys"]:
        lacking = sorted(report["missing_keys"])
        raise ValueError(
            f"{base} lacks {len(lacking)} weights of a model that continues text, such as {lacking[0]}; they would be "
            "random. Set BASE_MODEL to the model that the adapter was trained from."
        )
    return model


@dataclasses.dataclass
class Loaded:
    """A base model with adapters.

    Attributes:
        model: PEFT's.
        head: The base model's own last layer.
        vocabulary: Number of the base model's tokens.
        trained_vocabulary: Number of the adapter's tokens, which differs if the base model was resized for the
            training. The rows of `head` and of the embeddings are as many as the larger number.
    """

    model: PeftModel
    head: nn.Module
    vocabulary: int
    trained_vocabulary: int


def load_adapters(
    model: nn.Module, adapters: dict[str, str], configs: dict[str, PeftConfig], peft_names: dict[str, str]
) -> Loaded:
    """Puts the adapters into the base model, as PEFT does, and leaves the base model's weights as they are.

    Raises:
        ValueError: for an adapter whose weights are absent, or not those that the model takes.
    """
    head = model.get_output_embeddings()
    vocabulary = trained = model.config.get_text_config().vocab_size
    base_weights = model.state_dict(keep_vars=True)
    # PEFT cannot load an adapter without new tokens after one that has some, so those come last.
    for name in sorted(adapters, key=lambda name: configs[name].trainable_token_indices is not None):
        source, config = adapters[name], configs[name]
        weights = _read_weights(name, source)
        resized = trained_vocabulary(name, source, config, shapes_of(weights), shapes_of(base_weights))
        if resized:
            trained = resized
            if len(adapters) > 1:
                raise ValueError(
                    f"{name}: {source} was trained with a vocabulary of {trained} tokens, the base model has "
                    f"{vocabulary}. Such an adapter needs a page of its own: set ADAPTERS to it alone."
                )
            _add_rows(model, trained, weights)
            head, base_weights = model.get_output_embeddings(), model.state_dict(keep_vars=True)
        config.inference_mode = True  # as PEFT's from_pretrained sets it
        try:
            if isinstance(model, PeftModel):
                model.add_adapter(peft_names[name], config)
            else:
                model = PeftModelForCausalLM(model, config, peft_names[name])
        except ValueError as error:  # such as target modules that the model lacks
            raise ValueError(f"{name}: {source} does not fit the base model: {error}") from error
        _load(model, name, source, config, peft_names[name], weights, base_weights)
    return Loaded(model, head, vocabulary, trained)


def _add_rows(model: nn.Module, vocabulary: int, weights: dict[str, torch.Tensor]) -> None:
    """Resizes the base model for the tokens that were added, which get the rows that they had before the training."""
    layers = {"embeddings": model.get_input_embeddings(), "head": model.get_output_embeddings()}
    present = layers["head"].weight.shape[0]
    if vocabulary <= present:  # the rows past the adapter's are the base model's alone
        return
    names = {what: next(n for n, module in model.named_modules() if module is layer) for what, layer in layers.items()}
    model.resize_token_embeddings(vocabulary, mean_resizing=False)
    layers = {"embeddings": model.get_input_embeddings(), "head": model.get_output_embeddings()}
    # Where such a layer is in modules_to_save, its plain name is that of the trained one, so the original comes last.
    for key in sorted(weights, key=lambda key: ".original_module." in key):
        for what, layer in layers.items():
            if ".modules_to_save." not in key and plain_name(key) == f"{names[what]}.weight":
                with torch.no_grad():
                    layer.weight[present:] = weights[key][present:]


def shapes_of(weights: dict[str, torch.Tensor]) -> Shapes:
    return {key: tuple(weight.shape) for key, weight in weights.items()}


def _load(
    model: PeftModel,
    name: str,
    source: str,
    config: PeftConfig,
    peft_name: str,
    weights: dict[str, torch.Tensor],  # of the adapter's file
    base_weights: dict[str, torch.Tensor],
) -> None:
    takes = shapes_of(get_peft_model_state_dict(model, adapter_name=peft_name, save_embedding_layers=False))
    # PEFT's files may have weights of the base model, too, where embeddings have an adapter or were resized. They are
    # left out, as they may be rounded to another dtype.
    copies = {key: plain_name(key) for key in weights if key not in takes and plain_name(key) in base_weights}
    for key, original in copies.items():
        if ".modules_to_save." not in key:  # which the file has a second time, by the name in `takes`
            _check_copy(name, source, original, weights[key], base_weights[original])
    # It also has the new tokens' rows a second time, for a head that is tied to the embeddings.
    rows = {key: weight for key, weight in weights.items() if key.endswith(".trainable_tokens_delta")}
    taken = [weight for key, weight in rows.items() if key in takes]
    tied = {k for k, weight in rows.items() if k not in takes and any(torch.equal(weight, other) for other in taken)}
    weights = {k: weight.contiguous() for k, weight in weights.items() if k not in copies and k not in tied}
    has = shapes_of(weights)
    try:
        with tempfile.TemporaryDirectory() as folder:
            if copies or tied:
                save_file(weights, Path(folder) / SAFETENSORS_WEIGHTS_NAME)
                source_of_weights = folder
            else:
                source_of_weights = source
            # PEFT would load to a GPU, which is not there yet when ZeroGPU starts.
            report = model.load_adapter(source_of_weights, peft_name, torch_device="cpu")
    except (KeyError, RuntimeError) as error:
        check_weights(name, source, config, has, takes)
        raise ValueError(f"{name}: PEFT cannot load the weights of {source}: {error}") from error
    if report.missing_keys or report.unexpected_keys:
        # First in the names of the adapter's own file; where PEFT has converted those, in the model's.
        check_weights(name, source, config, has, takes)
        raise ValueError(
            f"{name}: {source} does not fit the base model. Missing: {report.missing_keys}; without a place in it: "
            f"{report.unexpected_keys}."
        )


def _read_weights(name: str, source: str) -> dict[str, torch.Tensor]:
    path = file_of(source, SAFETENSORS_WEIGHTS_NAME)
    if path is None:
        if file_of(source, WEIGHTS_NAME) is None:
            raise ValueError(
                f"{name}: {source} has an {CONFIG_NAME}, but no weights ({SAFETENSORS_WEIGHTS_NAME}). Save the "
                "adapter with save_pretrained when its training has ended."
            )
        return load_peft_weights(source, device="cpu")
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}
    except SafetensorError as error:  # cut off, or the pointer that git has without git-lfs
        raise ValueError(f"{name}: {SAFETENSORS_WEIGHTS_NAME} of {source} cannot be read: {error}.") from None


def _check_copy(name: str, source: str, original: str, copy: torch.Tensor, weight: torch.Tensor) -> None:
    """Raises a ValueError if the adapter's copy of a weight is not the base model's, up to rounding."""
    rows = min(len(copy), len(weight))  # a resized one has others
    copy, weight = copy[:rows], weight.detach()[:rows]
    dtype = min(copy.dtype, weight.dtype, key=lambda dtype: dtype.itemsize)
    if copy.shape != weight.shape or not torch.equal(copy.to(dtype), weight.to(copy.dtype).to(dtype)):
        raise ValueError(
            f"{name}: {source} has {original} of the base model with other values. The base model's side would not be "
            "the base model's. Train that layer with modules_to_save."
        )
