"""What `diagnose` says of factors, against NumPy."""

import math

import numpy as np
import pytest
import reference as ref
import torch
from factor_pairs import (
    F32,
    F64,
    SHAPES,
    make,
    numpy,
)

from hf_reflora.reflora.diagnose import diagnose


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
