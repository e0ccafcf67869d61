"""Better low-rank adapters in the Hugging Face stack: RefLoRA and LoRA-SB for PEFT, Trainer, TRL and plain PyTorch."""

from .arguments import LoraSbArguments, RefLoraArguments
from .callbacks import RefLoraCallback
from .checkpoints import WholeCheckpointsMixin, last_checkpoint
from .export import export_lora
from .hub import PushError
from .lora_sb import LoraSbCallback, LoraSbConfig, LoraSbModel, initialize_lora_sb_weights
from .optimizer import create_reflora_optimizer
from .publish import push_adapter
from .publishing_trainer import PublishingMixin
from .record import RunRecordCallback
from .step import RefLora
from .trainer import LoraSbSFTTrainer, RefLoraDPOTrainer, RefLoraSFTTrainer, RefLoraTrainer


__version__ = "0.1.0"

__all__ = [
    "LoraSbArguments",
    "LoraSbCallback",
    "LoraSbConfig",
    "LoraSbModel",
    "LoraSbSFTTrainer",
    "PublishingMixin",
    "PushError",
    "RefLora",
    "RefLoraArguments",
    "RefLoraCallback",
    "RefLoraDPOTrainer",
    "RefLoraSFTTrainer",
    "RefLoraTrainer",
    "RunRecordCallback",
    "WholeCheckpointsMixin",
    "create_reflora_optimizer",
    "export_lora",
    "initialize_lora_sb_weights",
    "last_checkpoint",
    "push_adapter",
]
