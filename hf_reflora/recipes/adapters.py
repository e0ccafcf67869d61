"""The adapter that a recipe trains: its method and start on the command line, its configuration, its trainer."""

from dataclasses import dataclass, field
from typing import Any

from peft import PeftConfig
from transformers import Trainer
from trl import ModelConfig, get_peft_config

from ..lora_sb.callback import LoraSbCallback
from ..lora_sb.config import LoraSbConfig
from ..report.methods import METHODS
from ..report.recorder import RunRecordCallback, non_default
from ..trainers.arguments import LoraSbArguments, RefLoraArguments


REFLORA = ("reflora", "reflora_s")
INITS = ("default", "lora_sb")


@dataclass
class RecipeArguments:
    """What every recipe adds to TRL's options."""

    method: str = field(default="reflora", metadata={"help": f"One of {', '.join(METHODS)}."})
    init: str = field(
        default="default",
        metadata={"help": "Start of LoRA and RefLoRA: PEFT's 'default' (B = 0), or 'lora_sb', LoRA-SB's subspace."},
    )
    cpu_threads: int | None = field(
        default=None,
        metadata={
            "help": "Threads of each process on a CPU, where accelerate would use one. Default: all cores, shared."
        },
    )

    def __post_init__(self):
        if self.method not in METHODS:
            raise ValueError(f"method must be one of {tuple(METHODS)}, got {self.method!r}.")
        if self.init not in INITS:
            raise ValueError(f"init must be one of {INITS}, got {self.init!r}.")
        if self.init == "lora_sb" and METHODS[self.method].native:
            raise ValueError(f"init is for lora, reflora and reflora_s; {self.method} has its own.")
        if self.cpu_threads is not None and self.cpu_threads < 1:
            raise ValueError(f"cpu_threads must be at least 1, got {self.cpu_threads}.")


def check(
    model_args: ModelConfig, recipe: RecipeArguments, reflora_args: RefLoraArguments, lorasb_args: LoraSbArguments
) -> None:
    """Raises where settings are given that the method would not use."""
    if not model_args.use_peft:
        raise ValueError("This recipe trains LoRA adapters; leave use_peft true.")
    unused = {}
    if recipe.method not in REFLORA:
        unused |= non_default(reflora_args)
    if recipe.method != "lora_sb" and recipe.init != "lora_sb":
        unused |= non_default(lorasb_args)
    if METHODS[recipe.method].native:
        ordinary = ("lora_alpha", "use_rslora", "use_dora", "lora_target_parameters")
        unused |= {name: value for name, value in non_default(model_args).items() if name in ordinary}
    if unused:
        raise ValueError(
            f"method is {recipe.method}, init {recipe.init}, but settings of others: {', '.join(unused)}."
        )


def peft_config(model_args: ModelConfig, recipe: RecipeArguments) -> PeftConfig:
    """TRL's LoraConfig, or a LoraSbConfig with the same settings."""
    config = get_peft_config(model_args)
    if not METHODS[recipe.method].native:
        return config
    return LoraSbConfig(
        r=config.r,
        target_modules=config.target_modules,
        lorasb_dropout=config.lora_dropout,
        modules_to_save=config.modules_to_save,
        task_type=config.task_type,
        init_weights=recipe.method,
    )


def make_trainer(
    plain: type[Trainer],
    reflora: type[Trainer],
    recipe: RecipeArguments,
    reflora_args: RefLoraArguments,
    lora_sb: LoraSbCallback,
    record: RunRecordCallback,
    **arguments: Any,
) -> Trainer:
    """`plain(**arguments)` or, for RefLoRA, `reflora(**arguments)`, with the callbacks of method and start.

    Raises:
        ValueError: if LoRA-SB's initialization could not work, see `LoraSbCallback`.
    """
    starts_with_sb = METHODS[recipe.method].native or recipe.init == "lora_sb"
    callbacks = [record, *([lora_sb] if starts_with_sb else [])]
    if recipe.method in REFLORA:
        trainer = reflora(reflora=reflora_args.callback(recipe.method), callbacks=callbacks, **arguments)
    else:
        trainer = plain(callbacks=callbacks, **arguments)
    if starts_with_sb:
        lora_sb.check(trainer.args, trainer.model)
    return trainer
