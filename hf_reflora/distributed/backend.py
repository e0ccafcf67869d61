"""Which framework runs the training, as accelerate tells it: its name, and what does not work under it."""

from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from torch.optim import Optimizer
from transformers.utils import is_sagemaker_mp_enabled


def _state() -> AcceleratorState | None:
    """accelerate's state, None before anything has made it: AcceleratorState() would then fix its settings."""
    return AcceleratorState() if AcceleratorState._shared_state else None


def is_deepspeed() -> bool:
    """Whether DeepSpeed trains. It takes the optimizer's step inside the backward pass."""
    state = _state()
    return state is not None and state.distributed_type == DistributedType.DEEPSPEED


def backend_name() -> str:
    """The backend's name for people, such as "MULTI_GPU", "FSDP2" or "DeepSpeed ZeRO-2"."""
    state = _state()
    if state is None:
        return PartialState().distributed_type.value
    if is_deepspeed():
        return f"DeepSpeed ZeRO-{state.deepspeed_plugin.zero_stage}"
    # accelerate has one name, FSDP, for both versions.
    return "FSDP2" if state.is_fsdp2 else state.distributed_type.value


def is_replicated() -> bool:
    """Whether every process has the complete model and steps on its own parameters: one process, or DDP."""
    name = backend_name()
    return name == "NO" or name.startswith("MULTI_")


def optimizer_steps_in_float32() -> bool:
    """Whether 16-bit parameters are only copies for the forward pass, of float32 ones that the optimizer steps on."""
    state = _state()
    return state is not None and (is_deepspeed() or state.is_fsdp2) and state.mixed_precision in ("fp16", "bf16")


def check_backend(what: str) -> None:
    """Raises a ValueError on backends that give no access to the factors and their gradients.

    Args:
        what: What would not work there, for the message.
    """
    # accelerate's state does not tell SageMaker's model parallelism; transformers does.
    if is_sagemaker_mp_enabled():
        raise ValueError(f"{what} does not support SageMaker's model parallelism. Train with FSDP2 or DeepSpeed.")
    state = _state()
    if state is None:
        return
    if state.distributed_type == DistributedType.MEGATRON_LM:
        raise ValueError(
            f"{what} does not support Megatron-LM, which takes the optimizer's step by itself. Train with FSDP2, "
            "DeepSpeed or DDP."
        )
    if state.distributed_type == DistributedType.FSDP and not state.is_fsdp2:
        raise ValueError(
            f"{what} does not support FSDP1, which keeps the factors in flat parameters. Train with FSDP2: "
            "fsdp_version: 2 in accelerate's configuration, or fsdp_config={'version': 2}."
        )


def check_saving(state: AcceleratorState) -> None:
    """Raises a ValueError for settings under which a Trainer saves no adapter, or one without weights."""
    # With sharded state dicts transformers writes FSDP's own files and skips the adapter's.
    if state.distributed_type == DistributedType.FSDP and "FULL" not in str(state.fsdp_plugin.state_dict_type):
        raise ValueError(
            f"With {state.fsdp_plugin.state_dict_type} a Trainer saves no adapter. Choose FULL_STATE_DICT: "
            "fsdp_state_dict_type in accelerate's configuration, state_dict_type in fsdp_config."
        )
    if state.distributed_type == DistributedType.DEEPSPEED:
        zero = state.deepspeed_plugin.deepspeed_config["zero_optimization"]
        if zero["stage"] == 3 and not zero.get("stage3_gather_16bit_weights_on_model_save"):
            raise ValueError(
                "With ZeRO-3 a Trainer saves an adapter without weights unless "
                "stage3_gather_16bit_weights_on_model_save is true in DeepSpeed's configuration "
                "(zero3_save_16bit_model in accelerate's)."
            )


def unwrap_optimizer(optimizer: Optimizer) -> Optimizer:
    """The torch optimizer inside the wrappers of accelerate and DeepSpeed, which lack its hooks and its state."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer
