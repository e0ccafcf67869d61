"""RefLoRA-O against a slow float64 version of its formulas, and its limits, gauge, extremes, and life in a Trainer."""

import math
import sys
from pathlib import Path

import pytest
import tiny
import tiny_trainer
import torch
from factor_pairs import EXTREMES, extreme
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR


sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks" / "evidence"))

import numpy as np
from reflora_o import RefLoraO, create_reflora_o_optimizer, whitening

from hf_reflora import create_reflora_optimizer
from hf_reflora.reflora.factors import LoraPair


CLOSE = {"rtol": 1e-7, "atol": 1e-10}
OPTIONS = {
    "both": {},
    "A": {"sides": "A"},
    "B": {"sides": "B", "delta": 0.1},
    "linear": {"delta_schedule": "linear"},
    "log": {"delta_schedule": "log", "delta": 1e-3},
    "length": {"length": 0.5},
    "no rescaling": {"rescale": False},
    "betas": {"betas": (0.8, 0.95), "eps": 1e-6},
}


def whitened_by_hand(D, delta):
    """‖D‖ M^(-1/2) D / ‖M^(-1/2) D‖ with M = (1 - δ) r D Dᵀ / tr(D Dᵀ) + δ I."""
    gram = D @ D.T
    if gram.trace() == 0:
        return D
    values, vectors = torch.linalg.eigh((1 - delta) * len(D) * gram / gram.trace() + delta * torch.eye(len(D)).to(D))
    flat = vectors @ torch.diag(values**-0.5) @ vectors.T @ D
    return flat * D.norm() / flat.norm()


def run_by_hand(
    model,
    steps,
    *,
    lr,
    rates,
    delta=0.02,
    delta_schedule="constant",
    sides="both",
    length=1.0,
    rescale=True,
    betas=(0.9, 0.999),
    eps=1e-8,
    weight_decay=0.01,
):
    """The formulas of RefLoRA-O, one matrix at a time; `rates` are the shares of `lr` of each step."""
    pairs = [(A, B) for A, B, _ in tiny.linear_pairs(model)]
    m, v = ({p: torch.zeros_like(p) for p in model.parameters()} for _ in range(2))
    for t in range(1, steps + 1):
        model.zero_grad()
        tiny.mlp_loss(model, t).backward()
        rate = rates(t)
        d = {
            "constant": delta,
            "linear": 1 - (1 - delta) * rate,
            "log": math.exp(math.log(delta) * rate),
        }[delta_schedule]
        with torch.no_grad():
            for p in [p for p in model.parameters() if p.requires_grad]:
                m[p] = betas[0] * m[p] + (1 - betas[0]) * p.grad
                v[p] = betas[1] * v[p] + (1 - betas[1]) * p.grad**2
                D = m[p] / (1 - betas[0] ** t) / ((v[p] / (1 - betas[1] ** t)).sqrt() + eps)
                if sides in ("both", "A") and any(p is A for A, _ in pairs):
                    D = length * whitened_by_hand(D, d)
                if sides in ("both", "B") and any(p is B for _, B in pairs):
                    D = length * whitened_by_hand(D.T, d).T
                p.copy_(p - lr * rate * weight_decay * p - lr * rate * D)
            for A, B in pairs if rescale and t > 1 else ():
                q = (B.norm() / A.norm()).sqrt()
                A *= q
                B /= q
                m[A], v[A], m[B], v[B] = m[A] / q, v[A] / q**2, m[B] * q, v[B] * q**2
    return tiny.trainable(model)


def rates(step):
    return [0.5, 1.0, 0.75, 0.4, 0.1][step - 1]


def run(model, optimizer, steps=5):
    schedule = LambdaLR(optimizer, lambda done: rates(min(done + 1, 5)))
    for t in range(1, steps + 1):
        optimizer.zero_grad()
        tiny.mlp_loss(model, t).backward()
        optimizer.step()
        schedule.step()
    return tiny.trainable(model)


def model_with_bias():
    """Pairs of two shapes, and a bias that belongs to none."""
    model = tiny.lora(tiny.mlp())
    bias = next(p for name, p in model.named_parameters() if name.endswith("4.bias"))
    bias.requires_grad_(True)
    return model


@pytest.mark.parametrize("name", OPTIONS)
def test_trajectory_is_the_one_by_hand(name):
    model = model_with_bias()
    result = run(model, create_reflora_o_optimizer(model, lr=0.02, **OPTIONS[name]))
    expected = run_by_hand(model_with_bias(), 5, lr=0.02, rates=rates, **OPTIONS[name])
    tiny.assert_same(result, expected, **CLOSE)
    if name != "both":
        model = model_with_bias()
        default = run(model, create_reflora_o_optimizer(model, lr=0.02))
        assert any(not torch.allclose(default[key], result[key], rtol=1e-3) for key in default)


