"""LoRA-SB's formulas as pure functions of tensors (https://huggingface.co/papers/2411.19557).

A linear layer computes x Wᵀ with W = W0 + s B R A, where W is (out, in), B (out, r), R (r, r) and A (r, in).
"""

import torch
from torch import Tensor


UPDATES = ("sign", "gradient")


def first_update(G: Tensor, eta: float, update: str = "sign") -> Tensor:
    """ΔW, the optimizer's first step in full fine-tuning (Equations 5 and 6).

    Args:
        G: Gradient of the loss with respect to W, (out, in), of any floating-point dtype. It is not changed.
        eta: Step size η > 0 of that step.
        update: `"sign"`, ΔW = −η sign(G), for Adam and its relatives, whose first step is the sign of the gradient;
            `"gradient"`, ΔW = −η G, for SGD.

    Returns:
        ΔW, with the shape and dtype of G.
    """
    return (G.sign() if update == "sign" else G.clone()).mul_(-eta)


def truncated_svd(M: Tensor, r: int, *, depth: int = 4, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """The r largest singular triplets of M, by a block Krylov method (Musco & Musco, 2015, Algorithm 2).

    The space spanned by `depth` blocks M (MᵀM)ʲ Ω, each of r + max(8, r/4) columns, contains the leading singular
    vectors far better than as many power iterations would. Of the sign of a gradient it misses less than 1e-4 of the
    energy of the best rank-r matrix, and up to 1e-2 where r reaches into a flat spectrum (noise), whose subspace is
    arbitrary anyway. A matrix that is hardly larger than that space gets an exact SVD.

    Some steps are in float64, which Apple's MPS does not have: a matrix there is decomposed on the CPU.

    Args:
        M: (out, in), finite, float32 or float64. Other dtypes are converted to float32.
        r: Number of triplets, 1 ≤ r ≤ min(out, in).
        depth: Number of blocks.
        seed: Seed of the random Ω (in, block). The global random state is not touched.

    Returns:
        U (out, r) and V (in, r), whose columns are orthonormal to 1e-6 (float32), and S (r,) in descending order.
    """
    if M.device.type == "mps":
        U, S, V = truncated_svd(M.cpu(), r, depth=depth, seed=seed)
        return U.to(M.device), S.to(M.device), V.to(M.device)
    M = M.to(torch.promote_types(M.dtype, torch.float32))
    block = r + max(8, r // 4)
    # Here the Krylov space would be most of the whole space, and an exact SVD costs no more.
    if depth * block >= 0.6 * min(M.shape):
        U, S, Vt = torch.linalg.svd(M, full_matrices=False)
        return _orthonormal(U[:, :r]), S[:r], _orthonormal(Vt[:r].T)
    generator = torch.Generator().manual_seed(seed)
    # Ω is drawn on the CPU, so that it is the same on every device.
    Z = torch.randn(M.shape[1], block, generator=generator, dtype=M.dtype).to(M.device)
    K, T = M.new_empty(M.shape[0], 0), M.new_empty(0, M.shape[1])
    for _ in range(depth):
        # QR of all blocks together makes the new one orthonormal to the old ones even where M has a smaller rank.
        Y = torch.linalg.qr(torch.cat([K, M @ Z], dim=1)).Q[:, -block:]
        Z = M.T @ Y
        K, T = torch.cat([K, Y], dim=1), torch.cat([T, Z.T])
    # The best rank-r matrix within the space is given by the SVD of T = KᵀM, here through the small T Tᵀ. That squares
    # the singular values, therefore in float64.
    energies, X = torch.linalg.eigh(T.double() @ T.double().T)
    U, V = K @ X.to(M.dtype)[:, -r:].flip(1), T.T @ X.to(M.dtype)[:, -r:].flip(1)
    return _orthonormal(U), energies[-r:].flip(0).clamp(min=0).sqrt().to(M.dtype), _orthonormal(V)


def _orthonormal(X: Tensor) -> Tensor:
    """Makes nearly orthogonal columns orthonormal, up to rounding, without turning them; a column may also be 0."""
    Q, R = torch.linalg.qr(X.double())
    # QR may flip a column's sign, which U and V must do together or not at all.
    return (Q * R.diagonal().sign().where(R.diagonal() != 0, 1)).to(X.dtype)


def sb_factors(U: Tensor, S: Tensor, V: Tensor, s: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """B, R and A of LoRA-SB with s B R A = U diag(S) Vᵀ and BᵀB = A Aᵀ = I (Equations 7 and 8)."""
    return U, torch.diag(S) / s, V.T  # B = U[:, :r], R = diag(S[:r]) / s, A = Vᵀ[:r]


def balanced_factors(U: Tensor, S: Tensor, V: Tensor, s: float = 1.0) -> tuple[Tensor, Tensor]:
    """B and A of an ordinary LoRA with s B A = U diag(S) Vᵀ, balanced: BᵀB = A Aᵀ = diag(S)/s, as RefLoRA assumes."""
    root = (S / s).sqrt()
    return U * root, root[:, None] * V.T


def optimal_R_gradient(grad_R: Tensor, B: Tensor, A: Tensor, s: float = 1.0) -> Tensor:
    """The gradient g for R whose effect on W, s B g A, is as close to the full gradient G as R can come (Theorem 3).

    With LoRA-SB's initialization, where BᵀB = A Aᵀ = I and s = 1, it is ∇R itself (Equation 9): an ordinary optimizer
    on R is right there, and this function is not needed. For other factors (LoRA-XS, pruned or rounded ones) put it
    in the place of R's gradient before the optimizer's step.

    Args:
        grad_R: ∇R = s Bᵀ G Aᵀ (Lemma 2), (r, r).
        B: (out, r), of full rank.
        A: (r, in), of full rank.
        s: The adapter's scaling.

    Returns:
        g (r, r).
    """
    # g = s⁻² (BᵀB)⁻¹ ∇R (A Aᵀ)⁻¹ (Theorem 3)
    g = torch.linalg.solve(B.T @ B, grad_R)
    return torch.linalg.solve(A @ A.T, g, left=False) / s**2
