"""What the card's Python snippet needs to know of an adapter's folder: the adapter's own tokenizer and its tokens.

An adapter may have been trained with another chat template, another end token or more tokens than its base model has.
Its folder tells, as the trainer saves the tokenizer beside the weights.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from transformers import AutoTokenizer

from .escaping import literal
from .ids import is_hub_id
from .record import RunRecord


# How the names of the layers end that have a row for each token, without PEFT's wrappers.
TOKEN_LAYERS = ("embed_tokens.weight", "lm_head.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight")
WRAPPERS = {"base_layer", "modules_to_save", "original_module", "token_adapter"}


@dataclass(frozen=True)
class OwnTokenizer:
    """The tokenizer in an adapter's folder.

    Attributes:
        has_template: It has a chat template.
        has_end: It names an end token.
        end_tokens: The end tokens in the folder's `generation_config.json`.
        vocabulary: Number of tokens to which the base model was resized for the training; None if it was not.
    """

    has_template: bool = False
    has_end: bool = False
    end_tokens: tuple[int, ...] = ()
    vocabulary: int | None = None


def read_own_tokenizer(folder: str | os.PathLike) -> OwnTokenizer | None:
    """The tokenizer in the folder of an adapter; None if there is none that transformers loads.

    Nothing is downloaded, and no code in the folder is run.
    """
    folder = Path(folder)
    if not (folder / "tokenizer_config.json").is_file():
        return None
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception:  # what tokenizers raise is of many kinds; the snippet then takes the base model's
        return None
    return OwnTokenizer(
        has_template=tokenizer.chat_template is not None,
        has_end=tokenizer.eos_token_id is not None,
        end_tokens=_end_tokens(folder),
        vocabulary=_resized_vocabulary(folder),
    )


def messages(record: RunRecord, tokenizer: OwnTokenizer | None) -> str | None:
    """The snippet's chat as Python source: the system prompt of the training and the first example.

    None if nothing tells that the adapter was trained on chats: neither a system prompt nor a chat template of its
    own.
    """
    system, examples = record.arguments.get("system_prompt"), record.examples
    if not (system and examples) and not (tokenizer and tokenizer.has_template):
        return None
    turns = [("system", system)] if system else []
    turns.append(("user", examples[0]["prompt"] if examples else "…"))
    lines = [f'{{"role": "{role}", "content": {literal(content)}}},' for role, content in turns]
    return "\n".join(["[", *(f"    {turn}" for turn in lines), "]"])


def _end_tokens(folder: Path) -> tuple[int, ...]:
    eos = _json(folder / "generation_config.json").get("eos_token_id")
    return tuple(token for token in (eos if isinstance(eos, list) else [eos]) if type(token) is int)


def _resized_vocabulary(folder: Path) -> int | None:
    """Rows of the embeddings that PEFT has saved, unless they are known to be as many as the base model's.

    PEFT saves them where the base model was resized, and also where they were trained. An unknown base model is taken
    for one that was resized: where it was not, resizing to the size that it has changes nothing.
    """
    try:
        with safe_open(folder / SAFETENSORS_WEIGHTS_NAME, framework="pt") as file:
            names = [name for name in file.keys() if _plain(name).endswith(TOKEN_LAYERS)]
            rows = {file.get_slice(name).get_shape()[0] for name in names}
    except (OSError, SafetensorError):
        return None
    base = _base_vocabulary(_json(folder / CONFIG_NAME).get("base_model_name_or_path"))
    return max(rows) if rows and rows != {base} else None


def _plain(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def _base_vocabulary(base: Any) -> int | None:
    """The base model's number of tokens, if its configuration is on this machine."""
    if not isinstance(base, str):
        return None
    path: Any = Path(base) / "config.json"
    if not path.is_file() and is_hub_id(base):
        path = try_to_load_from_cache(base, "config.json")
    config = _json(Path(path)) if isinstance(path, str | Path) else {}
    of_text = config.get("text_config")  # of a model that reads pictures, too
    return (of_text if isinstance(of_text, dict) else config).get("vocab_size")


def _json(path: Path) -> dict[str, Any]:
    """The object in a file that a person may have written; {} if there is none."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return data if isinstance(data, dict) else {}
