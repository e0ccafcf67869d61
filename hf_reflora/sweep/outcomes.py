"""What came of the runs of a sweep: one JSON line a run, of those too that failed or diverged."""

import json
import math
import statistics
from collections import defaultdict
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ..report.environment import without_secrets
from ..report.record import RECORD_NAME, RunRecord
from .plan import PlannedRun, Sweep


FILE = "runs.jsonl"
# A sweep that is started again does not repeat runs of these outcomes, and repeats all others.
FINAL = ("finished", "diverged")


@dataclass
class Outcome:
    """One run and what came of it.

    `status` is "finished"; "diverged" where a loss is not finite; "failed"; or "interrupted" by Ctrl-C or a signal.
    `value` is the metric of the sweep, None unless finished. `losses` and `evaluations` are (step, loss) of the
    training and of the held-out rows.
    """

    id: str
    method: str
    choice: dict[str, Any]
    status: str
    started: str
    seconds: float
    metric: str
    value: float | None = None
    scores: dict[str, float] = field(default_factory=dict)
    losses: list[tuple[float, float]] = field(default_factory=list)
    evaluations: list[tuple[float, float]] = field(default_factory=list)
    trainable_parameters: int | None = None
    error: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)

    @property
    def number(self) -> float:
        """The value of a run that finished."""
        if self.value is None:
            raise ValueError(f"The run {self.id} did not finish: {self.status}.")
        return self.value

    @property
    def setting(self) -> dict[str, Any]:
        """The options in which the runs of the method differ, without the seed."""
        return {name: value for name, value in self.choice.items() if name != "seed"}


def read_outcomes(folder: Path, metric: str) -> dict[str, Outcome]:
    """The last outcome of every run in a sweep's folder, by the run's id, with the values of `metric`.

    Raises:
        ValueError: if a run finished without this metric.
    """
    path = folder / FILE
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    outcomes = {}
    for line in lines:
        try:
            entry = json.loads(line)
        except ValueError:
            continue  # a sweep was killed while it wrote
        outcome = Outcome(**entry)
        # JSON has no number that is not finite, so the file has it as a text.
        outcome.scores = {name: float(score) for name, score in outcome.scores.items()}
        outcome.losses = [(step, float(loss)) for step, loss in outcome.losses]
        outcome.evaluations = [(step, float(loss)) for step, loss in outcome.evaluations]
        if outcome.status == "finished" and metric not in outcome.scores:
            raise ValueError(
                f"{path}: the runs have no score {metric!r}; they have {', '.join(outcome.scores)}. Choose one of "
                "these as --metric, or another --output_dir."
            )
        outcome.metric, outcome.value = metric, outcome.scores[metric] if outcome.status == "finished" else None
        outcomes[outcome.id] = outcome
    return outcomes


def append_outcome(folder: Path, outcome: Outcome) -> None:
    path = folder / FILE
    torn = path.exists() and path.stat().st_size > 0 and not path.read_bytes().endswith(b"\n")
    with path.open("a", encoding="utf-8", newline="\n") as file:
        file.write(("\n" if torn else "") + json.dumps(without_secrets(asdict(outcome)), ensure_ascii=False) + "\n")


def outcome_of(run: PlannedRun, metric: str, started: str, seconds: float) -> Outcome | None:
    """The outcome that the record in the run's folder tells, None if there is no complete one.

    Raises:
        ValueError: if the record lacks the metric; the message lists what there is.
    """
    path = Path(run.options["output_dir"], RECORD_NAME)
    if not path.exists():
        return None
    record = RunRecord.load(path)
    if not record.after:
        return None
    if metric not in record.after:
        raise ValueError(f"The record has no score {metric!r}; it has {', '.join(record.after)}.")
    scores = {name: float(value) for name, value in record.after.items()}
    evaluations: dict[float, float] = {}
    for entry in record.log:
        if "eval_loss" in entry:  # the last step is evaluated twice: in training, and by the recipe after it
            evaluations.setdefault(entry["step"], float(entry["eval_loss"]))
    finite = all(math.isfinite(loss) for _, loss in (*record.losses, *evaluations.items(), ("", scores[metric])))
    return Outcome(
        id=run.id,
        method=run.method,
        choice=run.choice,
        status="finished" if finite else "diverged",
        started=started,
        seconds=record.seconds.get("total", seconds),
        metric=metric,
        value=scores[metric] if finite else None,
        scores=scores,
        losses=record.losses,
        evaluations=list(evaluations.items()),
        trainable_parameters=record.trainable_parameters,
        options=run.options,
        environment=record.environment,
    )


