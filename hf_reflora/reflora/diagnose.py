"""What LoRA factors look like before a refactoring: balance, condition numbers, norms."""

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from .refactor import group_by_rank, ieee_arithmetic, refactor_pairs


@torch.no_grad()
def diagnose(
    As: Sequence[Tensor], Bs: Sequence[Tensor], *, eps: float | None, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Numbers about n pairs, each of shape (n,), float64, on the CPU.

    A value that does not exist (a division by 0) is NaN or inf.

    Args:
        As, Bs, eps, dtype: As in `precondition_`.

    Returns:
        - balance_gap: ‖P - Q‖_F / ‖Q‖_F, how far the factors are from balance (S = I);
        - balance_residual: ‖S P S - Q‖_F / ‖Q‖_F, how far S leaves them from it; it shows shrinkage and fallbacks;
        - cond_P, cond_Q: condition numbers λ_max / λ_min;
        - norm_A, norm_B: Frobenius norms;
        - fallback: 1 where S is only a multiple of I, else 0.
    """
    batches = group_by_rank(As, Bs)
    parts: dict[str, list[Tensor]] = defaultdict(list)
    for indices in batches:
        P, Q, R = refactor_pairs([As[i] for i in indices], [Bs[i] for i in indices], eps=eps, dtype=dtype)
        P, Q, S = (M.cpu().double() for M in (P, Q, R.S))  # in float32 squares of Gram matrices overflow
        size = torch.linalg.matrix_norm(Q)
        parts["balance_gap"].append(torch.linalg.matrix_norm(P - Q) / size)
        with ieee_arithmetic(P.device):
            parts["balance_residual"].append(torch.linalg.matrix_norm(S @ P @ S - Q) / size)
        for name, G in (("cond_P", P), ("cond_Q", Q)):
            # eigvalsh raises for a NaN, which would hide the other pairs.
            usable = G.isfinite().all(-1).all(-1)
            spectrum = torch.linalg.eigvalsh(torch.where(usable[:, None, None], G, 0))
            parts[name].append(spectrum[:, -1] / spectrum[:, 0].clamp(min=0))
        for name, G in (("norm_A", P), ("norm_B", Q)):
            parts[name].append(G.diagonal(dim1=-2, dim2=-1).sum(-1).sqrt())
        parts["fallback"].append(R.fallback.cpu().double())
    order = torch.tensor([i for indices in batches for i in indices]).argsort()
    return {name: torch.cat(values)[order] for name, values in parts.items()}
