"""RefLoRA in one step of gradient descent: the loss of linear regression and its upper bounds by step size."""

import torch
from theory_descent import gaussian, refactoring_of
from torch import Tensor

from hf_reflora.reflora.precondition import precondition_, precondition_scalar_


REGRESSION = {
    "out": 10,
    "in": 10,
    "samples": 20,
    "rank": 2,
    "std_A": 1.0,
    "std_B": [1.0, 0.2, 0.05],
    "plotted_std_B": [1.0, 0.2],
    "draws": 200,
    "points": 800,
    "plotted_points": 160,
}
REGRESSION_METHODS = ("LoRA", "RefLoRA-S", "RefLoRA")


def linear_regression(settings: dict) -> dict:
    """Figure 1: the loss ‖W X - Y‖² / (2 N) after one step of size η, and its upper bounds, for S of each method.

    Returns:
        `draws`: of every draw of X, Y, A and B, by the size of B, `summary` of each method. `curves`: of the first.
    """
    draws, curves = [], []
    for std_B in settings["std_B"]:
        for seed in range(settings["draws"]):
            generator = torch.Generator().manual_seed(seed)
            X, Y = (gaussian(settings[name], settings["samples"], generator=generator) for name in ("in", "out"))
            A = settings["std_A"] * gaussian(settings["rank"], settings["in"], generator=generator)
            B = std_B * gaussian(settings["out"], settings["rank"], generator=generator)
            problem = Regression(X, Y, A, B)
            etas = problem.step_sizes(settings["points"])
            methods = {m: summary(problem.step(m, etas), etas, problem.loss) for m in REGRESSION_METHODS}
            draws.append({"std_B": std_B, "seed": seed, "methods": methods})
            if seed == 0 and std_B in settings["plotted_std_B"]:
                etas = torch.linspace(
                    0, 1.1 * max(m["widest"] for m in methods.values()), settings["plotted_points"] + 1
                )
                curves.append({"std_B": std_B, **problem.curves(etas[1:].double())})
    return {"curves": curves, "draws": draws}


class Regression:
    """The problem ‖W X - Y‖² / (2 N) at W = B A: its loss, gradient G and smoothness constant L in W."""

    def __init__(self, X: Tensor, Y: Tensor, A: Tensor, B: Tensor):
        self.X, self.Y, self.A, self.B = X, Y, A, B
        samples = X.shape[1]
        self.loss = self.loss_at(B @ A).item()
        self.G = (B @ A @ X - Y) @ X.T / samples
        self.L = torch.linalg.matrix_norm(X, ord=2).item() ** 2 / samples

    def loss_at(self, W: Tensor) -> Tensor:
        return (W @ self.X - self.Y).square().sum((-2, -1)) / (2 * self.X.shape[1])

    def step_sizes(self, points: int) -> Tensor:
        """A geometric range of η, up to where every method's step raises the loss, as `summary` checks."""
        largest = 20 / (self.L * torch.linalg.matrix_norm(self.B @ self.A, ord="nuc").item())
        return largest * torch.logspace(-4, 0, points, dtype=torch.float64)

    def step(self, method: str, eta: Tensor, small: bool = False) -> dict[str, Tensor]:
        """Loss, quadratic bound (6) and objective (8) times η², after one step of each size η with the method's S.

        Args:
            small: Whether S follows the branch of Theorems 3 and 5 for small η.
        """
        A, B, G, L = self.A, self.B, self.G, self.L
        inverse_steps = (1 / (L * eta)).tolist() if small else None
        copies = len(eta) if small else 1  # else S, and with it the direction, does not depend on η
        grads_A, grads_B = [B.T @ G for _ in range(copies)], [G @ A.T for _ in range(copies)]
        if method == "RefLoRA":
            precondition_([A] * copies, [B] * copies, grads_A, grads_B, inverse_steps=inverse_steps)
        elif method == "RefLoRA-S":
            precondition_scalar_([A] * copies, [B] * copies, grads_A, grads_B, inverse_steps=inverse_steps)
        steps_A, steps_B = (eta[:, None, None] * torch.stack(grads) for grads in (grads_A, grads_B))
        change = (B - steps_B) @ (A - steps_A) - B @ A
        bound = self.loss + (G * change).sum((-2, -1)) + L / 2 * change.square().sum((-2, -1))  # (6)
        S, S_inv = refactoring_of(method, A, B)
        trace_P, trace_Q = (A @ A.T * S).sum(), (B.T @ B * S_inv).sum()
        if small:  # S times the c with c tr(P S) + tr(Q S⁻¹) / c = 1 / (L η), where there is one
            goal = 1 / (L * eta)
            gap = goal.square() - 4 * trace_P * trace_Q
            c = torch.where(gap > 0, (goal + gap.clamp(min=0).sqrt()) / (2 * trace_P), 1)
            trace_P, trace_Q = c * trace_P, trace_Q / c
        objective = (eta * (trace_P + trace_Q) - 1 / L).square()  # (8) times η²
        return {"loss": self.loss_at(B @ A + change), "bound": bound, "objective": objective}

    def curves(self, eta: Tensor) -> dict:
        """What is plotted: `step` of every method for each η, and for RefLoRA also with the branch for small η."""
        steps = {method: self.step(method, eta) for method in REGRESSION_METHODS}
        steps["RefLoRA, small η"] = self.step("RefLoRA", eta, small=True)
        threshold = 1 / (2 * self.L * torch.linalg.matrix_norm(self.B @ self.A, ord="nuc").item())  # Theorem 3
        methods = {method: {name: v.tolist() for name, v in values.items()} for method, values in steps.items()}
        return {"eta": eta.tolist(), "loss": self.loss, "threshold": threshold, "methods": methods}


def summary(step: dict[str, Tensor], eta: Tensor, start: float) -> dict:
    """The least loss after a step as a share of `start`, the largest η before the loss exceeds `start`, and whether
    the bound (6) holds everywhere."""
    worse = (step["loss"] > start).nonzero()
    if not len(worse):
        raise ValueError("The step lowers the loss at every η: the range of step sizes is too small.")
    holds = bool((step["bound"] >= step["loss"] - 1e-9 * start).all())
    widest = eta[worse[0, 0] - 1].item() if worse[0, 0] > 0 else 0.0
    return {"least": step["loss"].min().item() / start, "widest": widest, "bound_holds": holds}
