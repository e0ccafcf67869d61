"""RefLoRA under many steps of gradient descent and Adam: matrix factorization, and the gauge test.

The letters are the package's: W = B A with A (r, in) and B (out, r). Everything is float64.
"""

import functools
import itertools
import math
from collections.abc import Callable

import torch
from reflora_o import RefLoraO
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from hf_reflora.reflora.factors import LoraPair
from hf_reflora.reflora.optimizer_support import moments
from hf_reflora.reflora.precondition import precondition_, precondition_scalar_, rescale_
from hf_reflora.reflora.refactor import refactor_pairs


DIVERGED = 1e12

FACTORIZATION = {
    "sizes": [[100, 100, 8], [64, 64, 8], [50, 30, 5]],  # out, in, r; the first one is plotted
    "learning_rates": [0.01, 0.03],
    "grid": [float(f"{10 ** (k / 4):.3g}") for k in range(-10, 2)],  # quarter-decades from 0.003 to 1.8
    "seeds": 10,
    "steps": 300,
    "plotted_steps": 100,
    "reached": 1e-2,
    "std_A": 1.0,
}
GAUGE = {
    "size": [40, 30, 4],
    "noise": 0.1,
    "std": 0.5,
    "scales": [1, 3, 9, 27],
    "cond_T": 10,
    "steps": 200,
    "rates": {"SGD": 0.01, "Adam": 0.1},
    "seed": 0,
}


def gaussian(*shape: int, generator: torch.Generator) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def low_rank(out: int, n_in: int, r: int, generator: torch.Generator) -> Tensor:
    """A Gaussian matrix, truncated to its r largest singular values."""
    U, S, Vh = torch.linalg.svd(gaussian(out, n_in, generator=generator), full_matrices=False)
    return U[:, :r] * S[:r] @ Vh[:r]


# What each method does with the gradients, before a step of gradient descent or Adam


def scaled_gd(A: Tensor, B: Tensor) -> None:
    """ScaledGD (Tong et al., 2021): ∇A ← (BᵀB)⁻¹ ∇A, ∇B ← ∇B (AAᵀ)⁻¹; the first step from B = 0 is plain."""
    if B.any():
        A.grad = torch.linalg.solve(B.T @ B, A.grad)
        B.grad = torch.linalg.solve(A @ A.T, B.grad.T).T


def reflora(A: Tensor, B: Tensor) -> None:
    precondition_([A], [B], [A.grad], [B.grad])


def reflora_s(A: Tensor, B: Tensor) -> None:
    precondition_scalar_([A], [B], [A.grad], [B.grad])


BEFORE = {"LoRA": lambda A, B: None, "ScaledGD": scaled_gd, "RefLoRA-S": reflora_s, "RefLoRA": reflora}


