"""`refactor` against a float64 reference, the paper's theorems and the inputs that break an eigh-based S."""

import itertools
import math

import hypothesis.extra.numpy as arrays_of
import numpy as np
import pytest
import reference as ref
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from hf_reflora.reflora.diagnose import diagnose
from hf_reflora.reflora.polar import polar_coefficients, polar_factor
from hf_reflora.reflora.precondition import precondition_, precondition_scalar_, rescale_
from hf_reflora.reflora.refactor import balance_scalar, default_eps, gram_stack, refactor_pairs, refactoring


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


# The reference itself


@pytest.mark.parametrize("r", [1, 3, 8])
def test_reference_solves_the_papers_problem(r):
    """Theorem 3 = Lemma 7, S P S = Q, and tr(PS) + tr(QS⁻¹) = 2 ‖BA‖_* is its least value over S."""
    rng = np.random.default_rng(r)
    A, B = rng.normal(size=(r, 12)), rng.normal(size=(10, r))
    P, Q = ref.grams(A, B)
    S = ref.geometric_mean(P, Q)

    def bound(S):
        return np.trace(P @ S) + np.trace(np.linalg.solve(S, Q))

    assert relative(ref.geometric_mean_of_lemma_7(P, Q), S) < 1e-11
    assert relative(S @ P @ S, Q) < 1e-11
    assert bound(S) == pytest.approx(2 * ref.nuclear_norm(A, B), rel=1e-11)
    for _ in range(5):
        root = ref.power(S, 0.5)
        change = rng.normal(size=(r, r)) * 0.1
        assert bound(root @ ref.power(np.eye(r) + change @ change.T, rng.choice([-1.0, 1.0])) @ root) > bound(S)


# Against the reference


@pytest.mark.parametrize("eps", [None, 1e-6, 1e-2, 0.5, 1.0])
@pytest.mark.parametrize("without", [(), (0, 2, 3)], ids=["all", "some_None"])
def test_precondition_matches_reference_in_float64(eps, without):
    """Mixed shapes and ranks in one call; gradients that are None on either side, or on both, are left out."""
    As, Bs, grads_A, grads_B = make(SHAPES)
    for i in without:
        grads_A[i] = None
        grads_B[-1 - i] = None  # pair 3 loses both
    results = preconditioned(As, Bs, grads_A, grads_B, eps=eps)
    for i, (A, B, grad_A, grad_B) in enumerate(zip(As, Bs, grads_A, grads_B, strict=True)):
        S = ref.refactoring(numpy(A), numpy(B), default_eps(len(A), F64) if eps is None else eps)
        pair = (torch.zeros(A.shape) if grad_A is None else grad_A, torch.zeros(B.shape) if grad_B is None else grad_B)
        expected = ref.preconditioned(S, *map(numpy, pair))
        for grad, result, value in zip((grad_A, grad_B), (results[i], results[len(As) + i]), expected, strict=True):
            if grad is None:
                assert result is None
            else:
                np.testing.assert_allclose(numpy(result), value, rtol=1e-9, atol=1e-10 * np.abs(value).max())


@pytest.mark.parametrize("cond", [1.0, 30.0, 1e3, 1e6])
@pytest.mark.parametrize("r", [1, 2, 4, 8, 32])
@pytest.mark.parametrize("dtype", [F32, F64])
def test_S_is_as_accurate_as_its_condition_allows(dtype, r, cond):
    """‖S - S_ref‖ <= 4 r u κ ‖S_ref‖, also for S⁻¹; the float64 reference squares κ and adds its own error."""
    unit = torch.finfo(dtype).eps / 2
    for eps, seed in itertools.product((None, 1e-2), range(3)):
        (A,), (B,), _, _ = make([(r, 64, 48)], cond=cond, dtype=dtype, seed=seed)
        shrink = default_eps(r, dtype) if eps is None else eps
        kappa = sensitivity(A, B, shrink)
        bound = 4 * r * (unit * kappa + 2**-53 * kappa**2)
        S, S_inv, fallback = S_of(A, B, eps=eps)
        assert not fallback
        if bound < 0.1:  # else the reference is no reference
            expected = ref.refactoring(numpy(A), numpy(B), shrink)
            assert relative(S, expected) < bound
            assert relative(S_inv, np.linalg.inv(expected)) < bound


def test_precondition_scalar_matches_reference():
    As, Bs, grads_A, grads_B = make(SHAPES)
    grads_A[1] = grads_B[2] = None
    results = preconditioned(As, Bs, grads_A, grads_B, method=precondition_scalar_)
    assert results[1] is results[len(As) + 2] is None
    scalars = [ref.scalar(numpy(A), numpy(B)) for A, B in zip(As, Bs, strict=True)]
    factors = [1 / s for s in scalars] + scalars
    for grad, result, factor in zip(grads_A + grads_B, results, factors, strict=True):
        if grad is not None:
            torch.testing.assert_close(result, grad * factor, rtol=1e-13, atol=0)


def test_gram_stack_keeps_the_order_of_mixed_shapes():
    factors = [A.to(d) for A, d in zip(make([(3, k, 3) for k in (5, 8, 5, 1, 8)])[0], (F64, F32) * 3, strict=False)]
    grams = gram_stack(factors, F64)
    assert grams.shape == (5, 3, 3)
    assert grams.dtype == F64
    for gram, A in zip(grams, factors, strict=True):
        torch.testing.assert_close(gram, A.double() @ A.double().mT, rtol=1e-12, atol=1e-12)


# Dtypes and in-place writing


