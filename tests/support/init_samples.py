"""Samples for LoRA-SB's initialization, and the initialization with them."""

import itertools

import torch
from torch import Tensor

from hf_reflora import initialize_lora_sb_weights


ETA = 1e-3


def make_rows(n: int = 6, vocab: int = 260) -> list[dict[str, Tensor]]:
    """Samples of unlike lengths; the first half of every other one is a prompt without labels."""
    generator = torch.Generator().manual_seed(5)
    rows = []
    for i in range(n):
        ids = torch.randint(4, vocab, (4 + 5 * (i % 3) + i,), generator=generator)
        labels = ids.clone()
        if i % 2:
            labels[: len(ids) // 2] = -100
        rows.append({"input_ids": ids, "labels": labels})
    return rows


def collate(rows) -> dict[str, Tensor]:
    pad = torch.nn.utils.rnn.pad_sequence
    return {
        "input_ids": pad([row["input_ids"] for row in rows], batch_first=True),
        "attention_mask": pad([torch.ones_like(row["input_ids"]) for row in rows], batch_first=True),
        "labels": pad([row["labels"] for row in rows], batch_first=True, padding_value=-100),
    }


def batches(*sizes: int) -> list[dict[str, Tensor]]:
    rows = iter(make_rows(sum(sizes)))
    return [collate(list(itertools.islice(rows, size))) for size in sizes]


def initialize(model, data=None, **changes):
    data = batches(2, 3, 1) if data is None else data
    initialize_lora_sb_weights(model, data, **{"eta": ETA, "show_progress_bar": False, **changes})
    return model
