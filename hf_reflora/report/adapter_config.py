"""The configuration of a saved adapter, read with sentences for what can be wrong with the file."""

import json
import os
from pathlib import Path

import peft
from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import CONFIG_NAME

from ..lora_sb import config as _  # noqa: F401  (adds LORASB to PEFT's types)


def read_adapter_config(adapter: str | os.PathLike) -> PeftConfig:
    """The configuration of the adapter in a folder, or of one on the Hub.

    Raises:
        ValueError: there is none, or it is not one that the installed PEFT reads.
    """
    path = Path(adapter) / CONFIG_NAME
    if path.is_file():
        _check_type(path)
    try:
        config = PeftConfig.from_pretrained(str(adapter))
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{adapter}: PEFT {peft.__version__} cannot read {CONFIG_NAME}: {type(error).__name__} {error}. It may be "
            "of a newer PEFT, or have been changed by hand."
        ) from error
    if config.peft_type is None:
        raise ValueError(_no_type(str(adapter)))
    return config


def _check_type(path: Path) -> None:
    try:
        settings = json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}. Save the adapter again with save_pretrained.") from error
    kind = settings.get("peft_type") if isinstance(settings, dict) else None
    if kind is None:
        raise ValueError(_no_type(str(path)))
    known = {str(getattr(name, "value", name)) for name in PEFT_TYPE_TO_CONFIG_MAPPING}
    if kind not in known:
        meant = f' PEFT writes it as "{kind.upper()}".' if str(kind).upper() in known else ""
        version = peft.__version__
        raise ValueError(
            f"{path} has the peft_type {kind!r}, which PEFT {version} does not know.{meant or ' Update PEFT.'}"
        )


def _no_type(place: str) -> str:
    return f'{place} names no peft_type, so that nothing can load it. Add one, such as "peft_type": "LORA".'
