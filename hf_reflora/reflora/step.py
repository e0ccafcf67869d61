"""Chooses the step object of the backend, once, when training begins; see `PlainStep` for its three methods."""

from peft.tuners.lora.layer import LoraLayer
from torch.distributed.tensor import DTensor

from ..distributed.backend import is_deepspeed
from .factors import trainable_pairs
from .settings import RefLora
from .step_deepspeed import DeepSpeedStep
from .step_fsdp2 import Fsdp2Step
from .step_plain import PlainStep


def choose_step(settings: RefLora, layers: dict[str, LoraLayer]) -> PlainStep:
    """The step object for a Trainer's run.

    Raises:
        NotImplementedError: see `Fsdp2Step` and `DeepSpeedStep`.
    """
    return DeepSpeedStep(settings, layers) if is_deepspeed() else choose_loop_step(settings, layers)


def choose_loop_step(settings: RefLora, layers: dict[str, LoraLayer]) -> PlainStep:
    """The step object where gradients are there before the optimizer's step: everywhere but under DeepSpeed."""
    # A model that from_pretrained sharded has DTensors in its base only; its factors are plain parameters.
    sharded = any(isinstance(factor, DTensor) for pair in trainable_pairs(layers) for factor in (pair.A, pair.B))
    return Fsdp2Step(settings, layers) if sharded else PlainStep(settings, layers)
