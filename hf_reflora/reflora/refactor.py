"""RefLoRA's mathematics on tensors: the optimal refactoring S of LoRA factors, and the two ways to use it.

LoRA writes an update of rank r as ΔW = γ B A with A (r, in), B (out, r) and PEFT's scaling γ. Every pair
(Tᵀ A, B T⁻ᵀ) gives the same ΔW, but not the same next step. RefLoRA (https://huggingface.co/papers/2505.18877)
takes the pair whose next step has the smallest upper bound on the loss; it depends on T through S = T Tᵀ alone:

    P = A Aᵀ,  Q = Bᵀ B,    RefLoRA (Theorem 3):   S = P⁻¹ # Q,  the matrix geometric mean
                            RefLoRA-S (Theorem 5): S = s I,  s = ‖B‖_F / ‖A‖_F

Refactoring, stepping and refactoring back is preconditioning the gradients:  ∇A ← S⁻¹ ∇A,  ∇B ← ∇B S.

S comes from Cholesky factors and a polar factor, P = L_A L_Aᵀ, Q = L_B L_Bᵀ, X = L_Bᵀ L_A = W H:

    S = L_B W L_A⁻¹,    S⁻¹ = L_A Wᵀ L_B⁻¹

so no Gram matrix is squared again, S S⁻¹ = I by construction, and only r x r matrices are involved: all pairs of one
rank form one batch whatever their in and out sizes. The polar factor takes a fixed number of matrix products
(composed minimax quintics, Polar Express, https://huggingface.co/papers/2505.16932), so nothing waits for the device.

One dtype rule: Gram matrices and S are at least float32 (`compute_dtype`), IEEE arithmetic (no TF32), and what is
written back is cast once, at the end, to the dtype of the tensor it is written to.
"""

import functools
import math
from collections import defaultdict
from collections.abc import Hashable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from ..distributed.parameters import full_tensor


Quintic = tuple[float, float, float]


@dataclass(frozen=True)
class Refactoring:
    """The refactoring of n pairs of rank r. `fallback` marks pairs where S is a multiple of the identity because
    their Gram matrices vanish, are not finite or have no Cholesky factor."""

    S: Tensor  # (n, r, r)
    S_inv: Tensor  # (n, r, r)
    fallback: Tensor  # (n,) bool


def compute_dtype(*tensors: Tensor, minimum: torch.dtype = torch.float32) -> torch.dtype:
    """The dtype to compute in: the widest of `tensors`, at least `minimum`."""
    return functools.reduce(torch.promote_types, (t.dtype for t in tensors), minimum)


def default_eps(r: int, dtype: torch.dtype) -> float:
    """The smallest shrinkage ε whose Cholesky factors are safe: max(1e-5, 4 r 2⁻²⁴) in float32, 1e-12 in float64."""
    return 1e-12 if dtype == torch.float64 else max(1e-5, 4 * r * 2**-24)


@functools.cache
def polar_coefficients(lower: float) -> tuple[Quintic, ...]:
    """Coefficients (a, b, c) of odd quintics a x + b x³ + c x⁵ whose composition maps [lower, 1] to 1.

    Each quintic is the minimax approximation of 1 on the interval that its predecessor leaves, found by Remez exchange
    in float64. The last two are Newton-Schulz steps, which cube what error is left.

    Args:
        lower: Smallest singular value to be mapped to 1, in (0, 1].
    """
    if not 0 < lower <= 1:
        raise ValueError(f"polar_coefficients needs 0 < lower <= 1, got {lower}.")
    low, high, steps = lower, 1.0, []
    while high - low > 2e-2:
        # Rounding can lift a singular value above `high`, where a quintic grows fast: fit with a margin.
        top = high * (1 + 2e-3)
        # The best quintic for a tiny `low` presses singular values near 1 down to `low` too and loses their digits:
        # fit above 1/40 of the interval, where it stays large, and see where that takes `low`.
        floor = max(low, 0.025 * top)
        (a, b, c), error = _minimax_quintic(floor, top)
        least = 1 - error if floor == low else a * low + b * low**3 + c * low**5
        scale = 2 / (least + 1 + error)
        low, high = scale * least, scale * (1 + error)
        steps.append((scale * a, scale * b, scale * c))
    return (*steps, (15 / 8, -10 / 8, 3 / 8), (15 / 8, -10 / 8, 3 / 8))


