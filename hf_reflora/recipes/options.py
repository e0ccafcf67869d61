"""The options that every recipe takes, on the command line and in YAML files, and how they are checked."""

import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from peft import PeftConfig
from transformers import TrainingArguments
from transformers.integrations import get_available_reporting_integrations
from trl import ModelConfig, ScriptArguments, TrlParser, get_peft_config

from ..lora_sb.config import LoraSbConfig
from ..reflora.settings import METHODS as REFLORA_METHODS
from ..report.methods import METHODS
from ..report.recorder import non_default
from ..trainers.arguments import LoraSbArguments, RefLoraArguments
from .shipped import config_file


# What TRL's quantization config has of these is for 4 bits only.
OF_4BIT = {"bnb_4bit_quant_type", "use_bnb_nested_quant", "bnb_4bit_quant_storage"}
INITS = ("default", "lora_sb")


@dataclass
class RecipeArguments:
    """What every recipe adds to TRL's options.

    Raises:
        ValueError: at construction, for an unknown method or init, or a value out of range.
    """

    method: str = field(default="reflora", metadata={"help": f"One of {', '.join(METHODS)}."})
    init: str = field(
        default="default",
        metadata={
            "help": "Where LoRA and RefLoRA start: 'default' is PEFT's start (B = 0), 'lora_sb' the subspace that "
            "LoRA-SB computes."
        },
    )
    test_dataset_name: str | None = field(
        default=None,
        metadata={"help": "Another dataset to take dataset_test_split from. Default: dataset_name."},
    )
    test_dataset_config: str | None = field(default=None, metadata={"help": "The configuration of test_dataset_name."})
    cpu_threads: int | None = field(
        default=None,
        metadata={
            "help": "Threads of each process when training on a CPU, where accelerate would use one. Default: the "
            "machine's cores divided by its processes."
        },
    )

    def __post_init__(self):
        if self.method not in METHODS:
            raise ValueError(f"method must be one of {tuple(METHODS)}, got {self.method!r}.")
        if self.init not in INITS:
            raise ValueError(f"init must be one of {INITS}, got {self.init!r}.")
        if self.init == "lora_sb" and METHODS[self.method].native:
            raise ValueError(f"init is for lora, reflora and reflora_s; {self.method} has its own start.")
        if self.test_dataset_config is not None and self.test_dataset_name is None:
            raise ValueError("test_dataset_config needs test_dataset_name.")
        if self.cpu_threads is not None and self.cpu_threads < 1:
            raise ValueError(f"cpu_threads must be at least 1, got {self.cpu_threads}.")


@dataclass
class Options:
    """The options of one run, in the six groups and the order in which `RecipeParser` returns them.

    Raises:
        ValueError: at construction, if settings are given that the chosen method would not use.
    """

    script: ScriptArguments
    training: TrainingArguments
    model: ModelConfig
    recipe: RecipeArguments
    reflora: RefLoraArguments
    lora_sb: LoraSbArguments

    def __post_init__(self):
        if not self.model.use_peft:
            raise ValueError("This recipe trains LoRA adapters; leave use_peft true.")
        if self.script.dataset_streaming:
            raise ValueError(
                "dataset_streaming is not supported: the recipes count, check and record the rows. Leave it out; "
                "datasets reads the rows from disk, so they need not fit the memory."
            )
        if self.script.ignore_bias_buffers:
            raise ValueError(
                "ignore_bias_buffers is not supported: TRL's option is for models with boolean buffers under DDP. "
                "Give ddp_broadcast_buffers: false instead."
            )
        # A Trainer would say so only after the model has been loaded.
        missing = {"tensorboard", "trackio", "wandb"} & set(self.training.report_to)
        if missing := sorted(missing - set(get_available_reporting_integrations())):
            raise ValueError(
                f"report_to names {', '.join(missing)}, which is not installed: pip install {' '.join(missing)}, or "
                "give --report_to none."
            )
        unused = {}
        if self.recipe.method not in REFLORA_METHODS:
            unused |= non_default(self.reflora)
        if not self.starts_from_gradient:
            unused |= non_default(self.lora_sb)
        if not self.model.load_in_4bit:
            unused |= {name: value for name, value in non_default(self.model).items() if name in OF_4BIT}
        if METHODS[self.recipe.method].native:
            ordinary = ("lora_alpha", "use_rslora", "use_dora", "lora_target_parameters")
            unused |= {name: value for name, value in non_default(self.model).items() if name in ordinary}
        if unused:
            raise ValueError(
                f"method {self.recipe.method} with init {self.recipe.init} does not use these settings: "
                f"{', '.join(unused)}. Leave them out."
                + (" Those of bitsandbytes need load_in_4bit." if OF_4BIT & set(unused) else "")
            )

    @property
    def starts_from_gradient(self) -> bool:
        """Whether the adapter starts in the subspace of LoRA-SB, which is computed from a gradient."""
        return "lora_sb" in (self.recipe.method, self.recipe.init)

    def given(self) -> dict[str, Any]:
        """All options that differ from their defaults, for the run record."""
        groups = (self.script, self.training, self.model, self.recipe, self.reflora, self.lora_sb)
        return {name: value for group in groups for name, value in non_default(group).items()}

    def peft_config(self) -> PeftConfig:
        """TRL's LoraConfig, or a LoraSbConfig with the same settings."""
        config = get_peft_config(self.model)
        name = self.model.lora_target_modules
        if isinstance(name, str) and name != "all-linear" and re.fullmatch(r"[\w.]+", name):
            # TRL makes a list of one name a string, in which PEFT sees a regular expression for the whole path.
            config.target_modules = {name}
        if not METHODS[self.recipe.method].native:
            return config
        return LoraSbConfig(
            r=config.r,
            target_modules=config.target_modules,
            lorasb_dropout=config.lora_dropout,
            modules_to_save=config.modules_to_save,
            task_type=config.task_type,
            init_weights=self.recipe.method,
        )


class RecipeParser(TrlParser):
    """TRL's parser for the six groups of `Options`; `--config` also takes the name of a YAML file that is shipped.

    Args:
        training: The trainer's arguments, such as SFTConfig.
        recipe: `RecipeArguments`, or a subclass with what one recipe adds.
        prog: How the help names the command. Default: the running script.
        defaults: Options whose default differs from TRL's.
    """

    def __init__(
        self,
        training: type[TrainingArguments],
        recipe: type[RecipeArguments] = RecipeArguments,
        prog: str | None = None,
        **defaults: Any,
    ):
        groups = (ScriptArguments, training, ModelConfig, recipe, RefLoraArguments, LoraSbArguments)
        super().__init__(groups, prog=prog)
        self.set_defaults(use_peft=True, **defaults)

    def parse_args_and_config(self, args: Iterable[str] | None = None, **options: Any) -> tuple[Any, ...]:
        args = list(sys.argv[1:] if args is None else args)
        if args[-1:] == ["--config"]:
            self.error("argument --config: expected one argument")
        if "--config" in args:
            value = args.index("--config") + 1
            try:
                args[value] = str(config_file(args[value]))
            except ValueError as error:
                self.error(str(error))
        return super().parse_args_and_config(args, **options)
