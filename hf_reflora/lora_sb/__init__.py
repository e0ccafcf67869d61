"""LoRA-SB, a PEFT method (https://huggingface.co/papers/2411.19557), and LoRA-XS, which shares its layer."""

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

from .config import LoraSbConfig, LoraSbPeftType
from .layer import LoraSbLayer
from .model import LoraSbModel


__all__ = ["LoraSbConfig", "LoraSbLayer", "LoraSbModel"]

# What peft.register_peft_method does; that function takes only members of PEFT's own, closed PeftType.
PEFT_TYPE_TO_CONFIG_MAPPING[LoraSbPeftType.LORASB] = LoraSbConfig
PEFT_TYPE_TO_TUNER_MAPPING[LoraSbPeftType.LORASB] = LoraSbModel
PEFT_TYPE_TO_PREFIX_MAPPING[LoraSbPeftType.LORASB] = LoraSbModel.prefix