def _minimax_quintic(low: float, high: float) -> tuple[Quintic, float]:
    """The odd quintic closest to 1 on [low, high], and its largest error there."""
    signs = (1, -1, 1, -1)
    inner = [low + (high - low) * 0.25, low + (high - low) * 0.75]
    for _ in range(100):
        # p(x_i) = x_i (a + b t_i + c t_i²) = 1 - (±1) E, t = x², at four points. The third divided difference of the
        # bracket vanishes, which gives E; Newton's form through the last three points gives a, b, c.
        x = (low, *inner, high)
        t = [point * point for point in x]
        weights = [1 / (x[i] * math.prod(t[i] - t[j] for j in range(4) if j != i)) for i in range(4)]
        error = sum(weights) / sum(sign * weight for sign, weight in zip(signs, weights, strict=True))
        y = [(1 - sign * error) / point for sign, point in zip(signs, x, strict=True)]
        slope, next_slope = (y[2] - y[1]) / (t[2] - t[1]), (y[3] - y[2]) / (t[3] - t[2])
        c = (next_slope - slope) / (t[3] - t[1])
        b = slope - c * (t[1] + t[2])
        a = y[1] - t[1] * (b + c * t[1])
        # the error is extremal where p'(x) = a + 3 b x² + 5 c x⁴ = 0
        root = math.sqrt(max(9 * b * b - 20 * a * c, 0.0))
        previous, inner = inner, sorted(math.sqrt((-3 * b + sign * root) / (10 * c)) for sign in (-1, 1))
        if max(abs(p - q) for p, q in zip(previous, inner, strict=True)) < 1e-12 * high:
            break
    return (a, b, c), abs(error)


def polar_factor(
    X: Tensor,  # (n, r, r), singular values in [lower, 1]
    coefficients: tuple[Quintic, ...],
) -> Tensor:  # (n, r, r)
    """The orthogonal W of X = W H, H symmetric positive definite. `coefficients` are `polar_coefficients(lower)`."""
    for a, b, c in coefficients:
        Y = X.mT @ X
        X = a * X + X @ (b * Y + c * (Y @ Y))
    return X


def refactoring(
    P: Tensor,  # (n, r, r), A Aᵀ
    Q: Tensor,  # (n, r, r), Bᵀ B
    *,
    eps: float,
    coefficients: tuple[Quintic, ...],
    inverse_step: Tensor | None = None,  # (n,), 1 / (L η)
) -> Refactoring:
    """S of Theorem 3 with shrinkage ε, for a batch of pairs.

    With s = ‖B‖_F / ‖A‖_F and the shrunk Gram matrices P̂ = (1 - ε) r P / tr P + ε I (and Q̂ alike), S = s (P̂⁻¹ # Q̂):
    ε = 0 is Theorem 3, ε = 1 is RefLoRA-S (Theorem 5), and all between is invariant to the scale of the factors.

    Args:
        eps: Shrinkage ε in (0, 1], see `default_eps`.
        coefficients: `polar_coefficients(eps / r)`.
        inverse_step: 1 / (L η) of each pair, for the small-step branch of Theorems 3 and 5: where
            η < 1 / (2 L ‖B A‖_*), S is multiplied by c = [1/(Lη) + √(1/(Lη)² - 4 ‖B A‖_*²)] / (2 ‖B A‖_*). (The other
            root is 1 / c, which meets the same bound.) Default: c = 1, the branch for ordinary learning rates.
    """
    r = P.shape[-1]
    eye = torch.eye(r, dtype=P.dtype, device=P.device).expand_as(P)
    trace_P, trace_Q = (G.diagonal(dim1=-2, dim2=-1).sum(-1) for G in (P, Q))
    finite = (P.isfinite() & Q.isfinite()).all(-1).all(-1)
    usable = finite & (trace_P > 0) & (trace_Q > 0)

    def shrunk(G: Tensor, trace: Tensor) -> Tensor:  # Ĝ = (1 - ε) r G / tr G + ε I
        share = G / torch.where(usable, trace, 1)[:, None, None]
        return torch.where(usable[:, None, None], (1 - eps) * r * share + eps * eye, eye)

    L_A, info_A = torch.linalg.cholesky_ex(shrunk(P, trace_P))
    L_B, info_B = torch.linalg.cholesky_ex(shrunk(Q, trace_Q))
    X = L_B.mT @ L_A
    W = polar_factor(X / torch.linalg.matrix_norm(X, keepdim=True), coefficients)
    S = torch.linalg.solve_triangular(L_A, L_B @ W, upper=False, left=False)  # L_B W L_A⁻¹
    S_inv = torch.linalg.solve_triangular(L_B, L_A @ W.mT, upper=False, left=False)  # L_A Wᵀ L_B⁻¹
    sound = usable & (info_A == 0) & (info_B == 0) & (S.isfinite() & S_inv.isfinite()).all(-1).all(-1)
    S, S_inv = (torch.where(sound[:, None, None], M, eye) for M in (S, S_inv))

    norm_A, norm_B = trace_P.sqrt(), trace_Q.sqrt()
    nuclear = torch.where(sound, (W * X).sum((-2, -1)) / r, 1)  # ‖B A‖_* / (‖A‖_F ‖B‖_F) = tr(Wᵀ X) / r
    s = balance_scalar(norm_A, norm_B, nuclear=nuclear, inverse_step=inverse_step)[:, None, None]
    return Refactoring(S=s * S, S_inv=S_inv / s, fallback=~sound)


