"""What the experiments compare RefLoRA with and the recipes do not have: other optimizers and other adapters.

All are the libraries' own, but for RefLoRA-O, which is tried here before it may enter the package.
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from peft import PeftConfig, VeraConfig
from torch.optim import Optimizer
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_reflora.recipes.options import Options, RecipeArguments
from hf_reflora.reflora.factors import require_pairs


OPTIMIZERS = ("lorarite", "reflora_o")  # beside the recipes' own
ADAPTERS = ("lora", "vera")


@dataclass
class RivalArguments(RecipeArguments):
    """What the experiments add to a recipe's options.

    Raises:
        ValueError: at construction, for an unknown name.
    """

    optimizer_names: ClassVar[tuple[str, ...]] = (*RecipeArguments.optimizer_names, *OPTIMIZERS)

    adapter: str = field(default="lora", metadata={"help": f"One of {', '.join(ADAPTERS)}."})
    loraplus_lr_ratio: float = field(default=4.0, metadata={"help": "LoRA+'s ratio of B's learning rate to A's."})
    delta: float = field(default=0.02, metadata={"help": "RefLoRA-O's shrinkage δ; 1 is AdamW with rescaling."})
    delta_schedule: str = field(default="constant", metadata={"help": "RefLoRA-O: constant, linear or log."})
    sides: str = field(default="both", metadata={"help": "RefLoRA-O: which factors are whitened: both, A or B."})
    length: float = field(default=1.0, metadata={"help": "RefLoRA-O: the length of a step, in lengths of Adam's."})
    evaluation_rows: int | None = field(
        default=None, metadata={"help": "Held-out rows that are evaluated during training. Default: all."}
    )

    def __post_init__(self):
        super().__post_init__()
        if self.adapter not in ADAPTERS:
            raise ValueError(f"adapter must be one of {ADAPTERS}, got {self.adapter!r}.")


class RivalOptions(Options):
    """The options of a recipe, with VeRA among the adapters."""

    def peft_config(self) -> PeftConfig:
        config = super().peft_config()
        if self.recipe.adapter == "lora":
            return config
        return VeraConfig(
            r=config.r,
            target_modules=config.target_modules,
            vera_dropout=config.lora_dropout,
            task_type=config.task_type,
        )


def make_optimizer(model: torch.nn.Module, training: TrainingArguments, recipe: RivalArguments) -> Optimizer:
    """The optimizer of `OPTIMIZERS` that `recipe` names, with the Trainer's settings of Adam."""
    lr = training.learning_rate
    adam: dict[str, Any] = {"betas": (training.adam_beta1, training.adam_beta2), "eps": training.adam_epsilon}
    decay = {"weight_decay": training.weight_decay}
    if recipe.optimizer == "lorarite":
        return _make_lorarite(model, lr, **decay)
    from reflora_o import create_reflora_o_optimizer

    names = ("delta", "delta_schedule", "sides", "length")
    own = {name: getattr(recipe, name) for name in names}
    return create_reflora_o_optimizer(model, lr=lr, **own, **adam, **decay)


def _make_lorarite(model: torch.nn.Module, lr: float, **settings: float) -> Optimizer:
    from pytorch_optimizer import LoRARite  # here, because only this rival needs the package

    # It takes the factors in turn, B (out, r) as the left one and A (r, in) as the right one. Other parameters, such
    # as a classifier's, are not its.
    factors = [factor for pair in require_pairs(model) for factor in (pair.B, pair.A)]
    others = [p for p in model.parameters() if p.requires_grad and not any(p is factor for factor in factors)]
    if others:
        raise ValueError(f"LoRARite updates LoRA factors only, and {len(others)} other parameters are trainable.")
    return LoRARite(factors, lr=lr, lora_l_dim=-1, lora_r_dim=0, **settings)


def with_optimizer(trainer: type[Trainer], recipe: RivalArguments) -> type[Trainer]:
    """`trainer` with the optimizer that `recipe` names, if it is one of `OPTIMIZERS`."""
    if recipe.optimizer not in OPTIMIZERS:
        return trainer

    class RivalTrainer(trainer):
        def create_optimizer(self, model=None):
            if self.optimizer is None:
                self.optimizer = make_optimizer(self.model, self.args, recipe)
            return self.optimizer

    return RivalTrainer


class EvaluateAllRowsLast(TrainerCallback):
    """Evaluates a part of the held-out rows before and during training, and all of them at the end."""

    def __init__(self, rows: int):
        self.rows = rows
        self.trainer: Trainer | None = None

    def attach(self, trainer: Trainer) -> None:
        self.trainer, self.all_rows = trainer, trainer.eval_dataset
        trainer.eval_dataset = self.all_rows.select(range(min(self.rows, len(self.all_rows))))
        trainer.add_callback(self)

    def on_train_end(self, args, state, control, **kwargs):
        self.trainer.eval_dataset = self.all_rows
