"""Which adapters the page can show; `hf-reflora space` asks the same before it makes a Space.

What needs the adapter's configuration only is in `read_config` and `check_adapter`. `check_weights` needs the model.
"""

import json
from pathlib import Path

from peft import PeftConfig
from peft.utils import CONFIG_NAME


Shapes = dict[str, tuple[int, ...]]  # of weights, by their names as they are in an adapter's file


def read_config(name: str, source: str, folder: str) -> PeftConfig:
    """The configuration in `folder` of the adapter that the page calls `name` and that comes from `source`.

    Raises:
        ValueError: if it is not a LoRA adapter's, or no configuration at all.
    """
    try:
        kind = json.loads((Path(folder) / CONFIG_NAME).read_text(encoding="utf-8")).get("peft_type")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{name}: the {CONFIG_NAME} of {source} is not one of PEFT's: {error}") from None
    # Asked here, too, because PEFT has only a KeyError for methods of other packages, such as LoRA-SB.
    _check_kind(name, source, kind)
    return PeftConfig.from_pretrained(folder)


def _check_kind(name: str, source: str, kind: str | None) -> None:
    # Other methods ignore adapter_names, and the base's side would be the adapter's.
    if kind != "LORA":
        how = f" Export it to a LoRA: hf-reflora export {source} FOLDER." if kind == "LORASB" else ""
        raise ValueError(f"{name}: this page shows LoRA adapters, {source} is {kind}.{how}")


def check_adapter(name: str, source: str, config: PeftConfig) -> None:
    """Raises a ValueError for an adapter that would change the base model's side, or whose own side would be wrong.

    Args:
        name: The adapter's name on the page.
        source: Its folder or its id on the Hub.
        config: Its configuration.
    """
    _check_kind(name, source, getattr(config.peft_type, "value", None))
    if config.task_type not in (None, "CAUSAL_LM"):
        raise ValueError(f"{name}: this page shows models that write text, {source} is for {config.task_type}.")
    if config.init_lora_weights not in (True, False, "gaussian", "orthogonal", "eva"):
        raise ValueError(
            f"{name}: {source} changes the base model where it is loaded (init_lora_weights="
            f"{config.init_lora_weights!r}). Save it with path_initial_model_for_weight_conversion, as PEFT's "
            "save_pretrained says, and it is an ordinary LoRA."
        )
    unsupported = {"bias": config.bias != "none", "layer_replication": config.layer_replication}
    unsupported["alora_invocation_tokens"] = config.alora_invocation_tokens
    for setting, is_used in unsupported.items():
        if is_used:
            raise ValueError(f"{name}: this page can't show adapters with {setting}, and {source} has it.")


def trained_elsewhere(base: str, config: PeftConfig) -> str | None:
    """The name of the model that the adapter was trained from, if it is not the base model's."""
    trained_from = (config.base_model_name_or_path or "").rstrip("/")
    # Folders move, and a folder often has the name of the model in it.
    is_same = Path(trained_from).name.lower() == Path(base.rstrip("/")).name.lower()
    return trained_from if trained_from and not is_same else None


def trained_vocabulary(
    name: str,
    source: str,
    config: PeftConfig,
    has: Shapes,
    base: Shapes,  # of the base model, by the names of its own state dict
) -> int | None:
    """Number of tokens with which the adapter was trained, if its base model was resized for that; None otherwise.

    PEFT saves the resized embeddings and the resized head, or one of them, beside the adapter.

    Raises:
        ValueError: if the adapter has tokens past the base model's, and its file has no embeddings of them.
    """
    layers = ("embed_tokens.weight", "lm_head.weight", "wte.weight", "word_embeddings.weight")
    resizable = {key: shape for key, shape in base.items() if key.endswith(layers)}
    for key, shape in has.items():
        present = resizable.get(plain_name(key), shape)
        if shape != present and shape[1:] == present[1:]:
            return shape[0]
    rows = [shape[0] for shape in resizable.values()]
    tokens = config.trainable_token_indices or []  # a list for the input embeddings, or a dictionary by layer
    tokens = [token for layer in tokens.values() for token in layer] if isinstance(tokens, dict) else tokens
    if rows and tokens and max(tokens) >= min(rows):
        raise ValueError(
            f"{name}: {source} has a token {max(tokens)}, and the base model has {min(rows)} tokens: it was "
            "resized for the training. Save the adapter with save_pretrained(save_embedding_layers=True)."
        )
    return None


def plain_name(key: str) -> str:
    """The name in the base model of a weight in an adapter's file: without PEFT's prefix and its wrappers."""
    wrappers = {"token_adapter", "base_layer", "original_module", "modules_to_save"}
    return ".".join(part for part in key.removeprefix("base_model.model.").split(".") if part not in wrappers)


def check_weights(
    name: str,
    source: str,
    config: PeftConfig,
    has: Shapes,  # of the adapter's file
    takes: Shapes,  # of the model with an adapter of this configuration
) -> None:
    """Raises a ValueError if the adapter's weights are not those that the model takes for its configuration."""
    differing = [key for key in has if key in takes and has[key] != takes[key]]
    lacking, unknown = [key for key in takes if key not in has], [key for key in has if key not in takes]
    if differing:
        key = differing[0]
        fault = f"{key} has the shape {has[key]}, and the model takes {takes[key]} ({len(differing)} differ)"
    elif lacking or unknown:
        parts = [f"the model takes {len(takes)} weights, the adapter has {len(has)}"]
        parts += [f"{len(lacking)} are missing, such as {lacking[0]}"] if lacking else []
        parts += [f"{len(unknown)} have no place in the model, such as {unknown[0]}"] if unknown else []
        fault = "; ".join(parts)
    else:
        return
    trained_from = config.base_model_name_or_path
    hint = f" It was trained from {trained_from}." if trained_from else ""
    raise ValueError(f"{name}: the weights of {source} do not fit the base model: {fault}.{hint}")
