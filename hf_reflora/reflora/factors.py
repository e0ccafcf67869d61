"""Finds the LoRA factors of a PEFT model. This is the only file that knows the insides of PEFT's layers.

Frameworks replace Parameters (FSDP2 when it shards) and switch them on and off (`set_adapter`), so a list of pairs may
be out of date at the next step. Only the layers stay. `PairLookup` keeps a list as long as it is certain to be right.
"""

import math
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.adalora.layer import AdaLoraLayer
from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn


# Variants whose update is not scaling * B @ A, so that (Tᵀ A, B T⁻ᵀ) would change it.
UNSUPPORTED_VARIANTS = {
    "ArrowLinearVariant": "Arrow mixes several adapters by a router",
    "BdLoraLinearVariant": "BD-LoRA has block-diagonal factors",
    "KasaLinearVariant": "KaSA has a diagonal between B and A",
    "MontecloraLinearVariant": "MonteCLoRA samples its factors",
}


@dataclass(frozen=True)
class LoraPair:
    """The factors of one adapter in one layer, ΔW = scaling * B @ A, or `blocks` such products side by side.

    A Linear, Conv1D or Embedding layer has one block. A convolution of g groups has g. `target_parameters` on E
    experts has E, and PEFT's layout interleaves the experts in B. Each block is refactored as a pair of its own.
    """

    name: str
    A: nn.Parameter  # (blocks * r, in, ...)
    B: nn.Parameter  # (out, blocks * r, ...)
    scaling: float
    blocks: int = 1
    experts: bool = False

    def split_A(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """The blocks of a tensor of A's shape (or of this process's rows of it): views (r, in)."""
        if tensor.ndim == 2 and self.blocks == 1:
            return (tensor,)  # most layers: saves the five calls that make the views, but it may need no_grad()
        return _as_matrix(tensor).unflatten(0, (self.blocks, -1)).unbind(0)

    def split_B(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """The blocks of a tensor of B's shape (or of this process's rows of it): views (out, r)."""
        if tensor.ndim == 2 and self.blocks == 1:
            return (tensor,)
        if self.experts:
            return _as_matrix(tensor).unflatten(1, (-1, self.blocks)).unbind(2)
        return _as_matrix(tensor).unflatten(0, (self.blocks, -1)).unbind(0)


def _as_matrix(tensor: Tensor) -> Tensor:
    """A view (rows, columns). A kernel's columns are in the order of its memory, which channels_last permutes."""
    order = sorted(range(1, tensor.ndim), key=tensor.stride, reverse=True)
    return tensor.detach().permute(0, *order).view(len(tensor), math.prod(tensor.shape[1:]))


def blocks_of(
    pairs: Sequence[LoraPair],
    split: Callable[[LoraPair, Tensor], tuple[Tensor, ...]],
    tensors: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """The blocks of one tensor for each pair, in one list; None for each block of a missing tensor.

    Args:
        split: `LoraPair.split_A` for tensors of A's shape, `LoraPair.split_B` for those of B's.
    """
    return [
        block
        for pair, tensor in zip(pairs, tensors, strict=True)
        for block in ([None] * pair.blocks if tensor is None else split(pair, tensor))
    ]


def lora_layers(model: nn.Module) -> dict[str, LoraLayer]:
    """PEFT's LoRA layers of `model` by name. It holds modules only, so it stays right when Parameters are replaced."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer) and not isinstance(module, AdaLoraLayer)  # AdaLoRA: B diag(E) A
    }


def trainable_pairs(layers: dict[str, LoraLayer]) -> list[LoraPair]:
    """The pairs of `layers` whose two factors are both trainable now, each pair of Parameters once.

    Raises:
        ValueError: A trainable pair is of a variant whose update is not B @ A, or shares one factor with another.
    """
    return _pairs_of(layers, lambda factor: factor.requires_grad)


class PairLookup:
    """The pairs that an optimizer's step can change: `trainable_pairs`, and those that still have gradients.

    A loss of several adapters is computed with `set_adapter` between them, which freezes the one that has its
    gradients already. An optimizer looks at gradients, not at `requires_grad`, and updates that adapter, too.

    Looking up the pairs of a model takes as long as computing their refactorings. The result is therefore kept until
    something that it depends on changes: a Parameter or a module that holds one is another object, an adapter comes or
    goes, its scaling changes, or a factor's `requires_grad` or gradient comes or goes. What a Parameter's
    `data` is does not matter here, because shapes, dtypes and memory are read from the Parameter when they are needed.
    """

    def __init__(self, layers: dict[str, LoraLayer]):
        self._layers = layers
        self._pairs: list[LoraPair] = []
        self._adapters: list[int] | None = None  # the number of each layer's adapters; None before the first lookup
        # objects[i] was found in mappings[i] at keys[i].
        self._mappings: tuple[dict, ...] = ()
        self._keys: tuple[str, ...] = ()
        self._objects: tuple[Any, ...] = ()
        self._factors: list[nn.Parameter] = []
        self._counts: list[bool] = []  # of each factor, whether a step can change it

    def pairs(self) -> list[LoraPair]:
        """The pairs as of now.

        Raises:
            ValueError: as `trainable_pairs`.
        """
        if not self._is_current():
            self._pairs = _pairs_of(self._layers, _can_change)
            adapters = [(layer, adapter) for layer in self._layers.values() for adapter in layer.r]
            places = [place for layer, adapter in adapters for place in _places(layer, adapter)]
            self._mappings, self._keys, self._objects = zip(*places, strict=True) if places else ((), (), ())
            self._factors = [factor for layer, adapter in adapters for factor in _factors(layer, adapter)]
            self._counts = [_can_change(factor) for factor in self._factors]
            self._adapters = [len(layer.r) for layer in self._layers.values()]
        return self._pairs

    def _is_current(self) -> bool:
        return (
            self._adapters == [len(layer.r) for layer in self._layers.values()]
            # The same object in every place. Without a line of Python for each, it takes a tenth of a lookup.
            and all(map(operator.is_, map(dict.get, self._mappings, self._keys), self._objects))
            and self._counts == [factor.requires_grad or factor.grad is not None for factor in self._factors]
        )


def _can_change(factor: nn.Parameter) -> bool:
    return factor.requires_grad or factor.grad is not None


def _places(layer: LoraLayer, adapter: str) -> Iterator[tuple[dict, str, Any]]:
    """Where a layer keeps what a lookup of an adapter reads: (dictionary, key, the object there now).

    These are the dictionaries themselves, because reading an attribute of a module takes ten times as long.
    """
    yield layer.scaling, adapter, layer.scaling[adapter]
    embedding = adapter in layer.lora_embedding_A
    for side in ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A", "lora_B"):
        holder = getattr(layer, side)
        yield layer._modules, side, holder
        if embedding:
            yield holder._parameters, adapter, holder[adapter]
        else:
            yield holder._modules, adapter, holder[adapter]
            # A parametrized weight is none of the module's parameters, so it is never current and looked up each time.
            yield holder[adapter]._parameters, "weight", holder[adapter].weight


def _pairs_of(layers: dict[str, LoraLayer], counts: Callable[[nn.Parameter], bool]) -> list[LoraPair]:
    """The pairs of `layers` both of whose factors count."""
    pairs: list[LoraPair] = []
    seen: set[tuple[int, int]] = set()
    factors: set[int] = set()
    for name, layer in layers.items():
        for adapter in layer.r:
            A, B = _factors(layer, adapter)
            if not (counts(A) and counts(B)) or (id(A), id(B)) in seen:
                continue  # frozen, or tied to a layer that came earlier
            if not factors.isdisjoint((id(A), id(B))):
                raise ValueError(
                    f"RefLoRA would refactor a factor twice: {name} (adapter {adapter!r}) shares lora_A or lora_B, "
                    "but not both, with another layer. Give each layer factors of its own, or train without RefLoRA."
                )
            seen.add((id(A), id(B)))
            factors.update((id(A), id(B)))
            variant = type(layer.lora_variant.get(adapter)).__name__
            if variant in UNSUPPORTED_VARIANTS:
                raise ValueError(
                    f"RefLoRA needs an update of the form B @ A, but {name} (adapter {adapter!r}) uses {variant}: "
                    f"{UNSUPPORTED_VARIANTS[variant]}. Use a plain LoraConfig, or train this adapter without RefLoRA."
                )
            experts = isinstance(layer, ParamWrapper)
            blocks = layer.num_experts if experts else getattr(layer.get_base_layer(), "groups", 1)
            pairs.append(LoraPair(f"{name}[{adapter}]", A, B, float(layer.scaling[adapter]), blocks, experts))
    return pairs


def _factors(layer: LoraLayer, adapter: str) -> tuple[nn.Parameter, nn.Parameter]:
    # PEFT keeps an embedding's factors as bare parameters, of the same orientation as a linear layer's weights.
    if adapter in layer.lora_embedding_A:
        return layer.lora_embedding_A[adapter], layer.lora_embedding_B[adapter]
    return layer.lora_A[adapter].weight, layer.lora_B[adapter].weight


def require_pairs(model: nn.Module) -> list[LoraPair]:
    """`trainable_pairs` of `model`, at least one.

    Raises:
        ValueError: There is none, and the message says what there is instead; or as `trainable_pairs`.
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
    others = {type(m) for m in model.modules() if isinstance(m, BaseTunerLayer)}
    if others:
        names = ", ".join(sorted(f"{cls.__module__}.{cls.__name__}" for cls in others))
        raise ValueError(f"{looked}. The adapter layers of this model are others: {names}. Pass a LoraConfig.")
    configs = getattr(model, "peft_config", None)  # of prompt tuning, which has no layers
    if isinstance(model, PeftModel) and configs:
        names = ", ".join(sorted({type(config).__name__ for config in configs.values()}))
        raise ValueError(f"{looked}. The adapter of this model is made by {names}. Pass a LoraConfig.")
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
