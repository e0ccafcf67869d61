"""`RunRecordCallback` notes the facts of a training run as they happen and writes them beside each saved adapter."""

import os
import re
import sys
import time
from datetime import datetime, timezone
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from accelerate.state import PartialState
from peft import PeftConfig, PeftModel, TaskType
from transformers import TrainerCallback
from transformers.utils import logging

from ..distributed.backend import backend_name
from ..distributed.parameters import adapter_state_dict, has_sharded_parameters
from ..lora_sb.config import LoraSbConfig
from ..lora_sb.targets import missing_peft_model
from .diagnostics import diagnostics, method_of, same_weights
from .environment import environment, peak_memory_gb
from .failures import log_errors
from .ids import commit_in_cache, hub_id
from .json_values import changed_fields, jsonable
from .record import RECORD_NAME, RunRecord
from .tasks import auto_mapping
from .trackers import run_pages


logger = logging.get_logger(__name__)

# The fields of a record that `RunRecordCallback` takes as arguments, because a trainer cannot know them, or the user
# knows them better: a trainer sees a local copy of the model, or rows that are packed already.
FACTS = (
    *("method", "init", "tags", "model", "base_model", "base_revision", "arguments", "environment"),
    *("dataset", "dataset_id", "dataset_revision", "dataset_config", "dataset_split", "dataset_fingerprint"),
    "train_rows",
)
# Metrics that say how an evaluation went, not how good the model is.
NO_SCORES = (
    *("runtime", "preparation_time", "samples_per_second", "steps_per_second"),
    *("step", "epoch", "num_tokens", "entropy"),
    *("logps/chosen", "logps/rejected", "logits/chosen", "logits/rejected"),
)
# Arguments that a Trainer's own card names, and that are recorded also where they are the defaults.
MAIN_ARGUMENTS = (
    *("learning_rate", "lr_scheduler_type", "optim", "per_device_train_batch_size", "per_device_eval_batch_size"),
)
# Values of arguments that are recorded. Others are objects that a library makes of arguments, such as accelerate's.
PLAIN = (int, float, str, list, tuple, dict, set, Enum, torch.dtype, type(None))


