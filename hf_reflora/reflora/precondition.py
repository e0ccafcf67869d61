"""What RefLoRA does with S: it preconditions gradients, or it rescales the factors and the optimizer's moments.

All functions take lists of plain tensors and write into them in place.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .products import multiply_, scale_
from .refactor import balance_batches, factor_norms, ieee_arithmetic, refactorings


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
            multiply_([grads_A[i] for i in indices], R.S_inv, left=True)
            multiply_([grads_B[i] for i in indices], R.S, left=False)


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
    for indices, s in balance_batches(norms_A, norms_B, inverse_steps):
        grads = [*(grads_A[i] for i in indices), *(grads_B[i] for i in indices)]
        multipliers = (*s.reciprocal().unbind(0), *s.unbind(0))
        present = [(grad, number) for grad, number in zip(grads, multipliers, strict=True) if grad is not None]
        scale_([grad for grad, _ in present], [number for _, number in present])


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
        moments_A, moments_B: For each factor its moments as (tensor, degree), overwritten; the degree is 1 or 2.
        inverse_steps: As in `precondition_`.
        norms: As in `precondition_scalar_`.
    """
    norms_A, norms_B = norms or (factor_norms(As), factor_norms(Bs))
    for indices, s in balance_batches(norms_A, norms_B, inverse_steps):
        # B A = (B / √s) (√s A), and ∇(√s A) = ∇A / √s.
        root = s.sqrt()
        grow, shrink = root.unbind(0), root.reciprocal().unbind(0)
        by_degree = {1: (shrink, grow), 2: (s.reciprocal().unbind(0), s.unbind(0))}
        tensors, multipliers = [As[i] for i in indices] + [Bs[i] for i in indices], [*grow, *shrink]
        for side, moments in enumerate((moments_A or (), moments_B or ())):
            for place, i in enumerate(indices if moments else ()):
                for moment, degree in moments[i]:
                    tensors.append(moment)
                    multipliers.append(by_degree[degree][side][place])
        scale_(tensors, multipliers)
