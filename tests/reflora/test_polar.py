"""The polar factor and the coefficients of its quintics."""

import math

import numpy as np
import pytest
import torch
from factor_pairs import (
    F32,
    F64,
    spectrum,
)
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hf_reflora.reflora.polar import polar_coefficients, polar_factor


# The polar factor


def composed_error(lower, *error):
    """Largest |p(x) - 1| of the composed quintics on a grid of [lower, 1]."""
    x = torch.tensor(np.geomspace(lower, 1, 2001))
    for a, b, c in polar_coefficients.__wrapped__(lower, *error):
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
    assert composed_error(lower, 2**-25) < 2**-25


def test_float32_needs_a_step_less():
    assert len(polar_coefficients(1e-5 / 8, 2**-25)) == len(polar_coefficients(1e-5 / 8)) - 1


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
    W = polar_factor(X, polar_coefficients(lower, torch.finfo(dtype).eps / 4)).double()
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
    unit = torch.finfo(dtype).eps
    error = torch.linalg.matrix_norm(polar_factor(X, polar_coefficients(lower, unit / 4)) - U @ Vh, 2).max()
    assert error < 500 * unit  # X's condition is 10 at most