def refactoring_of(method: str, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """S and S⁻¹ of Theorem 3 for "RefLoRA", of Theorem 5 for "RefLoRA-S", and I for other methods."""
    if not method.startswith("RefLoRA"):
        return (torch.eye(len(A), dtype=A.dtype),) * 2
    _, _, R = refactor_pairs([A], [B], eps=1.0 if method == "RefLoRA-S" else None)
    return R.S[0], R.S_inv[0]


def norms(method: str, A: Tensor, B: Tensor) -> list[float]:
    """‖A‖, ‖B‖, ‖∇A‖, ‖∇B‖, for RefLoRA and RefLoRA-S those of the refactored pair, S^(1/2) A and B S^(-1/2)."""
    P, Q = A @ A.T, B.T @ B
    S, S_inv = refactoring_of(method, A, B)
    squares = [(P * S).sum(), (Q * S_inv).sum(), (A.grad @ A.grad.T * S_inv).sum(), (B.grad.T @ B.grad * S).sum()]
    return [math.sqrt(max(float(square), 0.0)) for square in squares]


def descend(
    start: tuple[Tensor, Tensor],
    target: Tensor,
    optimizer: Callable[[nn.Parameter, nn.Parameter], Optimizer],
    steps: int,
    *,
    before: Callable[[Tensor, Tensor], None] = BEFORE["LoRA"],
    after: Callable[[Optimizer, Tensor, Tensor], None] | None = None,
    decay: bool = False,
    measure: Callable[[Tensor, Tensor], list[float]] | None = None,
    until: float = 0.0,
) -> dict[str, list]:
    """Minimizes ‖B A - target‖² / 2 and returns the losses, one more than steps; fewer where it diverges.

    Args:
        optimizer: Makes the optimizer of A and B.
        before: Called with A and B, which have gradients, before each step.
        after: Called with the optimizer, A and B after each step.
        decay: Whether the learning rate falls linearly to 0.
        measure: Numbers to record at each step, from A and B with their gradients.
        until: A loss below which it ends.
    """
    A, B = (nn.Parameter(factor.clone()) for factor in start)
    optimizer_ = optimizer(A, B)
    schedule = LambdaLR(optimizer_, lambda step: 1 - step / steps if decay else 1.0)
    losses, measured = [], []
    for _ in range(steps + 1):
        optimizer_.zero_grad()
        loss = (B @ A - target).square().sum() / 2
        if not loss.item() < DIVERGED:  # NaN, too
            break
        losses.append(loss.item())
        if loss.item() < until:
            break
        loss.backward()
        with torch.no_grad():
            if measure:
                measured.append(measure(A, B))
            before(A, B)
        optimizer_.step()
        if after:
            with torch.no_grad():
                after(optimizer_, A, B)
        schedule.step()
    return {"loss": losses, **({"norms": measured} if measure else {})}


def matrix_factorization(settings: dict) -> dict:
    """Figure 2: min ‖B A - Y‖² / 2 for a Y of rank r by gradient descent from LoRA's start, B = 0.

    Returns:
        `curves`: of the first size and seed, by method and learning rate. `reached`: the steps that each run needs to
        bring the loss below settings["reached"], by size, learning rate and method: null where it does not, "diverged"
        where its loss grows beyond all bounds; and the loss after the last step. `grid`: the same steps for more
        learning rates.
    """
    curves, reached, grid = [], [], []
    for size, (method, before) in itertools.product(settings["sizes"], BEFORE.items()):
        for lr in settings["learning_rates"]:
            runs = [
                factorize(size, seed, lr, before, settings, functools.partial(norms, method))
                for seed in range(settings["seeds"])
            ]
            steps = [first_below(run["loss"], settings["reached"], settings["steps"]) for run in runs]
            ends = [run["loss"][-1] for run in runs]
            reached.append({"size": size, "lr": lr, "method": method, "steps": steps, "end": ends})
            if size == settings["sizes"][0]:
                shown = {name: values[: settings["plotted_steps"] + 1] for name, values in runs[0].items()}
                curves.append({"method": method, "lr": lr, **shown})
        for lr in settings["grid"]:
            losses = [factorize(size, seed, lr, before, settings)["loss"] for seed in range(settings["seeds"])]
            steps = [first_below(loss, settings["reached"], settings["steps"]) for loss in losses]
            grid.append({"size": size, "lr": lr, "method": method, "steps": steps})
    return {"curves": curves, "reached": reached, "grid": grid}


def factorize(
    size: list[int],
    seed: int,
    lr: float,
    before: Callable[[Tensor, Tensor], None],
    settings: dict,
    measure: Callable[[Tensor, Tensor], list[float]] | None = None,
) -> dict[str, list]:
    """One run of gradient descent; without `measure` it ends when the loss is below settings["reached"]."""
    generator = torch.Generator().manual_seed(seed)
    out, n_in, r = size
    target = low_rank(out, n_in, r, generator)
    A = settings["std_A"] * gaussian(r, n_in, generator=generator)
    return descend(
        (A, torch.zeros(out, r, dtype=torch.float64)),
        target,
        lambda A, B: SGD([A, B], lr=lr),
        settings["steps"],
        before=before,
        measure=measure,
        until=settings["reached"] if measure is None else 0.0,
    )


def first_below(losses: list[float], bound: float, steps: int) -> int | str | None:
    """The first step with a loss below `bound`, "diverged" or None."""
    step = next((i for i, loss in enumerate(losses) if loss < bound), None)
    return "diverged" if step is None and len(losses) <= steps else step


def rescale(optimizer: Optimizer, A: Tensor, B: Tensor) -> None:
    rescale_([A], [B], [moments(optimizer, A)], [moments(optimizer, B)])


GAUGE_METHODS = {  # name: (optimizer, before, after)
    "SGD": {
        "LoRA": (lambda A, B, lr: SGD([A, B], lr=lr), BEFORE["LoRA"], None),
        "ScaledGD": (lambda A, B, lr: SGD([A, B], lr=lr), scaled_gd, None),
        "RefLoRA-S": (lambda A, B, lr: SGD([A, B], lr=lr), reflora_s, None),
        "RefLoRA": (lambda A, B, lr: SGD([A, B], lr=lr), reflora, None),
    },
    "Adam": {
        "LoRA": (lambda A, B, lr: Adam([A, B], lr=lr), BEFORE["LoRA"], None),
        "RefLoRA": (lambda A, B, lr: Adam([A, B], lr=lr), reflora, None),
        "RefLoRA-S": (lambda A, B, lr: Adam([A, B], lr=lr), BEFORE["LoRA"], rescale),
        "RefLoRA-O": (
            lambda A, B, lr: RefLoraO([A, B], [LoraPair("pair", A, B, 1.0)], lr=lr, weight_decay=0.0),
            BEFORE["LoRA"],
            None,
        ),
    },
}


def gauge(settings: dict) -> dict:
    """One problem, started from equivalent pairs: (c A, B / c) for every scale c, and (Tᵀ A, B T⁻ᵀ) for one T.

    Returns:
        `runs`: the losses of every run by optimizer, method and start (a run that diverged has fewer), and their
        `difference` from those of the first start.
    """
    generator = torch.Generator().manual_seed(settings["seed"])
    out, n_in, r = settings["size"]
    target = low_rank(out, n_in, r, generator) + settings["noise"] * gaussian(out, n_in, generator=generator)
    A, B = (settings["std"] * gaussian(*shape, generator=generator) for shape in ((r, n_in), (out, r)))
    U, V = (torch.linalg.qr(gaussian(r, r, generator=generator))[0] for _ in range(2))
    sizes = torch.logspace(-0.5, 0.5, r, base=settings["cond_T"], dtype=torch.float64)
    T = U * sizes @ V.T
    starts = {f"c = {c}": (c * A, B / c) for c in settings["scales"]} | {"T": (T.T @ A, B @ torch.linalg.inv(T).T)}
    runs = []
    for kind, methods in GAUGE_METHODS.items():
        for method, (optimizer, before, after) in methods.items():
            first = None
            for name, start in starts.items():
                losses = descend(
                    start,
                    target,
                    lambda A, B, make=optimizer, kind=kind: make(A, B, settings["rates"][kind]),
                    settings["steps"],
                    before=before,
                    after=after,
                    decay=kind == "Adam",
                )["loss"]
                first = first or losses
                run = {"optimizer": kind, "method": method, "start": name, "loss": losses}
                runs.append({**run, "difference": difference(losses, first)})
    return {"runs": runs}


def difference(curve: list[float], first: list[float]) -> dict[str, float] | None:
    """The largest relative difference of two loss curves and that of their ends; None where one of them diverged."""
    if len(curve) != len(first):
        return None
    differences = [abs(a / b - 1) for a, b in zip(curve, first, strict=True)]
    return {"largest": max(differences), "last": differences[-1]}
