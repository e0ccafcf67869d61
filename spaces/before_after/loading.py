"""Loads a base model and its adapters, and refuses with a sentence what the page could not show as it is."""

from pathlib import Path

import torch
from adapter_check import Shapes, check_adapter, check_new_tokens, check_weights, plain_name, read_config
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from peft import PeftConfig, PeftModel, PeftModelForCausalLM, load_peft_weights
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME, get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
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


def load_adapters(
    model: nn.Module, adapters: dict[str, str], configs: dict[str, PeftConfig], peft_names: dict[str, str]
) -> PeftModel:
    """Puts the adapters into the base model, as PEFT does, and leaves the base model's weights as they are.

    Raises:
        ValueError: for an adapter whose weights are absent, or not those that the model takes.
    """
    base_weights = model.state_dict(keep_vars=True)
    base_shapes = {name: tuple(weight.shape) for name, weight in base_weights.items()}
    # PEFT cannot load an adapter without new tokens after one that has some, so those come last.
    for name in sorted(adapters, key=lambda name: configs[name].trainable_token_indices is not None):
        source, config = adapters[name], configs[name]
        config.inference_mode = True  # as PEFT's from_pretrained sets it
        weights = _read_weights(name, source)
        has = {key: tuple(weight.shape) for key, weight in weights.items()}
        check_new_tokens(name, source, config, has, base_shapes)
        try:
            if isinstance(model, PeftModel):
                model.add_adapter(peft_names[name], config)
            else:
                model = PeftModelForCausalLM(model, config, peft_names[name])
        except ValueError as error:  # such as target modules that the model lacks
            raise ValueError(f"{name}: {source} does not fit the base model: {error}") from error
        takes = get_peft_model_state_dict(model, adapter_name=peft_names[name], save_embedding_layers=False)
        takes = {key: tuple(weight.shape) for key, weight in takes.items()}
        # PEFT's files may have weights of the base model, too: embeddings that are trained, or that have an adapter.
        copies = {key: plain_name(key) for key in has if key not in takes and plain_name(key) in base_weights}
        before = {original: base_weights[original].detach().clone() for original in copies.values()}
        for key, original in copies.items():
            _check_copy(name, source, original, weights[key], before[original])
        _load(model, name, source, config, peft_names[name], {k: s for k, s in has.items() if k not in copies}, takes)
        with torch.no_grad():
            for original, weight in before.items():
                base_weights[original].copy_(weight)  # the adapter's copy may be rounded to another dtype
    return model


def _load(
    model: PeftModel, name: str, source: str, config: PeftConfig, peft_name: str, has: Shapes, takes: Shapes
) -> None:
    try:
        # PEFT would load to a GPU, which is not there yet when ZeroGPU starts.
        report = model.load_adapter(source, peft_name, torch_device="cpu")
    except (KeyError, RuntimeError) as error:
        check_weights(name, source, config, has, takes)
        raise ValueError(f"{name}: PEFT cannot load the weights of {source}: {error}") from error
    lacking = report.missing_keys
    unknown = [key for key in report.unexpected_keys if ".modules_to_save." not in key]
    if lacking or unknown:
        # First in the names of the adapter's own file; where PEFT has converted those, in the model's.
        check_weights(name, source, config, has, takes)
        raise ValueError(
            f"{name}: {source} does not fit the base model. Missing: {lacking}; without place: {unknown}."
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
    dtype = min(copy.dtype, weight.dtype, key=lambda dtype: dtype.itemsize)
    if copy.shape != weight.shape or not torch.equal(copy.to(dtype), weight.to(copy.dtype).to(dtype)):
        raise ValueError(
            f"{name}: {source} has {original} of the base model with other values. The base model's side would not be "
            "the base model's. Train that layer with modules_to_save."
        )


def trained_elsewhere(base: str, config: PeftConfig) -> str | None:
    """The name of the model that the adapter was trained from, if it is not the base model's."""
    trained_from = (config.base_model_name_or_path or "").rstrip("/")
    # Folders move, and a folder often has the name of the model in it.
    is_same = Path(trained_from).name.lower() == Path(base.rstrip("/")).name.lower()
    return trained_from if trained_from and not is_same else None
