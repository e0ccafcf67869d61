"""Benchmarks by lm-eval, of the base model and with the adapter: in the recipes, and of an adapter trained earlier.

    hf-reflora sft --config … --benchmarks gsm8k,arc_easy --benchmark_limit 200
    hf-reflora eval runs/smollm2-135m-reflora --tasks gsm8k,arc_easy --limit 200

lm-eval's own command cannot load a LoRA-SB adapter, and it evaluates one side in a run.
"""

import difflib
import logging
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather
from peft import PeftModel
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ..adapter_files import download
from ..hub.staging import read_config, read_record
from ..report.ids import hub_id
from ..report.record import RECORD_NAME, RunRecord
from ..report.tasks import task_of
from ..requirements import extra
from . import embedded_model
from .scores import contiguous_head_input


with extra("eval", "A benchmark"):
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager


class Benchmarks:
    """lm-eval's tasks, the same for the base model and for the adapter: same rows, examples in the prompt and seed.

    Under DDP, each process evaluates its share of the rows.

    Args:
        tasks: Names of tasks, groups or tags as lm-eval has them, also with `*`; a name may be several, with commas.
        limit: How many rows of each task are taken, the first ones. Default: all.
        num_fewshot: Solved examples in the prompt. Default: each task's own number. A task that says 0 keeps it.
        batch_size: Texts that each process computes at a time.
        seed: Draws the examples in the prompts, and what a task samples.
        include_path: Folder with tasks of your own, as YAML files.

    Raises:
        ValueError: at construction, if lm-eval knows no such task, the message names similar ones; for values that
            are out of range.
    """

    def __init__(
        self,
        tasks: str | Sequence[str],
        *,
        limit: int | None = None,
        num_fewshot: int | None = None,
        batch_size: int = 8,
        seed: int = 0,
        include_path: str | None = None,
    ):
        check_values(limit=limit, num_fewshot=num_fewshot, batch_size=batch_size)
        processes = PartialState().num_processes
        if limit is not None and limit < processes:
            raise ValueError(f"Each of the {processes} processes needs a row of each task; limit {limit} is too low.")
        parts = [tasks] if isinstance(tasks, str) else tasks
        names = list(dict.fromkeys(name.strip() for part in parts for name in part.split(",") if name.strip()))
        self.manager, self.tasks = _find_tasks(names, include_path)
        self.limit, self.num_fewshot, self.batch_size, self.seed = limit, num_fewshot, batch_size, seed
        self.scores: dict[str, dict[tuple[str, str, str], dict[str, Any]]] = {}  # by "before" and "after"

    def evaluate(self, model: PeftModel | PreTrainedModel, tokenizer: PreTrainedTokenizerBase, when: str) -> None:
        """Evaluates `model` as it is, "before" or "after" training. All processes must call it.

        The model's mode and all random states are afterwards what they were, so that a training goes on as without.
        """
        was_training, device = model.training, PartialState().device
        if torch.device(model.device).type != device.type:
            model.to(device)  # with DeepSpeed, a Trainer moves it only when training begins
        try:
            with _random_states_kept(model), contiguous_head_input(model):
                results = lm_eval.simple_evaluate(
                    model=_EachProcess(model, tokenizer, self.batch_size),
                    tasks=self.tasks,
                    task_manager=self.manager,
                    num_fewshot=self.num_fewshot,
                    limit=self.limit,
                    log_samples=False,
                    random_seed=self.seed,
                    numpy_random_seed=self.seed,
                    torch_random_seed=self.seed,
                    fewshot_random_seed=self.seed,
                )
        finally:
            model.train(was_training)
        # Only the main process has results; the others' records must not differ from its own.
        scores = [None if results is None else scores_of(results)]
        self.scores[when] = broadcast_object_list(scores)[0]

    def entries(self) -> list[dict[str, Any]]:
        """Both evaluations in the form of `hf_reflora.report.benchmarks`."""
        entries = []
        for (task, metric, part), after in self.scores["after"].items():
            before = self.scores["before"][task, metric, part]
            entries.append(
                {
                    **{"task": task, "metric": metric, "filter": part},
                    **{f"before{name}": before[f"score{name}"] for name in ("", "_stderr")},
                    **{f"after{name}": after[f"score{name}"] for name in ("", "_stderr")},
                    **{name: value for name, value in after.items() if not name.startswith("score")},
                    "seed": self.seed,
                }
            )
        return entries


