"""LoRA-SB's formulas as pure tensor functions (https://huggingface.co/papers/2411.19557).

A linear layer computes x Wᵀ with W = W0 + s B R A, where W is out × in, B out × r, R r × r and A r × in.
"""

import torch
from torch import Tensor


UPDATES = ("sign", "gradient")


def first_update(G: Tensor, eta: float, update: str = "sign") -> Tensor:
    """ΔW, the optimizer's first step of full fine-tuning (Equations 5 and 6).

    Args:
        G: Gradient of the loss with respect to W, (out, in), float.
        eta: Step size η > 0 of that step.
        update: `"sign"`, −η sign(G), for Adam and its kin, whose first step is the sign of the gradient; `"gradient"`,
            −η G, for SGD.

    Returns:
        ΔW, of the shape and dtype of G.
    """
    return (G.sign() if update == "sign" else G.clone()).mul_(-eta)


def truncated_svd(M: Tensor, r: int, *, depth: int = 4, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """The r largest singular triplets of M, by a block Krylov method (Musco & Musco, 2015, Algorithm 2).

    The space of `depth` blocks M (MᵀM)ʲ Ω of r + max(8, r/4) columns holds the leading singular vectors far better
    than as many power iterations do: of the sign of a gradient it misses less than 1e-4 of the energy of the best
    rank-r matrix, and up to 1e-2 where r reaches into a flat spectrum (noise), whose subspace is arbitrary.
    Matrices hardly larger than that space get an exact SVD.

    Args:
        M: (out, in), finite, float32 or float64; other dtypes are computed in float32.
        r: 1 ≤ r ≤ min(out, in).
        depth: Number of blocks.
        seed: Of Ω. The global random state is not touched.

    Returns:
        U (out, r) and V (in, r) with columns orthonormal to 1e-6 (float32), S (r,) in descending order.
    """
    M = M.to(torch.promote_types(M.dtype, torch.float32))
    block = r + max(8, r // 4)
    if depth * block >= 0.6 * min(M.shape):
        U, S, Vt = torch.linalg.svd(M, full_matrices=False)
        return _orthonormal(U[:, :r]), S[:r], _orthonormal(Vt[:r].T)
    generator = torch.Generator().manual_seed(seed)
    Z = torch.randn(M.shape[1], block, generator=generator, dtype=M.dtype).to(M.device)
    K, T = M.new_empty(M.shape[0], 0), M.new_empty(0, M.shape[1])
    for _ in range(depth):
        Y = torch.linalg.qr(torch.cat([K, M @ Z], dim=1)).Q[:, -block:]  # orthonormal to K whatever the rank of M
        Z = M.T @ Y
        K, T = torch.cat([K, Y], dim=1), torch.cat([T, Z.T])
    # The best rank-r matrix within the space: the SVD of T = KᵀM, through the small T Tᵀ.
    energies, X = torch.linalg.eigh(T.double() @ T.double().T)
    U, V = K @ X.to(M.dtype)[:, -r:].flip(1), T.T @ X.to(M.dtype)[:, -r:].flip(1)
    return _orthonormal(U), energies[-r:].flip(0).clamp(min=0).sqrt().to(M.dtype), _orthonormal(V)


def _orthonormal(X: Tensor) -> Tensor:
    """The directions of nearly orthogonal columns, orthonormal to rounding also where a column is 0."""
    Q, R = torch.linalg.qr(X.double())
    return (Q * R.diagonal().sign().where(R.diagonal() != 0, 1)).to(X.dtype)


def sb_factors(U: Tensor, S: Tensor, V: Tensor, s: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """B, R and A of LoRA-SB with s B R A = U diag(S) Vᵀ (Equations 7 and 8), BᵀB = A Aᵀ = I."""
    return U, torch.diag(S) / s, V.T


def balanced_factors(U: Tensor, S: Tensor, V: Tensor, s: float = 1.0) -> tuple[Tensor, Tensor]:
    """B and A of an ordinary LoRA with s B A = U diag(S) Vᵀ, balanced as RefLoRA assumes: BᵀB = A Aᵀ = diag(S)/s."""
    root = (S / s).sqrt()
    return U * root, root[:, None] * V.T


def optimal_R_gradient(grad_R: Tensor, B: Tensor, A: Tensor, s: float = 1.0) -> Tensor:
    """g = s⁻² (BᵀB)⁻¹ ∇R (A Aᵀ)⁻¹ (Theorem 3): s B g A is the matrix nearest to the full gradient that R can reach.

    With LoRA-SB's initialization, BᵀB = A Aᵀ = I and s = 1, it is ∇R itself (Equation 9), which is why an ordinary
    optimizer on R is right there. For other A and B (LoRA-XS, pruned or rounded factors) call it before the step.

    Args:
        grad_R: ∇R = s Bᵀ G Aᵀ (Lemma 2), (r, r).
        B: (out, r), full rank.
        A: (r, in), full rank.
        s: The adapter's scaling.
    """
    g = torch.linalg.solve(B.T @ B, grad_R)
    return torch.linalg.solve(A @ A.T, g, left=False) / s**2
