"""What RefLoRA does with S: it preconditions gradients, or it rescales the factors and the optimizer's moments.

All functions take lists of plain tensors and write into them in place.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .refactor import balance_scalars, factor_norms, group_indices, ieee_arithmetic, refactorings


@torch.no_grad()
def precondition_(
    As: Sequence[Tensor],
    Bs: Sequence[Tensor],
    grads_A: Sequence[Tensor | None],
    grads_B: Sequence[Tensor | None],
    *,
    eps: float | None = None,
    dtype: torch.dtype = torch.float32,
    inverse_steps: Sequence[float] | None = None,
    sum_over_shards: Callable[[Tensor, Sequence[int]], Tensor] | None = None,
) -> None:
    """RefLoRA as preconditioning (Theorem 3): ∇A ← S⁻¹ ∇A and ∇B ← ∇B S, in place.

    A pair with B = 0 (LoRA's start) keeps its gradients, with `inverse_steps` up to a factor. Gradients that are not
    finite stay so, and a GradScaler still sees them; S itself is always finite, and so is a product with finite
    gradients: what float16 cannot hold becomes its largest number.

    Args:
        As: n matrices A (r_i, in_i) of any floating dtype. Ranks and devices may differ.
        Bs: n matrices B (out_i, r_i).
        grads_A: n gradients of A's shape, overwritten; None is left out.
        grads_B: n gradients of B's shape, overwritten; None is left out.
        eps: Shrinkage ε in (0, 1]; 1 is RefLoRA-S. Default: `default_eps`, the smallest that is safe.
        dtype: Least dtype of the Gram matrices, float32 or float64. float64 (with ε = 1e-12) keeps Theorem 6, the
            invariance of the SGD step, for factors of condition number up to about 1e4.
        inverse_steps: n numbers 1 / (L η) for the small-step branch, see `refactoring`; 0 for a pair without it.
            Default: no pair has it.
        sum_over_shards: Where `Bs` and `grads_B` are this process's rows only, `sum_over_shards(values, indices)` adds
            up over the processes the (n, r, r) that each computed for the pairs `indices`. Default: every B is full.
    """
    for indices, R in refactorings(
        As, Bs, eps=eps, dtype=dtype, inverse_steps=inverse_steps, sum_over_shards=sum_over_shards
    ):
        with ieee_arithmetic(R.S.device):
            _multiply_([grads_A[i] for i in indices], R.S_inv, left=True)
            _multiply_([grads_B[i] for i in indices], R.S, left=False)


@torch.no_grad()
def precondition_scalar_(
    As: Sequence[Tensor],
    Bs: Sequence[Tensor],
    grads_A: Sequence[Tensor | None],
    grads_B: Sequence[Tensor | None],
    *,
    inverse_steps: Sequence[float] | None = None,
    norms: tuple[Sequence[Tensor], Sequence[Tensor]] | None = None,
) -> None:
    """RefLoRA-S as preconditioning (Theorem 5): ∇A ← ∇A / s and ∇B ← s ∇B, in place.

    Adam-type optimizers divide a gradient by its own running size, so they undo a constant s and see only its changes;
    with them use `rescale_` instead. With SGD this is the method of the paper.

    Args:
        As, Bs, grads_A, grads_B, inverse_steps: As in `precondition_`.
        norms: ‖A‖_F and ‖B‖_F of every pair, where the matrices are this process's rows only. Default: computed here.
    """
    norms_A, norms_B = norms or (factor_norms(As), factor_norms(Bs))
    for grad_A, grad_B, s in zip(grads_A, grads_B, balance_scalars(norms_A, norms_B, inverse_steps), strict=True):
        for grad, multiplier in ((grad_A, s.reciprocal()), (grad_B, s)):
            if grad is not None:
                _write_(grad, grad.to(multiplier.dtype) * multiplier)


@torch.no_grad()
def rescale_(
    As: Sequence[Tensor],
    Bs: Sequence[Tensor],
    moments_A: Sequence[Sequence[tuple[Tensor, int]]] | None = None,
    moments_B: Sequence[Sequence[tuple[Tensor, int]]] | None = None,
    *,
    inverse_steps: Sequence[float] | None = None,
    norms: tuple[Sequence[Tensor], Sequence[Tensor]] | None = None,
) -> None:
    """RefLoRA-S as a true refactoring (the authors' code): A ← √s A, B ← B / √s, in place.

    The product B A does not change. The factors become balanced, ‖A‖_F = ‖B‖_F, also in what is saved. The optimizer's
    moments follow the gradients of the new factors, ∇A / √s and √s ∇B: a moment of degree k is divided by √sᵏ for A
    and multiplied by it for B (k = 1: `exp_avg`, momentum; k = 2: `exp_avg_sq`).

    It differs from `precondition_scalar_`, which leaves the factors alone, wherever the optimizer is not plain SGD.
    Adam takes steps of one size for every entry, so the sizes of the factors decide how far ΔW moves; weight decay,
    too, acts on the balanced factors.

    Args:
        As, Bs: The factors, overwritten.
        moments_A, moments_B: For each factor its moments as (tensor, degree), overwritten.
        inverse_steps: As in `precondition_`.
        norms: As in `precondition_scalar_`.
    """
    norms_A, norms_B = norms or (factor_norms(As), factor_norms(Bs))
    for i, s in enumerate(balance_scalars(norms_A, norms_B, inverse_steps)):
        root = s.sqrt()
        # B A = (B / √s) (√s A), and ∇(√s A) = ∇A / √s.
        _write_(As[i], As[i].to(root.dtype) * root)
        _write_(Bs[i], Bs[i].to(root.dtype) / root)
        for moment, degree in moments_A[i] if moments_A is not None else ():
            _write_(moment, moment.to(root.dtype) / root**degree)
        for moment, degree in moments_B[i] if moments_B is not None else ():
            _write_(moment, moment.to(root.dtype) * root**degree)


def _multiply_(grads: Sequence[Tensor | None], S: Tensor, *, left: bool) -> None:
    """grads[i] ← S[i] grads[i] (left) or grads[i] S[i], in place; gradients of one shape in one batch."""
    present = {i: grad for i, grad in enumerate(grads) if grad is not None}
    where = list(present)
    for group in group_indices([(grad.shape, grad.dtype, grad.device) for grad in present.values()]):
        indices = [where[i] for i in group]
        stack = torch.stack([present[i] for i in indices]).to(S.dtype)
        # Indexing with a list would copy the indices to the device and wait for it; stacking views does not.
        T = S if len(indices) == len(S) else torch.stack([S[i] for i in indices])
        product = T @ stack if left else stack @ T
        for i, value in zip(indices, product.unbind(0), strict=True):
            _write_(present[i], value)


def _write_(target: Tensor, value: Tensor) -> None:
    """target ← value, cast once to the target's dtype. What is finite stays finite.

    Only float16 is too small for that: its largest number, 65504, takes the place of a larger one. As inf it would
    make the factors NaN for good.
    """
    if target.dtype == torch.float16:
        limit = torch.finfo(target.dtype).max
        value = torch.where(value.isfinite(), value.clamp(-limit, limit), value)
    target.copy_(value)
