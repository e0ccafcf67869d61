"""What the oldest supported libraries lack: marks that skip a test, and new names of arguments in old ones."""

import dataclasses
import traceback
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from packaging.version import Version
from torch import nn
from torch.utils.data import SequentialSampler
from transformers import Trainer, TrainingArguments


FIELDS = {field.name for field in dataclasses.fields(TrainingArguments)}
SEQUENTIAL: set[str] = set()  # output folders of the runs that take their data in order


# A causal language model predicts no token from nothing, so the first label does not count; transformers before 5.10
# divides the loss by the number of labels that includes it.
UNCOUNTED_LABELS = 1 if Version(version("transformers")) >= Version("5.10") else 0


def needs(package: str, least: str, feature: str):
    """Skips a test where `package` is older than `least`, the first version that has `feature`."""
    installed = version(package)
    reason = f"{feature} came with {package} {least}; {installed} is installed"
    return pytest.mark.skipif(Version(installed) < Version(least), reason=reason)


def training_arguments(arguments: dict[str, Any]) -> dict[str, Any]:
    """Keyword arguments of TrainingArguments under the names that the installed transformers has for them."""
    arguments = dict(arguments)
    for old in ("gradient_checkpointing", "gradient_checkpointing_kwargs"):
        new = old.replace("gradient", "activation")
        if new in arguments and new not in FIELDS:
            arguments[old] = arguments.pop(new)
    if "train_sampling_strategy" in arguments and "train_sampling_strategy" not in FIELDS:
        remember = SEQUENTIAL.add if arguments.pop("train_sampling_strategy") == "sequential" else SEQUENTIAL.discard
        remember(arguments["output_dir"])
    return arguments


def checkpoint_activations(model: nn.Module, *args) -> None:
    """`activation_checkpointing_enable`, which older transformers call gradient_checkpointing_enable."""
    name = "activation_checkpointing_enable"
    getattr(model, name if hasattr(model, name) else name.replace("activation", "gradient"))(*args)


def lora_sb_needs_newer_peft(error: BaseException) -> bool:
    """Whether a test itself asked for a LoRA-SB adapter, which this PEFT cannot save: see `LoraSbConfig`.

    Where hf_reflora asks for one without being told to, in the middle of RefLoRA, that is a bug and no reason to skip.
    """
    if not (isinstance(error, ImportError) and "LoRA-SB adapters are saved" in str(error)):
        return False
    callers = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
    while callers and callers[-1].endswith(("hf_reflora/requirements.py", "lora_sb/config.py", "<string>")):
        callers.pop()  # down to who made the configuration; <string> is the dataclass's __init__
    return Path(callers[-1]).is_relative_to(Path(__file__).parents[1]) or "/peft/" in callers[-1]


if "train_sampling_strategy" not in FIELDS:  # transformers < 5.2 shuffles always
    train_sampler = Trainer._get_train_sampler

    def _get_train_sampler(self, train_dataset=None):
        if self.args.output_dir in SEQUENTIAL:
            return SequentialSampler(self.train_dataset if train_dataset is None else train_dataset)
        return train_sampler(self, train_dataset)

    Trainer._get_train_sampler = _get_train_sampler