class RunRecordCallback(TrainerCallback):
    """Keeps the record of a training run, which `hf_reflora.report.card.render` makes the model card of.

    The record is written as `run_record.json` beside the weights that it describes: into every checkpoint, and into
    `output_dir` when training ends. A write that fails leaves the old file as it was. Tokens and other secrets are
    replaced by "***", the home folder by "~". A run that is resumed continues the record of its checkpoint.

    The trainers of hf_reflora add one themselves; give another trainer one in `callbacks`. What the record has is
    explained at `hf_reflora.report.record.RunRecord`.

    Args:
        facts: What the trainer does not know, by the names of the record's fields: `method="reflora"` (default: what
            the adapter's type tells), `model="…"` as the user named it, `base_model="org/name"` of a local copy,
            `dataset="org/name"`, …

    Raises:
        ValueError: for another name; when training starts, if the model has no adapter.

    Example:
        >>> trainer = DPOTrainer(..., callbacks=[RefLoraCallback(), RunRecordCallback(method="reflora")])
    """

    def __init__(self, **facts: Any):
        if unknown := sorted(set(facts) - set(FACTS)):
            raise ValueError(
                f"RunRecordCallback knows no fact named {', '.join(unknown)}; it takes {', '.join(FACTS)}."
            )
        self.facts = facts
        self.resumed_from: str | os.PathLike | None = None
        self.record = RunRecord(scores={"before": {}, "after": {}})
        self._model: Any = None
        self._state: Any = None
        self._begin: float | None = None  # time.monotonic() when training began, None while nothing trains
        self._saved_step: int | None = None  # of the last checkpoint that has its record
        self._rows_of: dict[tuple[str, str], int] = {}  # the number of rows of each score, by ("after", its name)

    def update(self, **entries: Any) -> None:
        """Adds results that the trainer does not compute itself; dictionaries are merged. See `RunRecord.update`."""
        self.record.update(**entries)

    def write(self, folder: str | os.PathLike) -> RunRecord:
        """Writes the record as it is now into `folder`, on the main process only; returns what it has written.

        The diagnostics of a sharded model are those of the last `write_together`, because computing them takes all
        processes.
        """
        self._refresh()
        if PartialState().is_main_process:
            if not has_sharded_parameters(self._model):
                self._diagnose()
            Path(folder).mkdir(parents=True, exist_ok=True)
            self.record.save(Path(folder) / RECORD_NAME)
        return self.record.without_secrets()

    def write_together(self, folder: str | os.PathLike) -> RunRecord:
        """`write`, with diagnostics of a sharded model, too. All processes must call it."""
        if has_sharded_parameters(self._model):
            self._diagnose()
        return self.write(folder)

    def write_checkpoint(self, folder: str | os.PathLike) -> None:
        """`write_together` for the checkpoint of this step, once; a failure is logged.

        The trainers of hf_reflora call it between the weights and the file by which the checkpoint counts as
        complete; a stock trainer calls `on_save` after that file.
        """
        if self._saved_step != self._state.global_step:
            self._saved_step = self._state.global_step
            with log_errors(f"The run record of {folder} could not be written"):
                self.write_together(folder)

    def on_init_end(self, args, state, control, model=None, **kwargs):
        if not isinstance(model, PeftModel):
            return  # on_train_begin raises; here a method's own check would not be reached, which says it better
        with log_errors("The run record could not be begun"):
            self._observe(args, state, model)

    def _observe(self, args, state, model: PeftModel) -> None:
        """Notes the model and the arguments of this moment: both can be others than when the trainer was made."""
        self._state = state
        if model is not self._model:
            is_first, self._model = self._model is None, model
            self._describe_model(args)
            if is_first:
                self.record.replace(**self.facts)
                # It takes some tenths of a second and asks git, so not where the facts have it, as in the recipes.
                self.record.replace(environment=self.facts.get("environment") or environment())
            else:
                # `model_init` has made another model. What was trained and measured of the former one is not its own;
                # the scores of the base model are.
                self.record.replace(runs=[], scores={**self.record.scores, "after": {}})
        self._describe(
            arguments={**_main_arguments(args), **non_default(args)},
            seed=args.seed,
            data_seed=args.data_seed,
            processes=args.world_size,
        )

    def _describe_model(self, args) -> None:
        model, config = self._model, self._model.active_peft_config
        name = config.base_model_name_or_path or "an unknown base model"
        base_model = hub_id(name)
        revision = config.revision or (getattr(args, "model_init_kwargs", None) or {}).get("revision")
        self._describe(
            method=method_of(config),
            init="default",
            model=name,
            base_model=base_model,
            base_revision=commit_in_cache(base_model, revision) if base_model else None,
            peft=peft_settings(config, self._model),
            backend=backend_name(),
            # ZeRO-3 leaves a parameter of shape (0,) and keeps the number of its elements in ds_numel.
            trainable_parameters=sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters() if p.requires_grad),
        )
        if config.task_type in (TaskType.SEQ_CLS, TaskType.TOKEN_CLS):
            self._describe(labels=list(model.config.id2label.values()))
        if isinstance(config, LoraSbConfig):  # its method implies the start, whatever the user named it
            self.facts |= {"method": method_of(config), "init": "default"}
            self.record.replace(method=method_of(config), init="default")

    def _describe(self, **entries: Any) -> None:
        """Sets fields of the record to what the user's facts say of them, or else to these entries."""
        self.record.replace(**{name: self.facts.get(name, value) for name, value in entries.items()})

    def on_train_begin(self, args, state, control, model=None, train_dataloader=None, **kwargs):
        if not isinstance(model, PeftModel):
            raise ValueError(f"RunRecordCallback records the adapter of a PeftModel; {missing_peft_model(model)}")
        with log_errors("The run record could not be begun"):
            self._end_aborted_run()
            self._observe(args, state, model)
            if args.auto_find_batch_size:  # the arguments keep the size that it began with
                found = state.train_batch_size // max(1, args.n_gpu)
                self._describe(arguments=self.record.arguments | {"per_device_train_batch_size": found})
            self.record.fill(tags=list(getattr(model, "model_tags", None) or []))
            self.record.fill(**dataset_facts(getattr(train_dataloader, "dataset", None)))
            if state.global_step > 0:
                self._resume(args, state)
            # The trainer's own callbacks, which begin the trackers' runs, come before this one.
            if pages := run_pages():
                self.record.replace(trackers=pages)
            facts = self.record.environment
            run = {
                "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
                "from_step": state.global_step,
                "processes": args.world_size,
                **{name: facts[name] for name in ("commit", "versions") if name in facts},
            }
            self.record.replace(runs=[*self.record.runs, run])
        self._begin, self._saved_step = time.monotonic(), None

    def _end_aborted_run(self) -> None:
        """Notes how far a training came that ended with an error; one without a step was none.

        `auto_find_batch_size` begins again and again until the batch fits the memory.
        """
        if self._begin is None:
            return
        *earlier, run = self.record.runs
        if self._state.global_step > run["from_step"]:
            self._refresh()
        elif "to_step" not in run:
            self.record.replace(runs=earlier)

    def _resume(self, args, state) -> None:
        # A callback is not told which checkpoint train() was given. The trainers of hf_reflora set resumed_from;
        # another one has it in its arguments, or has taken the last checkpoint in its output_dir.
        folders = [self.resumed_from, args.resume_from_checkpoint]
        folders.append(Path(args.output_dir) / f"checkpoint-{state.global_step}")
        files = [Path(folder) / RECORD_NAME for folder in folders if isinstance(folder, str | os.PathLike)]
        path = next((file for file in files if file.is_file()), None)
        if path is not None:
            with log_errors("The record of the checkpoint could not be continued"):
                self.record.resume(RunRecord.load(path))

    def on_evaluate(self, args, state, control, metrics=None, model=None, eval_dataloader=None, **kwargs):
        if not isinstance(model, PeftModel):
            return
        with log_errors("The scores could not be recorded"):
            if self._model is None:  # the callback was added to an existing trainer
                self._observe(args, state, model)
            self._note_scores(metrics or {}, state.global_step, getattr(eval_dataloader, "dataset", None))

    def _note_scores(self, metrics: dict[str, Any], step: int, rows: Any = None) -> None:
        scores = {
            name.removeprefix("eval_"): value
            for name, value in metrics.items()
            if isinstance(value, int | float) and not name.endswith(NO_SCORES)
        }
        # An adapter that changes nothing yet leaves the base model as it is, so its scores are the base model's.
        when = "before" if step == 0 and not _changes_outputs(self._model) else "after"
        self.record.update(scores={when: scores})
        if hasattr(rows, "__len__"):
            self._rows_of |= dict.fromkeys(((when, name) for name in scores), len(rows))
            # Scores of evaluation sets of several sizes have no one number of rows that a card could give.
            counts = set(self._rows_of.values())
            self.record.update(scores={"rows": len(rows) if len(counts) == 1 else None})

    def on_save(self, args, state, control, **kwargs):
        folders = [Path(args.output_dir) / f"checkpoint-{state.global_step}"]
        if state.is_hyper_param_search:  # each trial has a folder of its own in output_dir, of a name that is not told
            folders = sorted(Path(args.output_dir).glob(f"*/{folders[0].name}"), key=lambda path: path.stat().st_mtime)
        if folders:
            self.write_checkpoint(folders[-1])

    def on_train_end(self, args, state, control, **kwargs):
        with log_errors(f"The run record of {args.output_dir} could not be written"):
            self._refresh()
            self._begin = None
            if args.load_best_model_at_end and state.best_global_step and self._is_best(state):
                # The Trainer has loaded the best checkpoint, so step and scores must be those of that checkpoint.
                self.record.replace(step=state.best_global_step)
                # One entry for each evaluation set, whose metrics are called "eval_<set>_loss" if there are several.
                best = [e for e in state.log_history if e.get("step") == state.best_global_step]
                metrics = {name: value for e in best for name, value in e.items() if name.startswith("eval_")}
                if metrics:
                    self._note_scores(metrics, state.global_step)
            # A trial of a hyperparameter search leaves no weights in output_dir, only in its checkpoints.
            if not state.is_hyper_param_search:
                self.write_together(args.output_dir)

    def _is_best(self, state) -> bool:
        """Whether the model has the weights of the best checkpoint. Collective where it is sharded.

        A Trainer may fail to load them and only warn: it looks for an adapter in the checkpoint's folder, where PEFT
        saves an adapter that is called "default"; another one is in a folder of its name.
        """
        self._diagnose()  # before the file, which not every node may see: all processes must take part
        path = Path(state.best_model_checkpoint or "") / RECORD_NAME
        return not path.is_file() or same_weights(RunRecord.load(path).diagnostics, self.record.diagnostics)

    def _diagnose(self) -> None:
        """On all processes where the model is sharded."""
        tensors = adapter_state_dict(self._model)
        numbers = diagnostics(self._model.active_peft_config, tensors)
        if "not_finite" in numbers and "not_finite" not in self.record.diagnostics:
            # The log may not tell: with logging_nan_inf_filter a Trainer logs the mean of the losses before, or 0.
            logger.warning(
                f"{numbers['not_finite']} of the adapter's {len(tensors)} tensors have values that are not finite: "
                "the training has diverged, whatever losses are logged. Go back to an earlier checkpoint and take a "
                "lower learning rate, or look for rows without labels."
            )
        self.record.replace(diagnostics=numbers)

    def _refresh(self) -> None:
        """Notes what changes while training goes on: log, step, seconds, memory, tokens."""
        record = self.record
        record.replace(log=jsonable(self._state.log_history))
        if self._begin is not None:
            run = record.runs[-1]
            run["to_step"] = self._state.global_step
            run["seconds"] = round(time.monotonic() - self._begin, 1)
            trained = round(sum(run.get("seconds", 0) for run in record.runs), 1)
            peaks = peak_memory_gb()
            peaks = {name: max(gb, record.peak_memory_gb.get(name, 0)) for name, gb in peaks.items()}
            record.update(step=self._state.global_step, seconds={"train": trained}, peak_memory_gb=peaks)
        tokens = _tokens(record.log, record.step or 0) or self._state.num_input_tokens_seen
        if tokens:
            record.replace(tokens=tokens)


