"""One RefLoRA step on the pairs of a model: which form, at which steps, with which numbers."""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..distributed.parameters import copy_full_, full_tensor, is_sharded, local_tensor
from . import refactor
from .factors import LoraPair, dense_gradient


METHODS = ("reflora", "reflora_s")
FORMS = ("precondition", "rescale")
DTYPES = {"float32": torch.float32, "float64": torch.float64}
# State that torch's optimizers keep for each entry, by the degree in which the gradient enters it.
MOMENT_DEGREES = {
    "exp_avg": 1,
    "momentum_buffer": 1,
    "grad_avg": 1,
    "exp_avg_sq": 2,
    "max_exp_avg_sq": 2,
    "square_avg": 2,
    "sum": 2,
}


@dataclass(frozen=True)
class RefLora:
    """The settings of RefLoRA, checked, and what a step does with them.

    Args:
        method: "reflora" (Theorem 3) or "reflora_s" (Theorem 5, S = s I).
        form: "precondition" multiplies the gradients before the optimizer's step and leaves the factors as they are;
            "rescale" balances the factors and moves the optimizer's moments along after the step, for "reflora_s"
            only. Default: "precondition" for "reflora", "rescale" for "reflora_s" (as the authors' code does). See
            `hf_reflora.reflora.refactor.rescale_` for how they differ.
        eps: Shrinkage ε in (0, 1] of the Gram matrices; 1 turns "reflora" into "reflora_s". Default: the smallest safe
            one, max(1e-5, 4 r 2⁻²⁴) in float32 and 1e-12 in float64. Without meaning for "reflora_s".
        dtype: "float32" (default) or "float64", the least dtype of the Gram matrices.
        warmup_steps: Number of first optimizer steps that are left plain. Default 0; the paper uses 100 or 200.
        interval: Refactor at every interval-th step only. Default 1. With "precondition" and Adam the plain steps
            between share the same moments, which mixes two kinds of gradients: prefer 1.
        smoothness: L, the smoothness constant of the loss with respect to the weight, for the small-step branch of
            Theorems 3 and 5 (η is the optimizer's current learning rate). Default: no such branch.

    Raises:
        ValueError: at construction, for a value out of range.
    """

    method: str = "reflora"
    form: str | None = None
    eps: float | None = None
    dtype: str = "float32"
    warmup_steps: int = 0
    interval: int = 1
    smoothness: float | None = None

    def __post_init__(self):
        if self.method not in METHODS:
            raise ValueError(f"RefLoRA: method must be one of {METHODS}, got {self.method!r}.")
        if self.form is not None and self.form not in FORMS:
            raise ValueError(f"RefLoRA: form must be one of {FORMS} or None, got {self.form!r}.")
        if self.form == "rescale" and self.method == "reflora":
            raise ValueError(
                "RefLoRA: form='rescale' needs method='reflora_s': a full S would mix entries of Adam's second "
                "moment. Use form='precondition'."
            )
        if self.eps is not None and not 0 < self.eps <= 1:
            raise ValueError(f"RefLoRA: eps must lie in (0, 1], got {self.eps}.")
        if self.dtype not in DTYPES:
            raise ValueError(f"RefLoRA: dtype must be one of {tuple(DTYPES)}, got {self.dtype!r}.")
        if self.warmup_steps < 0:
            raise ValueError(f"RefLoRA: warmup_steps must be at least 0, got {self.warmup_steps}.")
        if self.interval < 1:
            raise ValueError(f"RefLoRA: interval must be at least 1, got {self.interval}.")
        if self.smoothness is not None and not self.smoothness > 0:
            raise ValueError(f"RefLoRA: smoothness must be positive, got {self.smoothness}.")

    @property
    def rescales(self) -> bool:
        """Whether `after_optimizer` does the work; `before_optimizer` does otherwise."""
        return self.method == "reflora_s" and self.form != "precondition"

    def due(self, step: int) -> bool:
        """Whether optimizer step number `step`, counted from 0, is refactored."""
        return step >= self.warmup_steps and (step - self.warmup_steps) % self.interval == 0

    def before_optimizer(self, pairs: Sequence[LoraPair], optimizer: Optimizer) -> Tensor | None:
        """Preconditions the gradients. Returns their norm after it (a tensor, not synchronized), None if none was."""
        pairs = [p for p in _held(pairs, optimizer) if p.A.grad is not None or p.B.grad is not None]
        if not pairs:
            return None
        # Of FSDP2's shards, A and its gradient are gathered; B's rows stay where they are.
        As, Bs = _blocks(pairs)
        grads_A, grads_B, gathered = [], [], []
        for pair in pairs:
            grad_A, grad_B = dense_gradient(pair.A), dense_gradient(pair.B)
            whole_A = None if grad_A is None else full_tensor(grad_A)
            if whole_A is not grad_A:
                gathered.append((grad_A, whole_A))
            grads_A += pair.split_A(whole_A) if grad_A is not None else [None] * pair.blocks
            grads_B += pair.split_B(local_tensor(grad_B)) if grad_B is not None else [None] * pair.blocks
        inverse_steps = self._inverse_steps(pairs, optimizer)
        if self.method == "reflora_s":
            refactor.precondition_scalar_(As, Bs, grads_A, grads_B, inverse_steps=inverse_steps)
        else:
            refactor.precondition_(
                As, Bs, grads_A, grads_B, eps=self.eps, dtype=DTYPES[self.dtype], inverse_steps=inverse_steps
            )
        for grad, value in gathered:
            copy_full_(grad, value)
        return full_tensor(
            torch.nn.utils.get_total_norm([g for p in pairs for g in (p.A.grad, p.B.grad) if g is not None])
        )

    def after_optimizer(self, pairs: Sequence[LoraPair], optimizer: Optimizer) -> None:
        """Rescales the factors and the optimizer's moments (RefLoRA-S as a true refactoring).

        Raises:
            ValueError: Pairs share memory (PEFT's `ensure_weight_tying`), or the optimizer keeps unknown state.
        """
        pairs = _held(pairs, optimizer)
        parts = [local_tensor(factor) for pair in pairs for factor in (pair.A, pair.B)]
        pointers = [p.data_ptr() for p in parts if p.numel() > 0]
        if len(set(pointers)) < len(pointers):
            raise ValueError(
                "RefLoRA-S as rescaling would scale memory twice that LoRA pairs share (ensure_weight_tying). Use "
                "form='precondition'."
            )
        As, Bs = _blocks(pairs, gather=False)
        moments_A, moments_B = [], []
        for pair in pairs:
            moments_A += _moments(optimizer, pair.A, pair.split_A, pair.blocks)
            moments_B += _moments(optimizer, pair.B, pair.split_B, pair.blocks)
        refactor.rescale_(As, Bs, moments_A, moments_B, inverse_steps=self._inverse_steps(pairs, optimizer))

    def scalars(self, pairs: Sequence[LoraPair], optimizer: Optimizer) -> list[Tensor]:
        """s of Theorem 5 of every block."""
        return refactor.balance_scalars(*_blocks(pairs), self._inverse_steps(pairs, optimizer))

    def multipliers(self, pairs: Sequence[LoraPair], optimizer: Optimizer) -> list[tuple[list[Tensor], list[Tensor]]]:
        """For every pair what multiplies ∇A and ∇B of its blocks: S⁻¹ and S (r, r), or numbers for "reflora_s"."""
        if self.method == "reflora_s":
            found = [(s.reciprocal(), s) for s in self.scalars(pairs, optimizer)]
        else:
            As, Bs = _blocks(pairs)
            found = [None] * len(As)
            steps = self._inverse_steps(pairs, optimizer)
            for indices, R in refactor.refactorings(
                As, Bs, eps=self.eps, dtype=DTYPES[self.dtype], inverse_steps=steps
            ):
                for i, S_inv, S in zip(indices, R.S_inv, R.S, strict=True):
                    found[i] = S_inv, S
        blocks = iter(found)
        per_pair = [[next(blocks) for _ in range(pair.blocks)] for pair in pairs]
        return [([left for left, _ in both], [right for _, right in both]) for both in per_pair]

    def diagnose(self, pairs: Sequence[LoraPair]) -> dict[str, Tensor]:
        """`hf_reflora.reflora.refactor.diagnose` of the pairs as they are now."""
        As, Bs = _blocks(pairs)
        return refactor.diagnose(As, [full_tensor(B) for B in Bs], eps=self.eps, dtype=DTYPES[self.dtype])

    def _inverse_steps(self, pairs: Sequence[LoraPair], optimizer: Optimizer) -> list[float] | None:
        """1 / (L γ² η) of every block: with PEFT's scaling γ, a step η on A and B moves W as γ² η does on B A."""
        if self.smoothness is None:
            return None
        rates = {id(p): float(group["lr"]) for group in optimizer.param_groups for p in group["params"]}
        everywhere = {float(group["lr"]) for group in optimizer.param_groups}
        if len(everywhere) == 1:  # DeepSpeed's groups hold other parameters than the model's, or none
            rates |= dict.fromkeys((id(pair.A) for pair in pairs), *everywhere)
        if any(id(pair.A) not in rates for pair in pairs):
            raise NotImplementedError("RefLoRA: smoothness under DeepSpeed needs one learning rate for all.")
        return [
            1 / (self.smoothness * pair.scaling**2 * max(rates[id(pair.A)], 1e-30))
            for pair in pairs
            for _ in range(pair.blocks)
        ]