@pytest.mark.parametrize("grad_dtype", [BF16, F16, F32, F64])
@pytest.mark.parametrize("dtype", [BF16, F16, F32, F64])
@pytest.mark.parametrize("method", [precondition_, precondition_scalar_])
def test_gradients_are_written_in_place_and_cast_once(method, dtype, grad_dtype):
    """Same storage, same dtype, and the bits of the float32 (float64) result cast once."""
    As, Bs, _, _ = make(SHAPES, dtype=dtype)
    _, _, grads_A, grads_B = make(SHAPES, dtype=grad_dtype)
    wide = torch.promote_types(dtype, F32)
    exact = preconditioned(*([t.to(wide) for t in ts] for ts in (As, Bs, grads_A, grads_B)), method=method)
    before = [(g.data_ptr(), g.dtype, g._version) for g in grads_A + grads_B]
    method(As, Bs, grads_A, grads_B)
    assert [(g.data_ptr(), g.dtype) for g in grads_A + grads_B] == [b[:2] for b in before]
    assert all(g._version > b[2] for g, b in zip(grads_A + grads_B, before, strict=True))
    assert identical(grads_A + grads_B, [t.to(grad_dtype) for t in exact])


@pytest.mark.parametrize("dtype", [BF16, F16, F32, F64])
def test_rescale_is_written_in_place_and_cast_once(dtype):
    As, Bs, moments_A, moments_B = make(SHAPES, dtype=dtype)
    wide = torch.promote_types(dtype, F32)
    exact = [[t.to(wide) for t in ts] for ts in (As, Bs, moments_A, moments_B)]
    rescale_(*exact[:2], *([[(m, 1)] for m in ms] for ms in exact[2:]))
    before = [(t.data_ptr(), t.dtype) for ts in (As, Bs, moments_A, moments_B) for t in ts]
    rescale_(As, Bs, *([[(m, 1)] for m in ms] for ms in (moments_A, moments_B)))
    after = [t for ts in (As, Bs, moments_A, moments_B) for t in ts]
    assert [(t.data_ptr(), t.dtype) for t in after] == before
    assert identical(after, [t.to(dtype) for ts in exact for t in ts])


@pytest.mark.parametrize("method", [precondition_, precondition_scalar_])
def test_strided_gradients_touch_nothing_around_them(method):
    As, Bs, grads_A, grads_B = make([(4, 10, 6)] * 2, dtype=F32)
    expected = preconditioned(As, Bs, grads_A, grads_B, method=method)
    frames = [torch.full((g.shape[1] + 2, 2 * g.shape[0]), 7.0) for g in grads_A + grads_B]
    views = [frame[1:-1, ::2].mT for frame in frames]
    for view, grad in zip(views, grads_A + grads_B, strict=True):
        view.copy_(grad)
    method(As, Bs, views[:2], views[2:])
    for frame, view, value in zip(frames, views, expected, strict=True):
        torch.testing.assert_close(view, value, rtol=1e-5, atol=1e-6)
        view.fill_(7.0)
        assert (frame == 7).all()


@pytest.mark.parametrize("wide", ["option", "A", "B"])
def test_float64_by_option_or_by_one_factor_is_float64_to_the_end(wide):
    """float32 gradients and condition 100: exact to the final cast, where float32 Gram matrices are not."""
    As, Bs, grads_A, grads_B = make([(4, 20, 15)], cond=100.0, dtype=F32)
    S = ref.refactoring(numpy(As[0]), numpy(Bs[0]), 1e-12)
    expected = ref.preconditioned(S, numpy(grads_A[0]), numpy(grads_B[0]))
    plain = preconditioned(As, Bs, grads_A, grads_B)
    if wide != "option":
        (As if wide == "A" else Bs)[0] = (As if wide == "A" else Bs)[0].double()
    results = preconditioned(As, Bs, grads_A, grads_B, dtype=F64 if wide == "option" else F32)
    for result, coarse, value in zip(results, plain, expected, strict=True):
        assert result.dtype == F32
        assert relative(result, value) < 1e-7 < relative(coarse, value)


# Reductions to what is known


@pytest.mark.parametrize(("dtype", "tolerance"), [(F32, 3e-5), (F64, 1e-9)])
def test_balanced_factors_keep_their_gradients_and_adamw_its_step(dtype, tolerance):
    """A Aᵀ = Bᵀ B: S = I."""
    (A,), _, (grad_A,), (grad_B,) = make([(6, 20, 14)], dtype=F64)
    _, values, V = torch.linalg.svd(A, full_matrices=False)
    A = (values[:, None] * V).to(dtype)
    left = torch.linalg.qr(torch.tensor(np.random.default_rng(1).normal(size=(14, 6))))[0]
    B = (left * values).to(dtype)
    grads = [grad_A.to(dtype), grad_B.to(dtype)]
    results = preconditioned([A], [B], grads[:1], grads[1:])
    for result, grad in zip(results, grads, strict=True):
        assert relative(result, grad) < tolerance

    def adamw(grads):
        params = [torch.nn.Parameter(M.clone()) for M in (A, B)]
        for p, grad in zip(params, grads, strict=True):
            p.grad = grad
        torch.optim.AdamW(params, lr=0.1, eps=1e-2).step()
        return params

    for stepped, plain, start in zip(adamw(results), adamw(grads), (A, B), strict=True):
        assert (stepped - plain).norm() < tolerance * (plain - start).norm()


@pytest.mark.parametrize("inverse_step", [None, 30.0, 1e-3])
@pytest.mark.parametrize(("dtype", "tolerance"), [(F32, 1e-6), (F64, 1e-14)])
@pytest.mark.parametrize(("r", "eps"), [(1, None), (1, 0.3), (2, 1.0), (8, 1.0), (64, 1.0)])
def test_rank_1_and_eps_1_are_reflora_s(r, eps, dtype, tolerance, inverse_step):
    parts = make([(r, 64, 48), (r, 30, 48)], dtype=dtype)
    steps = None if inverse_step is None else [inverse_step] * 2
    expected = preconditioned(*parts, method=precondition_scalar_, inverse_steps=steps)
    for result, value in zip(preconditioned(*parts, eps=eps, inverse_steps=steps), expected, strict=True):
        torch.testing.assert_close(result, value, rtol=tolerance, atol=tolerance * value.abs().max())


