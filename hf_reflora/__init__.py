"""Better low-rank adapters in the Hugging Face stack: RefLoRA for Trainer, TRL and plain PyTorch."""

from .arguments import RefLoraArguments
from .callbacks import RefLoraCallback
from .optimizer import create_reflora_optimizer
from .step import RefLora
from .trainer import RefLoraSFTTrainer, RefLoraTrainer


__version__ = "0.1.0"

__all__ = [
    "RefLora",
    "RefLoraArguments",
    "RefLoraCallback",
    "RefLoraSFTTrainer",
    "RefLoraTrainer",
    "create_reflora_optimizer",
]