def check_optimizer(optimizer_cls: type[Optimizer]) -> None:
    """Raises a ValueError if gradients that are changed before the optimizer's step would not count."""
    if hasattr(optimizer_cls, "fused_backward") or optimizer_cls.__name__ == "LayerWiseDummyOptimizer":
        _steps_inside(optimizer_cls.__name__)
    closure = inspect.signature(optimizer_cls.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise ValueError(
            f"RefLoRA changes gradients before the step, but {optimizer_cls.__name__}.step needs a closure that "
            "computes them again inside the step. Use an optimizer whose closure is optional, such as AdamW or SGD."
        )


def check_optim(optim: str) -> None:
    """`check_optimizer` for the name in `TrainingArguments.optim`, before there is an optimizer."""
    if optim in ("lomo", "adalomo") or optim.endswith("layerwise"):
        _steps_inside(f"optim={optim}")


def _steps_inside(name: str) -> None:
    raise ValueError(
        f"RefLoRA changes gradients before the step, but {name} takes its step inside the backward pass (LOMO, "
        "AdaLOMO, layer-wise GaLore and APOLLO). Use optim=adamw_torch or another optimizer."
    )


def _held(pairs: Sequence[LoraPair], optimizer: Optimizer) -> list[LoraPair]:
    """The pairs that `optimizer` updates: another adapter's may be trainable, too."""
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    found = [pair for pair in pairs if id(pair.A) in held and id(pair.B) in held]
    if not found and any(is_sharded(pair.A) for pair in pairs):
        raise ValueError(
            f"RefLoRA looked for the {len(pairs)} LoRA pairs of the model in the optimizer, but it holds other "
            "parameters: it was made before the model was sharded, or DeepSpeed partitions them. Make the optimizer "
            "after fully_shard; for DeepSpeed use RefLoraCallback in a Trainer."
        )
    return found


def _blocks(pairs: Sequence[LoraPair], gather: bool = True) -> tuple[list[Tensor], list[Tensor]]:
    """A and B of every block of every pair; FSDP2's A whole (`gather`), its B in shards."""
    As = [A for p in pairs for A in p.split_A(full_tensor(p.A.detach()) if gather else p.A)]
    return As, [B for p in pairs for B in p.split_B(p.B)]


def _moments(optimizer: Optimizer, parameter: Tensor, split, blocks: int) -> list[list[tuple[Tensor, int]]]:
    """The moments (tensor, degree) that `optimizer` keeps for each block of `parameter`."""
    moments = [[] for _ in range(blocks)]
    for name, value in optimizer.state.get(parameter, {}).items():
        degree = moment_degree(optimizer, name, value)
        if degree:
            for block, piece in zip(moments, split(value), strict=True):
                block.append((piece, degree))
    return moments


def moment_degree(optimizer: Optimizer, name: str, value: Tensor | None) -> int:
    """The degree in which gradients enter the state `name`; 0 for state that does not change with the factors' size.

    Raises:
        ValueError: for an unknown tensor.
    """
    if value is None or (name == "momentum_buffer" and isinstance(optimizer, torch.optim.RMSprop)):
        return 0  # RMSprop's is made of normalized steps
    if name not in MOMENT_DEGREES and torch.is_tensor(value) and value.numel() > 1:
        raise ValueError(
            f"RefLoRA-S as rescaling moves the optimizer's state along with the factors, but "
            f"{type(optimizer).__name__} keeps {name!r}, which it does not know (known: "
            f"{', '.join(MOMENT_DEGREES)}). Use AdamW or SGD, or form='precondition'."
        )
    return MOMENT_DEGREES.get(name, 0)
