"""One pass over several batches in which one block's gradients are in memory at a time.

A gradient is complete after the backward passes of all batches, so that after ordinary ones, a batch each, all layers'
gradients are in memory together. Here each batch's graph is cut at the outputs of the model's blocks, its decoder or
encoder layers, and the backward pass goes through the last block in all batches, then through the block before it in
all batches, and so on. Within a block it is activation checkpointing: a batch's graph keeps the block's inputs only,
and its activations are computed again when its turn comes. What is outside the blocks, such as the head with its
logits, is in memory for one batch at a time.
"""

import contextlib
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge, saved_tensors_hooks
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from .gradients import replaced_forwards
from .memory import UsageMeter


class CannotCutError(Exception):
    """The graph cannot be cut into blocks, or does not fit into memory that way; the message says why."""


def outermost_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The layers that transformers can checkpoint and that are in no other one, by name."""
    blocks: dict[str, nn.Module] = {}
    inner: set[nn.Module] = set()
    for name, module in model.named_modules():  # a module comes before those inside it
        if isinstance(module, GradientCheckpointingLayer) and module not in inner:
            blocks[name] = module
            inner.update(module.modules())
    return blocks


def same_order(orders: list[list[str]]) -> list[str]:
    """The order that several batches or processes have in common; those without any count for nothing.

    Raises:
        CannotCutError: they have none.
    """
    orders = [order for order in orders if order]
    if any(order != orders[0] for order in orders):
        raise CannotCutError("not all batches go through the same blocks in the same order")
    return orders[0] if orders else []


def group_by_block(blocks: dict[str, nn.Module], layers: dict[str, nn.Module]) -> dict[str | None, list[str]]:
    """The names of the layers by the block in whose turn their gradients are complete; None if they are in no block.

    Args:
        blocks: In the order of the forward pass. A layer that several blocks share is complete in the first one's
            turn, which is the last one.
        layers: The layers by name.
    """
    block_of: dict[nn.Module, str] = {}
    for name, block in blocks.items():
        for module in block.modules():
            block_of.setdefault(module, name)
    groups: dict[str | None, list[str]] = {name: [] for name in [None, *blocks]}
    for name, layer in layers.items():
        groups[block_of.get(layer)].append(name)
    return groups


class _Cut(torch.autograd.Function):
    """Passes a block's detached output on. In the backward pass its gradient stops here and is kept in `received`."""

    @staticmethod
    def forward(ctx, anchor: Tensor, output: Tensor, received: list[Tensor]) -> Tensor:
        ctx.received = received
        return output.detach()  # no view, so that the model may change it in place

    @staticmethod
    def backward(ctx, gradient: Tensor):
        # The output may be used in several places, each of which adds a part.
        ctx.received[:] = [ctx.received[0] + gradient] if ctx.received else [gradient]
        return None, None, None


@dataclass
class _Call:
    """One forward pass of one batch through one block: its piece of the graph begins at its outputs' edges."""

    block: str
    # Of each output. The edge keeps the graph alive but not the output itself.
    edges: list[GradientEdge] = field(default_factory=list)
    received: list[list[Tensor]] = field(default_factory=list)  # gradients: empty, or one tensor

    def backward(self) -> None:
        used = [(edge, parts[0]) for edge, parts in zip(self.edges, self.received, strict=True) if parts]
        if used:
            edges, gradients = zip(*used, strict=True)
            # What lies between two blocks, such as an encoder's last norm, may lead to several later blocks and is
            # then passed once for each; autograd would refuse the second time. The graph is freed with this object.
            torch.autograd.backward(edges, gradients, retain_graph=True)


class CutGraphs:
    """The graphs of several batches, cut at the outputs of blocks.

    Args:
        blocks: Modules by name. See `outermost_blocks`.
    """

    def __init__(self, blocks: dict[str, nn.Module]):
        self.offload = False  # keep the blocks' inputs of further batches in the CPU's memory
        self.meter: UsageMeter | None = None  # counts what the batches take that pass while it is set
        self._names = {block: name for name, block in blocks.items()}
        self._batches: list[list[_Call]] = []
        self._anchor = torch.zeros((), requires_grad=True)  # so that a cut output requires a gradient

    @contextmanager
    def cutting(self) -> Iterator[None]:
        """Within it, forward passes through the blocks are cut."""
        with replaced_forwards(list(self._names), self._cut_forward):
            yield

    def next_batch(self) -> None:
        """Calls of blocks belong to a further batch from now on."""
        self._batches.append([])

    def order(self) -> list[str]:
        """The blocks' names in the order of the forward pass; those that no trainable layer reaches may be missing.

        Raises:
            CannotCutError: the order is not the same in all batches, or a block is used again after others, so that
                its gradients would not be complete in its turn.
        """
        orders = []
        for calls in self._batches:
            order = [name for name, _ in itertools.groupby(call.block for call in calls)]
            again = next((name for i, name in enumerate(order) if name in order[:i]), None)
            if again is not None:
                raise CannotCutError(f"{again} is used again after other blocks")
            orders.append(order)
        return same_order(orders)

    def backward(self, block: str) -> None:
        """The backward pass of all batches through one block. To be called from the last block to the first."""
        for calls in self._batches:
            while calls and calls[-1].block == block:
                calls.pop().backward()

    def _cut_forward(self, block: nn.Module, forward: Callable) -> Callable:
        def run(structure, *leaves):
            args, kwargs = tree_unflatten(leaves, structure)
            return forward(*args, **kwargs)

        def cut_forward(*args, **kwargs):
            if not torch.is_grad_enabled():  # a reference model's pass, which has no gradient
                return forward(*args, **kwargs)
            # Positional arguments only: checkpoint would not give keyword arguments to the hooks that offload them.
            leaves, structure = tree_flatten((args, kwargs))
            if self.meter is not None:
                self.meter.count(block, leaves, lambda: forward(*args, **kwargs))
            with saved_tensors_hooks(_to_cpu, _from_cpu) if self.offload else contextlib.nullcontext():
                output = checkpoint(run, structure, *leaves, use_reentrant=False)
            return self._cut_outputs(block, output)

        return cut_forward

    def _cut_outputs(self, block: nn.Module, output):
        call = _Call(self._names[block])

        def cut(value):
            if not (isinstance(value, Tensor) and value.requires_grad):
                return value
            call.edges.append(get_gradient_edge(value))
            call.received.append([])
            return _Cut.apply(self._anchor, value.detach(), call.received[-1])

        output = tree_map(cut, output)
        if call.edges:
            self._batches[-1].append(call)
        return output


def _to_cpu(tensor: Tensor) -> tuple[torch.device, Tensor]:
    # Masks and position embeddings are the same tensors for all blocks and need no gradient: they are not copied.
    return tensor.device, tensor.to("cpu") if tensor.requires_grad else tensor


def _from_cpu(packed: tuple[torch.device, Tensor]) -> Tensor:
    device, tensor = packed
    return tensor.to(device)
