"""LoRA-SB as a PEFT method (https://huggingface.co/papers/2411.19557), and LoRA-XS, which uses the same layer.

Importing this package registers the method with PEFT. hf_reflora imports it together with `peft`, whoever does that,
so it must stay light: the initialization, the callback and the export are modules of their own.
"""

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

from .config import LoraSbConfig, LoraSbPeftType
from .layer import LoraSbLayer
from .model import LoraSbModel


__all__ = ["LoraSbConfig", "LoraSbLayer", "LoraSbModel"]

# peft.register_peft_method would do the same, but takes only members of PeftType, an Enum that cannot be extended.
PEFT_TYPE_TO_CONFIG_MAPPING[LoraSbPeftType.LORASB] = LoraSbConfig
PEFT_TYPE_TO_TUNER_MAPPING[LoraSbPeftType.LORASB] = LoraSbModel
PEFT_TYPE_TO_PREFIX_MAPPING[LoraSbPeftType.LORASB] = LoraSbModel.prefix
