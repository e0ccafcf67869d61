"""Trainers with the methods built in: a callback, metrics in the log and a name on the card, nothing else."""

from transformers import Trainer
from trl import DPOTrainer, SFTTrainer

from ..lora_sb.callback import LoraSbCallback
from ..reflora.callback import RefLoraCallback
from ..report.methods import LORA_SB_PAPER, REFLORA_PAPER
from .checkpoints import WholeCheckpointsMixin
from .publishing import PublishingMixin


def _start(callbacks: list) -> dict[str, str]:
    """How an ordinary LoRA is started, as the run record says it."""
    return {"init": "lora_sb"} if any(isinstance(c, LoraSbCallback) or c is LoraSbCallback for c in callbacks) else {}


class _RefLoraMixin(WholeCheckpointsMixin, PublishingMixin):
    """Adds `RefLoraCallback` to a Trainer and its metrics to the training log."""

    def __init__(self, *args, reflora: RefLoraCallback | None = None, callbacks: list | None = None, **kwargs):
        if any(isinstance(c, RefLoraCallback) or c is RefLoraCallback for c in callbacks or []):
            raise ValueError(
                f"{type(self).__name__} adds a RefLoraCallback itself; a second one in callbacks= would refactor "
                "twice. Pass it as reflora=RefLoraCallback(...)."
            )
        self.reflora = RefLoraCallback() if reflora is None else reflora
        super().__init__(*args, callbacks=[*(callbacks or []), self.reflora], **kwargs)
        self.reflora.check(self.args, self.model, self.optimizer)

    def _record_facts(self, callbacks: list) -> dict[str, str]:
        return {"method": self.reflora.settings.method, **_start(callbacks)}

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        if "loss" in logs:  # the training log, not evaluation or the summary at the end
            logs = {**logs, **self.reflora.metrics()}
        super().log(logs, *args, **kwargs)


class RefLoraTrainer(_RefLoraMixin, Trainer):
    """`transformers.Trainer` with RefLoRA (https://huggingface.co/papers/2505.18877).

    Takes the arguments of `transformers.Trainer` and `reflora`, the callback with RefLoRA's settings (default
    `RefLoraCallback()`). The training log gains what `RefLoraCallback.metrics` returns.

    Raises:
        ValueError: at construction, see `RefLoraCallback`.
    """

    _tag_names = ["reflora"]

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if hasattr(self.model, "add_model_tags"):
            self.model.add_model_tags(self._tag_names)


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


class LoraSbSFTTrainer(WholeCheckpointsMixin, PublishingMixin, SFTTrainer):
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
