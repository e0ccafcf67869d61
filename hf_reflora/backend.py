"""What accelerate and a Trainer hand to callbacks: the backend that runs, and the optimizer inside its wrapper."""

from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from torch.optim import Optimizer


def check_backend(what: str) -> None:
    """Raises a ValueError on backends where a callback does not have whole factors and gradients in its hands.

    Args:
        what: What would not work there, for the message.
    """
    if not AcceleratorState._shared_state:
        return
    state = AcceleratorState()
    reasons = {
        DistributedType.DEEPSPEED: (
            "DeepSpeed takes the optimizer's step inside the backward pass, so gradients changed after it do nothing"
        ),
        DistributedType.FSDP: "FSDP keeps the factors in flat or sharded parameters, so they are not whole",
        DistributedType.MEGATRON_LM: "Megatron-LM takes the optimizer's step by itself",
    }
    if state.distributed_type in reasons:
        raise ValueError(
            f"{what} does not support {state.distributed_type.value} yet: {reasons[state.distributed_type]}. Train "
            f"with DDP instead (accelerate launch --multi_gpu), or without {what}."
        )


def inner_optimizer(optimizer: Optimizer) -> Optimizer:
    """The optimizer inside accelerate's wrapper."""
    return getattr(optimizer, "optimizer", optimizer)
