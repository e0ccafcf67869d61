"""RefLoRA under DeepSpeed, which takes the optimizer's step inside the backward pass, on partitions of its own.

S depends on the factors alone, which stand still while gradients accumulate, and g ↦ S⁻¹ g and g ↦ g S are linear:
so S is computed when a step begins and applied to each micro-batch's gradient, before DeepSpeed adds, averages, scales
and clips. A rescaling multiplies the entries of a factor and of its moments by one number, wherever they are kept.
"""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..distributed.parameters import gather_parameters, has_zero_master_copy, is_zero3_partitioned
from .factors import LoraPair
from .refactor import ieee_arithmetic
from .step import RefLora, moment_degree


class GradientHooks:
    """Hooks on the factors' gradients that multiply them by an S frozen at the beginning of the step."""

    def __init__(self, reflora: RefLora):
        self.reflora = reflora
        self._handles: list = []
        self._multipliers: dict[str, tuple[list[Tensor], list[Tensor]]] = {}

    def attach(self, pairs: Sequence[LoraPair]) -> None:
        """Hooks these pairs, and only these."""
        for handle in self._handles:
            handle.remove()
        self._handles = [
            factor.register_hook(partial(self._multiplied, pair, side))
            for pair in pairs
            for side, factor in enumerate((pair.A, pair.B))
        ]

    def freeze(self, pairs: Sequence[LoraPair], optimizer: Optimizer) -> None:
        """Computes S from the factors as they are now. `pairs` may be empty: a plain step."""
        with gather_parameters(factor for pair in pairs for factor in (pair.A, pair.B)):
            multipliers = self.reflora.multipliers(pairs, optimizer) if pairs else []
        self._multipliers = {pair.name: found for pair, found in zip(pairs, multipliers, strict=True)}

    @torch.no_grad()
    def _multiplied(self, pair: LoraPair, side: int, grad: Tensor) -> Tensor | None:
        if pair.name not in self._multipliers:
            return None
        result = grad.clone()
        blocks = (pair.split_A, pair.split_B)[side](result)
        with ieee_arithmetic(grad.device):
            for block, T in zip(blocks, self._multipliers[pair.name][side], strict=True):
                wide = block.to(T.dtype)
                if T.ndim == 0:
                    block.copy_(T * wide)  # ∇A / s, s ∇B
                else:
                    block.copy_(T @ wide if side == 0 else wide @ T)  # S⁻¹ ∇A, ∇B S
        return result


@torch.no_grad()
def rescale_(reflora: RefLora, pairs: Sequence[LoraPair], optimizer: Optimizer) -> None:
    """`RefLora.after_optimizer` on DeepSpeed's partitions: A ← √s A, B ← B / √s, and their moments along.

    Raises:
        NotImplementedError: a pair has many blocks.
        ValueError: the optimizer keeps unknown state.
    """
    if any(pair.blocks > 1 for pair in pairs):
        raise NotImplementedError(
            "RefLoRA-S as rescaling is not for grouped convolutions and target_parameters under DeepSpeed. Use "
            "form='precondition'."
        )
    factors = [factor for pair in pairs for factor in (pair.A, pair.B)]
    with gather_parameters(factors):
        roots = torch.stack(reflora.scalars(pairs, optimizer)).sqrt().tolist()
    scales = [scale for root in roots for scale in (root, 1 / root)]
    kept = {
        name: moment_degree(optimizer, name, value)
        for state in optimizer.state.values()
        for name, value in state.items()
    }
    degrees = {name: degree for name, degree in kept.items() if degree}
    for factor, scale in zip(factors, scales, strict=True):
        _scale_state(factor, scale, degrees, optimizer)
    with gather_parameters(factors, write=True):
        for factor, scale in zip(factors, scales, strict=True):
            factor.mul_(scale)


def _scale_state(factor: Tensor, scale: float, degrees: dict[str, int], optimizer: Optimizer) -> None:
    """Scales this process's float32 copy of a factor and its moments, where DeepSpeed keeps them apart from it."""
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
        if factor._hp_mapping is not None:  # this process owns a part of it
            factor._hp_mapping.get_hp_fragment(None).data.mul_(scale)
            for name, degree in degrees.items():
                factor._hp_mapping.get_hp_fragment(name).data.div_(scale**degree)
    else:
        for name, degree in degrees.items():
            optimizer.state[factor][name].div_(scale**degree)
