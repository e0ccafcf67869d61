"""What a sweep runs, read from a YAML file and the command line."""

import hashlib
import itertools
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from ..recipes.shipped import config_file


RECIPES = ("sft", "dpo", "classify")
KEYS = ("recipe", "config", "options", "grid", "methods", "metric", "trials", "fresh_seeds", "output_dir")
# A run's id does not depend on these: they do not change what is learned.
NOT_IN_ID = ("output_dir", "cpu_threads", "report_to")
# A sweep pushes nothing, because all its runs would be pushed to one repository.
HUB_OPTIONS = ("push_to_hub", "hub_model_id", "hub_strategy", "hub_token", "hub_private_repo", "hub_always_push")


@dataclass(frozen=True)
class Range:
    """The numbers from `low` to `high`, which optuna's TPE searches on a logarithmic scale."""

    low: float
    high: float

    def __post_init__(self):
        if not 0 < self.low < self.high:
            raise ValueError(f"A range needs 0 < low < high, got {self.low} and {self.high}.")


@dataclass(frozen=True)
class Method:
    """One row of the table: options with one value, with several values, and with a range of values."""

    name: str
    fixed: dict[str, Any]
    grid: dict[str, list[Any]]
    ranges: dict[str, Range]

    def cells(self) -> list[dict[str, Any]]:
        """Every combination of the values in the grid."""
        return [dict(zip(self.grid, values, strict=True)) for values in itertools.product(*self.grid.values())]


@dataclass(frozen=True)
class PlannedRun:
    """One run: the method it belongs to, the options in which the method's runs differ, and all its options."""

    method: str
    choice: dict[str, Any]
    options: dict[str, Any]
    id: str

    def __str__(self) -> str:
        return ", ".join([self.method, *(f"{name} {value}" for name, value in self.choice.items())])


@dataclass(frozen=True)
class Sweep:
    """A sweep as the user describes it.

    Args:
        recipe: "sft", "dpo" or "classify", or the path of a script that takes a recipe's options.
        config: The recipe's YAML file, or the name of a shipped one.
        options: Options that all runs have, besides those in `config`.
        grid: Options by name with the values to try: a list, or {"low": …, "high": …} for a search by TPE.
        methods: The rows of the table by name, each with options of its own, which take precedence over `grid`. A list
            is a grid here, too. Default: one row for each value of `method` in `grid`.
        metric: "loss" or another score in the runs' records. A loss is to be small, any other score large.
        trials: For each combination of the values in lists, the number of runs that search the ranges.
        fresh_seeds: Seeds with which the best setting of each method is run again. The table then has the means over
            these runs only, because the seeds that chose the setting favour it.
        output_dir: Where the runs and their outcomes are kept.

    Raises:
        ValueError: at construction, for a value out of range, options that contradict each other, or an unknown file.
    """

    recipe: str
    config: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    grid: dict[str, Any] = field(default_factory=dict)
    methods: dict[str, dict[str, Any]] = field(default_factory=dict)
    metric: str = "loss"
    trials: int | None = None
    fresh_seeds: list[int] = field(default_factory=list)
    output_dir: str = "runs/sweep"

    def __post_init__(self):
        if self.recipe not in RECIPES and not Path(self.recipe).is_file():
            raise ValueError(
                f"The recipe must be {', '.join(RECIPES)} or a script, and there is no file {self.recipe!r} here."
            )
        if self.methods and "method" in self.grid:
            raise ValueError("The rows are named twice: by methods, and by method in the grid. Give one of the two.")
        ranges = any(method.ranges for method in self.rows)
        if ranges != (self.trials is not None):
            raise ValueError("trials is the number of runs that search a range: give both or none.")
        if self.trials is not None and self.trials < 1:
            raise ValueError(f"trials must be at least 1, got {self.trials}.")
        first = self.planned(self.rows[0], self.rows[0].cells()[0])
        if self.metric == "loss" and first.options.get("eval_strategy", "no") == "no":
            raise ValueError(
                "The metric is the loss of the held-out rows, which this recipe does not compute. Give "
                "--eval_strategy epoch, or another --metric, such as a score of the recipe."
            )

    @property
    def maximizes(self) -> bool:
        return "loss" not in self.metric

    @cached_property
    def recipe_options(self) -> dict[str, Any]:
        """The options of the recipe's YAML file with those of the sweep."""
        config = {} if self.config is None else read_yaml(config_file(self.config))
        return {**config, **self.options}

    @cached_property
    def rows(self) -> list[Method]:
        """The rows of the table."""
        if self.methods:
            return [_method(name, {**self.grid, **own}) for name, own in self.methods.items()]
        names = self.grid.get("method", [self.recipe_options.get("method", "reflora")])
        return [_method(name, {**self.grid, "method": name}) for name in names]

    def planned(self, method: Method, choice: dict[str, Any]) -> PlannedRun:
        """The run of `method` with the options `choice`."""
        options = {**self.recipe_options, **method.fixed, **choice}
        options = {name: value for name, value in options.items() if name not in HUB_OPTIONS}
        identity = {name: value for name, value in options.items() if name not in NOT_IN_ID}
        text = json.dumps([Path(self.recipe).stem, identity], sort_keys=True)
        id = hashlib.sha256(text.encode()).hexdigest()[:10]
        return PlannedRun(method.name, choice, {**options, "output_dir": str(Path(self.output_dir, id))}, id)

    def grid_runs(self) -> Iterator[PlannedRun]:
        """All runs of the methods that have no ranges, method by method in turn, so that none waits for another."""
        runs = [[self.planned(method, cell) for cell in method.cells()] for method in self.rows if not method.ranges]
        for turn in itertools.zip_longest(*runs):
            yield from (run for run in turn if run is not None)


