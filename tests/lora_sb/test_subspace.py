"""LoRA-SB's formulas against slow references written from the paper, and its theorems through the real layer."""

import numpy as np
import pytest
import reference_sb
import tiny
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from peft import get_peft_model
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from hf_reflora import LoraSbConfig
from hf_reflora.lora_sb import LoraSbLayer
from hf_reflora.lora_sb.subspace import (
    balanced_factors,
    first_update,
    optimal_R_gradient,
    sb_factors,
    truncated_svd,
)


FEW = settings(max_examples=20, deadline=None)
EXACT = {"rtol": 1e-9, "atol": 1e-11}
SIZES = [(600, 400), (400, 600), (700, 700)]


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def adapted(scaling: float = 1.0, r: int = 3, seed: int = 0, orthonormal: bool = False) -> tuple[nn.Module, list]:
    """A float64 MLP whose base weights require gradients, with B, R and A of full rank, far from orthonormal."""
    model = get_peft_model(
        tiny.mlp(),
        LoraSbConfig(r=r, scaling=scaling, target_modules=["0", "2"], init_weights=False),
        autocast_adapter_dtype=False,
    )
    layers = [module for module in model.modules() if isinstance(module, LoraSbLayer)]
    for i, layer in enumerate(layers):
        B, A = randn(layer.out_features, r, seed=seed + i), randn(r, layer.in_features, seed=seed + i + 10)
        if orthonormal:
            B, A = torch.linalg.qr(B).Q, torch.linalg.qr(A.T).Q.T
        # W, and with it G, is the same for every s
        layer.set_factors("default", B, randn(r, r, seed=seed + i + 20) / (5 * scaling), A)
        layer.get_base_layer().weight.requires_grad_()
    return model, layers


def arrays(layer: LoraSbLayer) -> tuple[np.ndarray, ...]:
    """G, ∇R, B and A in NumPy."""
    R = layer.lorasb_R["default"]
    assert R.dtype == torch.float64
    tensors = (layer.get_base_layer().weight.grad, R.grad, layer.lorasb_B["default"], layer.lorasb_A["default"])
    return tuple(tensor.numpy() for tensor in tensors)


def optimal(layer: LoraSbLayer, scaling: float) -> torch.Tensor:
    B, A = layer.lorasb_B["default"], layer.lorasb_A["default"]
    return optimal_R_gradient(layer.lorasb_R["default"].grad, B, A, scaling)


@pytest.mark.parametrize("scaling", [1.0, 0.25, 4.0])
def test_lemma_2_the_gradient_of_R(scaling):
    model, layers = adapted(scaling)
    tiny.mlp_loss(model, 0).backward()
    for layer in layers:
        G, grad_R, B, A = arrays(layer)
        np.testing.assert_allclose(grad_R, reference_sb.gradient_of_R(G, B, A, scaling), **EXACT)


@pytest.mark.parametrize("scaling", [1.0, 0.25, 4.0])
def test_theorem_3_the_nearest_equivalent_gradient(scaling):
    model, layers = adapted(scaling)
    tiny.mlp_loss(model, 0).backward()
    for layer in layers:
        G, grad_R, B, A = arrays(layer)
        g = optimal(layer, scaling).numpy()
        np.testing.assert_allclose(g, reference_sb.nearest_g(G, B, A, scaling), **EXACT)
        np.testing.assert_allclose(g, reference_sb.formula_of_theorem_3(grad_R, B, A, scaling), **EXACT)


@FEW
@given(seed=st.integers(0, 2**20), size=st.floats(1e-4, 10), scaling=st.floats(0.1, 10))
def test_theorem_3_no_other_g_is_nearer(seed, size, scaling):
    G, B, A = randn(7, 6, seed=seed), randn(7, 3, seed=seed + 1), randn(3, 6, seed=seed + 2)
    assume(np.linalg.cond(B) < 1e3 and np.linalg.cond(A) < 1e3)
    g = optimal_R_gradient(scaling * B.T @ G @ A.T, B, A, scaling)

    def distance(g):
        return (scaling * B @ g @ A - G).norm()

    assert distance(g + size * g.norm() * randn(3, 3, seed=seed + 3)) >= distance(g) * (1 - 1e-12)


