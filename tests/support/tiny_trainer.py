"""Trainers of every class over tiny models, for a few steps on the CPU."""

import tiny
from datasets import Dataset
from torch import nn
from transformers import Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer


def build(
    folder,
    cls: type[Trainer] = Trainer,
    model: nn.Module | str | None = None,
    data: Dataset | int = 16,
    more: dict | None = None,
    **changes,
) -> Trainer:
    """A trainer of class `cls` of `model` (default: a llama whose LoRA is in the middle of training).

    Args:
        data: The training data, or the number of rows of `tiny.token_dataset`.
        more: Further keyword arguments of `cls`.
        changes: What differs from `tiny.arguments` in its TrainingArguments or SFTConfig.
    """
    is_sft = issubclass(cls, SFTTrainer)
    return cls(
        model=tiny.lora(tiny.llama()) if model is None else model,
        args=(SFTConfig if is_sft else TrainingArguments)(**tiny.arguments(folder, **changes)),
        train_dataset=tiny.token_dataset(data, labels=not is_sft) if isinstance(data, int) else data,
        processing_class=tiny.tokenizer(),
        **more or {},
    )