def check_values(*, limit: int | None, num_fewshot: int | None, batch_size: int) -> None:
    """Raises a ValueError for a number that is too small."""
    for name, value, least in (("limit", limit, 1), ("num_fewshot", num_fewshot, 0), ("batch_size", batch_size, 1)):
        if value is not None and value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}.")


def _find_tasks(names: list[str], include_path: str | None) -> tuple[TaskManager, list[str]]:
    """lm-eval's index of tasks, and the names in it that are meant."""
    if not names:
        raise ValueError("No task is named. Name some of lm-eval's, such as gsm8k,arc_easy.")
    if include_path is not None:
        if not Path(include_path).is_dir():
            raise ValueError(f"include_path must be a folder with YAML files of tasks; {include_path} is none.")
        # lm-eval comes with 14,000 definitions, whose index takes it some 20 s. The user's own tasks do without.
        manager = TaskManager(include_path=include_path, include_defaults=False)
        if set(names) <= set(manager.all_subtasks):
            return manager, names
    manager = TaskManager(include_path=include_path)
    unknown = []
    for name in names:
        if not manager.match_tasks([name]):
            near = difflib.get_close_matches(name, manager.all_tasks, n=5)
            unknown.append(f"{name} (similar: {', '.join(near)})" if near else name)
    if unknown:
        raise ValueError(
            f"lm-eval {lm_eval.__version__} has no task of the name {'; '.join(unknown)}. `lm-eval ls tasks` lists "
            "all; tasks of your own are found in the folder that include_path names."
        )
    return manager, manager.match_tasks(names)


class _EachProcess(HFLM):
    """lm-eval's model around one in memory, of which each process has a copy and evaluates its share of the rows.

    lm-eval itself leaves such a model to one process, or to "custom distributed integration", which this is.
    """

    def __init__(self, model: PeftModel | PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int):
        logger = logging.getLogger("lm_eval.models.huggingface")
        # HFLM ties the weights of any model once more, which they are already. With an adapter on a tied lm_head it
        # fails there with a KeyError, because transformers would set the weight of PEFT's layer.
        model.tie_weights = lambda: None
        logger.disabled = True  # it warns of several processes
        try:
            super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
        finally:
            logger.disabled = False
            del model.tie_weights
        state = PartialState()
        self._rank, self._world_size = state.process_index, state.num_processes

    def all_gather(self, tensor: Tensor) -> Tensor:
        return gather(tensor)

    def barrier(self) -> None:
        PartialState().wait_for_everyone()


@contextmanager
def _random_states_kept(model: PeftModel | PreTrainedModel) -> Iterator[None]:
    """Puts back the random states that lm-eval seeds; otherwise a training would draw other batches."""
    python, numbers = random.getstate(), np.random.get_state()
    device = torch.device(model.device)
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numbers)


