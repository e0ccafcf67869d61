"""What the processes of one initialization do together: equal numbers of batches, shared SVDs, common errors.

Every function is collective: all processes must call it, with the same layers in the same order, or those that did
wait for ever.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .blocks import CannotCutError, same_order
from .targets import AdapterLayer


def pad_batches(batches: list[Any]) -> list[int]:
    """Repeats batches in place until every process has the same number of them.

    Where FSDP2 or ZeRO-3 shard the model, its forward and backward passes are themselves collective: a process with
    fewer batches than the others would leave them waiting in theirs.

    Args:
        batches: This process's batches. Its first one is repeated; a process without any borrows another one's.

    Returns:
        A weight for each batch: 1, and 0 for the repeated ones, which must not count in the gradient.

    Raises:
        ValueError: on all processes, if none of them has a batch.
    """
    counts: list[int] = [0] * dist.get_world_size()
    dist.all_gather_object(counts, len(batches))
    if max(counts) == 0:
        raise ValueError("The dataloader has no batches on any process. Give at least one sample.")
    # From the first process that has the most; every process takes part in the broadcast, whether it needs it or not.
    borrowed = [batches[0] if batches else None]
    dist.broadcast_object_list(borrowed, src=counts.index(max(counts)))
    missing = max(counts) - len(batches)
    weights = [1] * len(batches) + [0] * missing
    batches += [batches[0] if batches else borrowed[0]] * missing
    return weights


def share_factors(
    layers: dict[str, AdapterLayer],
    adapter_name: str,
    sums: dict[str, Tensor],  # (out, in) each
    device: torch.device,
    compute: Callable[[str, Tensor], tuple[Tensor, Tensor, Tensor]],
) -> Iterator[tuple[str, tuple[Tensor, Tensor, Tensor]]]:
    """Sums the gradients over the processes, spreads the SVDs over them, and gives every process all results.

    Each SVD is computed by one process and broadcast, so that the factors are bit-identical everywhere: the same SVD
    on two kinds of hardware need not even have the same signs.

    Args:
        layers: The layers of this pass, by name.
        adapter_name: Whose ranks they have.
        sums: This process's sums of gradients, by layer. They are consumed, to free their memory early.
        device: Of the sums and of what it yields.
        compute: From a layer's name and its summed gradient to U (out, r), S (r,) and V (in, r).

    Yields:
        Name and (U, S, V) of each layer, in order.

    Raises:
        Exception: what `compute` raises; on the other processes a ValueError that says so.
    """
    owners = {name: i % dist.get_world_size() for i, name in enumerate(layers)}
    gradients = _reduce_to_owners(layers, owners, sums, device)
    results: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
    error = None
    try:
        for name in list(gradients):
            results[name] = compute(name, gradients.pop(name))
    except Exception as raised:  # of this process's SVDs; the others wait for their results below
        error = raised
    raise_on_every_process(error)
    for name, owner in owners.items():
        layer, r = layers[name], layers[name].r[adapter_name]
        shapes = ((layer.out_features, r), (r,), (layer.in_features, r))
        buffers = (torch.empty(shape, device=device) for shape in shapes)
        # NCCL and gloo send contiguous memory only, and V comes out of the SVD transposed.
        U, S, V = (tensor.contiguous() for tensor in (results.pop(name) if name in results else buffers))
        for tensor in (U, S, V):
            dist.broadcast(tensor, src=owner)
        yield name, (U, S, V)


def _reduce_to_owners(
    layers: dict[str, AdapterLayer], owners: dict[str, int], sums: dict[str, Tensor], device: torch.device
) -> dict[str, Tensor]:
    """Sums each layer's gradient over the processes; returns those that this process owns."""
    owned = {}
    for name, owner in owners.items():
        G = sums.pop(name, None)
        if G is None:  # this process had no batch, or none whose gradient reached the layer; others may have
            G = torch.zeros(layers[name].out_features, layers[name].in_features, device=device)
        G = G.float()  # a float64 model's sums are float64, but the zeros of a process without batches are not
        dist.reduce(G, dst=owner)
        if owner == dist.get_rank():
            owned[name] = G
    return owned


def common_order(order: list[str]) -> list[str]:
    """The order of blocks that all processes have; those without any take the others'.

    Raises:
        CannotCutError: on all processes, if they have different ones.
    """
    if not dist.is_initialized():
        return order
    orders: list[list[str]] = [[]] * dist.get_world_size()
    dist.all_gather_object(orders, order)
    return same_order(orders)


@contextmanager
def raising_on_every_process() -> Iterator[None]:
    """What is raised within it on one process is raised on all of them: see `raise_on_every_process`."""
    error = None
    try:
        yield
    except Exception as raised:
        error = raised
    raise_on_every_process(error)


def raise_on_every_process(error: Exception | None) -> None:
    """Raises what went wrong on this process, or a ValueError for what went wrong on another one.

    Without it the other processes would go on to their next collective call and wait there for ever. A CannotCutError
    on one process is one on all of them, so that all go on in the same way, unless something else went wrong, too.
    """
    if not dist.is_initialized():
        if error is not None:
            raise error
        return
    outcome = None if error is None else (isinstance(error, CannotCutError), str(error) or type(error).__name__)
    outcomes: list[tuple[bool, str] | None] = [None] * dist.get_world_size()
    dist.all_gather_object(outcomes, outcome)
    failures = [(*outcome, rank) for rank, outcome in enumerate(outcomes) if outcome is not None]
    if not failures:
        return
    # False sorts first: all processes raise CannotCutError only where nothing else went wrong.
    cannot_cut, message, rank = min(failures)
    if error is not None and isinstance(error, CannotCutError) == cannot_cut:
        raise error
    raise CannotCutError(message) if cannot_cut else ValueError(f"On process {rank}: {message}")