def test_with_orthonormal_factors_and_s_1_it_is_the_gradient_itself():
    """Equation 9."""
    model, layers = adapted(orthonormal=True)
    tiny.mlp_loss(model, 0).backward()
    for layer in layers:
        torch.testing.assert_close(optimal(layer, 1.0), layer.lorasb_R["default"].grad, **EXACT)


@pytest.mark.parametrize("scaling", [1.0, 0.3])
def test_theorem_4_the_loss_falls(scaling):
    """By η ‖g̃‖² to first order, summed over the layers."""
    model, layers = adapted(scaling)
    before = tiny.mlp_loss(model, 0)
    before.backward()
    gs = [optimal(layer, scaling) for layer in layers]
    slope = sum(
        np.sum(reference_sb.equivalent_gradient(g.numpy(), *arrays(layer)[2:], scaling) ** 2)
        for g, layer in zip(gs, layers, strict=True)
    )
    start = [layer.lorasb_R["default"].detach().clone() for layer in layers]
    falls = {}
    for eta in (1e-3, 1e-5, -1e-5):
        with torch.no_grad():
            for layer, R, g in zip(layers, start, gs, strict=True):
                layer.lorasb_R["default"].copy_(R - eta * g)
            falls[eta] = (before - tiny.mlp_loss(model, 0)).item()
    assert falls[1e-3] > 0
    assert (falls[1e-5] - falls[-1e-5]) / 2e-5 == pytest.approx(slope, rel=1e-6)  # a central difference


def test_theorem_5_the_equivalent_gradient_does_not_depend_on_s():
    equivalent = []
    for scaling in (1.0, 0.1, 16.0):
        model, layers = adapted(scaling)
        tiny.mlp_loss(model, 0).backward()
        g = [optimal(layer, scaling).numpy() for layer in layers]
        equivalent.append(
            [
                reference_sb.equivalent_gradient(g, *arrays(layer)[2:], scaling)
                for g, layer in zip(g, layers, strict=True)
            ]
        )
    for other in equivalent[1:]:
        for one, another in zip(equivalent[0], other, strict=True):
            np.testing.assert_allclose(one, another, **EXACT)


@pytest.mark.parametrize("scaling", [1.0, 0.5])
@pytest.mark.parametrize("update", ["sign", "gradient"])
@pytest.mark.parametrize("r", [1, 3, 5])
def test_theorem_6_the_start_is_the_best_approximation_of_the_full_step(r, update, scaling):
    model, layers = adapted(scaling, r)
    tiny.mlp_loss(model, 0).backward()
    for layer in layers:
        G = arrays(layer)[0]
        step = reference_sb.first_step(G, 0.01, update)
        U, S, V = truncated_svd(first_update(torch.from_numpy(G), 0.01, update), r)
        layer.set_factors("default", *sb_factors(U, S, V, scaling))
        start = layer.get_delta_weight("default").detach().numpy()
        np.testing.assert_allclose(start, reference_sb.truncation(step, r), rtol=1e-9, atol=1e-13)
        error = np.linalg.norm(start - step)
        assert error == pytest.approx(reference_sb.tail(step, r), rel=1e-9)
        B, R, A = (getattr(layer, f"lorasb_{name}")["default"].detach().numpy() for name in "BRA")
        noise = np.random.default_rng(0)
        for size in (1e-4, 1e-2, 1.0):  # other matrices of rank r
            left, right = B + size * noise.normal(size=B.shape), A + size * noise.normal(size=A.shape)
            assert np.linalg.norm(scaling * left @ R @ right - step) >= error


