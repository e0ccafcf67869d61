"""Reads and writes parameters that are sharded: FSDP2's DTensors and the partitions of DeepSpeed's ZeRO.

Unless a function says otherwise it is collective: every process must call it, with the same parameters in the same
order, or the processes wait for each other for ever.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import ActivationWrapper
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Partial, Replicate


if TYPE_CHECKING:
    from peft import PeftModel


def full_tensor(tensor: Tensor) -> Tensor:
    """Gathers a DTensor; returns any other tensor as it is. The result is bit-identical on every process."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local_tensor(tensor: Tensor) -> Tensor:
    """This process's shard of a DTensor, sharing its memory; any other tensor as it is. Not collective."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def copy_full_(target: Tensor, value: Tensor) -> None:
    """Copies the full tensor `value`, equal on every process, into `target`; a DTensor takes its own shard of it."""
    if isinstance(target, DTensor):
        # distribute_tensor would broadcast rank 0's value once more; all processes have the same one already.
        mesh = target.device_mesh
        replicated = DTensor.from_local(value.to(target.dtype), mesh, [Replicate()] * mesh.ndim, run_check=False)
        value = replicated.redistribute(placements=target.placements)
    target.copy_(value)


def sum_over_shards(
    values: Tensor,  # (n, ...), one value for each factor, computed from its local shard
    factors: Sequence[Tensor],  # n factors
) -> Tensor:  # (n, ...)
    """Adds up what each process computed from its own rows of the factors; a factor that is not sharded keeps it."""
    groups: dict[tuple, list[int]] = {}
    for i, factor in enumerate(factors):
        if isinstance(factor, DTensor):
            groups.setdefault((factor.device_mesh, factor.placements), []).append(i)
    if not groups:
        return values
    # Stacks of views, because indexing with a list would copy it to the device and wait for that.
    totals = list(values.unbind(0))
    for (mesh, placements), indices in groups.items():
        # HSDP shards over one dimension of the mesh and replicates over the other, where nothing is to be added.
        addends = [Replicate() if placement.is_replicate() else Partial() for placement in placements]
        own = torch.stack([totals[i] for i in indices])
        summed = DTensor.from_local(own, mesh, addends, run_check=False).full_tensor()
        for i, total in zip(indices, summed.unbind(0), strict=True):
            totals[i] = total
    return torch.stack(totals)


def is_zero3_partitioned(parameter: Tensor) -> bool:
    """Whether ZeRO-3 partitions the parameter: outside of `gather_parameters` its shape is (0,). Not collective."""
    return hasattr(parameter, "ds_id")


def has_zero_master_copy(parameter: Tensor) -> bool:
    """Whether DeepSpeed's optimizer steps on a partitioned float32 copy of the parameter: ZeRO-1, 2 and 3.

    A change of the parameter alone would be lost at the next step. Not collective.
    """
    return is_zero3_partitioned(parameter) or hasattr(parameter, "_hp_mapping")


def is_sharded(parameter: Tensor) -> bool:
    """Whether FSDP2 or tensor parallelism shards it, or ZeRO shards what its optimizer steps on. Not collective."""
    return isinstance(parameter, DTensor) or has_zero_master_copy(parameter)


def has_sharded_parameters(model: nn.Module) -> bool:
    """Whether a single process cannot run `model`: FSDP2, tensor parallelism or ZeRO-3 shard it. Not collective."""
    return any(isinstance(parameter, DTensor) or is_zero3_partitioned(parameter) for parameter in model.parameters())


@contextmanager
def gather_parameters(parameters: Iterable[Tensor], *, write: bool = False) -> Iterator[None]:
    """Within it ZeRO-3's parameters have their full shape; all other parameters are left alone.

    Args:
        write: Spread what the main process has written into them to all processes at the end. Without it, changes are
            lost.
    """
    partitioned = [parameter for parameter in parameters if is_zero3_partitioned(parameter)]
    if not partitioned:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(partitioned, modifier_rank=0 if write else None):
        yield


@torch.no_grad()
def write_parameter_(parameter: nn.Parameter, value: Tensor) -> None:
    """Copies the full tensor `value`, equal on every process, into a parameter and into DeepSpeed's master copy."""
    # The order matters: leaving the context repartitions the parameter, and the master copy is set from its partition.
    with gather_parameters([parameter], write=True):
        copy_full_(parameter, value)
    if is_zero3_partitioned(parameter):
        from deepspeed.utils import safe_set_local_fp32_param

        safe_set_local_fp32_param(parameter, parameter.ds_tensor.float())
    elif has_zero_master_copy(parameter):  # ZeRO-1 and 2
        from deepspeed.utils import safe_set_full_fp32_param

        safe_set_full_fp32_param(parameter, value.float())


def check_master_copies(named_parameters: Iterable[tuple[str, nn.Parameter]], what: str) -> None:
    """Raises a NotImplementedError where a written parameter would be overwritten from a copy that is out of reach.

    ZeRO-0 steps on float32 copies of 16-bit parameters and, unlike ZeRO-1 to 3, offers no way to them. Not collective.

    Args:
        named_parameters: The parameters to be written.
        what: What writes them, for the message.
    """
    for name, parameter in named_parameters:
        if parameter.dtype in (torch.float16, torch.bfloat16) and not has_zero_master_copy(parameter):
            raise NotImplementedError(
                f"{what} changes {name}, which is {parameter.dtype}, but DeepSpeed's ZeRO-0 steps on a float32 copy "
                "that cannot be changed from here. Use ZeRO-1, 2 or 3, or train in float32."
            )


def reshard(model: nn.Module) -> None:
    """Returns FSDP2's modules to their sharded state, in which a write to a parameter lasts.

    A forward pass may leave a module unsharded; the next reshard then throws away what was written to the shards.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # unshard() also makes FSDP2 note the gradients' dtype again, which it takes from the parameters that are
            # trainable at that moment: during LoRA-SB's initialization none was.
            module.unshard()
            module.reshard()


@contextmanager
def without_checkpoint_wrappers(model: nn.Module) -> Iterator[None]:
    """Within it the wrappers of FSDP's activation checkpointing are gone. Not collective.

    They put "_checkpoint_wrapped_module" into the modules' names, and PEFT then finds no adapter to save.
    """
    wrappers = [(name, module) for name, module in model.named_modules() if isinstance(module, ActivationWrapper)]
    for name, module in reversed(wrappers):
        model.set_submodule(name, module._checkpoint_wrapped_module)
    try:
        yield
    finally:
        for name, module in wrappers:
            model.set_submodule(name, module)


def adapter_state_dict(model: "PeftModel") -> dict[str, Tensor]:
    """Copies of the active adapter's full tensors, by PEFT's names."""
    # Not at the top of the file: when PEFT is imported, hf_reflora imports lora_sb, which imports this module.
    from peft import get_peft_model_state_dict

    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with gather_parameters(trainable), without_checkpoint_wrappers(model):
        tensors = get_peft_model_state_dict(model, adapter_name=model.active_adapter)
        return {name: full_tensor(tensor).detach().clone() for name, tensor in tensors.items()}