@dataclass(frozen=True)
class Best:
    """The best setting of one method and the outcomes by which it is compared with other methods."""

    method: str
    setting: dict[str, Any]
    outcomes: list[Outcome]

    @property
    def mean(self) -> float:
        return statistics.mean(outcome.number for outcome in self.outcomes)


def settings_of(outcomes: list[Outcome]) -> list[list[Outcome]]:
    """The outcomes of each setting, without regard to the seed."""
    settings = defaultdict(list)
    for outcome in outcomes:
        settings[json.dumps(outcome.setting, sort_keys=True)].append(outcome)
    return list(settings.values())


def best_of(sweep: Sweep, outcomes: list[Outcome]) -> Best | None:
    """The best setting of one method, None if no setting finished with all of its seeds.

    The setting is the one with the best mean over the seeds of the grid. It is represented by the runs with
    `fresh_seeds` once there are all of them, so that methods are compared by the same seeds, and until then by those
    of the grid.
    """
    candidates = []
    for runs in settings_of([o for o in outcomes if o.status in FINAL]):
        chosen_by = [o for o in runs if o.choice.get("seed") not in sweep.fresh_seeds]
        if chosen_by and all(o.value is not None for o in chosen_by):
            mean = statistics.mean(o.number for o in chosen_by)
            candidates.append((-mean if sweep.maximizes else mean, runs, chosen_by))
    if not candidates:
        return None
    _, runs, chosen_by = min(candidates, key=lambda candidate: candidate[0])
    fresh = [o for o in runs if o.choice.get("seed") in sweep.fresh_seeds and o.value is not None]
    complete = len(fresh) == len(sweep.fresh_seeds) > 0
    return Best(runs[0].method, runs[0].setting, fresh if complete else chosen_by)


def outcomes_of_sweep(sweep: Sweep, outcomes: dict[str, Outcome]) -> list[Outcome]:
    """Those of `outcomes` that belong to `sweep`; a folder may have others, of other grids."""
    runs = [*sweep.grid_runs(), *searched_runs(sweep, outcomes)]
    return outcomes_of([*runs, *fresh_runs(sweep, outcomes)], outcomes)


def outcomes_of(runs: list[PlannedRun], outcomes: dict[str, Outcome]) -> list[Outcome]:
    """The outcomes of those of `runs` that have one."""
    # The method may have had another name when the run was made.
    return [replace(outcomes[run.id], method=run.method, choice=run.choice) for run in runs if run.id in outcomes]


def searched_runs(sweep: Sweep, outcomes: dict[str, Outcome]) -> list[PlannedRun]:
    """The runs that have searched the ranges so far."""
    runs = []
    for method in sweep.rows:
        for outcome in outcomes.values() if method.ranges else ():
            run = sweep.planned(method, outcome.choice)
            of_grid = all(outcome.choice.get(name) in values for name, values in method.grid.items())
            if run.id == outcome.id and of_grid and set(outcome.choice) == {*method.grid, *method.ranges}:
                runs.append(run)
    return runs


def fresh_runs(sweep: Sweep, outcomes: dict[str, Outcome]) -> list[PlannedRun]:
    """The best setting of each method with each fresh seed, seed by seed."""
    chosen_by = outcomes_of([*sweep.grid_runs(), *searched_runs(sweep, outcomes)], outcomes)
    bests = [(method, best_of(sweep, [o for o in chosen_by if o.method == method.name])) for method in sweep.rows]
    return [
        sweep.planned(method, {**best.setting, "seed": seed})
        for seed in sweep.fresh_seeds
        for method, best in bests
        if best is not None
    ]
