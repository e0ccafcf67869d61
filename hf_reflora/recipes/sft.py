"""Supervised fine-tuning with LoRA, RefLoRA or LoRA-SB, with the same rows answered before and after.

    accelerate launch recipes/sft_reflora.py --config recipes/smollm2-135m/reflora.yaml

Any option of TRL's SFT script works, on the command line or in the YAML file, and an unknown one is an error:

    accelerate launch recipes/sft_reflora.py --model_name_or_path HuggingFaceTB/SmolLM2-135M-Instruct \
        --dataset_name trl-lib/Capybara --method reflora --learning_rate 2e-4 --output_dir runs/capybara --push_to_hub
"""

import time
from dataclasses import dataclass, field
from typing import Any

from datasets import Dataset
from trl import ModelConfig, ScriptArguments, SFTConfig, SFTTrainer, TrlParser, get_quantization_config

from ..trainers.arguments import LoraSbArguments, RefLoraArguments
from ..trainers.checkpoints import WholeCheckpointsMixin
from ..trainers.publishing import PublishingMixin
from ..trainers.trainers import RefLoraSFTTrainer
from . import embedded_model, scores
from .adapters import RecipeArguments, check, make_trainer, peft_config
from .run import load_rows, load_tokenizer, model_init_kwargs, record_of, run, use_cores


EXAMPLES = 5


class LoraSFTTrainer(WholeCheckpointsMixin, PublishingMixin, SFTTrainer):
    """LoRA, to compare with, and LoRA-SB."""

    _tag_names = ["trl", "sft"]


@dataclass
class SFTRecipeArguments(RecipeArguments):
    """What this recipe adds to TRL's SFT script."""

    prompt_template: str | None = field(
        default=None,
        metadata={"help": "The prompt made from a row's columns, e.g. '{question}'. Default: rows in a TRL format."},
    )
    completion_template: str | None = field(
        default=None, metadata={"help": "The completion made from a row's columns, e.g. '{answer}'."}
    )
    system_prompt: str | None = field(
        default=None,
        metadata={"help": "With templates: rows become chat messages with this system turn (needs a chat template)."},
    )
    score: str | None = field(
        default=None,
        metadata={
            "help": "Answer the test split before and after training and score it: "
            f"{', '.join(scores.SCORES)}. Default: only the loss, if eval_strategy is set."
        },
    )
    score_max_new_tokens: int = field(default=256, metadata={"help": "Longest answer to score, in tokens."})
    score_batch_size: int = field(default=16, metadata={"help": "Prompts answered at a time."})

    def __post_init__(self):
        super().__post_init__()
        if self.score is not None and self.score not in scores.SCORES:
            raise ValueError(f"score must be one of {tuple(scores.SCORES)}, got {self.score!r}.")
        if (self.prompt_template is None) != (self.completion_template is None):
            raise ValueError("prompt_template and completion_template belong together: give both or none.")
        if self.system_prompt is not None and self.prompt_template is None:
            raise ValueError("system_prompt needs prompt_template and completion_template.")


def make_parser() -> TrlParser:
    parser = TrlParser(
        (ScriptArguments, SFTConfig, ModelConfig, SFTRecipeArguments, RefLoraArguments, LoraSbArguments)
    )
    parser.set_defaults(use_peft=True)
    return parser


def to_trl(rows: Dataset, recipe: SFTRecipeArguments) -> Dataset:
    """Rows in TRL's prompt/completion format, by the recipe's templates."""
    if recipe.prompt_template is None:
        return rows

    def convert(row: dict[str, Any]) -> dict[str, Any]:
        prompt, completion = recipe.prompt_template.format(**row), recipe.completion_template.format(**row)
        if recipe.system_prompt is None:
            return {"prompt": prompt, "completion": completion}
        system = {"role": "system", "content": recipe.system_prompt}
        return {
            "prompt": [system, {"role": "user", "content": prompt}],
            "completion": [{"role": "assistant", "content": completion}],
        }

    return rows.map(convert, remove_columns=rows.column_names, desc="Applying the templates")


def score_labelled_positions_only() -> None:
    """Lets TRL's LM head skip the prompt on a CPU, too: the same loss in about half the time.

    Where Triton is absent TRL scores every position, for the sake of compilers that need fixed shapes.
    """
    import trl.trainer.utils

    trl.trainer.utils._use_triton = lambda device: True


def main(
    script_args: ScriptArguments,
    training_args: SFTConfig,
    model_args: ModelConfig,
    recipe: SFTRecipeArguments,
    reflora_args: RefLoraArguments,
    lorasb_args: LoraSbArguments,
) -> None:
    start = time.monotonic()
    check(model_args, recipe, reflora_args, lorasb_args)
    evaluate_loss = training_args.eval_strategy != "no"
    train_rows = load_rows(script_args, script_args.dataset_train_split)
    groups = (script_args, training_args, model_args, recipe, reflora_args, lorasb_args)
    record = record_of(groups, script_args, model_args, recipe, train_rows)
    test_rows, references = None, []
    if evaluate_loss or recipe.score is not None:
        test_rows = to_trl(load_rows(script_args, script_args.dataset_test_split), recipe)
    if recipe.score is not None:
        if not {"prompt", "completion"} <= set(test_rows.column_names):
            raise ValueError(
                f"score needs rows with a prompt and a completion, found the columns {test_rows.column_names}. Give "
                "prompt_template and completion_template."
            )
        references = [scores.reference(row) for row in test_rows]

    path = embedded_model.resolve(model_args.model_name_or_path)
    tokenizer = load_tokenizer(path, model_args, trust_remote_code=training_args.trust_remote_code)
    training_args.model_init_kwargs = model_init_kwargs(model_args) | (training_args.model_init_kwargs or {})
    use_cores(training_args, recipe)
    if training_args.device.type == "cpu":
        score_labelled_positions_only()
    trainer = make_trainer(
        LoraSFTTrainer,
        RefLoraSFTTrainer,
        recipe,
        reflora_args,
        lorasb_args.callback(),
        record,
        model=path,
        args=training_args,
        train_dataset=to_trl(train_rows, recipe),
        eval_dataset=test_rows if evaluate_loss else None,
        processing_class=tokenizer,
        quantization_config=get_quantization_config(model_args),
        peft_config=peft_config(model_args, recipe),
    )
    answers: dict[str, list[str]] = {}

    def score(when: str) -> dict[str, float]:
        if recipe.score is None:
            return {}
        answers[when] = scores.answers(
            trainer.model,
            tokenizer,
            test_rows,
            max_new_tokens=recipe.score_max_new_tokens,
            batch_size=recipe.score_batch_size,
            description=f"Answering held-out rows {when} training",
        )
        return scores.SCORES[recipe.score](answers[when], references)

    def examples() -> list[dict[str, str]]:
        rows = []
        for i in range(min(EXAMPLES, len(references))):
            prompt = test_rows[i]["prompt"]
            rows.append(
                {
                    "prompt": prompt if isinstance(prompt, str) else prompt[-1]["content"],
                    "before": answers["before"][i],
                    "after": answers["after"][i],
                    "reference": references[i],
                }
            )
        return rows

    split = script_args.dataset_test_split
    run(trainer, start, test_rows=test_rows, split=split, score=score, examples=examples)


if __name__ == "__main__":
    main(*make_parser().parse_args_and_config())
