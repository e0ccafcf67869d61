"""RefLoRA's part of an optimizer step under FSDP2, which shards the rows of every factor over the processes.

The rows of B and of its gradient stay where they are: Q = Bᵀ B is a sum over rows, so an all-reduce of r × r numbers
completes it, and ∇B S multiplies each row by itself. S⁻¹ ∇A mixes the rows of ∇A, so A and its gradient are gathered.
"""

from collections.abc import Sequence

import torch
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

from ..distributed.parameters import copy_full_, full_tensor, local_tensor, sum_over_shards
from .factors import LoraPair, blocks_of, trainable_pairs
from .precondition import precondition_
from .refactor import compute_dtype
from .settings import RefLora
from .step_plain import PlainStep


class Fsdp2Step(PlainStep):
    """See `PlainStep`. Every method is collective: all processes call it in the same order.

    Raises:
        NotImplementedError: at construction, for a factor that is sharded in another way than by rows, or one of a
            convolution or of experts.
    """

    def __init__(self, settings: RefLora, layers: dict[str, LoraLayer]):
        super().__init__(settings, layers)
        for pair in trainable_pairs(layers):
            _check_shards(pair)

    def _precondition(
        self,
        pairs: list[LoraPair],
        grads_A: list[Tensor | None],
        grads_B: list[Tensor | None],
        inverse_steps: list[float] | None,
    ) -> None:
        # All processes multiply the full ∇A by the same bit-identical S⁻¹ and keep their own rows of the product.
        full_grads_A = [None if grad is None else full_tensor(grad) for grad in grads_A]
        Bs = [pair.B for pair in pairs]
        factors_B = _by_block(pairs, Bs)
        precondition_(
            blocks_of(pairs, LoraPair.split_A, [full_tensor(pair.A.detach()) for pair in pairs]),
            self._local_blocks(pairs, LoraPair.split_B, Bs),
            blocks_of(pairs, LoraPair.split_A, full_grads_A),
            self._local_blocks(pairs, LoraPair.split_B, grads_B),
            eps=self.settings.eps,
            dtype=self.settings.torch_dtype,
            inverse_steps=inverse_steps,
            sum_over_shards=lambda values, indices: sum_over_shards(values, [factors_B[i] for i in indices]),
        )
        for grad, full_grad in zip(grads_A, full_grads_A, strict=True):
            if full_grad is not grad:  # a parameter that FSDP2 was told to ignore has been written in place
                copy_full_(grad, full_grad)

    def _local(self, tensor: Tensor) -> Tensor:
        return local_tensor(tensor)

    def _full(self, tensor: Tensor) -> Tensor:
        # get_total_norm, too, returns a DTensor of DTensors, which holds this process's part of the norm.
        return full_tensor(tensor)

    def _norms(self, pairs: list[LoraPair]) -> tuple[list[Tensor], list[Tensor]]:
        blocks_A, blocks_B = self._local_factors(pairs)
        factors_A, factors_B = _by_block(pairs, [p.A for p in pairs]), _by_block(pairs, [p.B for p in pairs])
        return _full_norms(blocks_A, factors_A), _full_norms(blocks_B, factors_B)


def _by_block(pairs: Sequence[LoraPair], factors: Sequence[Tensor]) -> list[Tensor]:
    """The factor that each block belongs to."""
    return [factor for pair, factor in zip(pairs, factors, strict=True) for _ in range(pair.blocks)]


def _full_norms(blocks: list[Tensor], factors: list[Tensor]) -> list[Tensor]:
    """‖M‖_F of factors of which `blocks` are this process's rows."""
    # In float64, where the square of a float32 number neither overflows nor vanishes.
    squares = torch.stack([torch.linalg.vector_norm(block, dtype=torch.float64).square() for block in blocks])
    norms = sum_over_shards(squares, factors).sqrt()
    return [norm.to(compute_dtype(block)) for norm, block in zip(norms.unbind(0), blocks, strict=True)]


def _check_shards(pair: LoraPair) -> None:
    # A kernel's blocks would cross the borders of the shards, and experts interleave in B's columns.
    placements = [p for factor in (pair.A, pair.B) if isinstance(factor, DTensor) for p in factor.placements]
    if placements and (pair.A.ndim > 2 or pair.blocks > 1):
        raise NotImplementedError(
            f"RefLoRA found sharded factors in {pair.name}, a convolution or expert layer: under FSDP2 it knows "
            "linear and embedding layers. Train with DDP or DeepSpeed, or leave the layer out."
        )
    if any(placement not in (Shard(0), Replicate()) for placement in placements):
        raise NotImplementedError(
            f"RefLoRA found factors sharded as {placements} in {pair.name}: it knows FSDP2's shards of rows, not "
            "tensor parallelism. Train with FSDP2, DDP or DeepSpeed."
        )
