"""RefLoRA's formulas in float64 NumPy, eigendecompositions throughout: slow, and written from the papers, not from the
package. A is (r, in), B is (out, r), P = A Aᵀ, Q = Bᵀ B, and N = ‖B A‖_* the nuclear norm of the product."""

import math
from typing import NamedTuple

import numpy as np
from numpy import ndarray


def power(M: ndarray, exponent: float) -> ndarray:
    """M^exponent of a symmetric positive definite M."""
    values, vectors = np.linalg.eigh((M + M.T) / 2)
    return (vectors * values**exponent) @ vectors.T


def grams(A: ndarray, B: ndarray) -> tuple[ndarray, ndarray]:
    return A @ A.T, B.T @ B


def geometric_mean(P: ndarray, Q: ndarray) -> ndarray:
    """Theorem 3: P⁻¹ # Q = P^-½ (P^½ Q P^½)^½ P^-½."""
    root, inverse_root = power(P, 0.5), power(P, -0.5)
    return inverse_root @ power(root @ Q @ root, 0.5) @ inverse_root


def geometric_mean_of_lemma_7(P: ndarray, Q: ndarray) -> ndarray:
    """Lemma 7: Q^½ (Q^½ P Q^½)^-½ Q^½."""
    root = power(Q, 0.5)
    return root @ power(root @ P @ root, -0.5) @ root


def shrunk(G: ndarray, eps: float) -> ndarray:
    """Ĝ = (1 - ε) r G / tr G + ε I."""
    r = len(G)
    return (1 - eps) * r / np.trace(G) * G + eps * np.eye(r)


def scalar(A: ndarray, B: ndarray) -> float:
    """Theorem 5: s = ‖B‖_F / ‖A‖_F."""
    return float(np.linalg.norm(B) / np.linalg.norm(A))


def refactoring(A: ndarray, B: ndarray, eps: float = 0.0) -> ndarray:
    """S(ε) = s (P̂⁻¹ # Q̂): Theorem 3 at ε = 0, Theorem 5 at ε = 1."""
    P, Q = grams(A, B)
    return scalar(A, B) * geometric_mean(shrunk(P, eps), shrunk(Q, eps))


def nuclear_norm(A: ndarray, B: ndarray) -> float:
    return float(np.linalg.svd(B @ A, compute_uv=False).sum())


def small_step_factor(A: ndarray, B: ndarray, inverse_step: float) -> float:
    """c of Theorem 3: S = c (P⁻¹ # Q), c = [τ + √(τ² - 4 N²)] / (2 N), τ = 1 / (L η); 1 where τ <= 2 N."""
    N = nuclear_norm(A, B)
    if inverse_step <= 2 * N:
        return 1.0
    return (inverse_step + math.sqrt(inverse_step**2 - 4 * N**2)) / (2 * N)


def small_step_scalar(A: ndarray, B: ndarray, inverse_step: float) -> float:
    """s of Theorem 5: [τ + √(τ² - 4 ‖A‖² ‖B‖²)] / (2 ‖A‖²); ‖B‖ / ‖A‖ where τ <= 2 ‖A‖ ‖B‖."""
    a, b = np.sum(A**2), np.sum(B**2)
    if inverse_step <= 2 * math.sqrt(a * b):
        return scalar(A, B)
    return float((inverse_step + math.sqrt(inverse_step**2 - 4 * a * b)) / (2 * a))


def preconditioned(S: ndarray, grad_A: ndarray, grad_B: ndarray) -> tuple[ndarray, ndarray]:
    """∇A ← S⁻¹ ∇A, ∇B ← ∇B S."""
    return np.linalg.solve(S, grad_A), grad_B @ S


class AdamState(NamedTuple):
    """One factor, its gradient and its moments."""

    param: ndarray
    grad: ndarray
    exp_avg: ndarray
    exp_avg_sq: ndarray


def rescaled(state: AdamState, t: float) -> AdamState:
    """The state of t · param when the loss stays the same function: gradients divide by t, their squares by t²."""
    return AdamState(state.param * t, state.grad / t, state.exp_avg / t, state.exp_avg_sq / t**2)


def adamw_step(
    state: AdamState, step: int, *, lr: float, betas: tuple[float, float], eps: float, weight_decay: float
) -> ndarray:
    """The parameter after AdamW's step number `step` (from 1)."""
    exp_avg = betas[0] * state.exp_avg + (1 - betas[0]) * state.grad
    exp_avg_sq = betas[1] * state.exp_avg_sq + (1 - betas[1]) * state.grad**2
    direction = exp_avg / (1 - betas[0] ** step) / (np.sqrt(exp_avg_sq / (1 - betas[1] ** step)) + eps)
    return state.param * (1 - lr * weight_decay) - lr * direction
