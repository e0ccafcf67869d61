"""Sequence classification, such as GLUE's tasks, with LoRA, RefLoRA or LoRA-SB.

    hf-reflora classify --config glue/mrpc_reflora
    accelerate launch recipes/classify_reflora.py --config recipes/glue/mrpc_reflora.yaml

The classifier on top of the base model is trained too, in the model's dtype (leave it float32; `bf16: true` makes it
faster), and saved in the adapter. With `eval_strategy` set, the test split is also evaluated before and after
training. Before training the classifier is random, unless the base model has one.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset
from peft import get_peft_model
from transformers import (
    AutoModelForSequenceClassification,
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    set_seed,
)
from trl import ModelConfig

from ..trainers.mixin import AdapterTrainerMixin
from ..trainers.trainers import RefLoraTrainer
from .options import Options, RecipeArguments, RecipeParser
from .rows import check_cells
from .run import Run


class LoraTrainer(AdapterTrainerMixin, Trainer):
    """The trainer of LoRA, to compare with, and of LoRA-SB."""


@dataclass
class ClassifyArguments(RecipeArguments):
    """What this recipe adds to transformers' options."""

    text_columns: list[str] = field(
        default_factory=lambda: ["text"],
        metadata={"help": "The column to classify, or the two columns of a pair. Default: text."},
    )
    label_column: str = field(default="label", metadata={"help": "The column with the class, a number or a name."})
    max_length: int | None = field(
        default=None, metadata={"help": "Tokens after which texts are cut. Default: what the model takes."}
    )

    def __post_init__(self):
        super().__post_init__()
        if len(self.text_columns) not in (1, 2):
            raise ValueError(f"text_columns must be one column or two, got {self.text_columns}.")


def make_parser(prog: str | None = None) -> RecipeParser:
    return RecipeParser(TrainingArguments, ClassifyArguments, prog, lora_task_type="SEQ_CLS")


def check_model(model_args: ModelConfig) -> None:
    """Raises a ValueError for a task or a quantization that this recipe does not support."""
    if model_args.lora_task_type != "SEQ_CLS":
        raise ValueError(
            f"This recipe trains classifiers; lora_task_type is SEQ_CLS, got {model_args.lora_task_type}."
        )
    if model_args.load_in_4bit or model_args.load_in_8bit:
        raise ValueError("This recipe does not quantize the model; leave load_in_4bit and load_in_8bit out.")


def classes_of(rows: Dataset, column: str) -> dict[Any, str]:
    """The values of a label column and their names, in the order of the classes.

    Raises:
        ValueError: if there is no such column, a cell in it is empty, or its values are not classes: whole numbers or
            names, two or more.
    """
    if column not in rows.column_names:
        raise ValueError(f"label_column is {column!r}, the dataset has the columns {', '.join(rows.column_names)}.")
    check_cells(rows, [column])
    if isinstance(rows.features[column], ClassLabel):
        return dict(enumerate(rows.features[column].names))
    values = set(rows[column])
    if len(values) < 2 or not all(isinstance(value, int | str) for value in values):
        raise ValueError(
            f"label_column {column!r} must have two classes or more, numbered or named, found "
            f"{', '.join(map(repr, list(values)[:5]))}."
        )
    return {value: str(value) for value in sorted(values)}


def tokenize(
    rows: Dataset, recipe: ClassifyArguments, tokenizer: PreTrainedTokenizerBase, classes: dict[Any, str]
) -> Dataset:
    """The rows with the model's inputs and `labels`, which are the numbers of the classes from 0.

    Raises:
        ValueError: if a column is missing or not text, a cell is empty, or a label is not one of `classes`.
    """
    if missing := set(recipe.text_columns) - set(rows.column_names):
        raise ValueError(
            f"text_columns names {', '.join(sorted(missing))}, the dataset has the columns "
            f"{', '.join(rows.column_names)}."
        )
    check_cells(rows, recipe.text_columns, text=True)
    check_cells(rows, [recipe.label_column])
    if unknown := set(rows[recipe.label_column]) - set(classes):
        raise ValueError(
            f"The split {rows.split} has the labels {sorted(unknown, key=str)}, which are no classes of the training "
            "data (GLUE's test splits have none: -1). Choose another split."
        )
    numbers = {value: number for number, value in enumerate(classes)}

    def convert(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        texts = [batch[column] for column in recipe.text_columns]
        inputs = tokenizer(*texts, truncation=True, max_length=recipe.max_length)
        return {**inputs, "labels": [numbers[value] for value in batch[recipe.label_column]]}

    return rows.map(convert, batched=True, remove_columns=rows.column_names, desc="Tokenizing")


def scores_of(classes: int) -> Callable[[EvalPrediction], dict[str, float]]:
    """The Trainer's `compute_metrics` with GLUE's scores.

    These are accuracy and, for two classes, F1 of the second class and Matthews' correlation.
    """

    def scores(prediction: EvalPrediction) -> dict[str, float]:
        logits = prediction.predictions
        predicted, truth = (logits[0] if isinstance(logits, tuple) else logits).argmax(-1), prediction.label_ids
        result = {"accuracy": float((predicted == truth).mean())}
        if classes == 2:
            hits, wrong = int((predicted & truth).sum()), int((predicted != truth).sum())
            result["f1"] = 2 * hits / (2 * hits + wrong) if hits else 0.0
            # Matthews' correlation is Pearson's of two binary variables, which a constant one leaves undefined.
            constant = len(set(predicted.tolist())) == 1 or len(set(truth.tolist())) == 1
            result["matthews_correlation"] = 0.0 if constant else float(np.corrcoef(predicted, truth)[0, 1])
        return result

    return scores


def load_model(run: Run, tokenizer: PreTrainedTokenizerBase, names: list[str]) -> PreTrainedModel:
    """The base model with a classifier for the classes `names`."""
    set_seed(run.options.training.seed)  # the classifier is random where the base model has none
    model = AutoModelForSequenceClassification.from_pretrained(
        run.model_path,
        id2label=dict(enumerate(names)),
        label2id={name: number for number, name in enumerate(names)},
        **run.model_init_kwargs(),
    )
    model.config.pad_token_id = tokenizer.pad_token_id
    return model


def main(*groups: Any) -> None:
    """Trains with the options that `make_parser().parse_args_and_config()` returns."""
    options = Options(*groups)
    check_model(options.model)
    run = Run(options)
    classes = classes_of(run.train_rows, options.recipe.label_column)
    tokenizer = run.load_tokenizer()
    test_rows = None
    if run.evaluates_loss:
        test_rows = tokenize(run.load_test_rows(), options.recipe, tokenizer, classes)
    train_rows = tokenize(run.train_rows, options.recipe, tokenizer, classes)
    trainer = run.make_trainer(
        LoraTrainer,
        RefLoraTrainer,
        model=get_peft_model(load_model(run, tokenizer, list(classes.values())), options.peft_config()),
        train_dataset=train_rows,
        eval_dataset=test_rows,
        processing_class=tokenizer,
        compute_metrics=scores_of(len(classes)),
    )
    run.train(trainer, test_rows=test_rows)


if __name__ == "__main__":
    main(*make_parser().parse_args_and_config())
