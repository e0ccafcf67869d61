"""RefLoRA's part of an optimizer step under DeepSpeed, which steps inside the backward pass, on its own partitions.

S depends on the factors alone, and these do not change while gradients accumulate; g ↦ S⁻¹ g and g ↦ g S are linear.
So S is computed when a step begins and multiplies each micro-batch's gradient in a hook, before DeepSpeed adds,
averages, scales and clips. A rescaling multiplies all entries of a factor and of its moments by one number, wherever
DeepSpeed keeps them.
"""

from collections.abc import Sequence
from functools import partial

import torch
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor
from torch.optim import Optimizer

from ..distributed.parameters import (
    check_master_copies,
    gather_parameters,
    has_zero_master_copy,
    is_zero3_partitioned,
)
from .factors import LoraPair, trainable_pairs
from .optimizer_support import moment_degree
from .refactor import balance_scalars, factor_norms, ieee_arithmetic, refactorings
from .settings import RefLora
from .step_plain import PlainStep


class DeepSpeedStep(PlainStep):
    """See `PlainStep`. `begin` and `after_optimizer` are collective: all processes call them in the same order.

    Raises:
        NotImplementedError: at construction, for RefLoRA-S as rescaling with 16-bit factors under ZeRO-0; at a step,
            for RefLoRA-S as rescaling of grouped convolutions and `target_parameters`, and for `smoothness` with
            several learning rates.
    """

    def __init__(self, settings: RefLora, layers: dict[str, LoraLayer]):
        super().__init__(settings, layers)
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        # For each pair what multiplies ∇A and ∇B of its blocks, while the current step lasts.
        self._multipliers: dict[str, tuple[list[Tensor], list[Tensor]]] = {}
        pairs = trainable_pairs(layers)
        if settings.rescales:
            factors = [(pair.name, factor) for pair in pairs for factor in (pair.A, pair.B)]
            check_master_copies(factors, "RefLoRA-S as rescaling (not form='precondition')")
            return
        # Leaf hooks see the full local gradient in every ZeRO stage, before DeepSpeed reduces it into its partitions;
        # hooks of its optimizer would see flat partitions of all parameters.
        for pair in pairs:
            for side, factor in (("A", pair.A), ("B", pair.B)):
                self._handles.append(factor.register_hook(partial(self._multiply, pair, side)))

    def begin(self, step: int, optimizer: Optimizer) -> None:
        if self.settings.rescales:
            return
        pairs = trainable_pairs(self.layers) if self.settings.due(step) else []
        with gather_parameters(factor for pair in pairs for factor in (pair.A, pair.B)):
            self._multipliers = self._compute_multipliers(pairs, optimizer) if pairs else {}

    def before_optimizer(self, step: int, optimizer: Optimizer, *, measure_norm: bool = False) -> None:
        """Nothing: the optimizer's step has been taken already, inside the backward pass."""

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()

    def diagnose(self) -> dict[str, Tensor]:
        pairs = trainable_pairs(self.layers)
        with gather_parameters(factor for pair in pairs for factor in (pair.A, pair.B)):
            return super().diagnose()

    @torch.no_grad()
    def rescale(self, pairs: Sequence[LoraPair], optimizer: Optimizer) -> None:
        """A ← √s A, B ← B / √s and their moments along, in DeepSpeed's partitions (RefLoRA-S as a true refactoring).

        Raises:
            NotImplementedError: a pair has several blocks.
            ValueError: the optimizer keeps unknown state.
        """
        if any(pair.blocks > 1 for pair in pairs):
            raise NotImplementedError(
                "RefLoRA-S as rescaling is not for grouped convolutions and target_parameters under DeepSpeed. Use "
                "form='precondition'."
            )
        factors = [factor for pair in pairs for factor in (pair.A, pair.B)]
        # One host synchronization: DeepSpeed's accessors multiply by plain numbers, on whatever device they keep.
        with gather_parameters(factors):
            roots = torch.stack(self._scalars(pairs, optimizer)).sqrt().tolist()
        scales = [scale for root in roots for scale in (root, 1 / root)]
        degrees_by_name = {
            name: moment_degree(optimizer, name, value)
            for state in optimizer.state.values()
            for name, value in state.items()
        }
        degrees = {name: degree for name, degree in degrees_by_name.items() if degree}
        for factor, scale in zip(factors, scales, strict=True):
            _scale_master_copy_and_moments(factor, scale, degrees, optimizer)
        with gather_parameters(factors, write=True):
            for factor, scale in zip(factors, scales, strict=True):
                factor.mul_(scale)

    def _scalars(self, pairs: Sequence[LoraPair], optimizer: Optimizer) -> list[Tensor]:
        """s of Theorem 5 for every block."""
        As, Bs = self._local_factors(pairs)
        return balance_scalars(factor_norms(As), factor_norms(Bs), self._inverse_steps(pairs, optimizer))

    @torch.no_grad()
    def _compute_multipliers(
        self, pairs: Sequence[LoraPair], optimizer: Optimizer
    ) -> dict[str, tuple[list[Tensor], list[Tensor]]]:
        """By the pair's name, for each of its blocks, S⁻¹ and S (r, r), or the numbers 1/s and s for "reflora_s"."""
        if self.settings.method == "reflora_s":
            by_block = {i: (s.reciprocal(), s) for i, s in enumerate(self._scalars(pairs, optimizer))}
        else:
            As, Bs = self._local_factors(pairs)
            inverse_steps = self._inverse_steps(pairs, optimizer)
            eps, dtype = self.settings.eps, self.settings.torch_dtype
            by_block = {}
            for indices, R in refactorings(As, Bs, eps=eps, dtype=dtype, inverse_steps=inverse_steps):
                for i, S_inv, S in zip(indices, R.S_inv, R.S, strict=True):
                    by_block[i] = S_inv, S
        blocks = (by_block[i] for i in range(len(by_block)))
        by_pair = {pair.name: [next(blocks) for _ in range(pair.blocks)] for pair in pairs}
        return {name: ([left for left, _ in both], [right for _, right in both]) for name, both in by_pair.items()}

    @torch.no_grad()
    def _multiply(self, pair: LoraPair, side: str, grad: Tensor) -> Tensor | None:
        """The hook: S⁻¹ ∇A or ∇B S of a micro-batch's gradient; None leaves the gradient as it is."""
        if pair.name not in self._multipliers:
            return None
        result = grad.clone()  # autograd may use the gradient elsewhere
        left, right = self._multipliers[pair.name]
        blocks, multipliers = (pair.split_A(result), left) if side == "A" else (pair.split_B(result), right)
        with ieee_arithmetic(grad.device):
            for block, T in zip(blocks, multipliers, strict=True):
                wide = block.to(T.dtype)
                if T.ndim == 0:
                    block.copy_(T * wide)  # ∇A / s, s ∇B
                else:
                    block.copy_(T @ wide if side == "A" else wide @ T)  # S⁻¹ ∇A, ∇B S
        return result

    def _learning_rates(self, pairs: Sequence[LoraPair], optimizer: Optimizer) -> dict[int, float]:
        # DeepSpeed's groups hold flat partitions in place of the model's parameters.
        rates = {float(group["lr"]) for group in optimizer.param_groups}
        if len(rates) != 1:
            raise NotImplementedError("RefLoRA: smoothness under DeepSpeed needs one learning rate for all.")
        return dict.fromkeys((id(pair.A) for pair in pairs), rates.pop())


