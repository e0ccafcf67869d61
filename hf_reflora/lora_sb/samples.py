"""The samples of LoRA-SB's initialization, drawn from a trainer's own data without taking them from the training."""

import itertools
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset

from .gradients import preserve_random_states


def draw_samples(dataloader: DataLoader, number: int | None, seed: int) -> tuple[Any, list[int]]:
    """The dataset to take samples from, and their indices in it.

    Args:
        dataloader: The trainer's.
        number: How many. Default: a thousandth of the data, at least 25.
        seed: Of the choice, the same in every process.

    Raises:
        ValueError: the data are a stream, whose length is not known, and `number` is not given.
    """
    dataset = dataloader.dataset
    if isinstance(dataset, IterableDataset):
        if number is None:
            raise ValueError(
                "The training data are a stream of unknown length. Give LoraSbCallback(num_samples=...), "
                "in a YAML file lorasb_num_samples."
            )
        rows = first_rows(dataloader, number)
        return rows, list(range(len(rows)))
    number = max(25, math.ceil(len(dataset) / 1000)) if number is None else number
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed))
    return dataset, order[:number].tolist()


def first_rows(dataloader: DataLoader, number: int) -> list[Any]:
    """The first rows of a dataloader's stream, which its next pass has all the same.

    A stream that can be read only once, such as one over a generator, has lost these rows by now. Then the dataloader
    gets them back, followed by what the stream has left. Only where the dataloader reads in this process
    (`num_workers=0`): its workers read copies of the stream.
    """
    stream = dataloader.dataset
    # Read twice from one random state, so that a stream with random augmentation has the same first row again.
    with preserve_random_states():
        reader = iter(stream)
        rows = list(itertools.islice(reader, number))
    with preserve_random_states():
        second_reader = iter(stream)
        again = list(itertools.islice(second_reader, 1))
    if not rows or dataloader.num_workers > 0 or (again and _equal(again[0], rows[0])):
        return rows
    replay = _SizedReplay if hasattr(type(stream), "__len__") else _Replay
    # accelerate's dataloaders read from a DataLoader inside them. A DataLoader refuses to change its dataset, because
    # its sampler would be that of the old one; a stream has no sampler.
    holder = getattr(dataloader, "base_dataloader", dataloader)
    # The second reader comes last, though it has nothing left: a generator that is dropped closes the one it reads.
    holder.__dict__["dataset"] = replay(stream, itertools.chain(rows, again, reader, second_reader))
    return rows


class _Replay(IterableDataset):
    """A stream whose next pass is given; later passes are the stream's own. It has the stream's attributes."""

    def __init__(self, stream: Any, next_pass: Iterator[Any]):
        self.stream = stream
        self.next_pass: Iterator[Any] | None = next_pass

    def __iter__(self) -> Iterator[Any]:
        if self.next_pass is None:
            return iter(self.stream)
        next_pass, self.next_pass = self.next_pass, None
        return next_pass

    def __getattr__(self, name: str) -> Any:
        if name == "stream":  # not there yet while the object is copied
            raise AttributeError(name)
        return getattr(self.stream, name)


class _SizedReplay(_Replay):
    def __len__(self) -> int:
        return len(self.stream)


def _equal(left: Any, right: Any) -> bool:
    """Whether two rows have the same content, tensors and arrays included."""
    if isinstance(left, dict) and isinstance(right, dict):
        return left.keys() == right.keys() and all(_equal(value, right[name]) for name, value in left.items())
    if isinstance(left, list | tuple) and isinstance(right, list | tuple):
        return len(left) == len(right) and all(map(_equal, left, right))
    if torch.is_tensor(left) or torch.is_tensor(right):
        return torch.is_tensor(left) and torch.is_tensor(right) and torch.equal(left, right)
    return bool(np.array_equal(left, right))
