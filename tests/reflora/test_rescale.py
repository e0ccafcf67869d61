"""RefLoRA-S as rescaling: the factors, and the optimizer's moments that follow them."""

import math

import numpy as np
import pytest
import reference as ref
import torch
from factor_pairs import (
    BF16,
    EXTREMES,
    F16,
    F32,
    F64,
    SHAPES,
    any_factors,
    clones,
    extreme,
    identical,
    make,
    numpy,
    relative,
)
from hypothesis import given, settings

from hf_reflora.reflora.precondition import rescale_


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


@pytest.mark.parametrize("kind", ["A_0", "B_0", "both_0", "A_nan", "B_inf"])
def test_rescale_leaves_factors_without_a_scale_alone(kind):
    rng = np.random.default_rng(0)
    A, B = extreme(rng, 4, 9, EXTREMES[kind][0]), extreme(rng, 7, 4, EXTREMES[kind][1])
    before = A.clone(), B.clone()
    rescale_([A], [B])
    torch.testing.assert_close((A, B), before, rtol=0, atol=0, equal_nan=True)


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
