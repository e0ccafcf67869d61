from .hub.adapter import push_adapter
from .hub.retry import PushError
from .lora_sb.callback import LoraSbCallback
from .lora_sb.config import LoraSbConfig
from .lora_sb.export import export_lora
from .lora_sb.initialize import initialize_lora_sb_weights
from .lora_sb.model import LoraSbModel
from .reflora.callback import RefLoraCallback
from .reflora.optimizer import create_reflora_optimizer
from .reflora.settings import RefLora
from .report.recorder import RunRecordCallback
from .trainers.arguments import LoraSbArguments, RefLoraArguments
from .trainers.checkpoints import last_checkpoint
from .trainers.mixin import AdapterTrainerMixin
from .trainers.trainers import RefLoraTrainer
from .trainers.trl_trainers import LoraSbSFTTrainer, RefLoraDPOTrainer, RefLoraSFTTrainer

__all__ = [
    "AdapterTrainerMixin",
    "LoraSbArguments",
    "LoraSbCallback",
    "LoraSbConfig",
    "LoraSbModel",
    "LoraSbSFTTrainer",
    "PushError",
    "RefLora",
    "RefLoraArguments",
    "RefLoraCallback",
    "RefLoraDPOTrainer",
    "RefLoraSFTTrainer",
    "RefLoraTrainer",
    "RunRecordCallback",
    "create_reflora_optimizer",
    "export_lora",
    "initialize_lora_sb_weights",
    "last_checkpoint",
    "push_adapter",
]
__version__: str
