"""Supervised fine-tuning with LoRA, RefLoRA or LoRA-SB, with the same rows answered before and after.

    hf-reflora sft --config smollm2-135m/reflora

or, with the launcher's own options and from a clone:

    accelerate launch -m hf_reflora.recipes.sft --config smollm2-135m/reflora
    accelerate launch recipes/sft_reflora.py --config recipes/smollm2-135m/reflora.yaml

Every option of TRL's SFT script works, on the command line or in the YAML file, and an unknown one is an error:

    accelerate launch recipes/sft_reflora.py --model_name_or_path HuggingFaceTB/SmolLM2-135M-Instruct \
        --dataset_name trl-lib/Capybara --method reflora --learning_rate 2e-4 --output_dir runs/capybara --push_to_hub
"""

from dataclasses import dataclass, field
from typing import Any

from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from ..trainers.mixin import AdapterTrainerMixin
from ..trainers.trl_trainers import RefLoraSFTTrainer
from .options import Options, RecipeArguments, RecipeParser
from .run import Run
from .scores import SCORES, Scorer


class LoraSFTTrainer(AdapterTrainerMixin, SFTTrainer):
    """The trainer of LoRA, to compare with, and of LoRA-SB."""

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
            f"{', '.join(SCORES)}. Default: only the loss, if eval_strategy is set."
        },
    )
    score_max_new_tokens: int = field(default=256, metadata={"help": "Longest answer to score, in tokens."})
    score_batch_size: int = field(default=16, metadata={"help": "Prompts answered at a time."})

    def __post_init__(self):
        super().__post_init__()
        if self.score is not None and self.score not in SCORES:
            raise ValueError(f"score must be one of {tuple(SCORES)}, got {self.score!r}.")
        if (self.prompt_template is None) != (self.completion_template is None):
            raise ValueError("prompt_template and completion_template belong together: give both or none.")
        if self.system_prompt is not None and self.prompt_template is None:
            raise ValueError("system_prompt needs prompt_template and completion_template.")


def make_parser(prog: str | None = None) -> RecipeParser:
    return RecipeParser(SFTConfig, SFTRecipeArguments, prog)


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
    """Makes TRL skip the prompt in the LM head on a CPU, too, which gives the same loss in about half the time.

    Without Triton, TRL computes the logits of every position, since compilers may need fixed shapes. Nothing is
    compiled here.
    """
    import trl.trainer.utils

    trl.trainer.utils._use_triton = lambda device: True


def main(*groups: Any) -> None:
    """Trains with the options that `make_parser().parse_args_and_config()` returns."""
    options = Options(*groups)
    recipe, run = options.recipe, Run(options)
    test_rows = scorer = None
    if run.evaluates_loss or recipe.score is not None:
        test_rows = to_trl(run.load_test_rows(), recipe)
    if recipe.score is not None:
        scorer = Scorer(
            recipe.score,
            test_rows,
            max_new_tokens=recipe.score_max_new_tokens,
            batch_size=recipe.score_batch_size,
        )
    if options.training.device.type == "cpu":
        score_labelled_positions_only()
    trainer = run.make_trainer(
        LoraSFTTrainer,
        RefLoraSFTTrainer,
        train_dataset=to_trl(run.train_rows, recipe),
        eval_dataset=test_rows if run.evaluates_loss else None,
        **run.trl_arguments(),
    )
    run.train(trainer, test_rows=test_rows, scorer=scorer)


if __name__ == "__main__":
    main(*make_parser().parse_args_and_config())