@pytest.mark.parametrize("scaling", [1.0, 2.0])
def test_theorem_6_the_first_step_of_sgd_from_W0(scaling):
    """With factors from the SVD of -η G and R = 0, a step of SGD along Theorem 3's gradient, too, is the best one."""
    eta, r = 0.03, 2
    model, layers = adapted(scaling, r)
    with torch.no_grad():
        for layer in layers:
            layer.lorasb_R["default"].zero_()
    tiny.mlp_loss(model, 0).backward()
    for layer in layers:
        G, R = torch.from_numpy(arrays(layer)[0]), layer.lorasb_R["default"]
        B, _, A = sb_factors(*truncated_svd(first_update(G, eta, "gradient"), r), scaling)
        layer.set_factors("default", B, torch.zeros(r, r), A)
        R.grad = None
    tiny.mlp_loss(model, 0).backward()
    for layer in layers:
        layer.lorasb_R["default"].grad = optimal(layer, scaling)
    torch.optim.SGD([layer.lorasb_R["default"] for layer in layers], lr=eta).step()
    for layer in layers:
        best = reference_sb.truncation(-eta * arrays(layer)[0] / 2, r)  # two backward passes have added up
        np.testing.assert_allclose(layer.get_delta_weight("default").detach().numpy(), best, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("update", ["sign", "gradient"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_first_update(update, dtype):
    G = randn(5, 4).to(dtype)
    G[0, 0] = 0.0
    dW = first_update(G, 0.01, update)
    assert dW.dtype == dtype
    np.testing.assert_allclose(dW.numpy(), reference_sb.first_step(G.numpy(), 0.01, update), rtol=1e-6)
    assert dW[0, 0] == 0
    assert (dW * G).sum() < 0  # against the gradient
    torch.testing.assert_close(first_update(G, 0.01), first_update(G, 0.01, "sign"))


def test_first_update_is_what_optimizers_do_first():
    weights = {}
    for name, optimizer in {"sign": torch.optim.AdamW, "gradient": torch.optim.SGD}.items():
        weight = nn.Parameter(randn(5, 4))
        weight.grad = randn(5, 4, seed=1)
        before = weight.detach().clone()
        optimizer([weight], lr=0.01, weight_decay=0).step()
        weights[name] = weight.detach() - before
        torch.testing.assert_close(weights[name], first_update(weight.grad, 0.01, name), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("scaling", [1.0, 0.5, 3.0])
@pytest.mark.parametrize("shape", [(40, 30), (120, 100)], ids=["exact", "krylov"])
def test_equations_7_to_9(shape, scaling):
    M, r = randn(*shape).float(), 6
    U, S, V = truncated_svd(M, r)
    B, R, A = sb_factors(U, S, V, scaling)
    assert (B.shape, R.shape, A.shape) == ((shape[0], r), (r, r), (r, shape[1]))
    assert B.dtype == R.dtype == A.dtype == torch.float32
    for gram in (B.T @ B, A @ A.T):
        torch.testing.assert_close(gram, torch.eye(r), rtol=0, atol=1e-6)
    torch.testing.assert_close(R, torch.diag(S) / scaling)
    torch.testing.assert_close(scaling * B @ R @ A, (U * S) @ V.T)


@pytest.mark.parametrize("scaling", [1.0, 0.5, 3.0])
def test_balanced_factors(scaling):
    M, r = randn(30, 20), 5
    U, S, V = truncated_svd(M, r)
    B, A = (factor.numpy() for factor in balanced_factors(U, S, V, scaling))
    np.testing.assert_allclose(scaling * B @ A, reference_sb.truncation(M.numpy(), r), **EXACT)
    for gram in (B.T @ B, A @ A.T):
        np.testing.assert_allclose(gram, np.diag(S) / scaling, **EXACT)
    # B is the root of s⁻¹ (ΔW ΔWᵀ)^½, whatever the signs of the singular vectors
    best = reference_sb.truncation(M.numpy(), r)
    np.testing.assert_allclose(B @ B.T, reference_sb.balanced_root(best @ best.T) / scaling, rtol=1e-6, atol=1e-6)


def like_gradients(shape: tuple[int, int], noise: float) -> torch.Tensor:
    """Low rank with a decaying spectrum, plus noise."""
    rank = 60
    spectrum = torch.arange(1, rank + 1, dtype=torch.float64) ** -1.0
    G = (randn(shape[0], rank, seed=1) * spectrum) @ randn(rank, shape[1], seed=2)
    return (G + noise * G.std() * randn(*shape, seed=3)).float()


def assert_orthonormal(*factors: torch.Tensor) -> None:
    for factor in factors:
        gram = factor.double().T @ factor.double()
        torch.testing.assert_close(gram, torch.eye(len(gram), dtype=torch.float64), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("noise", "deficit"),
    [
        pytest.param(0.0, 1e-4, id="low rank"),
        pytest.param(0.1, 1e-4, id="a little noise"),
        # Past the signal, singular values are those of noise, hardly apart: nearly as good, but another subspace.
        pytest.param(1.0, 1e-2, id="noise"),
    ],
)
@pytest.mark.parametrize("shape", SIZES, ids=str)
def test_truncated_svd_of_signs_of_gradients(shape, noise, deficit):
    M = like_gradients(shape, noise).sign()
    exact = np.linalg.svd(M.double().numpy(), compute_uv=False)
    for r in (4, 8, 32):
        U, S, V = truncated_svd(M, r)
        best, whole = np.sum(exact[:r] ** 2), np.sum(exact**2)
        residual = ((M - (U * S) @ V.T).double() ** 2).sum().item()
        assert -1e-6 < (residual - (whole - best)) / best <= deficit
        assert_orthonormal(U, V)
        assert (S.diff() <= 0).all()
        np.testing.assert_allclose(S.double().numpy(), exact[:r], rtol=100 * deficit)
        assert (S.double().numpy() <= exact[:r] * (1 + 1e-6)).all()  # a projection has no more energy


@pytest.mark.parametrize("shape", [(60, 40), (40, 60), (1, 5), (5, 1), (9, 9)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_truncated_svd_of_small_matrices_is_exact(shape, dtype):
    M = randn(*shape).to(dtype)
    for r in {1, min(shape) // 2 or 1, min(shape)}:
        U, S, V = truncated_svd(M, r)
        assert U.dtype == S.dtype == V.dtype == dtype
        best = reference_sb.truncation(M.double().numpy(), r)
        tolerance = 1e-5 if dtype == torch.float32 else 1e-11
        np.testing.assert_allclose(((U * S) @ V.T).numpy(), best, rtol=tolerance, atol=tolerance)
        assert_orthonormal(U, V)


RANK_3 = (randn(3, 300, seed=7).T @ randn(3, 200, seed=8)).float()
DEFICIENT = {
    "zeros": (torch.zeros(300, 200), 0),
    "ones": (torch.ones(300, 200), 1),
    "rank 3": (RANK_3, 3),
    "rank 3, wide": (RANK_3.T, 3),
    "sign of rank 1": ((randn(300, 1) @ randn(1, 200)).sign().float(), 1),
    "one entry": (torch.zeros(300, 200).index_put((torch.tensor(7), torch.tensor(9)), torch.tensor(2.0)), 1),
    "zero rows": (torch.cat([RANK_3, torch.zeros(50, 200)]), 3),
    "tiny": (RANK_3 * 1e-12, 3),
    "huge": (RANK_3 * 1e12, 3),
    "small zeros": (torch.zeros(6, 5), 0),
    "small ones": (torch.ones(6, 5), 1),
}


@pytest.mark.parametrize("kind", DEFICIENT)
def test_truncated_svd_of_deficient_matrices(kind):
    """Whatever the rank: orthonormal factors, no NaN, nothing lost."""
    M, rank = DEFICIENT[kind]
    for r in {1, 4} | ({16} if len(M) > 6 else {5}):
        U, S, V = truncated_svd(M, r)
        assert_orthonormal(U, V)
        assert (S >= 0).all()
        assert (S.diff() <= 0).all()
        size = M.norm().item()
        assert (S[rank:] <= 1e-4 * size).all()
        if r >= rank:
            assert (M - (U * S) @ V.T).norm() <= 1e-5 * size


@FEW
@given(
    rows=st.integers(90, 110),
    columns=st.integers(90, 110),
    rank=st.integers(0, 9),
    r=st.integers(1, 5),
    seed=st.integers(0, 2**20),
    decay=st.floats(0.1, 1.0),
)
def test_truncated_svd_finds_a_low_rank_matrix_whole(rows, columns, rank, r, seed, decay):
    """Of the Krylov path's sizes, where the space holds M's own range."""
    spectrum = decay ** torch.arange(rank, dtype=torch.float64)
    Q = [torch.linalg.qr(randn(n, rank, seed=seed + i)).Q for i, n in enumerate((rows, columns))]
    M = ((Q[0] * spectrum) @ Q[1].T).float()
    U, S, V = truncated_svd(M, r)
    expected = np.zeros(r)
    expected[: min(r, rank)] = spectrum[:r]
    np.testing.assert_allclose(S.numpy(), expected, rtol=1e-4, atol=1e-4)
    error = (M - (U * S) @ V.T).double().norm()
    assert error <= spectrum[r:].norm() + 1e-4
    assert_orthonormal(U, V)


@FEW
@given(rows=st.integers(1, 12), columns=st.integers(1, 12), seed=st.integers(0, 2**20), data=st.data())
def test_truncated_svd_of_any_small_shape(rows, columns, seed, data):
    r = data.draw(st.integers(1, min(rows, columns)))
    M = randn(rows, columns, seed=seed)
    U, S, V = truncated_svd(M, r)
    assert (U.shape, S.shape, V.shape) == ((rows, r), (r,), (columns, r))
    np.testing.assert_allclose(S.numpy(), np.linalg.svd(M.numpy(), compute_uv=False)[:r], rtol=1e-9, atol=1e-12)
    assert (M - (U * S) @ V.T).norm().item() == pytest.approx(reference_sb.tail(M.numpy(), r), rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("shape", [(30, 20), (300, 200)], ids=["exact", "krylov"])
def test_truncated_svd_is_deterministic_and_leaves_the_random_state_alone(shape):
    M = like_gradients(shape, 1.0)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = truncated_svd(M, 8)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(6)
    for one, another in zip(first, truncated_svd(M, 8), strict=True):
        assert torch.equal(one, another)
    if shape[0] == 300:
        assert not torch.equal(first[0], truncated_svd(M, 8, seed=1)[0])
        assert not torch.equal(first[0], truncated_svd(M, 8, depth=3)[0])


@pytest.mark.parametrize("shape", [(30, 20), (300, 200)], ids=["exact", "krylov"])
def test_truncated_svd_of_other_dtypes(shape):
    M = like_gradients(shape, 1.0)
    for dtype in (torch.bfloat16, torch.float16):
        for half, full in zip(truncated_svd(M.to(dtype), 4), truncated_svd(M.to(dtype).float(), 4), strict=True):
            assert half.dtype == torch.float32
            assert torch.equal(half, full)
    U, S, V = truncated_svd(M.double(), 4)
    assert U.dtype == S.dtype == V.dtype == torch.float64
    for factor in (U, V):
        torch.testing.assert_close(factor.T @ factor, torch.eye(4, dtype=torch.float64), rtol=0, atol=1e-12)


def test_more_depth_is_nearer():
    """Of a flat spectrum, where it is needed most."""
    M = randn(300, 200).float()
    best = np.sum(np.linalg.svd(M.double().numpy(), compute_uv=False)[:4] ** 2)
    deficits = [1 - truncated_svd(M, 4, depth=depth)[1].double().square().sum().item() / best for depth in (1, 2, 4)]
    assert deficits[0] > 2 * deficits[1] > 4 * deficits[2] >= 0


class OnlyCopies(TorchDispatchMode):
    """Fails for every operation on Apple's MPS but copies from and to it."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        tensors = [t for t in torch.utils._pytree.tree_leaves((args, kwargs, result)) if torch.is_tensor(t)]
        is_copy = func.overloadpacket is torch.ops.aten._to_copy or func.namespace == "prim"  # asks for the device
        assert is_copy or all(tensor.device.type != "mps" for tensor in tensors), func
        assert all(tensor.dtype != torch.float64 or tensor.device.type != "mps" for tensor in tensors), func
        return result


@pytest.mark.parametrize("shape", [(40, 30), (400, 300)])
def test_on_mps_the_svd_is_computed_on_the_cpu(shape):
    """MPS has no float64, nor every decomposition. There is none here: the tensors have shapes and devices only."""
    with FakeTensorMode():
        M = torch.empty(shape, device="mps")
        with OnlyCopies():
            U, S, V = truncated_svd(M, 4)
    assert [(t.device.type, t.dtype) for t in (U, S, V)] == [("mps", torch.float32)] * 3
    assert (U.shape, S.shape, V.shape) == ((shape[0], 4), (4,), (shape[1], 4))