def scores_of(results: dict[str, Any]) -> dict[tuple[str, str, str], dict[str, Any]]:
    """The scores in lm-eval's results by task, metric and filter, each with its standard error and its conditions.

    Of a group that lm-eval has a score for, such as mmlu, the tasks inside are left out.
    """
    scores = {}
    of_groups = {
        child
        for group, children in results.get("group_subtasks", {}).items()
        if any("," in name for name in results["results"].get(group, {}))
        for child in children
    }
    for task, numbers in results["results"].items():
        if task in of_groups:
            continue
        config = results["configs"].get(task, {})
        samples = results["n-samples"].get(task, {})
        path = config.get("dataset_path")
        dataset = hub_id(path) if "/" in str(path) else None  # without a slash it is a format, such as json
        for name, value in numbers.items():
            metric, comma, part = name.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = numbers.get(f"{metric}_stderr,{part}")  # "N/A" where there is none, as for one row
            scores[task, metric, part] = {
                "score": float(value),
                "score_stderr": float(error) if isinstance(error, int | float) else None,
                "higher_is_better": results["higher_is_better"].get(task, {}).get(metric),
                "rows": numbers.get("sample_count", {}).get(name) or samples.get("effective"),
                "total_rows": samples.get("original"),
                "fewshot": results["n-shot"].get(task),
                "version": results["versions"].get(task),
                "dataset": dataset,
                "dataset_config": config.get("dataset_name") if dataset else None,
                "lm_eval": lm_eval.__version__,
            }
    return scores


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate_adapter` did."""

    entries: list[dict[str, Any]]  # the results in the form of `hf_reflora.report.benchmarks`
    base_model: str  # id or folder
    record: Path | None  # the file that the results were added to


def evaluate_adapter(adapter: str, benchmarks: Benchmarks, *, base_model: str | None = None) -> Evaluation:
    """Evaluates a saved adapter, and its base model without it.

    If the adapter is a folder with a `run_record.json`, the results are added to that, in place of earlier ones of the
    same tasks, and nothing else in it is changed.

    Args:
        adapter: Folder of the adapter, or its id on the Hub.
        benchmarks: What to evaluate.
        base_model: Id or folder of the base model. Default: the one in the adapter's configuration.

    Raises:
        ValueError: there is no adapter, or none of a model that writes text; the base model is not known; the record
            describes other weights than those beside it.
    """
    folder = Path(adapter) if Path(adapter).is_dir() else download(adapter)
    name = base_model or read_config(folder).base_model_name_or_path
    if not name:
        path = folder / "adapter_config.json"
        raise ValueError(f"{path} names no base model. Give its id or folder with base_model (--base-model).")
    base, tokenizer = _load_base(folder, name, is_own=base_model is None)
    benchmarks.evaluate(base, tokenizer, "before")
    # Not disable_adapter(): some adapters, such as PiSSA's, change the base model's weights when they are loaded.
    benchmarks.evaluate(PeftModel.from_pretrained(base, folder), tokenizer, "after")
    entries = benchmarks.entries()
    path = folder / RECORD_NAME
    if folder != Path(adapter) or not path.is_file():  # nothing is written into the Hub's cache
        return Evaluation(entries, name, None)
    if PartialState().is_main_process:
        record = RunRecord.load(path)
        record.replace(benchmarks=replaced(record.benchmarks, entries))
        record.save(path)
    return Evaluation(entries, name, path)


def replaced(entries: list[dict[str, Any]], new: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """`entries` without those of the tasks that are in `new`, and `new`."""
    tasks = {entry["task"] for entry in new}
    return [*(entry for entry in entries if entry.get("task") not in tasks), *new]


def _load_base(folder: Path, name: str, *, is_own: bool) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The base model of an adapter, on this process's device, and the tokenizer.

    Args:
        folder: Folder of the adapter.
        name: Id or folder of the base model.
        is_own: It is the one in the adapter's configuration, which may name a revision, too.
    """
    config = read_config(folder)
    task = task_of(read_record(folder))  # raises if the record is of other weights, before hours are spent on them
    if task.model_class is None or task.example not in ("text", "translation"):
        raise ValueError(
            f"lm-eval benchmarks models that write text. {folder} is an adapter of task type {config.task_type}; "
            "score it with the trainer's own evaluation."
        )
    name, revision = embedded_model.resolve(name), config.revision if is_own else None
    base = getattr(transformers, task.model_class).from_pretrained(name, revision=revision, dtype="auto")
    if (folder / "tokenizer_config.json").is_file():
        tokenizer = AutoTokenizer.from_pretrained(folder)
    else:
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision)
    if len(tokenizer) > base.get_input_embeddings().num_embeddings:  # the training has added tokens
        base.resize_token_embeddings(len(tokenizer))
    return base.to(PartialState().device), tokenizer