def read_sweep(path: str | os.PathLike, **given: Any) -> Sweep:
    """The sweep in a YAML file; what is `given` takes precedence, and `grid` and `options` are merged.

    Raises:
        ValueError: for a key that is none of a sweep's, or as `Sweep`.
    """
    entries = read_yaml(path)
    if unknown := set(entries) - set(KEYS):
        raise ValueError(
            f"{path}: a sweep has no {', '.join(sorted(unknown))}. It has {', '.join(KEYS)}; options of the recipe "
            "stand under options or grid."
        )
    for name in ("options", "grid"):
        given[name] = {**entries.get(name, {}), **given.get(name, {})}
    if "recipe" not in entries:
        raise ValueError(f"{path}: recipe is missing; it is {', '.join(RECIPES)} or the path of a script.")
    return Sweep(**{**entries, **given})


def read_yaml(path: str | os.PathLike) -> dict[str, Any]:
    """The mapping in a YAML file, in which 1e-3 is a number."""
    entries = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    if not isinstance(entries, dict):
        raise ValueError(f"{path}: expected options by name, found {type(entries).__name__}.")
    return _numbers(entries)


def read_value(text: str) -> Any:
    """The value of an option that stands on the command line: JSON, or else a text."""
    # Not YAML, in which `no`, a value of save_strategy, is false.
    try:
        return json.loads(text.lower() if text in ("True", "False") else text)
    except ValueError:
        return text


def read_grid(arguments: list[str]) -> dict[str, Any]:
    """The grid of arguments such as `learning_rate=1e-3,2e-3`, `learning_rate=1e-4..1e-2` or `seed=0,1,2`.

    Raises:
        ValueError: for an argument of another form.
    """
    grid: dict[str, Any] = {}
    for argument in arguments:
        name, equals, values = argument.partition("=")
        if not equals or not name or not values:
            raise ValueError(f"--grid {argument}: write NAME=VALUE,VALUE or, for a range to search, NAME=LOW..HIGH.")
        low, dots, high = values.partition("..")
        grid[name] = {"low": float(low), "high": float(high)} if dots else [read_value(v) for v in values.split(",")]
    return grid


def _method(name: str, options: dict[str, Any]) -> Method:
    ranges = {key: Range(**value) for key, value in options.items() if isinstance(value, dict)}
    grid = {key: value for key, value in options.items() if isinstance(value, list)}
    fixed = {key: value for key, value in options.items() if key not in ranges and key not in grid}
    if empty := [key for key, values in grid.items() if not values]:
        raise ValueError(f"The grid of {name} has no value for {', '.join(empty)}.")
    return Method(name, fixed, grid, ranges)


def _numbers(value: Any) -> Any:
    # YAML 1.1 takes 1e-3, which has no point, for a text.
    if isinstance(value, dict):
        return {name: _numbers(entry) for name, entry in value.items()}
    if isinstance(value, list):
        return [_numbers(entry) for entry in value]
    if isinstance(value, str) and value[:1] in set("+-.0123456789"):
        try:
            return float(value)
        except ValueError:
            return value
    return value
