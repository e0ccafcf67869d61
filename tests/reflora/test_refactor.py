"""The refactoring S against a float64 reference, the paper's theorems and the inputs that break an eigh-based S."""

import itertools
import math

import numpy as np
import pytest
import reference as ref
import torch
from factor_pairs import (
    BF16,
    EXTREMES,
    F32,
    F64,
    SHAPES,
    S_of,
    any_factors,
    extreme,
    identical,
    make,
    numpy,
    preconditioned,
    relative,
    sensitivity,
    spectrum,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from hf_reflora.reflora.diagnose import diagnose
from hf_reflora.reflora.polar import polar_coefficients
from hf_reflora.reflora.precondition import precondition_, precondition_scalar_, rescale_
from hf_reflora.reflora.products import gram_stack
from hf_reflora.reflora.refactor import balance_scalar, default_eps, refactoring


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


# Extreme factors

EXTREME_SHAPES = ((1, 5, 7), (4, 20, 30), (16, 8, 12), (256, 40, 64))  # the last two: r > in


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
    P, Q = gram_stack(As, F32), gram_stack(Bs, F32, of_columns=True)
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


@pytest.mark.parametrize("inverse_step", [0.0, 1e30, 1e300, math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_small_step_branch_at_a_rate_of_0_or_too_small(dtype, inverse_step):
    """Its S would grow like 1/η until Adam's squares of the gradients of B are not finite."""
    norm_A, norm_B = torch.tensor([2.0], dtype=dtype), torch.tensor([3.0], dtype=dtype)
    steps = torch.tensor([inverse_step], dtype=dtype)
    assert balance_scalar(norm_A, norm_B, inverse_step=steps).item() == pytest.approx(1.5)
    torch.manual_seed(0)
    A, B = torch.randn(3, 5, dtype=F64), torch.randn(6, 3, dtype=F64)
    grads = torch.randn_like(A), torch.randn_like(B)
    parts = [A], [B], [grads[0]], [grads[1]]
    expected = preconditioned(*parts, dtype=dtype)
    for result, value in zip(preconditioned(*parts, dtype=dtype, inverse_steps=[inverse_step]), expected, strict=True):
        torch.testing.assert_close(result, value)


def test_the_small_step_branch_down_to_tiny_rates():
    norms = torch.ones(1, dtype=F64), torch.ones(1, dtype=F64)
    for rate in (1e-3, 1e-9, 1e-15):
        s = balance_scalar(*norms, inverse_step=torch.tensor([1 / rate], dtype=F64)).item()
        assert s == pytest.approx(1 / rate, rel=1e-5)
