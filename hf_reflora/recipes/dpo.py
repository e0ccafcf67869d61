"""Direct preference optimization (DPO) with LoRA, RefLoRA or LoRA-SB.

    hf-reflora dpo --config smollm2-135m/dpo_reflora
    accelerate launch recipes/dpo_reflora.py --config recipes/smollm2-135m/dpo_reflora.yaml

Rows have `prompt`, `chosen` and `rejected`, in any of TRL's preference formats. With `eval_strategy` set, the test
split is also evaluated before and after training: loss, rewards and how often the chosen answer has the larger reward.
"""

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from trl import DPOConfig, DPOTrainer

from ..requirements import require
from ..trainers.mixin import AdapterTrainerMixin
from ..trainers.trl_trainers import RefLoraDPOTrainer
from .options import BenchmarkArguments, Options, RecipeParser
from .rows import check_trl_rows
from .run import Run
from .starts import changes_base


# The options that change the loss, and with it the gradient that LoRA-SB starts from, with their defaults.
PLAIN_LOSS = {
    "loss_type": ["sigmoid"],
    "loss_weights": None,
    "f_divergence_type": "reverse_kl",
    "ld_alpha": None,
    "use_weighting": False,
}


class LoraDPOTrainer(AdapterTrainerMixin, DPOTrainer):
    """The trainer of LoRA, to compare with, and of LoRA-SB."""

    _tag_names = ["trl", "dpo"]


def make_parser(prog: str | None = None) -> RecipeParser:
    return RecipeParser(DPOConfig, BenchmarkArguments, prog)


def loss_at_the_reference(beta: float) -> Callable[[nn.Module, dict[str, Any]], tuple[Tensor, int]]:
    """The `forward_fn` of `LoraSbCallback` for DPO; it returns the mean loss of a batch and its number of pairs.

    LoRA-SB takes the gradient without the adapter. There the model is its own reference, so one forward pass gives
    both log-probabilities of DPO's margin.

    Raises:
        ImportError: With TRL before 1.15, whose LM head does not return them.
    """
    require(
        "trl",
        "1.15",
        "LoRA-SB's start of a DPO training takes the log-probabilities from the LM head of",
        "With an older one start from LoRA's own initialization.",
    )

    def forward_fn(model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, int]:
        labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
        output = model(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            labels=labels,
            use_cache=False,
            fused_lm_head=True,
        )
        chosen, rejected = output.log_probs.sum(dim=1).chunk(2)
        margin = chosen - rejected
        return -F.logsigmoid(beta * (margin - margin.detach())).mean(), len(margin)

    return forward_fn


def check_options(options: Options) -> None:
    """Raises a ValueError for starts and an optimizer that do not suit DPO's reference, or its loss."""
    init = options.recipe.init
    if options.recipe.optimizer == "lora_fa":
        raise ValueError(
            "optimizer lora_fa freezes A, and PEFT makes A trainable again at every step of DPO, where the adapter is "
            "disabled for the reference. Take another optimizer."
        )
    if changes_base(init):
        raise ValueError(
            f"DPO's reference is the model without its adapter, and init {init} changes that model's weights. Take "
            "init default, gaussian, orthogonal, eva or lora_sb."
        )
    if not options.starts_from_gradient:
        return
    given = {name: getattr(options.training, name) for name in PLAIN_LOSS}
    other = {name: value for name, value in given.items() if value != PLAIN_LOSS[name]}
    if other:
        raise ValueError(
            f"LoRA-SB's start is implemented for DPO's own loss (loss_type: [sigmoid]), got {other}. Leave these out, "
            "or take method reflora, reflora_s, lora or lora_xs with init default."
        )


def main(*groups: Any) -> None:
    """Trains with the options that `make_parser().parse_args_and_config()` returns."""
    options = Options(*groups)
    check_options(options)
    run = Run(options)
    test_rows = run.load_test_rows() if run.evaluates_loss else None
    for rows in (run.train_rows, test_rows):
        if rows is not None:
            check_trl_rows(rows)
    trainer = run.make_trainer(
        LoraDPOTrainer,
        RefLoraDPOTrainer,
        forward_fn=loss_at_the_reference(options.training.beta),
        train_dataset=run.train_rows,
        eval_dataset=test_rows,
        **run.trl_arguments(),
    )
    run.train(trainer, test_rows=test_rows)


if __name__ == "__main__":
    main(*make_parser().parse_args_and_config())