# Properties of S


@pytest.mark.parametrize("cond", [1.0, 10.0, 100.0, 1e4])
@pytest.mark.parametrize("r", [1, 2, 5, 16, 64])
def test_S_balances_is_symmetric_positive_definite_and_has_its_inverse(r, cond):
    (A,), (B,), _, _ = make([(r, 80, 70)], cond=cond)
    S, S_inv, _ = S_of(A, B)
    (P, Q), s = ref.grams(numpy(A), numpy(B)), ref.scalar(numpy(A), numpy(B))
    bound = 20 * r * 2**-53 * sensitivity(A, B, 1e-12)
    assert relative(numpy(S / s) @ ref.shrunk(P, 1e-12) @ numpy(S / s), ref.shrunk(Q, 1e-12)) < bound
    assert relative(S, S.mT) < bound
    assert relative(S @ S_inv, torch.eye(r, dtype=F64)) < bound
    if cond < 1e3:
        assert relative(numpy(S) @ P @ numpy(S), Q) < 1e-7  # what shrinkage leaves
    assert torch.linalg.eigvalsh((S + S.mT) / 2)[0] > 0


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("r", [2, 8])
def test_S_follows_scale_and_rotation(r, dtype):
    """(αA, βB) gives (β/α) S, exactly for powers of 2, and (UA, BUᵀ) gives U S Uᵀ for orthogonal U; at any ε."""
    (A,), (B,), _, _ = make([(r, 20, 15)], cond=5.0, dtype=dtype)
    U = spectrum(np.random.default_rng(3), r, r, 1.0).to(dtype)
    for eps in (None, 0.05, 1.0):
        S, S_inv, _ = S_of(A, B, eps=eps)
        for alpha, beta in ((2.0**40, 1.0), (1.0, 2.0**-40), (2.0**-30, 2.0**35)):
            S_scaled, S_inv_scaled, _ = S_of(alpha * A, beta * B, eps=eps)
            torch.testing.assert_close(S_scaled, beta / alpha * S, rtol=1e-6, atol=0)
            torch.testing.assert_close(S_inv_scaled, alpha / beta * S_inv, rtol=1e-6, atol=0)
        tolerance = 1e3 * torch.finfo(dtype).eps
        assert relative(S_of(U @ A, B @ U.mT, eps=eps)[0], U @ S @ U.mT) < tolerance


# Theorem 6


def theorem_6_error(cond, method, seed):
    """Relative difference of the SGD steps of B A from (A, B) and from (T A, B T⁻¹), and κ of the second pair."""
    (A,), (B,), _, _ = make([(4, 12, 10)], cond=3.0, seed=seed)
    rng = np.random.default_rng(seed + 100)
    G, T = torch.tensor(rng.normal(size=(10, 12))), spectrum(rng, 4, 4, cond)
    steps = []
    for left, right in ((A, B), (T @ A, torch.linalg.solve(T, B, left=False))):
        grad_A, grad_B = right.mT @ G, G @ left.mT
        if method is not None:
            method([left], [right], [grad_A], [grad_B])
        steps.append((right - 0.03 * grad_B) @ (left - 0.03 * grad_A) - right @ left)
    return relative(steps[1], steps[0]), sensitivity(left, right, 1e-12)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("cond", [1.0, 10.0, 100.0, 1e3, 1e4])
def test_theorem_6_the_sgd_step_is_the_same_for_all_equivalent_factors(cond, seed):
    """To what shrinkage ε = 1e-12 moves: ε κ, about 1e-13 cond(T)², and below 1e-3 at 1e4."""

    def method(*parts):
        precondition_(*parts, dtype=F64, eps=1e-12)

    error, kappa = theorem_6_error(cond, method, seed)
    assert error < min(1e-12 * kappa + 1e-12, 1e-3)


@pytest.mark.parametrize("method", [None, precondition_scalar_], ids=["SGD", "RefLoRA-S"])
@pytest.mark.parametrize("cond", [10.0, 1e4])
def test_theorem_6_does_not_hold_without_S(cond, method):
    assert theorem_6_error(cond, method, seed=0)[0] > 0.5


# The small-step branch of Theorems 3 and 5


@pytest.mark.parametrize("ratio", [1e-3, 0.999, 1.001, 2.0, 100.0])
def test_small_step_branch_of_theorem_3(ratio):
    """Where τ = 1/(Lη) > 2 ‖BA‖_*, S and its mirror image (1/c) meet tr(PS) + tr(QS⁻¹) = τ; else c = 1."""
    (A,), (B,), (grad_A,), (grad_B,) = make([(5, 20, 15)], cond=5.0)
    P, Q = A @ A.mT, B.mT @ B
    tau = ratio * 2 * ref.nuclear_norm(numpy(A), numpy(B))
    plain, _, _ = S_of(A, B)
    S, S_inv, _ = S_of(A, B, inverse_step=torch.tensor([tau], dtype=F64))
    c = ref.small_step_factor(numpy(A), numpy(B), tau)
    assert (c > 1) == (ratio > 1)
    assert relative(S, c * plain) < 1e-10
    assert relative(S_inv, torch.linalg.inv(S)) < 1e-10
    if ratio > 1:
        for T in (c * plain, plain / c, S):
            assert (P @ T).trace() + torch.linalg.solve(T, Q).trace() == pytest.approx(tau, rel=1e-10)
    results = preconditioned([A], [B], [grad_A], [grad_B], inverse_steps=[tau])
    for result, value in zip(results, (S_inv @ grad_A, grad_B @ S), strict=True):
        torch.testing.assert_close(result, value)


