"""TRL's trainers with RefLoRA and LoRA-SB built in. They need `hf_reflora[trl]`; the other trainers do not."""

from ..lora_sb.callback import LoraSbCallback
from ..report.methods import LORA_SB_PAPER, REFLORA_PAPER
from ..requirements import extra
from .mixin import AdapterTrainerMixin
from .trainers import _RefLoraMixin, _start


with extra("trl", "A trainer of TRL with RefLoRA or LoRA-SB"):
    from trl import DPOTrainer, SFTTrainer


class RefLoraSFTTrainer(_RefLoraMixin, SFTTrainer):
    """TRL's `SFTTrainer` with RefLoRA (https://huggingface.co/papers/2505.18877).

    Takes the arguments of `trl.SFTTrainer` and `reflora`, the callback with RefLoRA's settings (default
    `RefLoraCallback()`). Pass `peft_config=LoraConfig(...)` or a trainable `PeftModel`. The training log gains what
    `RefLoraCallback.metrics` returns.

    Raises:
        ValueError: at construction, see `RefLoraCallback`.

    Example:
        >>> trainer = RefLoraSFTTrainer(
        ...     model="HuggingFaceTB/SmolLM2-135M-Instruct",
        ...     train_dataset=dataset,
        ...     peft_config=LoraConfig(r=8, target_modules="all-linear"),
        ...     reflora=RefLoraCallback(warmup_steps=100),
        ... )
    """

    _tag_names = ["trl", "sft", "reflora"]
    _name = "SFT (RefLoRA)"
    _paper = REFLORA_PAPER


class RefLoraDPOTrainer(_RefLoraMixin, DPOTrainer):
    """TRL's `DPOTrainer` with RefLoRA (https://huggingface.co/papers/2505.18877).

    Takes the arguments of `trl.DPOTrainer` and `reflora`, the callback with RefLoRA's settings (default
    `RefLoraCallback()`). Pass `peft_config=LoraConfig(...)`: without the adapter, the model is its own reference. The
    training log gains what `RefLoraCallback.metrics` returns.

    Raises:
        ValueError: at construction, see `RefLoraCallback`.
    """

    _tag_names = ["trl", "dpo", "reflora"]
    _name = "DPO (RefLoRA)"
    _paper = REFLORA_PAPER


class LoraSbSFTTrainer(AdapterTrainerMixin, SFTTrainer):
    """TRL's `SFTTrainer` with LoRA-SB (https://huggingface.co/papers/2411.19557).

    Takes the arguments of `trl.SFTTrainer` and `lora_sb`, the callback with the initialization's settings (default
    `LoraSbCallback()`). Pass `peft_config=LoraSbConfig(...)`; with a `LoraConfig` the same subspace initializes an
    ordinary LoRA. For RefLoRA from there: `RefLoraSFTTrainer(..., callbacks=[LoraSbCallback()])`.

    Raises:
        ValueError: at construction, see `LoraSbCallback`.

    Example:
        >>> trainer = LoraSbSFTTrainer(
        ...     model="HuggingFaceTB/SmolLM2-135M-Instruct",
        ...     train_dataset=dataset,
        ...     peft_config=LoraSbConfig(r=64, target_modules="all-linear"),
        ... )
    """

    _tag_names = ["trl", "sft", "lora-sb"]
    _name = "SFT (LoRA-SB)"
    _paper = LORA_SB_PAPER

    def __init__(self, *args, lora_sb: LoraSbCallback | None = None, callbacks: list | None = None, **kwargs):
        if any(isinstance(c, LoraSbCallback) or c is LoraSbCallback for c in callbacks or []):
            raise ValueError(
                "LoraSbSFTTrainer adds a LoraSbCallback itself; a second one would do nothing. Pass it as "
                "lora_sb=LoraSbCallback(...)."
            )
        self.lora_sb = LoraSbCallback() if lora_sb is None else lora_sb
        super().__init__(*args, callbacks=[*(callbacks or []), self.lora_sb], **kwargs)
        self.lora_sb.check(self.args, self.model)
        if self.compute_loss_func is not None and self.lora_sb.forward_fn is None:
            raise ValueError(
                "The loss is not the model's own (compute_loss_func). Give LoraSbCallback(forward_fn=...), which "
                "computes it."
            )

    def _record_facts(self, callbacks: list) -> dict[str, str]:
        return _start(callbacks)  # of a LoraConfig; a LoraSbConfig says it itself
