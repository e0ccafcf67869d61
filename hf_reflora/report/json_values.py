"""Values of Python and torch as JSON has them, so that no setting of a run is a reason not to record the run."""

import dataclasses
import re
from collections.abc import Mapping
from enum import Enum
from pathlib import PurePath
from typing import Any

import numpy as np
import torch
from transformers.utils.quantization_config import QuantizationConfigMixin


LONGEST = 200  # characters of a value that JSON does not know; a model would print itself on many pages

ADDRESS = re.compile(r" at 0x[0-9A-Fa-f]+")  # in memory, by which Python names what has no text of its own


def jsonable(value: Any) -> Any:
    """A deep copy of `value` in JSON's types. What JSON does not know becomes text that a person can read.

    Enums become their values, tuples and sets lists, NumPy's numbers and tensors of one element numbers, quantization
    configurations and dataclasses dictionaries of what is not their default; dtypes become such as "bfloat16", devices
    such as "cuda:0", functions and classes their names. Numbers that are not finite stay as they are.
    """
    if isinstance(value, Enum):
        return jsonable(value.value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Mapping):
        return {_key(name): jsonable(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(entry) for entry in value]
    if isinstance(value, set | frozenset):
        return sorted((jsonable(entry) for entry in value), key=str)
    if isinstance(value, np.generic) or (torch.is_tensor(value) and value.numel() == 1):
        number = value.item()
        return number if isinstance(number, bool | int | float | str) else _text(value)
    if isinstance(value, QuantizationConfigMixin):
        return jsonable(value.to_diff_dict() if hasattr(value, "to_diff_dict") else value.to_dict())
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {name: jsonable(entry) for name, entry in changed_fields(value).items()}
    return _text(value)


def changed_fields(instance: Any) -> dict[str, Any]:
    """The fields of a dataclass's instance that differ from their defaults, of those that its constructor takes."""
    values = {}
    for f in dataclasses.fields(instance):
        default = f.default_factory() if f.default_factory is not dataclasses.MISSING else f.default
        value = getattr(instance, f.name)
        if f.init and not _equal(value, default):
            values[f.name] = value
    return values


def _equal(value: Any, default: Any) -> bool:
    try:
        return bool(value == default)
    except Exception:  # arrays and tensors compare entry by entry
        return False


def _key(name: Any) -> str:
    name = jsonable(name)
    return name if isinstance(name, str) else str(name)


def _text(value: Any) -> str:
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if isinstance(value, torch.device | PurePath):
        return str(value)
    if isinstance(value, type) or callable(value):
        # The text of a function has its address, which differs from run to run.
        named = value if hasattr(value, "__qualname__") else type(value)
        return f"{named.__module__}.{named.__qualname__}"
    if torch.is_tensor(value) or isinstance(value, np.ndarray):
        return f"{type(value).__name__} of shape {tuple(value.shape)}"
    text = str(value)
    if ADDRESS.search(text):
        return f"{type(value).__module__}.{type(value).__qualname__}"
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"
