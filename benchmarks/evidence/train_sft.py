"""The SFT recipe with the rivals of `rivals.py`, evaluated as the experiments need it.

    python recipes/sweep.py benchmarks/evidence/tool_calls.yaml

Differences from the recipe: other optimizers and adapters may be chosen; during training a part of the held-out rows
is evaluated, and all of them at the end; the base model's answers, which are the same in all runs, are not scored.
"""

from dataclasses import dataclass

from rivals import EvaluateAllRowsLast, RivalArguments, RivalOptions, with_optimizer
from trl import SFTConfig

from hf_reflora.recipes.options import RecipeParser
from hf_reflora.recipes.run import Run
from hf_reflora.recipes.scores import Scorer
from hf_reflora.recipes.sft import LoraSFTTrainer, SFTRecipeArguments, score_labelled_positions_only, to_trl
from hf_reflora.recipes.shared_prefix import share_prefix
from hf_reflora.trainers.trl_trainers import RefLoraSFTTrainer


@dataclass
class EvidenceArguments(RivalArguments, SFTRecipeArguments):
    pass


class AfterOnlyScorer(Scorer):
    def score(self, model, tokenizer, when):
        return super().score(model, tokenizer, when) if when == "after" else {}

    def examples(self):
        return []


def main(*groups) -> None:
    options = RivalOptions(*groups)
    recipe, run = options.recipe, Run(options)
    test_rows = to_trl(run.load_test_rows(), recipe, test=True)
    scorer = AfterOnlyScorer(
        recipe.score,
        test_rows,
        max_new_tokens=recipe.score_max_new_tokens,
        batch_size=recipe.score_batch_size,
        share_prefix=recipe.share_prefix,
    )
    if options.training.device.type == "cpu":
        score_labelled_positions_only()
    trainer = run.make_trainer(
        with_optimizer(LoraSFTTrainer, recipe),
        RefLoraSFTTrainer,
        train_dataset=to_trl(run.train_rows, recipe),
        eval_dataset=test_rows,
        **run.trl_arguments(),
    )
    if recipe.share_prefix:
        share_prefix(trainer)
    if recipe.evaluation_rows is not None:
        EvaluateAllRowsLast(recipe.evaluation_rows).attach(trainer)
    run.train(trainer, test_rows=test_rows, scorer=scorer)


if __name__ == "__main__":
    main(*RecipeParser(SFTConfig, EvidenceArguments).parse_args_and_config())
