"""Sequence classification, such as GLUE's, with LoRA, RefLoRA or LoRA-SB; the sibling of sft_reflora.py.

    accelerate launch recipes/classify_reflora.py --config recipes/glue/mrpc_reflora.yaml

The classifier on top of the base model is trained along, in the model's dtype (leave it float32; `bf16: true` is for
speed), and saved in the adapter. With `eval_strategy` set, the test split is evaluated before and after training, too;
before, the classifier is a random one where the base has none.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset
from peft import get_peft_model
from transformers import (
    AutoModelForSequenceClassification,
    EvalPrediction,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    set_seed,
)
from trl import ModelConfig, ScriptArguments, TrlParser

from ..trainers.arguments import LoraSbArguments, RefLoraArguments
from ..trainers.checkpoints import WholeCheckpointsMixin
from ..trainers.publishing import PublishingMixin
from ..trainers.trainers import RefLoraTrainer
from . import embedded_model
from .adapters import RecipeArguments, check, make_trainer, peft_config
from .run import load_rows, load_tokenizer, model_init_kwargs, record_of, run, use_cores


class LoraTrainer(WholeCheckpointsMixin, PublishingMixin, Trainer):
    """LoRA, to compare with, and LoRA-SB."""


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


def make_parser() -> TrlParser:
    groups = (ScriptArguments, TrainingArguments, ModelConfig, ClassifyArguments, RefLoraArguments, LoraSbArguments)
    parser = TrlParser(groups)
    parser.set_defaults(use_peft=True, lora_task_type="SEQ_CLS")
    return parser


def check_model(model_args: ModelConfig) -> None:
    """Raises where the model is to be loaded in a way that this recipe does not."""
    if model_args.lora_task_type != "SEQ_CLS":
        raise ValueError(
            f"This recipe trains classifiers; lora_task_type is SEQ_CLS, got {model_args.lora_task_type}."
        )
    if model_args.load_in_4bit or model_args.load_in_8bit:
        raise ValueError("This recipe does not quantize the model; leave load_in_4bit and load_in_8bit out.")


def classes_of(rows: Dataset, column: str) -> dict[Any, str]:
    """The values of a label column and their names, in the order of the classes.

    Raises:
        ValueError: if there is no such column, or its values are no classes.
    """
    if column not in rows.column_names:
        raise ValueError(f"label_column is {column!r}, the dataset has the columns {', '.join(rows.column_names)}.")
    if isinstance(rows.features[column], ClassLabel):
        return dict(enumerate(rows.features[column].names))
    found = set(rows[column])
    if len(found) < 2 or not all(isinstance(value, int | str) for value in found):
        raise ValueError(
            f"label_column {column!r} must have two classes or more, numbered or named, found "
            f"{', '.join(map(repr, list(found)[:5]))}."
        )
    return {value: str(value) for value in sorted(found)}


def tokenize(
    rows: Dataset, recipe: ClassifyArguments, tokenizer: PreTrainedTokenizerBase, classes: dict[Any, str]
) -> Dataset:
    """Rows with the model's inputs and `labels`, numbers from 0."""
    if missing := set(recipe.text_columns) - set(rows.column_names):
        raise ValueError(
            f"text_columns names {', '.join(sorted(missing))}, the dataset has the columns "
            f"{', '.join(rows.column_names)}."
        )
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
    """GLUE's scores: accuracy and, of two classes, the second one's F1 and Matthews' correlation."""

    def scores(prediction: EvalPrediction) -> dict[str, float]:
        logits = prediction.predictions
        found, truth = (logits[0] if isinstance(logits, tuple) else logits).argmax(-1), prediction.label_ids
        result = {"accuracy": float((found == truth).mean())}
        if classes == 2:
            hits, wrong = int((found & truth).sum()), int((found != truth).sum())
            result["f1"] = 2 * hits / (2 * hits + wrong) if hits else 0.0
            constant = len(set(found.tolist())) == 1 or len(set(truth.tolist())) == 1
            result["matthews_correlation"] = 0.0 if constant else float(np.corrcoef(found, truth)[0, 1])
        return result

    return scores


def main(
    script_args: ScriptArguments,
    training_args: TrainingArguments,
    model_args: ModelConfig,
    recipe: ClassifyArguments,
    reflora_args: RefLoraArguments,
    lorasb_args: LoraSbArguments,
) -> None:
    start = time.monotonic()
    check(model_args, recipe, reflora_args, lorasb_args)
    check_model(model_args)
    train_rows, test_rows = load_rows(script_args, script_args.dataset_train_split), None
    groups = (script_args, training_args, model_args, recipe, reflora_args, lorasb_args)
    record = record_of(groups, script_args, model_args, recipe, train_rows)
    classes = classes_of(train_rows, recipe.label_column)

    path = embedded_model.resolve(model_args.model_name_or_path)
    tokenizer = load_tokenizer(path, model_args)
    if training_args.eval_strategy != "no":
        test_rows = tokenize(load_rows(script_args, script_args.dataset_test_split), recipe, tokenizer, classes)
    train_rows = tokenize(train_rows, recipe, tokenizer, classes)
    use_cores(training_args, recipe)
    set_seed(training_args.seed)  # the classifier is random, too
    names = list(classes.values())
    model = AutoModelForSequenceClassification.from_pretrained(
        path,
        id2label=dict(enumerate(names)),
        label2id={name: number for number, name in enumerate(names)},
        **model_init_kwargs(model_args),
    )
    model.config.pad_token_id = tokenizer.pad_token_id
    trainer = make_trainer(
        LoraTrainer,
        RefLoraTrainer,
        recipe,
        reflora_args,
        lorasb_args.callback(),
        record,
        model=get_peft_model(model, peft_config(model_args, recipe)),
        args=training_args,
        train_dataset=train_rows,
        eval_dataset=test_rows,
        processing_class=tokenizer,
        compute_metrics=scores_of(len(classes)),
    )
    run(trainer, start, test_rows=test_rows, split=script_args.dataset_test_split)


if __name__ == "__main__":
    main(*make_parser().parse_args_and_config())