def test_from_loras_start():
    """B = 0: the gradient of A and with it its direction vanish at the first step."""

    def start():
        model = tiny.lora(tiny.mlp())
        for _, B, _ in tiny.linear_pairs(model):
            B.data.zero_()
        return model

    model = start()
    result = run(model, create_reflora_o_optimizer(model, lr=0.02))
    tiny.assert_same(result, run_by_hand(start(), 5, lr=0.02, rates=rates), **CLOSE)


def test_delta_1_is_adamw_and_the_packages_rescaling():
    settings = {"lr": 0.02, "weight_decay": 0.1, "betas": (0.8, 0.99)}
    model = model_with_bias()
    result = run(model, create_reflora_o_optimizer(model, delta=1.0, **settings))
    model = model_with_bias()
    expected = run(model, create_reflora_optimizer(model, AdamW, method="reflora_s", warmup_steps=1, **settings))
    tiny.assert_same(result, expected, rtol=1e-10, atol=1e-13)
    model = model_with_bias()
    result = run(model, create_reflora_o_optimizer(model, delta=1.0, rescale=False, **settings))
    model = model_with_bias()
    expected = run(model, AdamW([p for p in model.parameters() if p.requires_grad], **settings))
    tiny.assert_same(result, expected, rtol=1e-10, atol=1e-13)


