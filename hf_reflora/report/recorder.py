"""The run record: facts of a training run as they happen, in one JSON file beside the adapter."""

import copy
import dataclasses
import json
import os
import re
import time
from datetime import datetime, timezone
from enum import Enum
from pathlib import Path
from typing import Any

import datasets
from accelerate.state import PartialState
from peft import PeftModel, TaskType
from transformers import TrainerCallback

from ..distributed.backend import backend_name
from ..distributed.parameters import adapter_state_dict, has_sharded_parameters
from ..lora_sb.config import LoraSbConfig
from .diagnostics import diagnostics, method_of
from .environment import environment, peak_memory_gb, without_secrets, write_json
from .ids import commit_in_cache, hub_id


SCHEMA = 2
RECORD_NAME = "run_record.json"
# What `RunRecordCallback` takes because a trainer cannot know it, or knows it less well.
GIVEN = (
    *("method", "init", "tags", "model", "base_model", "base_revision", "arguments", "environment"),
    *("dataset", "dataset_id", "dataset_revision", "dataset_config", "dataset_split", "dataset_fingerprint"),
    "train_rows",
)
# What a resumed run takes over.
KEPT = ("scores", "examples", "card", "runs", "seconds", "peak_memory_gb")
# Metrics that say how an evaluation went, not how good the model is.
NO_SCORES = (
    *("runtime", "preparation_time", "samples_per_second", "steps_per_second"),
    *("step", "epoch", "num_tokens", "entropy"),
    *("logps/chosen", "logps/rejected", "logits/chosen", "logits/rejected"),
)


