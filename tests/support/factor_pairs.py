"""LoRA pairs with given singular values, random pairs for hypothesis, and how far results are from each other."""

import math

import hypothesis.extra.numpy as arrays_of
import numpy as np
import reference as ref
import torch
from hypothesis import strategies as st

from hf_reflora.reflora.precondition import precondition_
from hf_reflora.reflora.refactor import refactor_pairs


F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64


SHAPES = ((4, 16, 12), (2, 7, 9), (4, 16, 20), (8, 30, 8), (1, 5, 3), (4, 9, 12), (2, 7, 9))  # (r, in, out)


def spectrum(rng, rows, columns, cond):
    """A rows x columns matrix whose singular values go geometrically from 1 to 1 / cond."""
    k = min(rows, columns)
    U, V = (np.linalg.qr(rng.normal(size=(n, k)))[0] for n in (rows, columns))
    return torch.tensor(U * np.geomspace(1, 1 / cond, k) @ V.T)


def make(shapes, *, cond=10.0, size_A=3.0, size_B=0.2, dtype=F64, seed=0):
    """As, Bs, grads_A, grads_B for pairs of these (r, in, out)."""
    rng = np.random.default_rng(seed)
    As = [size_A * spectrum(rng, r, n_in, cond) for r, n_in, _ in shapes]
    Bs = [size_B * spectrum(rng, n_out, r, cond) for r, _, n_out in shapes]
    return tuple(
        [M.to(dtype) for M in part]
        for part in (As, Bs, *([torch.tensor(rng.normal(size=M.shape)) for M in Ms] for Ms in (As, Bs)))
    )


def clones(tensors):
    return [None if t is None else t.clone() for t in tensors]


def preconditioned(As, Bs, grads_A, grads_B, *, method=precondition_, **options):
    """The gradients after `method`; the arguments stay as they are."""
    grads_A, grads_B = clones(grads_A), clones(grads_B)
    method(As, Bs, grads_A, grads_B, **options)
    return grads_A + grads_B


def S_of(A, B, **options):
    """The refactoring of one pair without its batch dimension: S, S⁻¹, fallback."""
    R = refactor_pairs([A], [B], **options)[2]
    return R.S[0], R.S_inv[0], R.fallback[0].item()


def numpy(tensor):
    """A float64 copy."""
    return tensor.detach().double().numpy().copy()


def relative(actual, expected):
    """Relative error in the spectral norm."""
    actual, expected = (numpy(M) if isinstance(M, torch.Tensor) else M for M in (actual, expected))
    return np.linalg.norm(actual - expected, 2) / np.linalg.norm(expected, 2)


def sensitivity(A, B, eps):
    """κ = 1/λ_min(P̂) + 1/λ_min(Q̂). S moves by κ/2 times a relative change of the Gram matrices (Thompson metric)."""
    return sum(1 / np.linalg.eigvalsh(ref.shrunk(G, eps))[0] for G in ref.grams(numpy(A), numpy(B)))


def identical(xs, ys):
    return all(torch.equal(x, y) for x, y in zip(xs, ys, strict=True))


# Any finite factors within 1e±15

ENTRIES = st.just(0.0) | st.builds(
    lambda sign, mantissa, exponent: float(np.float32(sign * mantissa * 10.0**exponent)),
    st.sampled_from([-1, 1]),
    st.floats(1, 9.5),
    st.integers(-15, 14),
)


@st.composite
def any_factors(draw):
    r, n_in, n_out = (draw(st.integers(1, n)) for n in (4, 5, 5))
    return tuple(
        torch.from_numpy(draw(arrays_of.arrays(np.float32, shape, elements=ENTRIES)))
        for shape in ((r, n_in), (n_out, r))
    )


EXTREMES = {  # (what to do to A, what to do to B): number = scale, or a word
    "A_0": ("zero", 1.0),
    "B_0": (1.0, "zero"),
    "both_0": ("zero", "zero"),
    "A_rank_1": ("rank_1", 1.0),
    "B_rank_1": (1.0, "rank_1"),
    "both_rank_1": ("rank_1", "rank_1"),
    "A_cond_1e8": ("cond_1e8", 1.0),
    "B_cond_1e8": (1.0, "cond_1e8"),
    "both_cond_1e8": ("cond_1e8", "cond_1e8"),
    "A_big": (1e15, 1.0),
    "B_big": (1.0, 1e15),
    "both_big": (1e15, 1e15),
    "A_small": (1e-15, 1.0),
    "B_small": (1.0, 1e-15),
    "both_small": (1e-15, 1e-15),
    "A_big_B_small": (1e15, 1e-15),
    "A_small_B_big": (1e-15, 1e15),
    "bf16": (BF16, BF16),
    "fp16": (F16, F16),
    "bf16_and_fp32": (BF16, 1.0),
    "bf16_big": (BF16, 1e15),
    "A_nan": (math.nan, 1.0),
    "B_nan": (1.0, math.nan),
    "A_inf": (math.inf, 1.0),
    "B_inf": (1.0, -math.inf),
    "both_inf": (math.inf, math.inf),
}


def extreme(rng, rows, columns, how):
    M = torch.tensor(rng.normal(size=(rows, columns)), dtype=F32)
    if how == "zero":
        return torch.zeros_like(M)
    if how == "rank_1":
        return M[:, :1] @ M[:1]
    if how == "cond_1e8":
        return rows * spectrum(rng, rows, columns, 1e8).float()
    if isinstance(how, torch.dtype):
        return M.to(how)
    if not math.isfinite(how):
        M[rows // 2, columns // 2] = how
        return M
    return M * how