def non_default(arguments: Any) -> dict[str, Any]:
    """The fields of a dataclass that differ from their defaults and say something in JSON, without Hub tokens."""
    return {
        name: jsonable(value)
        for name, value in changed_fields(arguments).items()
        if isinstance(value, PLAIN) and "hub_token" not in name
    }


def _main_arguments(args: Any) -> dict[str, Any]:
    """`MAIN_ARGUMENTS`, and how long the training was to be."""
    names = [*MAIN_ARGUMENTS, "max_steps" if args.max_steps > 0 else "num_train_epochs"]
    return {name: jsonable(getattr(args, name)) for name in names}


def peft_settings(config: PeftConfig, model: PeftModel | None = None) -> dict[str, Any]:
    """The settings of an adapter that are not their defaults, but for the base model's name, which may be a path.

    Where they have no task type, PEFT saves the class of the base model, which only the model tells.
    """
    settings = {name: value for name, value in non_default(config).items() if name != "base_model_name_or_path"}
    if config.task_type is None and config.auto_mapping is None and model is not None:
        settings["auto_mapping"] = auto_mapping(model)
    return settings


def dataset_facts(dataset: Any) -> dict[str, Any]:
    """The fields of a record that a `datasets.Dataset` knows of itself; {} for data of another kind.

    Id and commit on the Hub, configuration, split, fingerprint and number of rows, as far as they are known.
    """
    # Whoever has such a dataset has imported its library; RefLoRA itself does without.
    datasets = sys.modules.get("datasets")
    if datasets is None or not isinstance(dataset, datasets.Dataset):
        return {}
    # A dataset of the Hub tells its origin by its place in the cache only:
    # …/org___name/configuration/version/commit/….arrow
    paths = [Path(file["filename"]).parts for file in dataset.cache_files]
    name, config, _, commit, _ = paths[0][-5:] if paths and len(paths[0]) >= 5 else [""] * 5
    on_hub = "___" in name and re.fullmatch("[0-9a-f]{40}", commit)
    facts = {
        "dataset": name.replace("___", "/", 1) if on_hub else None,
        "dataset_id": name.replace("___", "/", 1) if on_hub else None,
        "dataset_revision": commit if on_hub else None,
        "dataset_config": config if on_hub else None,
        "dataset_split": str(dataset.split) if dataset.split is not None else None,
        "dataset_fingerprint": dataset._fingerprint,
        "train_rows": len(dataset),
    }
    return {name: value for name, value in facts.items() if value is not None}


def _tokens(log: list[dict[str, Any]], step: int) -> int:
    """The tokens in TRL's log up to a step, 0 if it counts none. In a resumed run TRL counts from 0 again."""
    total, last = 0, 0
    for entry in log:
        if "loss" in entry and "num_tokens" in entry and entry["step"] <= step:
            total, last = total + (last if entry["num_tokens"] < last else 0), entry["num_tokens"]
    return int(total + last)


def _changes_outputs(model: PeftModel) -> bool:
    """Whether the adapter changes what the model computes: the factor that starts at 0 is not 0 in some layer.

    That is lora_B, LoRA-SB's R, and of an embedding A.
    """
    last = ("lora_B.weight", "lorasb_R", "lora_embedding_A")
    tensors = adapter_state_dict(model)
    return any(name.endswith(last) and bool(tensor.any()) for name, tensor in tensors.items())
