"""Preconditioned gradients against a float64 reference, Theorem 6, and pairs that must not disturb each other."""

import math

import numpy as np
import pytest
import reference as ref
import torch
from factor_pairs import (
    BF16,
    F16,
    F32,
    F64,
    SHAPES,
    extreme,
    identical,
    make,
    numpy,
    preconditioned,
    relative,
    sensitivity,
    spectrum,
)

from hf_reflora.reflora.precondition import precondition_, precondition_scalar_
from hf_reflora.reflora.refactor import default_eps


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


def test_each_pair_has_its_own_step():
    """inverse_steps follow their pairs through the grouping by rank."""
    parts, steps = make(SHAPES), [10.0 * (i + 1) for i in range(len(SHAPES))]
    together = preconditioned(*parts, inverse_steps=steps)
    for i, step in enumerate(steps):
        alone = preconditioned(*([p[i]] for p in parts), inverse_steps=[step])
        for result, value in zip(together[i :: len(SHAPES)], alone, strict=True):
            torch.testing.assert_close(result, value, rtol=1e-9, atol=1e-9)


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


@pytest.mark.parametrize("method", [precondition_, precondition_scalar_])
@pytest.mark.parametrize("ratio", [1e-6, 1e6])
def test_finite_gradients_stay_finite_in_float16(method, ratio):
    """Of very unlike factors: the product is beyond 65504, the largest number of float16."""
    overflowed = 0
    for seed in range(5):
        torch.manual_seed(seed)
        A, B, G = torch.randn(4, 16) * ratio**0.5, torch.randn(16, 4) / ratio**0.5, 5 * torch.randn(16, 16)
        As, Bs, grads_A, grads_B = ([M.to(F16)] for M in (A, B, B.T @ G, G @ A.T))
        if not all(g.isfinite().all() for g in grads_A + grads_B):
            continue
        exact = preconditioned(*([t.float() for t in ts] for ts in (As, Bs, grads_A, grads_B)), method=method)
        overflowed += any(not value.to(F16).isfinite().all() for value in exact)
        for result, value in zip(preconditioned(As, Bs, grads_A, grads_B, method=method), exact, strict=True):
            limit = torch.finfo(F16).max
            torch.testing.assert_close(result, value.clamp(-limit, limit).to(F16), rtol=2e-3, atol=1e-6)
    assert overflowed


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
