"""LoRA-SB's formulas in float64 NumPy: slow, and written from the paper (arXiv 2411.19557), not from the package.
W = W0 + s B R A with W (out, in), B (out, r), R (r, r) and A (r, in); G = ∂L/∂W, g = ∂L/∂R or what takes its place."""

import numpy as np
from numpy import ndarray


def gradient_of_R(G: ndarray, B: ndarray, A: ndarray, s: float) -> ndarray:
    """Lemma 2: ∂L/∂R = s Bᵀ G Aᵀ."""
    return s * B.T @ G @ A.T


def equivalent_gradient(g: ndarray, B: ndarray, A: ndarray, s: float) -> ndarray:
    """Definition 1: g̃ = s B g A, what W moves along when R moves along g."""
    return s * B @ g @ A


def nearest_g(G: ndarray, B: ndarray, A: ndarray, s: float) -> ndarray:
    """Theorem 3 as its problem, min over g of ‖s B g A − G‖_F: least squares over the entries of g, row by row."""
    design = s * np.kron(B, A.T)  # vec(B g A) = (B ⊗ Aᵀ) vec(g)
    return np.linalg.lstsq(design, G.ravel(), rcond=None)[0].reshape(B.shape[1], A.shape[0])


def formula_of_theorem_3(grad_R: ndarray, B: ndarray, A: ndarray, s: float) -> ndarray:
    """s⁻² (BᵀB)⁻¹ ∇R (A Aᵀ)⁻¹."""
    return np.linalg.inv(B.T @ B) @ grad_R @ np.linalg.inv(A @ A.T) / s**2


def first_step(G: ndarray, eta: float, update: str) -> ndarray:
    """Equations 5 and 6: the optimizer's first step, of Adam (m̂ / √v̂ = G / |G|, and 0 where G = 0) or of SGD."""
    if update == "gradient":
        return -eta * G
    return -eta * np.divide(G, np.abs(G), out=np.zeros_like(G), where=G != 0)


def truncation(M: ndarray, r: int) -> ndarray:
    """The best approximation of M of rank r (Eckart-Young-Mirsky)."""
    U, S, Vt = np.linalg.svd(M, full_matrices=False)
    return (U[:, :r] * S[:r]) @ Vt[:r]


def tail(M: ndarray, r: int) -> float:
    """Its error, in the Frobenius norm."""
    return float(np.sqrt(np.sum(np.linalg.svd(M, compute_uv=False)[r:] ** 2)))


def balanced_root(M: ndarray) -> ndarray:
    """The symmetric positive semidefinite square root."""
    values, vectors = np.linalg.eigh(M)
    return (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T
