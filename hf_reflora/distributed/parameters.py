"""Parameters that a framework keeps in parts, read whole and written: FSDP2's DTensors and DeepSpeed's partitions.

All functions are collective: every process calls them, with the same parameters in the same order.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from peft import PeftModel, get_peft_model_state_dict
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import ActivationWrapper
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate


def whole(tensor: Tensor) -> Tensor:
    """The tensor of all parts of a DTensor; another tensor as it is. The same to the bit on every process."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def part(tensor: Tensor) -> Tensor:
    """This process's part of a DTensor, sharing its memory; another tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def put_(target: Tensor, value: Tensor) -> None:
    """Copies `value`, which is whole and the same everywhere, into `target`, of which a DTensor keeps its part."""
    if isinstance(target, DTensor):
        mesh = target.device_mesh
        replicated = DTensor.from_local(value.to(target.dtype), mesh, [Replicate()] * mesh.ndim, run_check=False)
        value = replicated.redistribute(placements=target.placements)
    target.copy_(value)


def partitioned(parameter: Tensor) -> bool:
    """Whether ZeRO-3 keeps the parameter in parts: outside of `gathered` its shape is (0,)."""
    return hasattr(parameter, "ds_id")


def linked(parameter: Tensor) -> bool:
    """Whether DeepSpeed steps on a float32 copy in parts that the parameter leads to: ZeRO-1, 2 and 3."""
    return partitioned(parameter) or hasattr(parameter, "_hp_mapping")


def in_parts(parameter: Tensor) -> bool:
    """Whether FSDP2 or tensor parallelism keeps the parameter in parts, or DeepSpeed what its optimizer steps on."""
    return isinstance(parameter, DTensor) or linked(parameter)


@contextmanager
def gathered(parameters: Iterable[Tensor], *, write: bool = False) -> Iterator[None]:
    """Within it ZeRO-3's parameters are whole. With `write`, what the main process has written is kept by all."""
    parts = [parameter for parameter in parameters if partitioned(parameter)]
    if not parts:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(parts, modifier_rank=0 if write else None):
        yield


@torch.no_grad()
def write_(parameter: nn.Parameter, value: Tensor) -> None:
    """Copies `value`, whole and the same everywhere, into a parameter and the float32 copy that DeepSpeed steps on."""
    with gathered([parameter], write=True):
        put_(parameter, value)
    if partitioned(parameter):
        from deepspeed.utils import safe_set_local_fp32_param

        safe_set_local_fp32_param(parameter, parameter.ds_tensor.float())
    elif linked(parameter):  # ZeRO-1 and 2
        from deepspeed.utils import safe_set_full_fp32_param

        safe_set_full_fp32_param(parameter, value.float())


def check_reachable(model: nn.Module, what: str) -> None:
    """Raises a NotImplementedError for 16-bit parameters whose float32 copies DeepSpeed's ZeRO-0 keeps to itself."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not linked(parameter) and parameter.dtype in (torch.float16, torch.bfloat16):
            raise NotImplementedError(
                f"{what} changes {name}, which is {parameter.dtype}, but DeepSpeed's ZeRO-0 steps on a float32 copy "
                "that cannot be changed from here. Use ZeRO-1, 2 or 3, or train in float32."
            )


def reshard(model: nn.Module) -> None:
    """Returns FSDP2's modules to their shards: writes to parameters that a forward pass left whole are lost."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.unshard()  # notes the gradients' dtype anew, which it takes from the parameters that are trainable
            module.reshard()


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP2, tensor parallelism or ZeRO-3 keeps a parameter of `model` in parts."""
    return any(isinstance(parameter, DTensor) or partitioned(parameter) for parameter in model.parameters())


@contextmanager
def checkpoint_wrappers_removed(model: nn.Module) -> Iterator[None]:
    """Within it the wrappers of FSDP's activation checkpointing are gone: by their names PEFT finds no adapter."""
    wrapped = [(name, module) for name, module in model.named_modules() if isinstance(module, ActivationWrapper)]
    for name, module in reversed(wrapped):
        model.set_submodule(name, module._checkpoint_wrapped_module)
    try:
        yield
    finally:
        for name, module in wrapped:
            model.set_submodule(name, module)


def adapter_tensors(model: PeftModel) -> dict[str, Tensor]:
    """The active adapter's tensors, whole, by PEFT's names."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with gathered(trained), checkpoint_wrappers_removed(model):
        tensors = get_peft_model_state_dict(model, adapter_name=model.active_adapter)
        return {name: whole(tensor).detach().clone() for name, tensor in tensors.items()}
