"""Finds the LoRA factors of a PEFT model: the only file that knows the insides of PEFT's layers.

Nothing here keeps a Parameter: frameworks replace them (FSDP2 when it shards, `set_adapter` when it switches), so
pairs are looked up from the layers anew at each step.
"""

from dataclasses import dataclass

import torch
from peft.tuners.adalora.layer import AdaLoraLayer
from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard


# Variants whose update is not scaling * B @ A, so that (Tᵀ A, B T⁻ᵀ) would change it.
UNSUPPORTED_VARIANTS = {
    "ArrowLinearVariant": "Arrow mixes several adapters by a router",
    "BdLoraLinearVariant": "BD-LoRA has block-diagonal factors",
    "KasaLinearVariant": "KaSA has a diagonal between B and A",
    "MontecloraLinearVariant": "MonteCLoRA samples its factors",
}


@dataclass(frozen=True)
class LoraPair:
    """Factors of one adapter in one layer, ΔW = scaling * B @ A, or `blocks` of them side by side.

    A Linear, Conv1D or Embedding layer has one block. A convolution of g groups has g, and `target_parameters` on
    E experts has E, whose B interleaves the experts (PEFT's layout): there each block is a pair of its own.
    """

    name: str
    A: nn.Parameter  # (blocks * r, in, ...)
    B: nn.Parameter  # (out, blocks * r, ...)
    scaling: float
    blocks: int = 1
    experts: bool = False

    def split_A(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """Views (r, in) of a tensor of A's shape, one a block."""
        if isinstance(tensor, DTensor):
            return (tensor.detach(),)
        return _rows(tensor).unflatten(0, (self.blocks, -1)).unbind(0)

    def split_B(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """Views (out, r) of a tensor of B's shape, one a block."""
        if isinstance(tensor, DTensor):
            return (tensor.detach(),)
        if self.experts:
            return _rows(tensor).unflatten(1, (-1, self.blocks)).unbind(2)
        return _rows(tensor).unflatten(0, (self.blocks, -1)).unbind(0)


def _rows(tensor: Tensor) -> Tensor:
    """A view (rows, columns); a kernel's columns come in the order of its memory (channels_last, too)."""
    order = sorted(range(1, tensor.ndim), key=tensor.stride, reverse=True)
    return tensor.detach().permute(0, *order).view(len(tensor), -1)


def lora_layers(model: nn.Module) -> dict[str, LoraLayer]:
    """PEFT's LoRA layers of `model` by name. Holds modules only, so it stays right when Parameters are replaced."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer) and not isinstance(module, AdaLoraLayer)  # AdaLoRA: B diag(E) A
    }


def trainable_pairs(layers: dict[str, LoraLayer]) -> list[LoraPair]:
    """The pairs of `layers` whose two factors are both trainable now, each pair of Parameters once.

    Raises:
        ValueError: A trainable pair is of a variant whose update is not B @ A, or shares one factor with another.
        NotImplementedError: A trainable factor is sharded in another way than FSDP2 shards a matrix.
    """
    pairs, seen, taken = [], set(), set()
    for name, layer in layers.items():
        for adapter in layer.r:
            A, B = _factors(layer, adapter)
            if not (A.requires_grad and B.requires_grad) or (id(A), id(B)) in seen:
                continue
            if not taken.isdisjoint((id(A), id(B))):
                raise ValueError(
                    f"RefLoRA would refactor a factor twice: {name} (adapter {adapter!r}) shares lora_A or lora_B, "
                    "but not both, with another layer. Give each layer factors of its own, or train without RefLoRA."
                )
            seen.add((id(A), id(B)))
            taken.update((id(A), id(B)))
            variant = type(layer.lora_variant.get(adapter)).__name__
            if variant in UNSUPPORTED_VARIANTS:
                raise ValueError(
                    f"RefLoRA needs an update of the form B @ A, but {name} (adapter {adapter!r}) uses {variant}: "
                    f"{UNSUPPORTED_VARIANTS[variant]}. Use a plain LoraConfig, or train this adapter without RefLoRA."
                )
            experts = isinstance(layer, ParamWrapper)
            blocks = layer.num_experts if experts else getattr(layer.get_base_layer(), "groups", 1)
            _check_shards(name, A, B, blocks)
            pairs.append(LoraPair(f"{name}[{adapter}]", A, B, float(layer.scaling[adapter]), blocks, experts))
    return pairs


def _check_shards(name: str, A: Tensor, B: Tensor, blocks: int) -> None:
    placements = [placement for M in (A, B) if isinstance(M, DTensor) for placement in M.placements]
    if placements and (A.ndim > 2 or blocks > 1):
        raise NotImplementedError(
            f"RefLoRA found sharded factors in {name}, a convolution or expert layer: under FSDP2 it knows linear and "
            "embedding layers. Train with DDP or DeepSpeed, or leave the layer out."
        )
    if any(placement not in (Shard(0), Replicate()) for placement in placements):
        raise NotImplementedError(
            f"RefLoRA found factors sharded as {placements} in {name}: it knows FSDP2's shards of rows, not tensor "
            "parallelism. Train with FSDP2, DDP or DeepSpeed."
        )


def _factors(layer: LoraLayer, adapter: str) -> tuple[nn.Parameter, nn.Parameter]:
    if adapter in layer.lora_embedding_A:
        return layer.lora_embedding_A[adapter], layer.lora_embedding_B[adapter]
    return layer.lora_A[adapter].weight, layer.lora_B[adapter].weight


def require_pairs(model: nn.Module) -> list[LoraPair]:
    """`trainable_pairs` of `model`, at least one.

    Raises:
        ValueError: There is none; the message says what was found instead.
        (and what `trainable_pairs` raises)
    """
    layers = lora_layers(model)
    pairs = trainable_pairs(layers)
    if pairs:
        return pairs
    looked = "RefLoRA looked for LoRA layers whose lora_A and lora_B are both trainable"
    if layers:
        raise ValueError(
            f"{looked}. The model has {len(layers)} LoRA layers, but none has both factors trainable. Load the "
            "adapter with is_trainable=True or call set_adapter; methods that freeze a factor (LoRA-FA, MiCA) have "
            "nothing to refactor."
        )
    # peft.tuners.vera.layer → vera
    kinds = sorted({type(m).__module__.split(".")[2] for m in model.modules() if isinstance(m, BaseTunerLayer)})
    if kinds:
        raise ValueError(f"{looked}. The model's adapters are of the kind {', '.join(kinds)}; pass a LoraConfig.")
    raise ValueError(
        f"{looked}. {type(model).__name__} has no adapter; wrap it with peft.get_peft_model(model, LoraConfig(...)) "
        "or pass peft_config=LoraConfig(...) to the trainer."
    )


def dense_gradient(parameter: nn.Parameter) -> Tensor | None:
    """The gradient of `parameter`, None where it has none.

    Raises:
        ValueError: The gradient is sparse.
    """
    if parameter.grad is not None and parameter.grad.layout != torch.strided:
        raise ValueError(f"RefLoRA needs dense gradients, found {parameter.grad.layout}; use sparse=False embeddings.")
    return parameter.grad