class RunRecordCallback(TrainerCallback):
    """Records what was run and with what result; `hf_reflora.report.card.render` makes the model card of it.

    The record is written as `run_record.json` beside the weights that it describes: into every checkpoint, and into
    `output_dir` when training ends, whole or not at all. A resumed run goes on with the checkpoint's record. The
    trainers of hf_reflora have one already; give another trainer one in `callbacks`.

    Tokens and other secrets are replaced, the home folder becomes `~`. The file's keys (`schema` 2):

    | | |
    | --- | --- |
    | `method`, `init`, `peft` | how the adapter was trained and started; settings of the PEFT config |
    | `model`, `base_model`, `base_revision` | as it was named; its id and commit on the Hub, or null |
    | `labels` | of a classifier: the names of its classes |
    | `dataset`, `dataset_…` (`id`, `revision`, `config`, `split`, `fingerprint`), `train_rows` | the training data |
    | `arguments`, `seed`, `data_seed` | arguments that are not defaults |
    | `scores` | `rows`, `before` and `after` training: the evaluations by the trainer, and what `update` adds |
    | `card` | license, language and tags for the card |
    | `examples` | prompt, answers before and after, reference |
    | `log`, `step`, `tokens` | the trainer's log; of the weights beside the record: optimizer steps, tokens seen |
    | `diagnostics` | see `hf_reflora.report.diagnostics.diagnostics` |
    | `trainable_parameters`, `seconds`, `peak_memory_gb`, `processes`, `backend`, `environment` | cost and place |
    | `runs` | one entry a start: when, from and to which step, seconds, processes, commit, versions |

    Args:
        facts: What a trainer does not know, by the names in `GIVEN`: `method="reflora"` (default: by the
            adapter's type), `model="…"` as the user named it, `base_model="org/name"` of a local copy,
            `dataset="org/name"`.

    Raises:
        ValueError: for a fact with another name; when training starts, if the model has no adapter.

    Example:
        >>> trainer = DPOTrainer(..., callbacks=[RefLoraCallback(), RunRecordCallback(method="reflora")])
    """

    def __init__(self, **facts: Any):
        if unknown := sorted(set(facts) - set(GIVEN)):
            raise ValueError(
                f"RunRecordCallback knows no fact named {', '.join(unknown)}; it takes {', '.join(GIVEN)}."
            )
        self.facts = facts
        self.resumed_from: str | os.PathLike | None = None
        self.record: dict[str, Any] = {"schema": SCHEMA, "scores": {"before": {}, "after": {}}}
        self._model, self._state, self._begin = None, None, None
        self._saved: int | None = None  # the step of the last checkpoint

    def update(self, **entries: Any) -> None:
        """Adds entries; dictionaries are merged. For results that the trainer does not compute itself."""
        self.record = _merged(self.record, entries)

    def write(self, folder: str | os.PathLike) -> dict[str, Any]:
        """Writes the record as it is now into `folder`, on the main process only; returns it."""
        self._refresh()
        if not PartialState().is_main_process:
            return without_secrets(self.record)
        if not has_sharded_parameters(self._model):
            self._diagnose()
        record = without_secrets(self.record)
        Path(folder).mkdir(parents=True, exist_ok=True)
        write_json(Path(folder) / RECORD_NAME, record)
        return record

    def on_init_end(self, args, state, control, model=None, **kwargs):
        if not isinstance(model, PeftModel):
            return  # on_train_begin raises; a method's own check says it better
        self._model, self._state = model, state
        config = model.active_peft_config
        name = config.base_model_name_or_path or "an unknown base model"
        base_model = hub_id(name)
        revision = config.revision or (getattr(args, "model_init_kwargs", None) or {}).get("revision")
        self.update(
            method=method_of(config),
            init="default",
            model=name,
            base_model=base_model,
            base_revision=commit_in_cache(base_model, revision) if base_model else None,
            peft={k: v for k, v in non_default(config).items() if k != "base_model_name_or_path"},  # it is `model`
            arguments=non_default(args),
            seed=args.seed,
            data_seed=args.data_seed,
            processes=args.world_size,
            backend=backend_name(),
            trainable_parameters=sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters() if p.requires_grad),
            environment=environment(),
        )
        if config.task_type == TaskType.SEQ_CLS:
            self.update(labels=list(model.config.id2label.values()))
        self.record |= self.facts
        if isinstance(config, LoraSbConfig):  # whose method tells the start
            self.record |= {"method": method_of(config), "init": "default"}

    def on_train_begin(self, args, state, control, model=None, train_dataloader=None, **kwargs):
        if not isinstance(model, PeftModel):
            raise ValueError(
                f"RunRecordCallback records the training of an adapter; got a {type(model).__name__} without one. "
                "Pass peft_config=... or a PeftModel."
            )
        if self._model is None:  # added to a trainer that existed
            self.on_init_end(args, state, control, model=model)
        self._state, self._saved = state, None
        self.record.setdefault("tags", list(getattr(model, "model_tags", None) or []))
        known = dataset_facts(getattr(train_dataloader, "dataset", None))
        self.record = {**known, **self.record}
        if state.global_step > 0:
            folders = [self.resumed_from, args.resume_from_checkpoint]
            folders.append(Path(args.output_dir) / f"checkpoint-{state.global_step}")
            files = [Path(folder) / RECORD_NAME for folder in folders if isinstance(folder, str | os.PathLike)]
            earlier = next((json.loads(f.read_text(encoding="utf-8")) for f in files if f.is_file()), {})
            kept = {name: earlier[name] for name in KEPT if name in earlier}
            self.record = _merged(kept, self.record)
        facts = self.record["environment"]
        self._begin = time.monotonic()
        self.record.setdefault("runs", []).append(
            {
                "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
                "from_step": state.global_step,
                "processes": args.world_size,
                **{name: facts[name] for name in ("commit", "versions") if name in facts},
            }
        )

    def on_evaluate(self, args, state, control, metrics=None, model=None, eval_dataloader=None, **kwargs):
        if self._model is None:  # added to a trainer that existed
            self.on_init_end(args, state, control, model=model)
        if self._model is None:
            return
        found = {
            name.removeprefix("eval_"): value
            for name, value in (metrics or {}).items()
            if isinstance(value, int | float) and not name.endswith(NO_SCORES)
        }
        when = "before" if state.global_step == 0 and not _acts(self._model) else "after"
        rows = getattr(eval_dataloader, "dataset", None)
        self.update(scores={when: found, **({"rows": len(rows)} if hasattr(rows, "__len__") else {})})

    def _diagnose(self) -> None:
        """On all processes where the model is sharded."""
        self.record["diagnostics"] = diagnostics(self._model.active_peft_config, adapter_state_dict(self._model))

    def _write_together(self, folder: str | os.PathLike) -> None:
        """`write` on all processes, which a sharded model's diagnostics need."""
        if has_sharded_parameters(self._model):
            self._diagnose()
        self.write(folder)

    def on_save(self, args, state, control, **kwargs):
        if self._saved != state.global_step:  # the trainers of hf_reflora call it themselves, earlier
            self._write_together(Path(args.output_dir) / f"checkpoint-{state.global_step}")
            self._saved = state.global_step

    def on_train_end(self, args, state, control, **kwargs):
        self._refresh()
        self._begin = None
        if args.load_best_model_at_end and state.best_global_step:
            self.record["step"] = state.best_global_step
            best = [e for e in state.log_history if e.get("step") == state.best_global_step and "eval_loss" in e]
            if best:
                self.on_evaluate(args, state, control, metrics=best[-1])
        self._write_together(args.output_dir)

    def _refresh(self) -> None:
        """What changes while training goes on."""
        self.record["log"] = copy.deepcopy(self._state.log_history)
        if self._begin is not None:
            run = self.record["runs"][-1]
            run["to_step"] = self.record["step"] = self._state.global_step
            run["seconds"] = round(time.monotonic() - self._begin, 1)
            trained = round(sum(run.get("seconds", 0) for run in self.record["runs"]), 1)
            peaks, earlier = peak_memory_gb(), self.record.get("peak_memory_gb", {})
            peaks = {name: max(gb, earlier.get(name, 0)) for name, gb in peaks.items()}
            self.update(seconds={"train": trained}, peak_memory_gb=peaks)
        tokens = _tokens(self.record["log"], self.record.get("step", 0)) or self._state.num_input_tokens_seen
        if tokens:
            self.record["tokens"] = tokens


