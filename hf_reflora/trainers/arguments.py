"""The methods' settings as dataclasses for `TrlParser` and `HfArgumentParser`."""

from dataclasses import Field, dataclass, field, make_dataclass
from typing import Any

from ..lora_sb.callback import LoraSbCallback
from ..reflora.callback import RefLoraCallback
from ..reflora.settings import optional_settings


PREFIX = "reflora_"


def _option(setting: Field) -> tuple[str, Any, Field]:
    return f"{PREFIX}{setting.name}", setting.type, field(default=setting.default, metadata=setting.metadata)


# The settings are declared once, in `hf_reflora.RefLora`; this gives each its prefix, default and help text.
_RefLoraOptions = make_dataclass("_RefLoraOptions", [_option(setting) for setting in optional_settings()])


@dataclass
class RefLoraArguments(_RefLoraOptions):  # type: ignore[valid-type, misc]  # a class that is made at run time
    """Settings of RefLoRA (https://huggingface.co/papers/2505.18877) on the command line and in YAML files.

    Every field is `reflora_` and the name of a setting of `hf_reflora.RefLora`: `reflora_form`, `reflora_eps`,
    `reflora_dtype`, `reflora_warmup_steps`, `reflora_interval`, `reflora_smoothness` and `reflora_diagnostics`. The
    recipes' `method` is `RefLora.method`.

    Raises:
        ValueError: at construction, for a value out of range.
    """

    def __post_init__(self):
        self.callback("reflora_s" if self.reflora_form == "rescale" else "reflora")  # raises for wrong values

    def callback(self, method: str) -> RefLoraCallback:
        """The callback with these settings for `method`, "reflora" or "reflora_s"."""
        return RefLoraCallback(
            method, **{setting.name: getattr(self, PREFIX + setting.name) for setting in optional_settings()}
        )


@dataclass
class LoraSbArguments:
    """Settings of LoRA-SB's initialization (https://huggingface.co/papers/2411.19557) on the command line and in YAML.

    Every field is `lorasb_` and the name of an argument of `LoraSbCallback`.

    Raises:
        ValueError: at construction, for a value out of range.
    """

    lorasb_num_samples: int | None = field(
        default=None,
        metadata={"help": "Training samples for the initialization. Default: a thousandth of the data, at least 25."},
    )
    lorasb_eta: float | None = field(
        default=None,
        metadata={"help": "η of the update. Default: the first learning rate above 0 (lr/warm-up)."},
    )
    lorasb_update: str | None = field(
        default=None,
        metadata={
            "help": "The optimizer's first step: 'sign' of the gradient (Adam and its relatives) or 'gradient' (SGD). "
            "Default: what is known of the optimizer."
        },
    )
    lorasb_passes: int | None = field(
        default=None,
        metadata={
            "help": "Passes over these samples, each for a part of the layers: 1 is fastest and takes 4 bytes for "
            "each adapted weight. Default: within the memory of a training step with LoRA, if possible one pass that "
            "goes block by block."
        },
    )
    lorasb_start_at_base: bool = field(
        default=False, metadata={"help": "Start at the base model instead of its first update, in the same subspace."}
    )

    def __post_init__(self):
        self.callback()  # raises on wrong values

    def callback(self) -> LoraSbCallback:
        """The callback with these settings."""
        return LoraSbCallback(
            num_samples=self.lorasb_num_samples,
            eta=self.lorasb_eta,
            update=self.lorasb_update,
            passes=self.lorasb_passes,
            start_at_base=self.lorasb_start_at_base,
        )
