"""PEFT's own optimizers of a LoRA as the recipes' `optimizer`: LoRA+, Riemannian preconditioning and LoRA-FA."""

from typing import TYPE_CHECKING

import peft
from peft import PeftModel
from peft.optimizers import create_lorafa_optimizer, create_loraplus_optimizer
from torch.optim import Optimizer
from transformers import Trainer, TrainingArguments

from ..distributed.backend import backend_name, is_replicated
from ..distributed.parameters import has_sharded_parameters
from ..reflora.settings import METHODS as REFLORA_METHODS
from ..report.methods import METHODS
from ..report.recorder import non_default


if TYPE_CHECKING:
    from .options import Options, RecipeArguments

OF_PEFT = ("loraplus", "riemannian", "lora_fa")
# Settings of the Trainer's Adam, which LoRA-FA's own Adam does not take.
OF_ADAM = ("optim", "optim_args", "adam_beta1", "adam_beta2", "adam_epsilon")


def check_names(recipe: "RecipeArguments") -> None:
    """Raises a ValueError for an optimizer that does not exist, or one without its setting."""
    if recipe.optimizer not in recipe.optimizer_names:
        raise ValueError(f"optimizer must be one of {recipe.optimizer_names}, got {recipe.optimizer!r}.")
    ratio = recipe.loraplus_lr_ratio
    if recipe.optimizer == "loraplus" and (ratio is None or ratio < 1):
        raise ValueError(
            "optimizer loraplus needs loraplus_lr_ratio, the learning rate of B divided by that of A (learning_rate). "
            f"Give a number of at least 1, such as 4 or 16; got {ratio}."
        )


def check(options: "Options") -> None:
    """Raises a ValueError where the optimizer and another option exclude each other."""
    recipe, name = options.recipe, options.recipe.optimizer
    if name != "loraplus" and "loraplus_lr_ratio" in non_default(recipe):
        raise ValueError(f"optimizer {name} does not use loraplus_lr_ratio. Leave it out, or take optimizer loraplus.")
    if name not in OF_PEFT:
        return
    if METHODS[recipe.method].native:
        raise ValueError(
            f"optimizer {name} treats A and B of a LoRA differently, and {recipe.method} trains R only. Leave "
            "optimizer out, or take method lora."
        )
    if recipe.method in REFLORA_METHODS and name != "loraplus":
        reason = "preconditions with A Aᵀ and BᵀB itself" if name == "riemannian" else "trains no A"
        raise ValueError(
            f"optimizer {name} {reason}, so that {recipe.method} has nothing to refactor. Take method lora, or leave "
            "optimizer out."
        )
    if name == "lora_fa":
        given = [setting for setting in OF_ADAM if setting in non_default(options.training)]
        given += ["use_dora"] * options.model.use_dora
        if given:
            raise ValueError(f"optimizer lora_fa is an Adam of its own and does not use {', '.join(given)}.")


def make_optimizer(model: PeftModel, args: TrainingArguments, recipe: "RecipeArguments") -> Optimizer:
    """PEFT's optimizer for a model that is not wrapped yet, with a trainer's settings.

    Raises:
        ValueError: under FSDP and DeepSpeed.
        ImportError: PEFT is too old for the Riemannian optimizer.
    """
    name = recipe.optimizer
    if not is_replicated() or has_sharded_parameters(model):
        raise ValueError(
            f"optimizer {name} is made for the parameters as they are before {backend_name()} shards them or steps on "
            "copies of them. Take one process or DDP, or method reflora with the default optimizer."
        )
    if name == "lora_fa":
        config = model.peft_config["default"]
        return create_lorafa_optimizer(model, config.r, config.lora_alpha, args.learning_rate, args.weight_decay)
    cls, settings = Trainer.get_optimizer_cls_and_kwargs(args, model)
    if name == "loraplus":
        return create_loraplus_optimizer(
            model,
            cls,
            loraplus_lr_ratio=recipe.loraplus_lr_ratio,
            loraplus_weight_decay=args.weight_decay,
            **settings,
        )
    try:
        from peft.optimizers import create_riemannian_optimizer
    except ImportError as error:
        raise ImportError(f"PEFT {peft.__version__} has no Riemannian optimizer; pip install -U peft") from error
    return create_riemannian_optimizer(model, cls, weight_decay=args.weight_decay, **settings)


def freeze_unused(model: PeftModel, optimizer: str) -> None:
    """Freezes A for LoRA-FA. PEFT makes it trainable again whenever the adapter was disabled, as for an evaluation.

    Its gradient would then take memory and count when gradients are clipped.
    """
    if optimizer == "lora_fa":
        for name, parameter in model.named_parameters():
            if ".lora_A." in name:
                parameter.requires_grad_(False)