def non_default(arguments: Any) -> dict[str, Any]:
    """The fields of a dataclass that differ from their defaults and can be written as JSON, without tokens."""
    values = {}
    for f in dataclasses.fields(arguments):
        default = f.default_factory() if f.default_factory is not dataclasses.MISSING else f.default
        value = getattr(arguments, f.name)
        if isinstance(value, set):
            value = sorted(value)
        plain = value is None or isinstance(value, int | float | str | list | dict)
        if f.init and plain and value != default and "hub_token" not in f.name:
            values[f.name] = value.value if isinstance(value, Enum) else value
    return values


def dataset_facts(dataset: Any) -> dict[str, Any]:
    """What a `datasets.Dataset` knows of itself: id and commit on the Hub, configuration, split, fingerprint, rows."""
    if not isinstance(dataset, datasets.Dataset):
        return {}
    # Where `datasets` keeps one of the Hub: …/org___name/configuration/version/commit/….arrow
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
    """Of TRL's log, up to a step; it counts from 0 again in a resumed run."""
    total, last = 0, 0
    for entry in log:
        if "loss" in entry and "num_tokens" in entry and entry["step"] <= step:
            total, last = total + (last if entry["num_tokens"] < last else 0), entry["num_tokens"]
    return int(total + last)


def _merged(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """`old` with the entries of `new`; a dictionary in both is merged likewise, all else of `new` wins."""
    both = {name for name in new if isinstance(old.get(name), dict) and isinstance(new[name], dict)}
    return {**old, **new, **{name: _merged(old[name], new[name]) for name in both}}


def _acts(model: PeftModel) -> bool:
    """Whether the adapter changes what the model computes: lora_B or lorasb_R is not 0 in some layer."""
    last = ("lora_B.weight", "lorasb_R", "lora_embedding_A")
    tensors = adapter_state_dict(model)
    return any(name.endswith(last) and bool(tensor.any()) for name, tensor in tensors.items())