def balance_scalar(
    norm_A: Tensor,  # (n,), ‖A‖_F
    norm_B: Tensor,  # (n,), ‖B‖_F
    *,
    nuclear: Tensor | float = 1.0,  # (n,), ‖B A‖_* / (‖A‖_F ‖B‖_F)
    inverse_step: Tensor | None = None,  # (n,), 1 / (L η)
) -> Tensor:  # (n,)
    """s of Theorem 5: ‖B‖_F / ‖A‖_F, and 1 where that is not a positive finite number with a finite inverse.

    With `inverse_step` = 1/(Lη), the small-step branch: [1/(Lη) + √(1/(Lη)² - 4 ‖A‖²‖B‖²)] / (2 ‖A‖²) where
    η < 1 / (2 L ‖A‖ ‖B‖). `nuclear` is 1 there; `refactoring` passes what turns it into Theorem 3's branch.
    """
    s = norm_B / norm_A
    if inverse_step is not None:
        N = norm_A * norm_B * nuclear
        gap = (inverse_step - 2 * N) * (inverse_step + 2 * N)  # 1/(Lη)² - 4 N²
        small = (inverse_step + gap.clamp(min=0).sqrt()) / (2 * norm_A.square() * nuclear)
        s = torch.where(gap > 0, small, s)
    return torch.where((s > 0) & s.isfinite() & s.reciprocal().isfinite(), s, 1)


def gram_stack(
    factors: Sequence[Tensor],  # n matrices (r, k_i)
    dtype: torch.dtype,
) -> Tensor:  # (n, r, r)
    """M Mᵀ of every factor, in `dtype`; factors of one shape are multiplied together."""
    grams: list[Tensor] = [None] * len(factors)
    for indices in _alike(factors):
        stack = torch.stack([factors[i] for i in indices]).to(dtype)
        # Of shards the sum over the processes, an all-reduce of r × r.
        for i, gram in zip(indices, full_tensor(stack @ stack.mT).unbind(0), strict=True):
            grams[i] = gram
    return torch.stack(grams)


@torch.no_grad()
def refactor_pairs(
    As: Sequence[Tensor],  # n matrices (r, in_i)
    Bs: Sequence[Tensor],  # n matrices (out_i, r)
    *,
    eps: float | None = None,
    dtype: torch.dtype = torch.float32,
    inverse_step: Tensor | None = None,  # (n,), 1 / (L η)
) -> tuple[Tensor, Tensor, Refactoring]:
    """P, Q and the refactoring of n pairs of one rank on one device. `eps` and `dtype` as in `precondition_`."""
    dtype = compute_dtype(*As, *Bs, minimum=dtype)
    r = As[0].shape[0]
    eps = default_eps(r, dtype) if eps is None else eps
    with ieee_arithmetic(As[0].device):
        P, Q = gram_stack(As, dtype), gram_stack([B.mT for B in Bs], dtype)
        return P, Q, refactoring(P, Q, eps=eps, coefficients=polar_coefficients(eps / r), inverse_step=inverse_step)


