"""The layers of an adapter that LoRA-SB can initialize: those of a `LoraSbConfig` and of an ordinary `LoraConfig`."""

from typing import TypeAlias

from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..distributed.parameters import full_tensor, gather_parameters
from .config import LoraSbConfig
from .layer import LoraSbLayer


AdapterLayer: TypeAlias = LoraSbLayer | LoraLayer


def missing_peft_model(model: nn.Module) -> str:
    """Why a model that is no PeftModel is not enough, and how to make one, for a message."""
    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        return (
            f"got a {type(model).__name__} with an adapter that model.add_adapter or inject_adapter_in_model has put "
            "into it. Make it by peft.get_peft_model(model, config), or pass peft_config=... to TRL's trainers."
        )
    return (
        f"got a {type(model).__name__} without an adapter. Make one by peft.get_peft_model(model, config), or pass "
        "peft_config=... to TRL's trainers."
    )


def adapter_layers(model: PeftModel, adapter_name: str) -> dict[str, AdapterLayer]:
    """The layers of an adapter, by name.

    Raises:
        ValueError: if the model has no such adapter, or LoRA-SB cannot initialize it: it is neither a `LoraSbConfig`
            nor a `LoraConfig` with `init_lora_weights=True`, or a layer is not linear, is a variant such as DoRA, is
            merged, or is smaller than its rank.
    """
    if adapter_name not in model.peft_config:
        raise ValueError(f"There is no adapter {adapter_name!r}; the model has {', '.join(model.peft_config)}.")
    config = model.peft_config[adapter_name]
    # By the exact type: other methods' configurations inherit from LoraConfig, such as AdaLoRA's.
    if type(config) not in (LoraSbConfig, LoraConfig):
        raise ValueError(
            f"The adapter {adapter_name!r} is a {type(config).__name__}; LoRA-SB initializes LoraSbConfig, LoraConfig."
        )
    if isinstance(config, LoraConfig) and config.init_lora_weights is not True:
        raise ValueError(
            f"The adapter {adapter_name!r} has init_lora_weights={config.init_lora_weights!r}, another start. "
            "Make it with init_lora_weights=True."
        )
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, AdapterLayer) and adapter_name in module.r
    }
    for name, layer in layers.items():
        _check_layer(name, layer, adapter_name)
    return layers


def _check_layer(name: str, layer: AdapterLayer, adapter_name: str) -> None:
    base = layer.get_base_layer()
    is_variant = isinstance(layer, LoraLayer) and adapter_name in layer.lora_variant
    if is_variant or not isinstance(base, nn.Linear | Conv1D):
        kind = "a LoRA variant such as DoRA" if is_variant else f"on a {type(base).__name__}"
        raise ValueError(f"{name} is {kind}; LoRA-SB initializes plain adapters on linear layers. Leave it out.")
    # An ordinary LoRA may have such a rank, but ΔW has fewer singular triplets. LoRA-SB's layers clamp theirs.
    if layer.r[adapter_name] > min(layer.in_features, layer.out_features):
        raise ValueError(
            f"{name} is {layer.out_features} x {layer.in_features} and has no subspace of rank "
            f"{layer.r[adapter_name]}. Give it a smaller rank by rank_pattern."
        )
    if layer.merged:  # the gradient would be taken at W0 + ΔW
        raise ValueError(f"{name} is merged. Call unmerge_adapter() first.")


def trained_parameter(layer: AdapterLayer, adapter_name: str) -> nn.Parameter:
    """What LoRA-SB trains in a layer: R, or B of an ordinary LoRA, which trains A as well."""
    return layer.lorasb_R[adapter_name] if isinstance(layer, LoraSbLayer) else layer.lora_B[adapter_name].weight


def is_initialized(model: PeftModel, adapter_name: str) -> bool:
    """Whether the adapter has been initialized, loaded or trained.

    A LoRA-SB layer remembers it; of an ordinary LoRA, B is 0 before and hardly ever afterwards. Collective where
    FSDP2 or ZeRO-3 shard the factors.
    """
    layers = adapter_layers(model, adapter_name).values()
    lora_Bs = [layer.lora_B[adapter_name].weight for layer in layers if isinstance(layer, LoraLayer)]
    with gather_parameters(lora_Bs):
        return any(bool(full_tensor(B).any()) for B in lora_Bs) or any(
            adapter_name in layer.initialized for layer in layers if isinstance(layer, LoraSbLayer)
        )
