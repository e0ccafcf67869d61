"""Products with many small matrices: Gram matrices, and S or s times gradients, factors and moments.

There are two ways to compute them, and both are needed. A GPU takes longer to start an operation than to carry it
out, so there the matrices of one shape are stacked and multiplied in one batch, and the number of operations does
not grow with the number of layers. On a CPU the copies that stacking makes cost more than the calls that it saves
(twice the time of all products, see benchmarks/README.md), so there each matrix is multiplied where it lies.
"""

from collections import defaultdict
from collections.abc import Hashable, Sequence
from itertools import compress

import torch
from torch import Tensor


def stacks(device: torch.device) -> bool:
    """Whether matrices are stacked on this device."""
    return device.type != "cpu"


def group_indices(keys: Sequence[Hashable]) -> list[list[int]]:
    """The indices of equal keys, group by group, in the order of their first appearance."""
    groups: dict[Hashable, list[int]] = defaultdict(list)
    for i, key in enumerate(keys):
        groups[key].append(i)
    return list(groups.values())


def gram_stack(
    factors: Sequence[Tensor],  # n matrices (r, k_i), or (k_i, r) with `of_columns`, on one device
    dtype: torch.dtype,
    *,
    of_columns: bool = False,
) -> Tensor:  # (n, r, r)
    """M Mᵀ of every factor M, or Mᵀ M with `of_columns`, in `dtype`."""
    if not stacks(factors[0].device):
        r = factors[0].shape[1 if of_columns else 0]
        grams = factors[0].new_empty((len(factors), r, r), dtype=dtype)
        for M, gram in zip(factors, grams.unbind(0), strict=True):
            if M.dtype != dtype:
                M = M.to(dtype)
            torch.mm(M.mT, M, out=gram) if of_columns else torch.mm(M, M.mT, out=gram)
        return grams
    ordered: list[Tensor | None] = [None] * len(factors)
    for indices in group_indices([(M.shape, M.dtype) for M in factors]):
        stack = torch.stack([factors[i] for i in indices]).to(dtype)
        products = stack.mT @ stack if of_columns else stack @ stack.mT
        for i, gram in zip(indices, products.unbind(0), strict=True):
            ordered[i] = gram
    return torch.stack(ordered)


def multiply_(
    grads: Sequence[Tensor | None],  # n matrices (r, k_i), or (k_i, r) with left=False, on one device
    S: Tensor,  # (n, r, r)
    *,
    left: bool,
) -> None:
    """grads[i] ← S[i] grads[i], or grads[i] S[i] with left=False, in place; None is left out."""
    present = {i: grad for i, grad in enumerate(grads) if grad is not None}
    matrices = S.unbind(0)
    if not stacks(S.device):
        dtype = S.dtype
        for i, grad in present.items():
            wide = grad if grad.dtype == dtype else grad.to(dtype)
            product = torch.mm(matrices[i], wide) if left else torch.mm(wide, matrices[i])
            grad.copy_(product if wide is grad else _saturated(product, grad.dtype))
        return
    where = list(present)
    for group in group_indices([(grad.shape, grad.dtype) for grad in present.values()]):
        indices = [where[i] for i in group]
        targets = [present[i] for i in indices]
        stack = torch.stack(targets).to(S.dtype)
        # Indexing with a list would copy the indices to the device and wait for it; stacking views does not.
        T = S if len(indices) == len(S) else torch.stack([matrices[i] for i in indices])
        _write_stack_(targets, T @ stack if left else stack @ T)


def scale_(
    tensors: Sequence[Tensor],  # n matrices of any shapes, on one device
    multipliers: Sequence[Tensor],  # n numbers, tensors without dimensions, of one dtype
) -> None:
    """tensors[i] ← multipliers[i] * tensors[i], in place."""
    if not tensors:
        return
    if not stacks(tensors[0].device):
        # mul_ would round the multiplier to the tensor's dtype first, so the dtypes must agree.
        dtype = multipliers[0].dtype
        agree = [tensor.dtype == dtype for tensor in tensors]
        if any(agree):
            torch._foreach_mul_(list(compress(tensors, agree)), list(compress(multipliers, agree)))
        if not all(agree):
            for tensor, multiplier in zip(tensors, multipliers, strict=True):
                if tensor.dtype != dtype:
                    tensor.copy_(_saturated(tensor.to(dtype) * multiplier, tensor.dtype))
        return
    for indices in group_indices([(tensor.shape, tensor.dtype) for tensor in tensors]):
        targets = [tensors[i] for i in indices]
        column = torch.stack([multipliers[i] for i in indices])[:, None, None]
        _write_stack_(targets, torch.stack(targets).to(column.dtype) * column)


def _write_stack_(targets: list[Tensor], values: Tensor) -> None:
    """targets[i] ← values[i], cast once to the dtype of the targets."""
    dtype = targets[0].dtype
    torch._foreach_copy_(targets, _saturated(values, dtype).to(dtype).unbind(0))


def _saturated(value: Tensor, dtype: torch.dtype) -> Tensor:
    """`value` as `dtype` can hold it: what is finite stays finite.

    Only float16 is too small for the products of finite numbers that occur here: its largest number, 65504, takes the
    place of a larger one. As inf it would make the factors NaN for good.
    """
    if dtype != torch.float16:
        return value
    limit = torch.finfo(dtype).max
    return torch.where(value.isfinite(), value.clamp(-limit, limit), value)
