"""Trainers with the methods built in: a callback, metrics in the log and a name on the card, nothing else."""

from typing import Any

from transformers import Trainer

from ..lora_sb.callback import LoraSbCallback
from ..reflora.callback import RefLoraCallback
from .mixin import AdapterTrainerMixin


def _start(callbacks: list) -> dict[str, str]:
    """How an ordinary LoRA is started, as the run record says it."""
    return {"init": "lora_sb"} if any(isinstance(c, LoraSbCallback) or c is LoraSbCallback for c in callbacks) else {}


class _RefLoraMixin(AdapterTrainerMixin):
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

    def create_model_card(  # type: ignore[override]  # the order of transformers, where the mixin has that of TRL
        self,
        language: str | list[str] | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        model_name: str | None = None,
        finetuned_from: str | None = None,
        tasks: str | list[str] | None = None,
        dataset_tags: str | list[str] | None = None,
        dataset: str | list[str] | None = None,
        dataset_args: str | list[str] | None = None,
        **more: Any,
    ) -> None:
        """As `AdapterTrainerMixin.create_model_card`, in the order of `transformers.Trainer.create_model_card`."""
        super().create_model_card(
            model_name,
            tags=tags,
            language=language,
            license=license,
            finetuned_from=finetuned_from,
            tasks=tasks,
            dataset_tags=dataset_tags,
            dataset=dataset,
            dataset_args=dataset_args,
            **more,
        )
