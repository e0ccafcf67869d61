"""Direct preference optimization with LoRA, RefLoRA or LoRA-SB; the sibling of sft_reflora.py.

    accelerate launch recipes/dpo_reflora.py --config recipes/smollm2-135m/dpo_reflora.yaml

Rows have `prompt`, `chosen` and `rejected`, in any of TRL's preference formats. With `eval_strategy` set, the test
split is evaluated before and after training, too: loss, rewards and how often the chosen answer has the larger one.
"""

import time
from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from trl import DPOConfig, DPOTrainer, ModelConfig, ScriptArguments, TrlParser, get_quantization_config

from ..trainers.arguments import LoraSbArguments, RefLoraArguments
from ..trainers.checkpoints import WholeCheckpointsMixin
from ..trainers.publishing import PublishingMixin
from ..trainers.trainers import RefLoraDPOTrainer
from . import embedded_model
from .adapters import RecipeArguments, check, make_trainer, peft_config
from .run import load_rows, load_tokenizer, model_init_kwargs, record_of, run, use_cores


# What changes the loss, and with it the gradient that LoRA-SB starts from.
PLAIN_LOSS = {
    "loss_type": ["sigmoid"],
    "loss_weights": None,
    "f_divergence_type": "reverse_kl",
    "ld_alpha": None,
    "use_weighting": False,
}


class LoraDPOTrainer(WholeCheckpointsMixin, PublishingMixin, DPOTrainer):
    """LoRA, to compare with, and LoRA-SB."""

    _tag_names = ["trl", "dpo"]


def make_parser() -> TrlParser:
    groups = (ScriptArguments, DPOConfig, ModelConfig, RecipeArguments, RefLoraArguments, LoraSbArguments)
    parser = TrlParser(groups)
    parser.set_defaults(use_peft=True)
    return parser


def loss_at_the_reference(beta: float) -> Callable[[nn.Module, dict[str, Any]], tuple[Tensor, int]]:
    """`LoraSbCallback`'s forward_fn for DPO: the mean loss of a batch and its number of pairs.

    LoRA-SB takes the gradient without the adapter, where the model is its own reference, so one pass does.
    """

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


def check_loss(training_args: DPOConfig, recipe: RecipeArguments) -> None:
    """Raises where LoRA-SB would start from the gradient of another loss than the one to train with."""
    if recipe.method != "lora_sb" and recipe.init != "lora_sb":
        return
    other = {name: getattr(training_args, name) for name, plain in PLAIN_LOSS.items()}
    other = {name: value for name, value in other.items() if value != PLAIN_LOSS[name]}
    if other:
        raise ValueError(
            f"LoRA-SB's start is implemented for DPO's own loss (loss_type: [sigmoid]), got {other}. Leave these out, "
            "or take method reflora, reflora_s, lora or lora_xs with init default."
        )


def main(
    script_args: ScriptArguments,
    training_args: DPOConfig,
    model_args: ModelConfig,
    recipe: RecipeArguments,
    reflora_args: RefLoraArguments,
    lorasb_args: LoraSbArguments,
) -> None:
    start = time.monotonic()
    check(model_args, recipe, reflora_args, lorasb_args)
    check_loss(training_args, recipe)
    train_rows, test_rows = load_rows(script_args, script_args.dataset_train_split), None
    groups = (script_args, training_args, model_args, recipe, reflora_args, lorasb_args)
    record = record_of(groups, script_args, model_args, recipe, train_rows)
    if training_args.eval_strategy != "no":
        test_rows = load_rows(script_args, script_args.dataset_test_split)

    path = embedded_model.resolve(model_args.model_name_or_path)
    training_args.model_init_kwargs = model_init_kwargs(model_args) | (training_args.model_init_kwargs or {})
    use_cores(training_args, recipe)
    lora_sb = lorasb_args.callback()
    lora_sb.forward_fn = loss_at_the_reference(training_args.beta)
    trainer = make_trainer(
        LoraDPOTrainer,
        RefLoraDPOTrainer,
        recipe,
        reflora_args,
        lora_sb,
        record,
        model=path,
        args=training_args,
        train_dataset=train_rows,
        eval_dataset=test_rows,
        processing_class=load_tokenizer(path, model_args, trust_remote_code=training_args.trust_remote_code),
        quantization_config=get_quantization_config(model_args),
        peft_config=peft_config(model_args, recipe),
    )
    run(trainer, start, test_rows=test_rows, split=script_args.dataset_test_split)


if __name__ == "__main__":
    main(*make_parser().parse_args_and_config())
