"""The classification recipe with the rivals of `rivals.py`; see `train_sft.py` for what differs from the recipe.

python recipes/sweep.py benchmarks/evidence/mrpc.yaml
"""

from dataclasses import dataclass

from peft import get_peft_model
from rivals import EvaluateAllRowsLast, RivalArguments, RivalOptions, with_optimizer
from transformers import TrainingArguments

from hf_reflora.recipes.classify import (
    ClassifyArguments,
    LoraTrainer,
    classes_of,
    load_model,
    scores_of,
    tokenize,
)
from hf_reflora.recipes.options import RecipeParser
from hf_reflora.recipes.run import Run
from hf_reflora.trainers.trainers import RefLoraTrainer


@dataclass
class EvidenceArguments(RivalArguments, ClassifyArguments):
    pass


def main(*groups) -> None:
    options = RivalOptions(*groups)
    recipe, run = options.recipe, Run(options)
    classes = classes_of(run.train_rows, recipe.label_column)
    tokenizer = run.load_tokenizer()
    test_rows = tokenize(run.load_test_rows(), recipe, tokenizer, classes)
    trainer = run.make_trainer(
        with_optimizer(LoraTrainer, recipe),
        RefLoraTrainer,
        model=get_peft_model(load_model(run, tokenizer, list(classes.values())), options.peft_config()),
        train_dataset=tokenize(run.train_rows, recipe, tokenizer, classes),
        eval_dataset=test_rows,
        processing_class=tokenizer,
        compute_metrics=scores_of(len(classes)),
    )
    if recipe.evaluation_rows is not None:
        EvaluateAllRowsLast(recipe.evaluation_rows).attach(trainer)
    run.train(trainer, test_rows=test_rows)


if __name__ == "__main__":
    main(*RecipeParser(TrainingArguments, EvidenceArguments, lora_task_type="SEQ_CLS").parse_args_and_config())
