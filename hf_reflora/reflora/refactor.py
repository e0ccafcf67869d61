"""RefLoRA's mathematics on tensors: the optimal refactoring S of LoRA factors, and the two ways to use it.

LoRA writes an update of rank r as ΔW = γ B A with A (r, in), B (out, r) and PEFT's scaling γ. Every pair
(Tᵀ A, B T⁻ᵀ) gives the same ΔW, but not the same next step. RefLoRA (https://huggingface.co/papers/2505.18877)
takes the pair whose next step has the smallest upper bound on the loss. The bound depends on T only through
S = T Tᵀ, and its minimum is, with P = A Aᵀ and Q = Bᵀ B,

    RefLoRA (Theorem 3):    S = P⁻¹ # Q,  the matrix geometric mean of P⁻¹ and Q
    RefLoRA-S (Theorem 5):  S = s I,  s = ‖B‖_F / ‖A‖_F

Refactoring, taking a step and refactoring back is the same as preconditioning the gradients:

    ∇A ← S⁻¹ ∇A,    ∇B ← ∇B S

The geometric mean is computed from Cholesky factors, P = L_A L_Aᵀ and Q = L_B L_Bᵀ, and from the polar factor W of
X = L_Bᵀ L_A = W H:

    S = L_B W L_A⁻¹,    S⁻¹ = L_A Wᵀ L_B⁻¹

In this form no Gram matrix is squared again, which would square its condition number, and S S⁻¹ = I holds by
construction. Only r x r matrices are involved, so all pairs of one rank form one batch, whatever their in and out
sizes.

There is one rule for dtypes: Gram matrices and S are at least float32 (`compute_dtype`) and are computed in IEEE
arithmetic (no TF32). A result is cast once, at the end, to the dtype of the tensor that it is written to.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from .polar import Quintic, polar_coefficients, polar_factor
from .products import gram_stack, group_indices


@dataclass(frozen=True)
class Refactoring:
    """The refactoring of n pairs of rank r.

    `fallback` marks the pairs whose S is only a multiple of the identity, because their Gram matrices vanish, are not
    finite or have no Cholesky factor.
    """

    S: Tensor  # (n, r, r)
    S_inv: Tensor  # (n, r, r)
    fallback: Tensor  # (n,) bool


def compute_dtype(*tensors: Tensor, minimum: torch.dtype = torch.float32) -> torch.dtype:
    """The dtype to compute in: the widest of `tensors`, and at least `minimum`."""
    return functools.reduce(torch.promote_types, {tensor.dtype for tensor in tensors}, minimum)


def default_eps(r: int, dtype: torch.dtype) -> float:
    """The smallest shrinkage ε whose Cholesky factors are safe: max(1e-5, 4 r 2⁻²⁴) in float32, 1e-12 in float64."""
    return 1e-12 if dtype == torch.float64 else max(1e-5, 4 * r * 2**-24)


def refactoring(
    P: Tensor,  # (n, r, r), A Aᵀ
    Q: Tensor,  # (n, r, r), Bᵀ B
    *,
    eps: float,
    coefficients: tuple[Quintic, ...],
    inverse_step: Tensor | None = None,  # (n,), 1 / (L η)
) -> Refactoring:
    """S of Theorem 3, the matrix geometric mean, with shrinkage ε, for a batch of pairs.

    With s = ‖B‖_F / ‖A‖_F and the shrunk Gram matrices P̂ = (1 - ε) r P / tr P + ε I (and Q̂ likewise),
    S = s (P̂⁻¹ # Q̂). ε = 0 is Theorem 3 and ε = 1 is RefLoRA-S (Theorem 5). For every ε the result is invariant to the
    scale of the factors.

    Args:
        eps: Shrinkage ε in (0, 1], see `default_eps`.
        coefficients: `polar_coefficients(eps / r, error)`.
        inverse_step: 1 / (L η) of each pair, for the small-step branch of Theorems 3 and 5: where
            η < 1 / (2 L ‖B A‖_*), S is multiplied by c = [1/(Lη) + √(1/(Lη)² - 4 ‖B A‖_*²)] / (2 ‖B A‖_*). (The other
            root is 1 / c, which meets the same bound.) 0, or the default: c = 1, the branch for ordinary learning
            rates.
    """
    r = P.shape[-1]
    eye = torch.eye(r, dtype=P.dtype, device=P.device)
    grams = torch.stack([P, Q])  # (2, n, r, r): one operation for both, here and below
    traces = grams.diagonal(dim1=-2, dim2=-1).sum(-1)
    # An entry of a Gram matrix is at most its trace, so a finite trace stands for finite entries.
    usable = (traces.isfinite() & (traces > 0)).all(0)
    # Ĝ = (1 - ε) r G / tr G + ε I. A pair that is not usable may become NaN here: it is replaced at the end.
    shrunk = torch.add(eps * eye, grams.div_(traces[..., None, None]), alpha=(1 - eps) * r)
    # cholesky_ex reports a failure in a tensor; cholesky would raise, and for that wait for the device.
    L, info = torch.linalg.cholesky_ex(shrunk)  # L_A, L_B
    X = L[1].mT @ L[0]
    W = polar_factor(X / torch.linalg.matrix_norm(X, keepdim=True), coefficients)
    # L_B W L_A⁻¹ and L_A Wᵀ L_B⁻¹
    both = torch.linalg.solve_triangular(L, torch.stack([L[1] @ W, L[0] @ W.mT]), upper=False, left=False)
    # The entries are below 1e6, or 1e13 in float64, so that their sum is finite if all of them are.
    sound = usable & ((info == 0) & both.sum((-2, -1)).isfinite()).all(0)

    norm_A, norm_B = traces.sqrt()
    nuclear = torch.where(sound, (W * X).sum((-2, -1)) / r, 1)  # ‖B A‖_* / (‖A‖_F ‖B‖_F) = tr(Wᵀ X) / r
    s = balance_scalar(norm_A, norm_B, nuclear=nuclear, inverse_step=inverse_step)
    scales = torch.stack([s, s.reciprocal()])[..., None, None]
    S, S_inv = torch.where(sound[:, None, None], both, eye).mul_(scales)
    return Refactoring(S=S, S_inv=S_inv, fallback=~sound)


def balance_scalar(
    norm_A: Tensor,  # (n,), ‖A‖_F
    norm_B: Tensor,  # (n,), ‖B‖_F
    *,
    nuclear: Tensor | float = 1.0,  # (n,), ‖B A‖_* / (‖A‖_F ‖B‖_F)
    inverse_step: Tensor | None = None,  # (n,), 1 / (L η)
) -> Tensor:  # (n,)
    """s of Theorem 5: ‖B‖_F / ‖A‖_F, and 1 where that is not a positive finite number with a finite inverse.

    With `inverse_step` = 1/(Lη) it is the small-step branch, [1/(Lη) + √(1/(Lη)² - 4 ‖A‖²‖B‖²)] / (2 ‖A‖²), where
    η < 1 / (2 L ‖A‖ ‖B‖). `nuclear` is 1 in Theorem 5; `refactoring` passes the ratio that gives Theorem 3's branch.
    There is no such branch where 1/(Lη) is 0, nor where s² of it is not finite in float32, in which Adam squares
    gradients that s has multiplied.
    """
    s = norm_B / norm_A
    if inverse_step is not None:
        N = norm_A * norm_B * nuclear
        gap = (inverse_step - 2 * N) * (inverse_step + 2 * N)  # 1/(Lη)² - 4 N², without the cancellation
        small = (inverse_step + gap.clamp(min=0).sqrt()) / (2 * norm_A.square() * nuclear)
        s = torch.where((gap > 0) & small.float().square().isfinite(), small, s)
    return torch.where((s > 0) & s.isfinite() & s.reciprocal().isfinite(), s, 1)


@torch.no_grad()
def refactor_pairs(
    As: Sequence[Tensor],  # n matrices (r, in_i)
    Bs: Sequence[Tensor],  # n matrices (out_i, r)
    *,
    eps: float | None = None,
    dtype: torch.dtype = torch.float32,
    inverse_step: Tensor | None = None,  # (n,), 1 / (L η)
    sum_over_shards: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor, Refactoring]:
    """P, Q and the refactoring of n pairs of one rank on one device.

    Args:
        eps, dtype: As in `precondition_`.
        sum_over_shards: Where `Bs` are this process's rows only: the function that adds up the processes' (n, r, r).
    """
    dtype = compute_dtype(*As, *Bs, minimum=dtype)
    r = As[0].shape[0]
    eps = default_eps(r, dtype) if eps is None else eps
    with ieee_arithmetic(As[0].device):
        P, Q = gram_stack(As, dtype), gram_stack(Bs, dtype, of_columns=True)
        Q = Q if sum_over_shards is None else sum_over_shards(Q)
        coefficients = polar_coefficients(eps / r, torch.finfo(dtype).eps / 4)
        return P, Q, refactoring(P, Q, eps=eps, coefficients=coefficients, inverse_step=inverse_step)


def refactorings(
    As: Sequence[Tensor],
    Bs: Sequence[Tensor],
    *,
    eps: float | None,
    dtype: torch.dtype,
    inverse_steps: Sequence[float] | None,
    sum_over_shards: Callable[..., Tensor] | None = None,  # (values, indices)
) -> Iterator[tuple[list[int], Refactoring]]:
    """The refactorings of pairs of any ranks and devices, batch by batch: (indices of the pairs, refactoring).

    `sum_over_shards(values, indices)` as in `precondition_`.
    """
    for indices in group_by_rank(As, Bs):
        inverse_step = None
        if inverse_steps is not None:
            first = As[indices[0]]
            steps = [inverse_steps[i] for i in indices]
            inverse_step = device_tensor(steps, compute_dtype(first, minimum=dtype), first.device)
        _, _, R = refactor_pairs(
            [As[i] for i in indices],
            [Bs[i] for i in indices],
            eps=eps,
            dtype=dtype,
            inverse_step=inverse_step,
            sum_over_shards=None if sum_over_shards is None else functools.partial(sum_over_shards, indices=indices),
        )
        yield indices, R


def device_tensor(values: Sequence[float], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of these numbers, made without waiting for the device."""
    tensor = torch.tensor(values, dtype=dtype, device="cpu")
    # From ordinary memory the copy would wait for all that the GPU has to do before it.
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def factor_norms(factors: Sequence[Tensor]) -> list[Tensor]:
    """‖M‖_F of every factor, at least float32 and on its device."""
    norms: list[Tensor | None] = [None] * len(factors)
    for indices in group_indices([(M.dtype, M.device) for M in factors]):
        group = [factors[i] for i in indices]
        for i, norm in zip(indices, torch._foreach_norm(group, dtype=compute_dtype(group[0])), strict=True):
            norms[i] = norm
    return norms


def balance_batches(
    norms_A: Sequence[Tensor],  # n numbers ‖A‖_F, each on its pair's device
    norms_B: Sequence[Tensor],  # n numbers ‖B‖_F
    inverse_steps: Sequence[float] | None,
) -> Iterator[tuple[list[int], Tensor]]:
    """s of Theorem 5 for pairs of any devices, in one batch for each device: (indices of the pairs, s)."""
    for indices in group_indices([norm.device for norm in norms_A]):
        norm_A, norm_B = (torch.stack([norms[i] for i in indices]) for norms in (norms_A, norms_B))
        steps = None
        if inverse_steps is not None:
            steps = device_tensor([inverse_steps[i] for i in indices], compute_dtype(norm_A, norm_B), norm_A.device)
        yield indices, balance_scalar(norm_A, norm_B, inverse_step=steps)


def balance_scalars(
    norms_A: Sequence[Tensor], norms_B: Sequence[Tensor], inverse_steps: Sequence[float] | None
) -> list[Tensor]:
    """s of Theorem 5 for every pair, in the order of the pairs; arguments as in `balance_batches`."""
    batches = balance_batches(norms_A, norms_B, inverse_steps)
    scalars = {i: s for indices, batch in batches for i, s in zip(indices, batch.unbind(0), strict=True)}
    return [scalars[i] for i in range(len(scalars))]


def group_by_rank(As: Sequence[Tensor], Bs: Sequence[Tensor]) -> list[list[int]]:
    """Indices of the pairs that form one batch: of one rank, on one device, of the same dtypes."""
    return group_indices([(A.shape[0], A.device, A.dtype, B.dtype) for A, B in zip(As, Bs, strict=True)])


@contextmanager
def ieee_arithmetic(device: torch.device) -> Iterator[None]:
    """Within it matrix products are IEEE arithmetic, whatever TF32 and autocast settings are in force outside."""
    backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
    before = [backend.fp32_precision for backend in backends]
    with ExitStack() as stack:
        stack.enter_context(torch.autocast(device.type, enabled=False))
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = "ieee"
            stack.callback(setattr, backend, "fp32_precision", precision)
        yield
