"""Checks the options of all runs with the recipe's own parser, before the first of them starts."""

import importlib
import tempfile
from pathlib import Path

import yaml

from ..recipes.options import Options
from .plan import RECIPES, PlannedRun, Sweep


def check_runs(sweep: Sweep) -> None:
    """Parses the options of every run in the grid, and at both ends of a range, as the recipe will.

    The options of a script are not checked: its first run tells.

    Raises:
        ValueError: for a run whose options the recipe does not take; the message names the run.
    """
    if sweep.recipe not in RECIPES:
        return
    recipe = importlib.import_module(f"hf_reflora.recipes.{sweep.recipe}")
    with tempfile.TemporaryDirectory() as folder:
        for run in _every_option(sweep):
            path = Path(folder, "options.yaml")
            path.write_text(yaml.safe_dump(run.options), encoding="utf-8")
            try:
                # A parser for each run, because TrlParser keeps what it reads in a file as its defaults.
                Options(*recipe.make_parser().parse_args_and_config(["--config", str(path)]))
            except (ValueError, TypeError) as error:
                raise ValueError(f"The run {run} cannot be made: {error}") from error


def _every_option(sweep: Sweep) -> list[PlannedRun]:
    runs = list(sweep.grid_runs())
    for method in sweep.rows:
        for end in ("low", "high") if method.ranges else ():
            ends = {name: getattr(tried, end) for name, tried in method.ranges.items()}
            runs += [sweep.planned(method, {**cell, **ends}) for cell in method.cells()]
    return runs
