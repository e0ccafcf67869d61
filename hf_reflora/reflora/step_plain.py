"""RefLoRA's part of an optimizer step where every process holds the full factors: one device, or DDP."""

from collections.abc import Callable, Sequence

import torch
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor
from torch.optim import Optimizer

from ..distributed.parameters import is_sharded
from .diagnose import diagnose
from .factors import LoraPair, PairLookup, blocks_of, dense_gradient, trainable_pairs
from .optimizer_support import moments
from .precondition import precondition_, precondition_scalar_, rescale_
from .settings import RefLora


class PlainStep:
    """What RefLoRA does at the three moments of an optimizer step; the other backends derive from it.

    Args:
        settings: RefLoRA's settings.
        layers: The LoRA layers, by name, from `lora_layers`.
    """

    def __init__(self, settings: RefLora, layers: dict[str, LoraLayer]):
        self.settings, self.layers = settings, layers
        self._lookup = PairLookup(layers)
        # The norm of the LoRA gradients after this step's preconditioning, on their device, where it was asked for.
        self.grad_norm: Tensor | None = None

    def begin(self, step: int, optimizer: Optimizer) -> None:
        """Before the first backward pass of optimizer step number `step`, counted from 0."""

    def before_optimizer(self, step: int, optimizer: Optimizer, *, measure_norm: bool = False) -> None:
        """Before the optimizer's step: preconditions the gradients, if the settings say so."""
        self.grad_norm = None
        if not self.settings.rescales and self.settings.due(step):
            self.grad_norm = self.precondition(self._lookup.pairs(), optimizer, measure_norm=measure_norm)

    def after_optimizer(self, step: int, optimizer: Optimizer) -> None:
        """After the optimizer's step: rescales the factors, if the settings say so."""
        if self.settings.rescales and self.settings.due(step):
            self.rescale(self._lookup.pairs(), optimizer)

    def close(self) -> None:
        """When training ends."""

    def diagnose(self) -> dict[str, Tensor]:
        """`hf_reflora.reflora.diagnose.diagnose` of the trainable pairs as they are now; {} where there is none."""
        pairs = trainable_pairs(self.layers)
        if not pairs:
            return {}
        As = blocks_of(pairs, LoraPair.split_A, [self._full(pair.A) for pair in pairs])
        Bs = blocks_of(pairs, LoraPair.split_B, [self._full(pair.B) for pair in pairs])
        return diagnose(As, Bs, eps=self.settings.eps, dtype=self.settings.torch_dtype)

    def precondition(
        self, pairs: Sequence[LoraPair], optimizer: Optimizer, *, measure_norm: bool = False
    ) -> Tensor | None:
        """Preconditions the gradients of the pairs that `optimizer` updates.

        Args:
            measure_norm: Whether to compute the norm, which reads all gradients once more.

        Returns:
            The norm of these gradients afterwards, a tensor on their device; None where there was no gradient or
            `measure_norm` is false.
        """
        pairs = [p for p in held_pairs(pairs, optimizer) if p.A.grad is not None or p.B.grad is not None]
        if not pairs:
            return None
        # Gradients are looked up now and never kept: zero_grad(set_to_none=True) replaces them at each step.
        grads_A, grads_B = [dense_gradient(pair.A) for pair in pairs], [dense_gradient(pair.B) for pair in pairs]
        inverse_steps = self._inverse_steps(pairs, optimizer)
        if self.settings.method == "reflora_s":
            precondition_scalar_(
                *self._local_factors(pairs),
                self._local_blocks(pairs, LoraPair.split_A, grads_A),
                self._local_blocks(pairs, LoraPair.split_B, grads_B),
                inverse_steps=inverse_steps,
                norms=self._norms(pairs),
            )
        else:
            self._precondition(pairs, grads_A, grads_B, inverse_steps)
        if not measure_norm:
            return None
        # Of torch's own norms this one takes the tensors of all devices and does not wait for any of them.
        present = [grad for grad in (*grads_A, *grads_B) if grad is not None]
        return self._full(torch.nn.utils.get_total_norm(present))

    def rescale(self, pairs: Sequence[LoraPair], optimizer: Optimizer) -> None:
        """Rescales the pairs that `optimizer` updates and its moments (RefLoRA-S as a true refactoring).

        Raises:
            ValueError: Pairs share memory (PEFT's `ensure_weight_tying`), or the optimizer keeps unknown state.
        """
        pairs = held_pairs(pairs, optimizer)
        if not pairs:
            return
        _check_no_shared_memory([self._local(factor) for pair in pairs for factor in (pair.A, pair.B)])
        moments_A, moments_B = [], []
        for pair in pairs:
            moments_A += self._block_moments(pair, pair.A, pair.split_A, optimizer)
            moments_B += self._block_moments(pair, pair.B, pair.split_B, optimizer)
        rescale_(
            *self._local_factors(pairs),
            moments_A,
            moments_B,
            inverse_steps=self._inverse_steps(pairs, optimizer),
            norms=self._norms(pairs),
        )

    def _precondition(
        self,
        pairs: list[LoraPair],
        grads_A: list[Tensor | None],
        grads_B: list[Tensor | None],
        inverse_steps: list[float] | None,
    ) -> None:
        """∇A ← S⁻¹ ∇A and ∇B ← ∇B S (Theorem 3), in place."""
        precondition_(
            *self._local_factors(pairs),
            self._local_blocks(pairs, LoraPair.split_A, grads_A),
            self._local_blocks(pairs, LoraPair.split_B, grads_B),
            eps=self.settings.eps,
            dtype=self.settings.torch_dtype,
            inverse_steps=inverse_steps,
        )

    def _local_blocks(
        self,
        pairs: Sequence[LoraPair],
        split: Callable[[LoraPair, Tensor], tuple[Tensor, ...]],
        tensors: Sequence[Tensor | None],
    ) -> list[Tensor | None]:
        """`blocks_of` what this process has of the tensors: views, so what is written into them lands there."""
        return blocks_of(pairs, split, [None if tensor is None else self._local(tensor) for tensor in tensors])

    def _local_factors(self, pairs: Sequence[LoraPair]) -> tuple[list[Tensor | None], list[Tensor | None]]:
        return (
            self._local_blocks(pairs, LoraPair.split_A, [pair.A for pair in pairs]),
            self._local_blocks(pairs, LoraPair.split_B, [pair.B for pair in pairs]),
        )

    def _block_moments(
        self,
        pair: LoraPair,
        factor: Tensor,
        split: Callable[[Tensor], tuple[Tensor, ...]],
        optimizer: Optimizer,
    ) -> list[list[tuple[Tensor, int]]]:
        """For each block of a factor what this process has of its moments: (tensor, degree)."""
        by_block: list[list[tuple[Tensor, int]]] = [[] for _ in range(pair.blocks)]
        for moment, degree in moments(optimizer, factor):
            for block_moments, block in zip(by_block, split(self._local(moment)), strict=True):
                block_moments.append((block, degree))
        return by_block

    def _local(self, tensor: Tensor) -> Tensor:
        """What this process has of a factor, a gradient or a moment, sharing its memory."""
        return tensor

    def _full(self, tensor: Tensor) -> Tensor:
        """The full tensor of a factor or a norm."""
        return tensor

    def _norms(self, pairs: list[LoraPair]) -> tuple[list[Tensor], list[Tensor]] | None:
        """‖A‖_F and ‖B‖_F of every block, where they cannot be computed from what this process has."""
        return None

    def _inverse_steps(self, pairs: Sequence[LoraPair], optimizer: Optimizer) -> list[float] | None:
        """1 / (L γ² η) of every block: with PEFT's scaling γ, a step η on A and B moves W as γ² η does on B A.

        0, which stands for no small-step branch, where η is 0, as in the first step of a warm-up. Such a step moves
        nothing, but the optimizer's moments keep its gradients, and the branch's S would be infinite.
        """
        smoothness = self.settings.smoothness
        if smoothness is None:
            return None
        rates = self._learning_rates(pairs, optimizer)
        constants = [smoothness * pair.scaling**2 * rates[id(pair.A)] for pair in pairs]
        return [1 / c if c > 0 else 0.0 for pair, c in zip(pairs, constants, strict=True) for _ in range(pair.blocks)]

    def _learning_rates(self, pairs: Sequence[LoraPair], optimizer: Optimizer) -> dict[int, float]:
        """The current learning rate of every A, by its id."""
        return {id(p): float(group["lr"]) for group in optimizer.param_groups for p in group["params"]}