@pytest.mark.parametrize("ratio", [1e-3, 0.999, 1.001, 2.0, 100.0])
def test_small_step_branch_of_theorem_5(ratio):
    """Where τ > 2 ‖A‖ ‖B‖, ‖A‖² s + ‖B‖²/s = τ; else s = ‖B‖/‖A‖. Rescaling by it keeps the product."""
    (A,), (B,), (grad_A,), (grad_B,) = make([(5, 20, 15)])
    a, b = A.square().sum(), B.square().sum()
    tau = ratio * 2 * (a * b).sqrt().item()
    s = ref.small_step_scalar(numpy(A), numpy(B), tau)
    actual = balance_scalar(a.sqrt()[None], b.sqrt()[None], inverse_step=torch.tensor([tau], dtype=F64))
    assert actual.item() == pytest.approx(s, rel=1e-10)
    if ratio > 1:
        mirrored = b / a / actual  # the other root: s₊ s₋ = ‖B‖²/‖A‖²
        for root in (actual, mirrored):
            assert (a * root + b / root).item() == pytest.approx(tau, rel=1e-10)
    else:
        assert s == ref.scalar(numpy(A), numpy(B))
    results = preconditioned([A], [B], [grad_A], [grad_B], method=precondition_scalar_, inverse_steps=[tau])
    for result, value in zip(results, (grad_A / s, grad_B * s), strict=True):
        torch.testing.assert_close(result, value)
    product, size = B @ A, math.sqrt(s)
    expected = (A * size, B / size)
    rescale_([A], [B], inverse_steps=[tau])
    torch.testing.assert_close(A, expected[0])
    torch.testing.assert_close(B, expected[1])
    torch.testing.assert_close(B @ A, product)


@pytest.mark.parametrize("dtype", [BF16, F32, F64])
def test_small_step_branch_at_B_0_meets_its_equation(dtype):
    """B = 0: ‖A‖² s = τ, so gradients and factors stay finite; A = 0 has no such s and nothing changes."""
    parts = make([(4, 9, 7)] * 2, dtype=dtype)
    parts[1][0].zero_()
    parts[0][1].zero_()
    s = 3.0 / parts[0][0].double().square().sum()
    for method in (precondition_, precondition_scalar_):
        results = preconditioned(*parts, method=method, inverse_steps=[3.0, 3.0])
        rtol = 2 * torch.finfo(dtype).eps
        torch.testing.assert_close(results[0].double(), parts[2][0].double() / s, rtol=rtol, atol=0)
        torch.testing.assert_close(results[2].double(), parts[3][0].double() * s, rtol=rtol, atol=0)
        assert identical(results[1::2], [parts[2][1], parts[3][1]])


def test_each_pair_has_its_own_step():
    """inverse_steps follow their pairs through the grouping by rank."""
    parts, steps = make(SHAPES), [10.0 * (i + 1) for i in range(len(SHAPES))]
    together = preconditioned(*parts, inverse_steps=steps)
    for i, step in enumerate(steps):
        alone = preconditioned(*([p[i]] for p in parts), inverse_steps=[step])
        for result, value in zip(together[i :: len(SHAPES)], alone, strict=True):
            torch.testing.assert_close(result, value, rtol=1e-9, atol=1e-9)


# Extreme factors

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
EXTREME_SHAPES = ((1, 5, 7), (4, 20, 30), (16, 8, 12), (256, 40, 64))  # the last two: r > in


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


@pytest.mark.parametrize("shape", EXTREME_SHAPES, ids=str)
@pytest.mark.parametrize("kind", EXTREMES)
def test_extreme_factors_stay_finite_and_are_flagged(kind, shape):
    """S, S⁻¹ and gradients are finite; `fallback` is true for zero and non-finite factors and for no others."""
    r, n_in, n_out = shape
    rng = np.random.default_rng(r)
    A, B = extreme(rng, r, n_in, EXTREMES[kind][0]), extreme(rng, n_out, r, EXTREMES[kind][1])
    grads = [torch.tensor(rng.normal(size=M.shape), dtype=F32) for M in (A, B)]
    without_gram = kind.endswith(("_0", "nan", "inf"))
    eye = torch.eye(r)
    for eps in (None, 1e-2, 1.0):
        S, S_inv, fallback = S_of(A, B, eps=eps)
        assert fallback == without_gram
        results = preconditioned([A], [B], grads[:1], grads[1:], eps=eps)
        assert all(M.isfinite().all() for M in (S, S_inv, *results))
        if without_gram:
            assert torch.equal(S, eye)
            assert torch.equal(S_inv, eye)
            assert identical(results, grads)
        else:
            assert (S.diagonal() > 0).all()
            assert (S_inv.diagonal() > 0).all()
            assert not identical(results, grads)
    results = preconditioned([A], [B], grads[:1], grads[1:], method=precondition_scalar_)
    assert all(M.isfinite().all() for M in results)
    assert identical(results, grads) == without_gram


@pytest.mark.parametrize(("r", "eps"), [(1, 1e-5), (32, 1e-5), (64, 2**-16), (256, 2**-14)])
def test_default_eps_grows_with_the_rank_in_float32_alone(r, eps):
    assert default_eps(r, F32) == eps
    assert default_eps(r, F64) == 1e-12


