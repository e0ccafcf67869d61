"""The run record: what was trained, how, with what result, as a dataclass and as the file `run_record.json`."""

import dataclasses
import json
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .environment import without_secrets, write_json
from .ids import is_hub_id
from .local_paths import without_local_paths
from .numbers import as_number


RECORD_NAME = "run_record.json"
SCHEMA = 2  # version of the file format
# In records that are older than the key `tags`, which all were of TRL's SFTTrainer.
OLDER_TAGS = ["sft", "trl"]
# What a resumed run takes over from the record of its checkpoint.
RESUMED = ("scores", "examples", "card", "runs", "seconds", "peak_memory_gb")


@dataclass
class RunRecord:
    """The facts of one training run. Everything that describes a run (card, plot, tables) is made from it.

    A field that is None or empty is not known, with one exception: `base_model`, `base_revision`, `dataset_id` and
    `data_seed` may be *known to be* None, for instance when the base model is a local folder. Therefore the record
    remembers which fields were set (`knows`), and writes those, a None as null, and no others.

    Set fields by `update`, `replace` and `fill`, not by assignment.

    Example:
        >>> record = RunRecord.load("runs/capybara/run_record.json")
        >>> record.method, record.after["exact"], record.losses[-1]
    """

    schema: int = SCHEMA
    # How it was trained
    method: str = ""  # "lora", "reflora", "reflora_s", "lora_sb" or "lora_xs"
    init: str = "default"  # how the adapter was started: "default", or "lora_sb" for an ordinary LoRA from that start
    peft: dict[str, Any] = field(default_factory=dict)  # settings of the PEFT config that are not its defaults
    tags: list[str] = field(default_factory=list)  # tags of the card that name the trainer, such as "trl", "sft"
    arguments: dict[str, Any] = field(
        default_factory=dict
    )  # training arguments that are not their defaults, and the main ones
    seed: int | None = None
    data_seed: int | None = None
    # What was trained, on what
    model: str = ""  # the base model as the user named it, perhaps a path
    base_model: str | None = None  # its id on the Hub; None: it is not there
    base_revision: str | None = None  # the commit of `base_model`; None: it could not be told
    labels: list[str] = field(default_factory=list)  # of a classifier: the names of its classes
    num_labels: int | None = None  # of a classifier whose classes have no known names: their number
    dataset: str | None = None  # the training data as the user named it, perhaps a path
    dataset_id: str | None = None  # its id on the Hub; None: it is not there
    dataset_revision: str | None = None  # commit
    dataset_config: str | None = None  # configuration
    dataset_split: str | None = None
    dataset_fingerprint: str | None = None  # by `datasets`, of the rows as they were loaded
    train_rows: int | None = None
    # What came of it
    scores: dict[str, Any] = field(default_factory=dict)  # "before" and "after": score by name; "rows", "split"
    examples: list[dict[str, str]] = field(default_factory=list)  # "prompt", "before", "after", "reference"
    log: list[dict[str, Any]] = field(default_factory=list)  # the trainer's log_history
    step: int | None = None  # optimizer steps of the weights beside the record
    tokens: int | None = None  # tokens that these weights have been trained on
    diagnostics: dict[str, Any] = field(default_factory=dict)  # see `hf_reflora.report.diagnostics.diagnostics`
    # Cost and place
    trainable_parameters: int | None = None
    seconds: dict[str, float] = field(default_factory=dict)  # "train" over all runs; of a recipe "total" and others
    peak_memory_gb: dict[str, float] = field(default_factory=dict)  # in 10⁹ bytes: "host", "cuda:0", …
    processes: int | None = None
    backend: str | None = None  # "MULTI_GPU", "FSDP2", "DeepSpeed ZeRO-2", …
    environment: dict[str, Any] = field(default_factory=dict)  # see `hf_reflora.report.environment.environment`
    trackers: dict[str, str] = field(
        default_factory=dict
    )  # the page of the run in each tracker, by the tracker's name
    # One entry for each start of the run: "started", "from_step", "to_step", "seconds", "processes", and where they
    # are known "commit" and "versions"
    runs: list[dict[str, Any]] = field(default_factory=list)
    # The user's "title", "license", "language", "tags", "task" (pipeline tag) and "datasets" (ids)
    card: dict[str, Any] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)  # the user's own keys, beside the others in the file

    def __post_init__(self):
        given = (f.name for f in dataclasses.fields(self) if getattr(self, f.name) not in (None, "", [], {}))
        self._known = set(given) - {"extra", "init"} | ({"init"} if self.init != "default" else set())

    # Setting

    def replace(self, **entries: Any) -> None:
        """Sets fields; names that are no fields go to `extra`."""
        for name, value in entries.items():
            if name in FIELDS:
                setattr(self, name, value)
                self._known.add(name)
            else:
                self.extra[name] = value

    def update(self, **entries: Any) -> None:
        """Sets fields, with dictionaries merged into those that are there, at every depth."""
        current = self.to_dict()
        self.replace(**{name: _merged(current.get(name), value) for name, value in entries.items()})

    def fill(self, **entries: Any) -> None:
        """Sets those of the fields that are not known yet."""
        self.replace(**{name: value for name, value in entries.items() if not self.knows(name)})

    def resume(self, earlier: "RunRecord") -> None:
        """Continues the record of the checkpoint that training resumes from: its runs, costs, scores and examples."""
        entries = {name: value for name, value in earlier.to_dict().items() if name in RESUMED}
        current = {name: value for name, value in self.to_dict().items() if name in entries}
        self.replace(**_merged(entries, current))

    def knows(self, name: str) -> bool:
        """Whether the field has been set, be it to None."""
        return name in self._known or name in self.extra

    @property
    def is_of_run(self) -> bool:
        """Whether a run has written it. The record of an adapter without one is read from the adapter's files."""
        return self.knows("log") or self.knows("arguments")

    # Reading and writing

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "RunRecord":
        """The record of the JSON object `data`, of this or an older version of the format.

        Older records have no `base_model` and `dataset_id`, for which names stand in that have the form of an id on
        the Hub, and no `tags`, which all are TRL's.

        Raises:
            ValueError: `data` is of a newer version, or no run record: it lacks method or model.
        """
        missing = [name for name in ("method", "model") if not isinstance(data, dict) or data.get(name) is None]
        if missing:
            raise ValueError(f"This is no run record: it has no {' and no '.join(missing)}.")
        if data.get("schema", SCHEMA) > SCHEMA:
            raise ValueError(
                f"This run record has version {data['schema']} of the format, and this version of hf_reflora knows "
                f"{SCHEMA}. Update hf_reflora."
            )
        record = cls()
        # null where the field is a list or a dictionary says nothing, so that the field stays empty.
        record.replace(
            **{name: value for name, value in data.items() if value is not None or getattr(record, name, None) is None}
        )
        # Set without `replace`, so that the record is not written with what its file did not have.
        if not record.knows("base_model") and is_hub_id(record.model):
            record.base_model = record.model
        if not record.knows("dataset_id") and is_hub_id(record.dataset):
            record.dataset_id = record.dataset
        if not record.knows("tags"):
            record.tags = list(OLDER_TAGS)
        return record

    def to_dict(self) -> dict[str, Any]:
        """The JSON object of the record: the fields that are known. Lists and dictionaries are shared, not copied."""
        known = {name: getattr(self, name) for name in FIELDS if name in self._known}
        return {"schema": self.schema, **known, **self.extra}

    @classmethod
    def load(cls, path: str | os.PathLike) -> "RunRecord":
        """Reads a `run_record.json`.

        Raises:
            ValueError: the file is not JSON, or see `from_dict`.
        """
        try:
            return cls.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    def save(self, path: str | os.PathLike) -> None:
        """Writes the record, as it may be published, to `path`. A write that fails leaves the old file as it was."""
        write_json(Path(path), _published(self.to_dict()))

    def without_secrets(self) -> "RunRecord":
        """A copy as `save` writes it: secrets are replaced by "***", local paths by their last name."""
        return RunRecord.from_dict(_published(self.to_dict()))

    # What readers ask for

    @property
    def before(self) -> dict[str, float]:
        """The scores of the base model that are numbers, by name."""
        return self._scores("before")

    @property
    def after(self) -> dict[str, float]:
        """The scores with the trained adapter that are numbers, by name."""
        return self._scores("after")

    def _scores(self, when: str) -> dict[str, float]:
        numbers = {name: as_number(value) for name, value in (self.scores.get(when) or {}).items()}
        return {name: number for name, number in numbers.items() if number is not None}

    @property
    def compared_scores(self) -> list[str]:
        """The names of the scores that are known both before and after training."""
        return [name for name in self.before if name in self.after]

    @property
    def evaluation_rows(self) -> int:
        """The number of rows that the scores are of, 0 if it is not known."""
        rows = as_number(self.scores.get("rows"))
        return int(rows) if rows is not None and math.isfinite(rows) else 0

    @property
    def evaluation_split(self) -> str | None:
        """The split of the dataset that these rows are from."""
        return self.scores.get("split")

    @property
    def losses(self) -> list[tuple[float, float]]:
        """The training loss as (step, loss) in the log's order; entries whose loss is no number are left out."""
        losses = ((as_number(entry.get("step")), as_number(entry.get("loss"))) for entry in self.log)
        return [(step, loss) for step, loss in losses if step is not None and loss is not None]


FIELDS = tuple(f.name for f in dataclasses.fields(RunRecord) if f.name != "extra")


def _published(data: dict[str, Any]) -> dict[str, Any]:
    # Examples are shown as they came out: a prompt may look like a path.
    return without_local_paths(without_secrets(data), keep=("examples",))


def _merged(old: Any, new: Any) -> Any:
    """`new`, or where both are dictionaries `old` with the entries of `new`, merged likewise."""
    if not isinstance(old, dict) or not isinstance(new, dict):
        return new
    return {**old, **{name: _merged(old.get(name), value) for name, value in new.items()}}