def refactorings(
    As: Sequence[Tensor],
    Bs: Sequence[Tensor],
    *,
    eps: float | None,
    dtype: torch.dtype,
    inverse_steps: Sequence[float] | None,
) -> Iterator[tuple[list[int], Refactoring]]:
    """The refactorings of pairs of any ranks and devices, batch by batch: (indices, refactoring)."""
    for indices in _one_rank(As, Bs):
        inverse_step = None
        if inverse_steps is not None:
            first = As[indices[0]]
            inverse_step = torch.tensor(
                [inverse_steps[i] for i in indices], dtype=compute_dtype(first, minimum=dtype), device=first.device
            )
        _, _, R = refactor_pairs(
            [As[i] for i in indices], [Bs[i] for i in indices], eps=eps, dtype=dtype, inverse_step=inverse_step
        )
        yield indices, R


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
) -> None:
    """RefLoRA as preconditioning (Theorem 3): ∇A ← S⁻¹ ∇A and ∇B ← ∇B S, in place.

    Args:
        As: n matrices A (r_i, in_i) of any floating dtype. Ranks and devices may differ.
        Bs: n matrices B (out_i, r_i), or FSDP2's shards of them, DTensors of rows.
        grads_A: n gradients of A's shape, overwritten; None is left out.
        grads_B: n gradients of B's shape, overwritten; None is left out. Of a sharded B this process's rows.
        eps: Shrinkage ε in (0, 1]; 1 is RefLoRA-S. Default: `default_eps`, the smallest that is safe.
        dtype: Least dtype of the Gram matrices, float32 or float64. float64 (with ε = 1e-12) keeps Theorem 6, the
            invariance of the SGD step, for factors of condition number up to about 1e4.
        inverse_steps: n numbers 1 / (L η) for the small-step branch, see `refactoring`. Default: no such branch.

    A pair of B = 0 (LoRA's start) keeps its gradients, with `inverse_steps` up to a factor. Non-finite gradients stay
    non-finite, so a GradScaler's check is not weakened; S itself is always finite.
    """
    for indices, R in refactorings(As, Bs, eps=eps, dtype=dtype, inverse_steps=inverse_steps):
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
) -> None:
    """RefLoRA-S as preconditioning (Theorem 5): ∇A ← ∇A / s and ∇B ← s ∇B, in place. Arguments as `precondition_`.

    Adam-type optimizers divide a gradient by its own running size, so they undo a constant s and see only its changes;
    with them use `rescale_` instead. With SGD this is the method of the paper.
    """
    for grad_A, grad_B, s in zip(grads_A, grads_B, balance_scalars(As, Bs, inverse_steps), strict=True):
        for grad, factor in ((grad_A, s.reciprocal()), (grad_B, s)):
            if grad is not None:
                grad.copy_(grad.to(factor.dtype) * factor)


@torch.no_grad()
def rescale_(
    As: Sequence[Tensor],
    Bs: Sequence[Tensor],
    moments_A: Sequence[Sequence[tuple[Tensor, int]]] | None = None,
    moments_B: Sequence[Sequence[tuple[Tensor, int]]] | None = None,
    *,
    inverse_steps: Sequence[float] | None = None,
) -> None:
    """RefLoRA-S as a true refactoring (the authors' code): A ← √s A, B ← B / √s, in place.

    The product B A does not change; the factors are balanced, ‖A‖_F = ‖B‖_F, and stay so in what is saved. The
    optimizer's moments follow the gradients of the new factors, ∇A / √s and √s ∇B: a moment of degree k is divided by
    √sᵏ for A and multiplied by it for B (k = 1: `exp_avg`, momentum; k = 2: `exp_avg_sq`).

    It differs from `precondition_scalar_`, which leaves the factors alone, wherever the optimizer is not plain SGD:
    Adam takes steps of one size per entry, so there the sizes of the factors themselves decide how far ΔW moves;
    weight decay, too, acts on the balanced factors.

    Args:
        As, Bs: The factors, overwritten.
        moments_A, moments_B: For each factor its moments as (tensor, degree), overwritten.
        inverse_steps: As in `precondition_`.
    """
    scalars = balance_scalars(As, Bs, inverse_steps)
    for i, (A, B, s) in enumerate(zip(As, Bs, scalars, strict=True)):
        root = s.sqrt()
        A.copy_(A.to(root.dtype) * root)
        B.copy_(B.to(root.dtype) / root)
        for moment, degree in moments_A[i] if moments_A is not None else ():
            moment.copy_(moment.to(root.dtype) / root**degree)
        for moment, degree in moments_B[i] if moments_B is not None else ():
            moment.copy_(moment.to(root.dtype) * root**degree)