@pytest.mark.parametrize("side", ["P", "Q"])
def test_a_gram_matrix_without_cholesky_factor_is_a_fallback(side):
    """S = s I there, whatever the factorisation leaves behind; the pair beside it has its S."""
    good, indefinite, eye = (
        torch.tensor([[4.0, 1.0], [1.0, 4.0]]),
        torch.tensor([[1.0, 2.0], [2.0, 1.0]]),
        torch.eye(2),
    )
    G = {"P": torch.stack([good, good]), "Q": torch.stack([good, good])}
    G[side][0] = indefinite
    R = refactoring(**G, eps=1e-5, coefficients=polar_coefficients(1e-5 / 2))
    assert R.fallback.tolist() == [True, False]
    s = 2.0 if side == "P" else 0.5  # √(tr Q / tr P)
    torch.testing.assert_close(R.S, torch.stack([s * eye, eye]))
    torch.testing.assert_close(R.S_inv, torch.stack([eye / s, eye]))


def test_an_S_that_is_not_finite_is_a_fallback():
    """Here by absurd coefficients."""
    G = torch.tensor([[[2.0, 1.0], [1.0, 3.0]]])
    R = refactoring(G, G, eps=1e-5, coefficients=((1e30, 0.0, 0.0),) * 3)
    assert R.fallback.item()
    assert torch.equal(R.S[0], torch.eye(2))


@pytest.mark.parametrize(
    ("norm_A", "norm_B", "s"),
    [(2.0, 1.0, 0.5), (1e18, 1e-18, 1e-36), (1e20, 1e-20, 1.0), (1e-20, 1e20, 1.0), (math.inf, math.inf, 1.0)],
)
def test_balance_scalar_is_1_where_it_or_its_inverse_overflows(norm_A, norm_B, s):
    assert balance_scalar(torch.tensor([norm_A]), torch.tensor([norm_B])).item() == pytest.approx(s)


