"""A recipe's run around its trainer: what it loads and records, scores before and after, saving and pushing."""

import logging
import os
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, load_dataset
from transformers import AutoTokenizer, PreTrainedTokenizerBase, Trainer, TrainingArguments
from trl import ModelConfig, ScriptArguments

from ..distributed.parameters import is_zero3_partitioned
from ..hub.retry import PushError
from ..report.environment import environment, peak_memory_gb, usable_cores
from ..report.ids import hub_id
from ..report.recorder import RunRecordCallback, dataset_facts, non_default
from . import summary
from .adapters import RecipeArguments


logger = logging.getLogger(__name__)


def load_rows(script_args: ScriptArguments, split: str) -> Dataset:
    return load_dataset(script_args.dataset_name, script_args.dataset_config, split=split)


def load_tokenizer(path: str, model_args: ModelConfig, **options: Any) -> PreTrainedTokenizerBase:
    tokenizer = AutoTokenizer.from_pretrained(path, revision=model_args.model_revision, **options)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def model_init_kwargs(model_args: ModelConfig) -> dict[str, Any]:
    return {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
    }


def use_cores(training_args: TrainingArguments, recipe: RecipeArguments) -> None:
    """On a CPU, shares the cores out over the machine's processes."""
    if training_args.device.type == "cpu":
        shared = max(1, usable_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
        torch.set_num_threads(recipe.cpu_threads or shared)  # accelerate launch sets OMP_NUM_THREADS=1


def record_of(
    groups: tuple[Any, ...],
    script_args: ScriptArguments,
    model_args: ModelConfig,
    recipe: RecipeArguments,
    train_rows: Dataset,
) -> RunRecordCallback:
    """The run record with what a trainer cannot know; `groups` are all the dataclasses of options."""
    model_name, dataset_name = model_args.model_name_or_path, script_args.dataset_name
    return RunRecordCallback(
        init=recipe.init,
        model=model_name,
        base_model=hub_id(model_name),
        arguments={name: value for group in groups for name, value in non_default(group).items()},
        environment=environment(Path(__file__).parent),
        **{"dataset": dataset_name, "dataset_id": hub_id(dataset_name), **dataset_facts(train_rows)},
    )


def no_scores(when: str) -> dict[str, float]:
    return {}


def run(
    trainer: Trainer,
    start: float,
    *,
    test_rows: Dataset | None,
    split: str,
    score: Callable[[str], dict[str, float]] = no_scores,
    examples: Callable[[], list[dict[str, str]]] = list,
) -> None:
    """Trains, with the held-out rows evaluated before, by the base model itself, and after; saves, shows and pushes.

    A resumed run (`resume_from_checkpoint: true` takes the last whole checkpoint) ends with the record of an unbroken
    one.

    Args:
        trainer: A trainer with `WholeCheckpointsMixin` and `PublishingMixin`; its `eval_dataset` is evaluated, if it
            has one.
        start: `time.monotonic()` when the run began.
        test_rows, split: The held-out rows and where they are from, for the record.
        score: Called "before" and "after"; scores besides the trainer's own.
        examples: Called after the last score; the record's examples.
    """
    seconds = {}

    def evaluate(when: str) -> dict[str, float]:
        begin = time.monotonic()
        with trainer.model.disable_adapter() if when == "before" else nullcontext():
            scores = {"loss": trainer.evaluate()["eval_loss"]} if trainer.eval_dataset is not None else {}
            scores |= score(when)
        seconds[when] = time.monotonic() - begin
        return scores

    # ZeRO-3 has the base model in parts at once, but computes with it after training has begun.
    late = any(is_zero3_partitioned(parameter) for parameter in trainer.model.parameters())
    if not late:
        trainer.run_record.update(scores={"before": evaluate("before")})
    try:
        trainer.train(resume_from_checkpoint=trainer.args.resume_from_checkpoint)
    except PushError as error:
        logger.error(error)  # everything is pushed once more below
    after = evaluate("after")
    if late:
        trainer.run_record.update(scores={"before": evaluate("before")})
    earlier = sum(run.get("seconds", 0) for run in trainer.run_record.record.runs[:-1])  # of a resumed run
    trainer.run_record.update(
        scores={"after": after} | ({"rows": len(test_rows), "split": split} if test_rows is not None else {}),
        examples=examples(),
        seconds={name: round(value, 1) for name, value in seconds.items()}
        | {"total": round(earlier + time.monotonic() - start, 1)},
        peak_memory_gb=peak_memory_gb(),
    )
    trainer.save_model(_internal_call=True)  # without a push, which comes below with everything
    if trainer.is_world_process_zero():
        record = trainer.run_record.record
        summary.show(record)
        print(f"Trained in {record.seconds['train']:.0f} s, {record.seconds['total']:.0f} s in all.")
        print(f"Adapter, model card, run record and plot: {trainer.args.output_dir}")
    if trainer.args.push_to_hub:
        commit = trainer.push_to_hub()
        if commit is not None:
            print(f"Pushed: {commit.commit_url}")
    trainer.end()