def balance_scalars(As: Sequence[Tensor], Bs: Sequence[Tensor], inverse_steps: Sequence[float] | None) -> list[Tensor]:
    """s of every pair, at least float32 and on its pair's device."""
    scalars: list[Tensor] = [None] * len(As)
    for indices in _grouped([A.device for A in As]):
        dtype = compute_dtype(*(M[i] for M in (As, Bs) for i in indices))
        norm_A, norm_B = (
            torch.stack([full_tensor(torch.linalg.vector_norm(M[i], dtype=dtype)) for i in indices]) for M in (As, Bs)
        )
        steps = None if inverse_steps is None else norm_A.new_tensor([inverse_steps[i] for i in indices])
        for i, s in zip(indices, balance_scalar(norm_A, norm_B, inverse_step=steps).unbind(0), strict=True):
            scalars[i] = s
    return scalars


@torch.no_grad()
def diagnose(
    As: Sequence[Tensor], Bs: Sequence[Tensor], *, eps: float | None, dtype: torch.dtype
) -> dict[str, Tensor]:
    """What the factors look like before a refactoring: one value a pair and key, each of shape (n,).

    balance_gap ‖P - Q‖_F / ‖Q‖_F, how far the factors are from balance (S = I); balance_residual
    ‖S P S - Q‖_F / ‖Q‖_F, how far S leaves them from it (shrinkage and fallback show here); cond_P and cond_Q,
    condition numbers λ_max / λ_min; norm_A and norm_B, Frobenius norms; fallback, 1 where S is a multiple of I.
    A value that does not exist (a division by 0) is NaN or inf.
    """
    batches = _one_rank(As, Bs)
    parts: dict[str, list[Tensor]] = defaultdict(list)
    for indices in batches:
        P, Q, R = refactor_pairs([As[i] for i in indices], [Bs[i] for i in indices], eps=eps, dtype=dtype)
        P, Q, S = (M.cpu().double() for M in (P, Q, R.S))  # squares of float32 Gram matrices overflow
        size = torch.linalg.matrix_norm(Q)
        parts["balance_gap"].append(torch.linalg.matrix_norm(P - Q) / size)
        with ieee_arithmetic(P.device):
            parts["balance_residual"].append(torch.linalg.matrix_norm(S @ P @ S - Q) / size)
        for name, G in (("cond_P", P), ("cond_Q", Q)):
            usable = G.isfinite().all(-1).all(-1)
            spectrum = torch.linalg.eigvalsh(torch.where(usable[:, None, None], G, 0))
            parts[name].append(spectrum[:, -1] / spectrum[:, 0].clamp(min=0))
        for name, G in (("norm_A", P), ("norm_B", Q)):
            parts[name].append(G.diagonal(dim1=-2, dim2=-1).sum(-1).sqrt())
        parts["fallback"].append(R.fallback.cpu().double())
    order = torch.tensor([i for indices in batches for i in indices]).argsort()
    return {name: torch.cat(values)[order] for name, values in parts.items()}


def _multiply_(grads: Sequence[Tensor | None], S: Tensor, *, left: bool) -> None:
    """grads[i] ← S[i] grads[i] (left) or grads[i] S[i], in place; gradients of one shape together."""
    present = [i for i, grad in enumerate(grads) if grad is not None]
    for group in _alike([grads[i] for i in present]):
        indices = [present[i] for i in group]
        stack = torch.stack([grads[i] for i in indices]).to(S.dtype)
        T = S if len(indices) == len(S) else torch.stack([S[i] for i in indices])
        product = T @ stack if left else stack @ T
        for i, value in zip(indices, product.unbind(0), strict=True):
            grads[i].copy_(value)


def _alike(tensors: Sequence[Tensor]) -> list[list[int]]:
    """Indices of the tensors that can be stacked, group by group."""
    return _grouped([(t.shape, t.dtype, t.device) for t in tensors])


def _one_rank(As: Sequence[Tensor], Bs: Sequence[Tensor]) -> list[list[int]]:
    """Indices of the pairs of one rank, device and dtype to compute in, group by group: one batch each."""
    return _grouped([(A.shape[0], A.device, compute_dtype(A, B)) for A, B in zip(As, Bs, strict=True)])


def _grouped(keys: Sequence[Hashable]) -> list[list[int]]:
    groups: dict[Hashable, list[int]] = defaultdict(list)
    for i, key in enumerate(keys):
        groups[key].append(i)
    return list(groups.values())


@contextmanager
def ieee_arithmetic(device: torch.device):
    """IEEE matrix products, whatever TF32, reduced-precision and autocast settings are in force outside."""
    backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
    before = [backend.fp32_precision for backend in backends]
    with ExitStack() as stack:
        stack.enter_context(torch.autocast(device.type, enabled=False))
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = "ieee"
            stack.callback(setattr, backend, "fp32_precision", precision)
        yield
