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
from .options import BenchmarkArguments, Options, RecipeParser
from .rows import apply_templates, check_trl_rows
from .run import Run
from .scores import SCORES, Scorer
from .shared_prefix import check_options, share_prefix


class LoraSFTTrainer(AdapterTrainerMixin, SFTTrainer):
    """The trainer of LoRA, to compare with, and of LoRA-SB."""

    _tag_names = ["trl", "sft"]


@dataclass
class SFTRecipeArguments(BenchmarkArguments):
    """What this recipe adds to TRL's SFT script."""

    prompt_template: str | None = field(
        default=None,
        metadata={
            "help": "The prompt made from a row's columns, e.g. '{question}', by Python's format strings: literal "
            "braces are written twice. Default: rows in a TRL format."
        },
    )
    completion_template: str | None = field(
        default=None, metadata={"help": "The completion made from a row's columns, e.g. '{answer}'."}
    )
    system_prompt: str | None = field(
        default=None,
        metadata={"help": "With templates: rows become chat messages with this system turn (needs a chat template)."},
    )
    test_prompt_template: str | None = field(
        default=None,
        metadata={
            "help": "The prompt of the test split, where its columns have other names. Default: prompt_template."
        },
    )
    test_completion_template: str | None = field(
        default=None, metadata={"help": "The completion of the test split. Default: completion_template."}
    )
    max_characters: int | None = field(
        default=None,
        metadata={
            "help": "Leave out rows of which the templates' columns, joined by spaces, have more characters. Default: "
            "all rows; texts are cut at max_length tokens."
        },
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
    share_prefix: bool = field(
        default=False,
        metadata={
            "help": "Compute what all rows of a batch begin with, such as a long system prompt, only once: same loss "
            "and answers up to rounding, in less time and memory (with dropout, rows share that of the beginning). "
            "Needs a model that connects tokens by attention alone, and attn_implementation eager or sdpa."
        },
    )

    def __post_init__(self):
        super().__post_init__()
        if self.score is not None and self.score not in SCORES:
            raise ValueError(f"score must be one of {tuple(SCORES)}, got {self.score!r}.")
        if (self.prompt_template is None) != (self.completion_template is None):
            raise ValueError("prompt_template and completion_template belong together: give both or none.")
        if self.system_prompt is not None and self.prompt_template is None:
            raise ValueError("system_prompt needs prompt_template and completion_template.")
        if (self.test_prompt_template is None) != (self.test_completion_template is None):
            raise ValueError("test_prompt_template and test_completion_template belong together: give both or none.")
        if self.prompt_template is None and (self.test_prompt_template or self.max_characters is not None):
            raise ValueError("test_prompt_template and max_characters need prompt_template and completion_template.")
        if self.max_characters is not None and self.max_characters < 1:
            raise ValueError(f"max_characters must be at least 1, got {self.max_characters}.")


def make_parser(prog: str | None = None) -> RecipeParser:
    return RecipeParser(SFTConfig, SFTRecipeArguments, prog)


def to_trl(rows: Dataset, recipe: SFTRecipeArguments, *, test: bool = False) -> Dataset:
    """Rows in one of TRL's formats, by the recipe's templates or as they are.

    Raises:
        ValueError: for a cell that is empty, or a template that does not fit the columns.
    """
    prompt_template, completion_template = recipe.prompt_template, recipe.completion_template
    if test and recipe.test_prompt_template is not None:
        prompt_template, completion_template = recipe.test_prompt_template, recipe.test_completion_template
    if prompt_template is None:
        check_trl_rows(rows)
        return rows
    return apply_templates(
        rows,
        prompt_template,
        completion_template,
        system_prompt=recipe.system_prompt,
        max_characters=recipe.max_characters,
    )


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
    if options.recipe.share_prefix:
        check_options(options.training)
    recipe, run = options.recipe, Run(options)
    test_rows = scorer = None
    if run.evaluates_loss or recipe.score is not None:
        test_rows = to_trl(run.load_test_rows(), recipe, test=True)
    if recipe.score is not None:
        scorer = Scorer(
            recipe.score,
            test_rows,
            max_new_tokens=recipe.score_max_new_tokens,
            batch_size=recipe.score_batch_size,
            share_prefix=recipe.share_prefix,
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
    if recipe.share_prefix:
        share_prefix(trainer)
    run.train(trainer, test_rows=test_rows, scorer=scorer)


if __name__ == "__main__":
    main(*make_parser().parse_args_and_config())