def pair(r=4, n_in=9, n_out=7, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    A, B = (torch.randn(shape, generator=generator, dtype=dtype) for shape in ((r, n_in), (n_out, r)))
    return torch.nn.Parameter(A), torch.nn.Parameter(B)


def steps(A, B, optimizer, count, first=0):
    """ΔW = B A after each of `count` steps on a quadratic loss in ΔW."""
    target = torch.randn(len(B), A.shape[1], generator=torch.Generator().manual_seed(9), dtype=A.dtype)
    products = []
    for _ in range(first, first + count):
        optimizer.zero_grad()
        (B @ A - target).square().sum().backward()
        optimizer.step()
        products.append((B @ A).detach().clone())
    return products


def test_whatever_scale_the_state_had_the_rescaling_forgets_it():
    """Factors and moments may be scaled by c between a step and its rescaling: the trajectory of B A is the same.

    It is so from the first rescaling on, at the second step. The steps before it are Adam's in the scale of the given
    factors: Adam's steps have one size for every entry, so pairs that differ in c part ways there.
    """
    A, B = pair()
    optimizer = RefLoraO([A, B], [LoraPair("pair", A, B, 1.0)], lr=0.01, eps=0.0)
    steps(A, B, optimizer, 3)
    C, D = pair()
    scaled = RefLoraO([C, D], [LoraPair("pair", C, D, 1.0)], lr=0.01, eps=0.0)
    steps(C, D, scaled, 3)
    for factor, c in ((C, 27.0), (D, 1 / 27.0)):
        factor.data *= c
        scaled.state[factor]["exp_avg"] /= c
        scaled.state[factor]["exp_avg_sq"] /= c**2
    scaled._rescale()
    for expected, actual in zip(steps(A, B, optimizer, 5), steps(C, D, scaled, 5), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)

    E, F = pair()
    E.data *= 27
    F.data /= 27
    other = steps(E, F, RefLoraO([E, F], [LoraPair("pair", E, F, 1.0)], lr=0.01, eps=0.0), 1)
    G, H = pair()
    plain = steps(G, H, RefLoraO([G, H], [LoraPair("pair", G, H, 1.0)], lr=0.01, eps=0.0), 1)
    assert (other[0] - plain[0]).norm() > 0.01 * plain[0].norm()


def test_rotations_of_the_direction_commute_with_the_whitening():
    """What is whitened has no preferred axes along the rank: T(Q D) = Q T(D) Qᵀ. (Adam itself does not commute.)"""
    D = torch.randn(3, 5, 11, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    Q = torch.linalg.qr(torch.randn(3, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1)))[0]
    T = whitening(D @ D.mT, delta=0.02, least_delta=0.02)
    torch.testing.assert_close(whitening(Q @ D @ D.mT @ Q.mT, delta=0.02, least_delta=0.02), Q @ T @ Q.mT)
    scale = torch.tensor([1e-6, 1.0, 1e6], dtype=torch.float64)[:, None, None]
    torch.testing.assert_close(whitening(scale * D @ D.mT, delta=0.02, least_delta=0.02), T)


@pytest.mark.parametrize("r", [1, 2, 8, 64])
@pytest.mark.parametrize("delta", [1e-6, 1e-3, 0.02, 0.5])
def test_whitened_directions_are_flat_and_keep_their_length(r, delta):
    rng = np.random.default_rng(r)
    for how in (1.0, "rank_1", "cond_1e8", 1e-15, 1e15):
        D = extreme(rng, r, 70, how).float()[None]
        T = whitening(D @ D.mT, delta=delta, least_delta=delta)
        expected = whitened_by_hand(D[0].double(), delta)
        # The Gram matrix is rounded by 2⁻²⁴ of its trace, and M^(-1/2) multiplies that by up to r / δ.
        error = 8 * r * 2**-24 / delta
        # A smaller bound takes more polynomials and gives the same polar factor.
        for whitened in (T @ D, whitening(D @ D.mT, delta=delta, least_delta=delta / 50) @ D):
            assert whitened.isfinite().all()
            if error < 0.1:
                assert (whitened[0] - expected).norm() <= error * D.norm()
                assert (whitened.norm() / D.norm()).item() == pytest.approx(1, abs=error)


# fp16 factors are left out: there Adam's eps of 1e-8 is 0, with AdamW, too.
FINITE = [name for name in EXTREMES if not any(word in name for word in ("nan", "inf", "fp16"))]


@pytest.mark.parametrize("name", FINITE)
def test_finite_at_extremes(name):
    rng = np.random.default_rng(0)
    how_A, how_B = EXTREMES[name]
    A, B = (torch.nn.Parameter(extreme(rng, *shape, how)) for shape, how in (((4, 9), how_A), ((7, 4), how_B)))
    optimizer = RefLoraO([A, B], [LoraPair("pair", A, B, 1.0)], lr=1e-3, delta=0.01)
    target = torch.ones(7, 9)
    for _ in range(6):
        # The gradients of ‖B A - target‖ / ‖target‖, written out: its own backward pass overflows earlier.
        E = B.detach().double() @ A.detach().double() - target
        E /= max(E.norm().item(), 1e-300)
        A.grad, B.grad = (B.detach().double().T @ E).to(A.dtype), (E @ A.detach().double().T).to(B.dtype)
        optimizer.step()
        assert all(t.isfinite().all() for t in (A, B))


def test_gradients_of_rank_1_and_none():
    A, B = pair(dtype=torch.float32)
    C, D = pair(seed=1, dtype=torch.float32)
    optimizer = RefLoraO([A, B, C, D], [LoraPair(n, *p, 1.0) for n, p in (("a", (A, B)), ("b", (C, D)))], lr=1e-2)
    before = C.detach().clone(), D.detach().clone()
    for _ in range(4):
        A.grad, B.grad = torch.ones_like(A), torch.ones_like(B)
        optimizer.step()
        assert A.isfinite().all()
        assert B.isfinite().all()
    assert torch.equal(C, before[0])
    assert torch.equal(D, before[1])


def test_bf16_adapters_stay_bf16():
    A, B = pair(dtype=torch.bfloat16)
    optimizer = RefLoraO([A, B], [LoraPair("pair", A, B, 1.0)], lr=1e-2)
    steps(A, B, optimizer, 4)
    assert A.dtype == B.dtype == optimizer.state[A]["exp_avg"].dtype == torch.bfloat16
    assert A.isfinite().all()
    assert B.isfinite().all()


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"delta": 0.0}, "delta"),
        ({"delta": math.nan}, "delta"),
        ({"delta_schedule": "cosine"}, "delta_schedule"),
        ({"sides": "AB"}, "sides"),
        ({"length": 0.0}, "length"),
    ],
)
def test_wrong_values_are_refused(wrong, words):
    with pytest.raises(ValueError, match=words):
        create_reflora_o_optimizer(tiny.lora(tiny.mlp()), lr=0.1, **wrong)


def test_a_model_without_pairs_is_refused():
    with pytest.raises(ValueError, match="looked for"):
        create_reflora_o_optimizer(tiny.mlp(), lr=0.1)


def test_in_a_trainer_a_resumed_run_is_the_unbroken_one(tmp_path):
    def trainer(folder, **changes):
        model = tiny.lora(tiny.llama())
        optimizer = create_reflora_o_optimizer(model, lr=0.01, delta_schedule="log")
        settings = {"max_steps": 6, "warmup_steps": 2, "max_grad_norm": 0.5, "save_strategy": "steps", "save_steps": 3}
        return tiny_trainer.build(
            folder, model=model, more={"optimizers": (optimizer, None)}, **{**settings, **changes}
        )

    unbroken = trainer(tmp_path / "unbroken")
    unbroken.train()
    start = tiny.trainable(tiny.lora(tiny.llama()))
    assert all((value - start[name]).abs().max() > 1e-3 for name, value in tiny.trainable(unbroken.model).items())
    resumed = trainer(tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "unbroken" / "checkpoint-3"))
    tiny.assert_same(tiny.trainable(resumed.model), tiny.trainable(unbroken.model))
    assert {state["step"] for state in resumed.optimizer.state.values()} == {6}
