"""Tensors of which each process keeps a part, DTensors (FSDP2): the whole of one, this process's part, writing.

`whole` is collective: every process calls it, in the same order.
"""

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate


def whole(tensor: Tensor) -> Tensor:
    """The tensor of all parts of a DTensor; another tensor as it is. The same to the bit on every process."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def part(tensor: Tensor) -> Tensor:
    """This process's part of a DTensor, sharing its memory; another tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def put_(target: Tensor, value: Tensor) -> None:
    """Copies `value`, which is whole and the same everywhere, into `target`, of which a DTensor keeps its part."""
    if isinstance(target, DTensor):
        mesh = target.device_mesh
        replicated = DTensor.from_local(value.to(target.dtype), mesh, [Replicate()] * mesh.ndim, run_check=False)
        value = replicated.redistribute(placements=target.placements)
    target.copy_(value)