def held_pairs(pairs: Sequence[LoraPair], optimizer: Optimizer) -> list[LoraPair]:
    """The pairs that `optimizer` updates: another adapter's may be trainable, too.

    Raises:
        ValueError: The optimizer has none of them, because the model was sharded after the optimizer was made.
    """
    parameters = {id(p) for group in optimizer.param_groups for p in group["params"]}
    held = [pair for pair in pairs if id(pair.A) in parameters and id(pair.B) in parameters]
    if not held and any(is_sharded(pair.A) for pair in pairs):
        raise ValueError(
            f"RefLoRA looked for the {len(pairs)} LoRA pairs of the model in the optimizer, but it holds other "
            "parameters: it was made before the model was sharded, or DeepSpeed partitions them. Make the optimizer "
            "after fully_shard; for DeepSpeed use RefLoraCallback in a Trainer."
        )
    return held


def _check_no_shared_memory(tensors: list[Tensor]) -> None:
    # ensure_weight_tying gives a head other Parameters on the memory of the embedding's factors, so ids do not tell.
    pointers = [tensor.data_ptr() for tensor in tensors if tensor.numel() > 0]
    if len(set(pointers)) < len(pointers):
        raise ValueError(
            "RefLoRA-S as rescaling would scale memory twice that LoRA pairs share (ensure_weight_tying). Use "
            "form='precondition'."
        )