@pytest.mark.parametrize("kind", ["A_0", "B_0", "both_0", "A_nan", "B_inf"])
def test_rescale_leaves_factors_without_a_scale_alone(kind):
    rng = np.random.default_rng(0)
    A, B = extreme(rng, 4, 9, EXTREMES[kind][0]), extreme(rng, 7, 4, EXTREMES[kind][1])
    before = A.clone(), B.clone()
    rescale_([A], [B])
    torch.testing.assert_close((A, B), before, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("how", ["zero", "rank_1", 1e15, 1e-15, math.nan, math.inf])
def test_a_bad_pair_does_not_change_its_neighbours(how, dtype):
    parts = make([(4, 9, 7)] * 3, dtype=dtype)
    expected = preconditioned(*parts)
    bad = extreme(np.random.default_rng(5), 4, 9, how).to(dtype)
    results = preconditioned([parts[0][0], bad, parts[0][2]], *parts[1:])
    own = (1, 4)
    assert identical(*([ts[i] for i in range(6) if i not in own] for ts in (results, expected)))
    assert not any(torch.equal(results[i], expected[i]) for i in own)
    for i in (0, 2):
        alone = preconditioned(*([p[i]] for p in parts))
        for result, value in zip(results[i::3], alone, strict=True):
            torch.testing.assert_close(result, value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_non_finite_gradients_stay_non_finite(value):
    """A GradScaler must still see them, also where S is a multiple of the identity."""
    As, Bs, grads_A, grads_B = make([(4, 9, 7)] * 2, dtype=F16)
    Bs[1].zero_()
    for grad in grads_A + grads_B:
        grad[2, 3] = value
    for method in (precondition_, precondition_scalar_):
        assert not any(g.isfinite().all() for g in preconditioned(As, Bs, grads_A, grads_B, method=method))


# The polar factor


def composed_error(lower):
    """Largest |p(x) - 1| of the composed quintics on a grid of [lower, 1]."""
    x = torch.tensor(np.geomspace(lower, 1, 2001))
    for a, b, c in polar_coefficients.__wrapped__(lower):
        x = a * x + b * x**3 + c * x**5
    return (x - 1).abs().max().item()


@pytest.mark.parametrize("exponent", range(-13, 1))
def test_composed_quintics_map_the_interval_to_1(exponent):
    assert composed_error(10.0**exponent) < 1e-12
    assert (
        len(polar_coefficients(10.0**exponent)) <= 4 - 1.6 * exponent
    )  # each step lifts the smallest by 4.25 at most


@given(st.floats(-13, 0).map(lambda exponent: 10**exponent) | st.floats(0.9, 1))
@example(0.98)
@settings(max_examples=60, deadline=None)
def test_composed_quintics_map_any_interval_to_1(lower):
    assert composed_error(lower) < 1e-12


@pytest.mark.parametrize("lower", [0.0, -1e-3, 1.0 + 1e-9, math.nan, math.inf])
def test_polar_coefficients_reject_an_impossible_bound(lower):
    with pytest.raises(ValueError, match="0 < lower <= 1"):
        polar_coefficients(lower)


@pytest.mark.parametrize(
    ("dtype", "lower", "tolerance"), [(F64, 1e-8, 1e-7), (F64, 1e-3, 1e-11), (F32, 1e-4, 2e-2), (F32, 0.5, 1e-5)]
)
@pytest.mark.parametrize("r", [1, 2, 16, 64])
def test_polar_factor_is_orthogonal_and_that_of_the_svd(r, dtype, lower, tolerance):
    rng = np.random.default_rng(r)
    X = torch.stack([spectrum(rng, r, r, 1 / lower) for _ in range(3)]).to(dtype)
    W = polar_factor(X, polar_coefficients(lower)).double()
    U, _, V = torch.linalg.svd(X.double())
    assert (W.mT @ W - torch.eye(r)).abs().max() < 100 * torch.finfo(dtype).eps
    assert torch.linalg.matrix_norm(W - U @ V, 2).max() < tolerance


@pytest.mark.parametrize(("dtype", "lower"), [(F32, 1.25e-6), (F32, 2.3e-7), (F64, 1.25e-13)])
def test_polar_factor_is_as_accurate_as_X_allows(dtype, lower):
    """However small `lower`: a quintic that presses large singular values down towards it loses their digits."""
    rng, r, n = np.random.default_rng(0), 8, 200
    U, V = (torch.linalg.qr(torch.tensor(rng.normal(size=(n, r, r))))[0] for _ in range(2))
    X = (U * torch.tensor(rng.uniform(0.1, 1, size=(n, 1, r))) @ V.mT).to(dtype)
    U, _, Vh = torch.linalg.svd(X.double())
    error = torch.linalg.matrix_norm(polar_factor(X, polar_coefficients(lower)) - U @ Vh, 2).max()
    assert error < 500 * torch.finfo(dtype).eps  # X's condition is 10 at most


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


@given(any_factors(), st.sampled_from([None, 1e-3, 0.1, 1.0]))
@settings(max_examples=150, deadline=None)
def test_any_factors_are_balanced_up_to_rounding(factors, eps):
    """S P̂ S = Q̂ up to the scale and 40 r u κ, S S⁻¹ = I, all finite, and the gradients get exactly this S."""
    A, B = factors
    r = len(A)
    S, S_inv, fallback = S_of(A, B, eps=eps)
    assert S.isfinite().all()
    assert S_inv.isfinite().all()
    assert fallback == (not A.any() or not B.any())
    grads = [torch.ones_like(A), torch.ones_like(B)]
    where = [g.data_ptr() for g in grads]
    precondition_([A], [B], grads[:1], grads[1:], eps=eps)
    assert [g.data_ptr() for g in grads] == where
    torch.testing.assert_close(grads, [S_inv @ torch.ones_like(A), torch.ones_like(B) @ S], rtol=1e-4, atol=math.inf)
    if not fallback:
        shrink = default_eps(r, F32) if eps is None else eps
        P, Q = (ref.shrunk(G, shrink) for G in ref.grams(numpy(A), numpy(B)))
        bound = 40 * r * 2**-24 * sensitivity(A, B, shrink)
        S, S_inv, s = numpy(S), numpy(S_inv), ref.scalar(numpy(A), numpy(B))
        if bound < 0.5:
            assert relative((S / s) @ P @ (S / s), Q) < bound
            assert relative(S @ S_inv, np.eye(r)) < bound


@given(any_factors())
@settings(max_examples=50, deadline=None)
def test_any_factors_are_rescaled_to_equal_norms(factors):
    A, B = (M.clone() for M in factors)
    product = B.double() @ A.double()
    rescale_([A], [B])
    assert A.isfinite().all()
    assert B.isfinite().all()
    if A.any() and B.any():
        assert torch.linalg.norm(A.double()) == pytest.approx(torch.linalg.norm(B.double()).item(), rel=1e-5)
    torch.testing.assert_close(B.double() @ A.double(), product, rtol=1e-4, atol=1e-6 * product.abs().max().item())


# No data dependence: nothing waits for a device


def all_entry_points(parts, steps=None):
    precondition_(*parts, inverse_steps=steps)
    precondition_(*parts, eps=1e-3, dtype=F64)
    precondition_scalar_(*parts, inverse_steps=steps)
    rescale_(*parts[:2], *([[(g, 1), (g, 2)] for g in grads] for grads in parts[2:]), inverse_steps=steps)


def fake_parts(dtype):
    return tuple(
        [torch.empty(s[0], s[1], dtype=dtype) if side == "A" else torch.empty(s[2], s[0], dtype=dtype) for s in SHAPES]
        for side in "ABAB"
    )


@pytest.mark.parametrize("steps", [None, [1.0] * len(SHAPES)], ids=["plain", "small_steps"])
@pytest.mark.parametrize("dtype", [BF16, F32, F64])
def test_nothing_depends_on_the_data(dtype, steps):
    """Under FakeTensorMode any .item(), any branch on a value raises."""
    all_entry_points(make(SHAPES, dtype=dtype), steps)  # the coefficients are cached
    with FakeTensorMode():
        all_entry_points(fake_parts(dtype), steps)
        with pytest.raises(RuntimeError):
            torch.ones(1).item()


@pytest.mark.parametrize(
    "mode", [lambda: torch.device("meta"), FakeTensorMode], ids=["default_device", "fake_tensors"]
)
def test_the_first_call_may_come_under_any_mode(mode):
    """The coefficients are numbers, computed once and kept: no default device or tensor mode takes part in them."""
    with mode():
        coefficients = polar_coefficients.__wrapped__(1e-5)
    assert coefficients == polar_coefficients(1e-5)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_refactoring_compiles_into_one_graph(backend):
    As, Bs, _, _ = make([(4, 9, 7)] * 3, dtype=F32)
    Bs[1].zero_()
    P, Q = gram_stack(As, F32), gram_stack([B.mT for B in Bs], F32)
    options = {
        "eps": 1e-5,
        "coefficients": polar_coefficients(1e-5 / 4),
        "inverse_step": torch.tensor([1.0, 10.0, 20.0]),
    }
    torch._dynamo.reset()
    compiled = torch.compile(refactoring, fullgraph=True, backend=backend)(P, Q, **options)
    plain = refactoring(P, Q, **options)
    torch.testing.assert_close(compiled.S, plain.S)
    torch.testing.assert_close(compiled.S_inv, plain.S_inv)
    assert compiled.fallback.tolist() == [False, True, False]


def test_the_same_input_gives_the_same_bits():
    parts = make([(8, 64, 48)] * 5 + [(16, 33, 20)] * 3, dtype=F32)
    first, second = (preconditioned(*parts) for _ in range(2))
    assert identical(first, second)


# IEEE arithmetic, whatever is set outside

BACKENDS = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)


@pytest.fixture
def precision():
    """Puts the matrix product settings back."""
    legacy, new = torch.get_float32_matmul_precision(), [b.fp32_precision for b in BACKENDS]
    yield
    torch.set_float32_matmul_precision(legacy)
    for backend, value in zip(BACKENDS, new, strict=True):
        backend.fp32_precision = value


class Products(TorchDispatchMode):
    """Records under which settings and in which dtypes matrix products run."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.bmm, torch.ops.aten.baddbmm):
            self.seen.add((*(b.fp32_precision for b in BACKENDS), args[0].dtype))
        return func(*args, **(kwargs or {}))


def settings_now():
    return (
        [b.fp32_precision for b in BACKENDS],
        torch.get_float32_matmul_precision(),
        torch.is_autocast_enabled("cpu"),
        torch.get_autocast_dtype("cpu"),
    )


@pytest.mark.parametrize("outside", ["medium", "high", "autocast"])
def test_products_are_ieee_float32_and_the_settings_come_back(outside, precision):
    parts = make([(32, 512, 64)] * 4 + [(8, 64, 64)] * 3, dtype=F32)
    expected = preconditioned(*parts)
    values = diagnose(*parts[:2], eps=None, dtype=F32)
    with torch.autocast("cpu", BF16, enabled=outside == "autocast"):
        if outside != "autocast":
            torch.set_float32_matmul_precision(outside)
        before = settings_now()
        results = preconditioned(*parts)
        again = diagnose(*parts[:2], eps=None, dtype=F32)
        assert settings_now() == before
        with Products() as products:
            preconditioned(*parts)
            diagnose(*parts[:2], eps=None, dtype=F32)
            assert all(cuda == cpu == "ieee" and d in (F32, F64) for cuda, cpu, d in products.seen)
            seen = len(products.seen)
            parts[0][0] @ parts[0][0].mT  # the spy does see what runs outside
            assert len(products.seen) == seen + 1 > 1
    assert identical(results, expected)
    torch.testing.assert_close(again, values, rtol=0, atol=0)


def test_the_settings_come_back_after_an_exception(precision):
    As, Bs, grads_A, _ = make([(4, 9, 7)], dtype=F32)
    torch.set_float32_matmul_precision("medium")
    with torch.autocast("cpu", BF16):
        before = settings_now()
        with pytest.raises(RuntimeError):
            precondition_(As, Bs, grads_A, [torch.ones(7, 5)])  # not of B's shape
        assert settings_now() == before


# RefLoRA-S as a true refactoring


def test_rescale_balances_keeps_the_product_and_is_idempotent():
    As, Bs, _, _ = make(SHAPES)
    products = [B @ A for A, B in zip(As, Bs, strict=True)]
    rescale_(As, Bs)
    for A, B, product in zip(As, Bs, products, strict=True):
        torch.testing.assert_close(B @ A, product, rtol=1e-12, atol=1e-13)
        assert A.norm().item() == pytest.approx(B.norm().item(), rel=1e-13)
    once = clones(As + Bs)
    rescale_(As, Bs)
    torch.testing.assert_close(As + Bs, once, rtol=1e-14, atol=0)


@pytest.mark.parametrize("tau", [1.0, 50.0])
def test_rescale_is_idempotent_in_the_small_step_branch(tau):
    """The factors then are at the optimum: s = 1."""
    As, Bs, _, _ = make([(4, 9, 7)])
    start = As[0].clone()
    rescale_(As, Bs, inverse_steps=[tau])
    once = clones(As + Bs)
    rescale_(As, Bs, inverse_steps=[tau])
    torch.testing.assert_close(As + Bs, once, rtol=1e-12, atol=0)
    assert relative(once[0], start) > 0.1


ADAMW = {"lr": 0.05, "betas": (0.9, 0.99), "weight_decay": 0.1}


def adamw_after_three_steps(eps):
    """Two unbalanced factors and an AdamW with a history, and fresh gradients for its fourth step."""
    (A,), (B,), _, _ = make([(3, 8, 6)])
    params = [torch.nn.Parameter(A), torch.nn.Parameter(B)]
    optimizer = torch.optim.AdamW(params, eps=eps, **ADAMW)
    rng = np.random.default_rng(9)
    for p in params * 3:
        p.grad = torch.tensor(rng.normal(size=p.shape))
        if p is params[1]:
            optimizer.step()
    return params, optimizer, [torch.tensor(rng.normal(size=p.shape)) for p in params]


def rescale_with_moments(params, optimizer, moments=True):
    states = [[(optimizer.state[p]["exp_avg"], 1), (optimizer.state[p]["exp_avg_sq"], 2)] for p in params]
    s = ref.scalar(*(numpy(p) for p in params))
    rescale_(params[:1], params[1:], *([[states[0]], [states[1]]] if moments else ()))
    return math.sqrt(s)


@pytest.mark.parametrize("eps", [0.0, 0.3])
def test_moments_move_with_the_factors(eps):
    """AdamW's step after `rescale_` is the reference's; without eps it moves each entry as it would have before."""
    params, optimizer, grads = adamw_after_three_steps(eps)
    states = [optimizer.state[p] for p in params]
    old = [
        ref.AdamState(*map(numpy, (p, g, q["exp_avg"], q["exp_avg_sq"])))
        for p, g, q in zip(params, grads, states, strict=True)
    ]
    root, expected = rescale_with_moments(params, optimizer), []
    for p, q, before, t in zip(params, states, old, (root, 1 / root), strict=True):
        now = ref.rescaled(before, t)
        for actual, value in zip((p, q["exp_avg"], q["exp_avg_sq"]), (now.param, *now[2:]), strict=True):
            np.testing.assert_allclose(numpy(actual), value, rtol=1e-12)
        p.grad = torch.tensor(now.grad)
        expected.append(ref.adamw_step(now, 4, eps=eps, **ADAMW))
        kept = 1 - ADAMW["lr"] * ADAMW["weight_decay"]
        step, step_before = (
            expected[-1] - kept * now.param,
            ref.adamw_step(before, 4, eps=eps, **ADAMW) - kept * before.param,
        )
        assert np.allclose(step, step_before, rtol=1e-9) == (eps == 0)
    optimizer.step()
    for p, value in zip(params, expected, strict=True):
        np.testing.assert_allclose(numpy(p), value, rtol=1e-10, atol=1e-12)


def test_moments_left_behind_give_another_step():
    """The counter-check: the moments matter."""
    results = []
    for moments in (True, False):
        params, optimizer, grads = adamw_after_three_steps(0.0)
        root = rescale_with_moments(params, optimizer, moments)
        for p, grad, t in zip(params, grads, (root, 1 / root), strict=True):
            p.grad = grad / t
        optimizer.step()
        results.append(params[0].detach())
    assert relative(results[1], results[0]) > 1e-3


# Diagnosis


def test_diagnose_values_are_those_of_numpy():
    As, Bs, _, _ = make([(4, 9, 7), (4, 20, 7), (4, 9, 30)])
    values = diagnose(As, Bs, eps=0.1, dtype=F64)
    for i, (A, B) in enumerate(zip(map(numpy, As), map(numpy, Bs), strict=True)):
        (P, Q), S = ref.grams(A, B), ref.refactoring(A, B, 0.1)
        expected = {
            "balance_gap": np.linalg.norm(P - Q) / np.linalg.norm(Q),
            "balance_residual": np.linalg.norm(S @ P @ S - Q) / np.linalg.norm(Q),
            "cond_P": np.linalg.cond(P),
            "cond_Q": np.linalg.cond(Q),
            "norm_A": np.linalg.norm(A),
            "norm_B": np.linalg.norm(B),
            "fallback": 0,
        }
        assert {name: value[i].item() for name, value in values.items()} == pytest.approx(expected, rel=1e-9)


def test_diagnose_keeps_the_order_of_the_pairs():
    """Ranks may alternate; value i is that of pair i."""
    As, Bs, _, _ = make(SHAPES)
    values = diagnose(As, Bs, eps=None, dtype=F64)
    norms = torch.stack([A.norm() for A in As])
    assert len(set(norms.tolist())) > 3
    torch.testing.assert_close(values["norm_A"], norms)


@pytest.mark.parametrize("size", [1e-12, 1.0, 1e12])
@pytest.mark.parametrize("dtype", [F32, F64])
def test_diagnose_does_not_depend_on_the_size_of_both_factors(dtype, size):
    """Balanced: gap 0. Unbalanced 2:1: gap 3. Both whatever the size, in float32 too."""
    (A,), _, _, _ = make([(4, 9, 9)], size_A=size, dtype=dtype)
    for factor, gap in ((1.0, 0.0), (2.0, 3.0)):
        values = diagnose([factor * A], [A.mT.contiguous()], eps=None, dtype=dtype)
        assert values["balance_gap"].item() == pytest.approx(gap, abs=1e-5)
        assert 0 <= values["balance_residual"].item() < 1e-2
        assert values["cond_P"].item() == pytest.approx(100, rel=1e-2)
        assert values["norm_B"].item() == pytest.approx(A.norm().item(), rel=1e-5)


def test_diagnose_names_what_does_not_exist():
    """A division by 0 is NaN or inf, nothing else is; a non-finite factor takes no other pair with it."""
    As, Bs, _, _ = make([(4, 9, 7)] * 3, dtype=F32)
    Bs[0].zero_()
    As[1][0, 0] = math.nan
    values = diagnose(As, Bs, eps=None, dtype=F32)
    assert values["fallback"].tolist() == [1, 1, 0]
    finite = {name: value.isfinite().tolist() for name, value in values.items()}
    assert finite == {
        "balance_gap": [False, False, True],
        "balance_residual": [False, False, True],
        "cond_P": [True, False, True],
        "cond_Q": [False, True, True],
        "norm_A": [True, False, True],
        "norm_B": [True, True, True],
        "fallback": [True, True, True],
    }
    assert values["norm_B"][0] == 0


# What it is for


@pytest.mark.parametrize("start", ["unbalanced", "ill_conditioned", "both"])
def test_gradient_descent_converges_from_bad_factors(start):
    """Low-rank factorisation (the paper's Figure 2): plain descent stalls at its best rate, RefLoRA converges."""
    rng = np.random.default_rng(0)
    W = torch.tensor(rng.normal(size=(24, 4)) @ rng.normal(size=(4, 20)))
    W /= torch.linalg.matrix_norm(W, 2)
    A, B = spectrum(rng, 4, 20, 1.0), spectrum(rng, 24, 4, 1.0)
    D = torch.diag(torch.logspace(0, -1.5, 4, dtype=F64))
    A, B = {
        "unbalanced": (10 * A, B / 3),
        "ill_conditioned": (10 * D @ A, B / 10),
        "both": (10 * D @ A, B @ torch.linalg.inv(D) / 100),
    }[start]

    def best_loss(method, rates, steps=60):
        losses = []
        for rate in rates:
            a, b = A.clone(), B.clone()
            for _ in range(steps):
                E = b @ a - W
                grads = [b.mT @ E], [E @ a.mT]
                if method is not None:
                    method([a], [b], *grads)
                a -= rate * grads[0][0]
                b -= rate * grads[1][0]
            losses.append(((b @ a - W).norm() / W.norm()).item() ** 2)
        return min(loss for loss in losses if math.isfinite(loss))

    assert best_loss(None, rates=[2.0**k for k in np.arange(-13, 2, 0.5)]) > 0.1
    assert best_loss(precondition_, rates=[0.5]) < 1e-9