def _scale_master_copy_and_moments(
    factor: Tensor, scale: float, degrees: dict[str, int], optimizer: Optimizer
) -> None:
    """Scales what this process has of a factor's float32 copy and of its moments.

    A moment of degree k follows the gradient, which is divided by what the factor is multiplied by: 1 / scaleᵏ.
    """
    if is_zero3_partitioned(factor):
        from deepspeed.utils import (
            safe_get_local_fp32_param,
            safe_get_local_optimizer_state,
            safe_set_local_fp32_param,
            safe_set_local_optimizer_state,
        )

        safe_set_local_fp32_param(factor, safe_get_local_fp32_param(factor) * scale)
        for name, degree in degrees.items():
            moment = safe_get_local_optimizer_state(factor, name)
            safe_set_local_optimizer_state(factor, moment / scale**degree, name)
    elif has_zero_master_copy(factor):
        # DeepSpeed's safe_set_full_* would gather everything; the fragment is this process's own memory.
        if factor._hp_mapping is not None:  # this process has a part of the factor
            factor._hp_mapping.get_hp_fragment(None).data.mul_(scale)
            for name, degree in degrees.items():
                factor._hp_mapping.get_hp_fragment(name).data.div_(scale**degree)
    else:  # ZeRO-0 in float32 steps on the parameters themselves
        for name, degree in degrees.items():
            optimizer.state[factor][name].div_(scale**degree)
