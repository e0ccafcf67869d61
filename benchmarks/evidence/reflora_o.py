"""RefLoRA-O, an experiment: AdamW for LoRA whose step is whitened along the rank, in balanced coordinates.

This is **not** the method of the RefLoRA paper, and it is not part of the package: it enters only if the experiments
of this folder support it. From RefLoRA-S (https://huggingface.co/papers/2505.18877, Theorem 5) it takes the balanced
factors. The whitening of an optimizer's direction follows Muon (Jordan et al., 2024), AdaMuon and LoRA-Muon
(https://huggingface.co/papers/2606.12921).

One step, for every pair A (r, in), B (out, r) with ΔW = γ B A:

    1. D_A, D_B   Adam's directions m̂ / (√v̂ + eps) of the plain gradients, with bias correction
    2. M_A = (1 - δ) r D_A D_Aᵀ / tr(D_A D_Aᵀ) + δ I,   O_A = M_A^(-1/2) D_A
       M_B = (1 - δ) r D_Bᵀ D_B / tr(D_Bᵀ D_B) + δ I,   O_B = D_B M_B^(-1/2)
    3. A ← A - η ‖D_A‖_F / ‖O_A‖_F O_A,  B likewise: the length of the step stays Adam's
    4. from the second step on, after the update, with q = √(‖B‖_F / ‖A‖_F): A ← q A, B ← B / q, and the moments
       follow, m_A / q, v_A / q², m_B q, v_B q²

δ = 1 is AdamW followed by RefLoRA-S's rescaling; δ → 0 replaces each direction by its polar factor.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hf_reflora.reflora.factors import LoraPair, require_pairs
from hf_reflora.reflora.polar import polar_coefficients, polar_factor
from hf_reflora.reflora.refactor import balance_scalars, compute_dtype, factor_norms, ieee_arithmetic


SCHEDULES = ("constant", "linear", "log")
SIDES = ("both", "A", "B")


def create_reflora_o_optimizer(
    model: nn.Module,
    *,
    lr: float,
    **settings: Any,
) -> "RefLoraO":
    """Creates RefLoRA-O over the trainable parameters of `model`; those outside LoRA pairs get ordinary AdamW.

    Args:
        model: A PEFT model with trainable LoRA adapters. Its pairs are looked up once, now: make a new optimizer after
            `set_adapter`. Sharded models (FSDP, DeepSpeed) are not supported.
        lr, settings: As in `RefLoraO`.

    Raises:
        ValueError: a value out of range, or no trainable LoRA pair.

    Example:
        >>> optimizer = create_reflora_o_optimizer(peft_model, lr=2e-3)
        >>> trainer = SFTTrainer(peft_model, args=..., optimizers=(optimizer, None))
    """
    return RefLoraO([p for p in model.parameters() if p.requires_grad], require_pairs(model), lr=lr, **settings)


class RefLoraO(Optimizer):
    """AdamW with RefLoRA-O's step for the given pairs; see this file's head.

    Args:
        params: The parameters, or groups of them, as for every torch optimizer.
        pairs: LoRA pairs whose factors are among `params`.
        lr: Learning rate η.
        delta: Shrinkage δ in (0, 1] of the whitening. 1 is none.
        delta_schedule: "constant", or δ rises to 1 while the learning rate η_t falls from η_max to 0: "linear" is
            1 - (1 - δ) η_t / η_max, "log" is δ^(η_t / η_max). η_max is the group's "initial_lr", which torch's
            schedulers set, or else `lr`. During a warm-up of the learning rate δ falls from 1 likewise.
        sides: Which factors are whitened: "both", "A" or "B". The other one takes Adam's step.
        length: Factor on the length of a whitened factor's step. (For both sides, without weight decay, it is the
            same as a factor on `lr`.)
        rescale: Whether the factors are balanced (4.).
        betas, eps, weight_decay: As in torch.optim.AdamW; weight decay is decoupled.
    """

    def __init__(
        self,
        params: Iterable,
        pairs: Iterable[LoraPair],
        *,
        lr: float,
        delta: float = 0.02,
        delta_schedule: str = "constant",
        sides: str = "both",
        length: float = 1.0,
        rescale: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
    ):
        if not 0 < delta <= 1:  # written so that NaN is refused, too
            raise ValueError(f"RefLoRA-O: delta must lie in (0, 1], got {delta}.")
        if delta_schedule not in SCHEDULES:
            raise ValueError(f"RefLoRA-O: delta_schedule must be one of {SCHEDULES}, got {delta_schedule!r}.")
        if sides not in SIDES:
            raise ValueError(f"RefLoRA-O: sides must be one of {SIDES}, got {sides!r}.")
        if not length > 0:
            raise ValueError(f"RefLoRA-O: length must be positive, got {length}.")
        self.pairs = list(pairs)
        self.rescale = rescale
        splits = {}  # by the id of a factor: how its blocks are made, and whether r is the side of the columns
        for pair in self.pairs:
            splits[id(pair.A)] = (pair.split_A, False)
            splits[id(pair.B)] = (pair.split_B, True)
        self._splits: dict[int, tuple[Callable[[Tensor], tuple[Tensor, ...]], bool]] = splits
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "delta": delta,
            "delta_schedule": delta_schedule,
            "sides": sides,
            "length": length,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """One step; the returned value is the closure's, if there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                directions = self._adam_directions(params, group)
                self._whiten_(params, directions, group)
                torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(params, directions, alpha=-group["lr"])
        if self.rescale:
            self._rescale()
        return loss

    def _adam_directions(self, params: list[Tensor], group: dict[str, Any]) -> list[Tensor]:
        """m̂ / (√v̂ + eps) of every parameter, after its moments took the gradient in."""
        beta1, beta2 = group["betas"]
        states = [self.state[p] for p in params]
        for parameter, state in zip(params, states, strict=True):
            if not state:
                # A number, not a tensor: load_state_dict leaves it alone, and the corrections need no device.
                state["step"] = 0
                state["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
                state["exp_avg_sq"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            state["step"] += 1
        grads = [p.grad for p in params]
        exp_avgs, exp_avg_sqs = ([state[name] for state in states] for name in ("exp_avg", "exp_avg_sq"))
        torch._foreach_lerp_(exp_avgs, grads, 1 - beta1)
        torch._foreach_mul_(exp_avg_sqs, beta2)
        torch._foreach_addcmul_(exp_avg_sqs, grads, grads, 1 - beta2)
        denominators = torch._foreach_sqrt(exp_avg_sqs)
        torch._foreach_div_(denominators, [(1 - beta2 ** state["step"]) ** 0.5 for state in states])
        torch._foreach_add_(denominators, group["eps"])
        torch._foreach_mul_(denominators, [1 - beta1 ** state["step"] for state in states])
        return list(torch._foreach_div(exp_avgs, denominators))

    def _whiten_(self, params: list[Tensor], directions: list[Tensor], group: dict[str, Any]) -> None:
        """Steps 2 and 3: replaces the directions of the pairs' factors by whitened ones of Adam's length."""
        delta = scheduled_delta(group)
        blocks: list[tuple[Tensor, bool]] = []
        for parameter, direction in zip(params, directions, strict=True):
            split, columns = self._splits.get(id(parameter), (None, False))
            if split is not None and group["sides"] in ("both", "B" if columns else "A"):
                blocks += [(block, columns) for block in split(direction)]
        by_rank = defaultdict(list)
        for block, columns in blocks:
            by_rank[(block.shape[columns], block.device)].append((block, columns))
        if delta < 1:
            for members in by_rank.values():
                whiten_(members, delta=delta, least_delta=group["delta"])
        if group["length"] != 1 and blocks:
            torch._foreach_mul_([block for block, _ in blocks], group["length"])

    @torch.no_grad()
    def _rescale(self) -> None:
        """Step 4 for the pairs that took at least two steps, as hf_reflora.reflora.precondition.rescale_ does it.

        The same scalars, but applied to all tensors at once: one call instead of two thousand per step.
        """
        pairs = [p for p in self.pairs if min(self.state[f].get("step", 0) for f in (p.A, p.B)) > 1]
        if not pairs:
            return
        split_A = [block for pair in pairs for block in pair.split_A(pair.A)]
        split_B = [block for pair in pairs for block in pair.split_B(pair.B)]
        scalars = balance_scalars(factor_norms(split_A), factor_norms(split_B), None)
        s = torch.stack(scalars).to(torch.float64).tolist()
        root, inverse_root = [x**0.5 for x in s], [x**-0.5 for x in s]
        inverse = [1 / x for x in s]
        torch._foreach_mul_(split_A, root)
        torch._foreach_mul_(split_B, inverse_root)
        for name, on_A, on_B in (("exp_avg", inverse_root, root), ("exp_avg_sq", inverse, s)):
            torch._foreach_mul_([m for p in pairs for m in p.split_A(self.state[p.A][name])], on_A)
            torch._foreach_mul_([m for p in pairs for m in p.split_B(self.state[p.B][name])], on_B)


def scheduled_delta(group: dict[str, Any]) -> float:
    """δ at the group's current learning rate, see `RefLoraO`."""
    delta, peak = group["delta"], group.get("initial_lr", group["lr"])
    if group["delta_schedule"] == "constant" or not peak:
        return delta
    share = min(float(group["lr"] / peak), 1.0)
    return 1 - (1 - delta) * share if group["delta_schedule"] == "linear" else delta**share


def whiten_(
    blocks: list[tuple[Tensor, bool]],  # (r, k_i), or (k_i, r) with True
    *,
    delta: float,
    least_delta: float,
) -> None:
    """Whitens directions of one rank along their r side and keeps their Frobenius norms, in place.

    Args:
        blocks: Directions D of one rank on one device, each with whether r is the side of its columns.
        delta: Shrinkage δ in (0, 1).
        least_delta: A bound δ is never below. It sets the polynomials of the polar factor, which are computed once for
            each bound and would otherwise be computed again at each step of a schedule.
    """
    dtype = compute_dtype(*(block for block, _ in blocks))
    groups = defaultdict(list)
    for block, columns in blocks:
        groups[(block.shape, columns)].append(block)
    stacks = [(torch.stack(group).to(dtype), columns) for (_, columns), group in groups.items()]
    with ieee_arithmetic(blocks[0][0].device):
        gram = torch.cat([D.mT @ D if columns else D @ D.mT for D, columns in stacks])
        T = whitening(gram, delta=delta, least_delta=least_delta).split([len(D) for D, _ in stacks])
        for (D, columns), T_group, group in zip(stacks, T, groups.values(), strict=True):
            torch._foreach_copy_(group, (D @ T_group if columns else T_group @ D).unbind(0))


def whitening(
    gram: Tensor,  # (n, r, r), D Dᵀ
    *,
    delta: float,
    least_delta: float,
) -> Tensor:  # (n, r, r)
    """c M^(-1/2) with M = (1 - δ) r D Dᵀ / tr(D Dᵀ) + δ I and c = ‖D‖_F / ‖M^(-1/2) D‖_F.

    It is I where the trace is 0 or not finite, or M has no Cholesky factor.
    """
    r = gram.shape[-1]
    eye = torch.eye(r, dtype=gram.dtype, device=gram.device).expand_as(gram)
    trace = gram.diagonal(dim1=-2, dim2=-1).sum(-1)[:, None, None]
    usable = (trace > 0) & gram.isfinite().all(-1, keepdim=True).all(-2, keepdim=True)
    share = gram / torch.where(usable, trace, 1)  # torch.where computes both branches: no division by 0 in one
    M = torch.where(usable, (1 - delta) * r * share + delta * eye, eye)
    L, info = torch.linalg.cholesky_ex(M)
    # M = L Lᵀ and L = W H give M^(-1/2) = W L⁻¹. As tr M = r and M ≥ δ I, the singular values of L / √r are at least
    # √(δ / r).
    W = polar_factor(L / r**0.5, polar_coefficients((least_delta / r) ** 0.5))
    T = torch.linalg.solve_triangular(L, W, upper=False, left=False)
    # ‖T D‖² / ‖D‖² = tr(T D Dᵀ Tᵀ) / tr(D Dᵀ), from r × r matrices only.
    T = T * ((T @ share) * T).sum((-2, -1), keepdim=True).rsqrt()
    sound = usable & (info == 0)[:, None, None] & T.isfinite().all(-1, keepdim=True).all(-2, keepdim=True)
    return torch.where(sound, T, eye)
