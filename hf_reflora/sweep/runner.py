"""Runs a sweep: grids in their order and ranges by optuna's TPE, several runs at a time, within a budget of time."""

import os
import queue
import shutil
import statistics
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import optuna
from filelock import FileLock, Timeout
from optuna.distributions import BaseDistribution, FloatDistribution
from optuna.trial import Trial, create_trial
from tqdm import tqdm

from ..report.environment import usable_cores
from .outcomes import (
    FINAL,
    Outcome,
    append_outcome,
    fresh_runs,
    outcome_of,
    outcomes_of,
    outcomes_of_sweep,
    read_outcomes,
    searched_runs,
)
from .plan import Method, PlannedRun, Sweep
from .process import INTERRUPTED, last_lines, run_process, wait_for_earlier


class Runner:
    """Runs what is left of a sweep.

    A run that has an outcome is not repeated unless it failed or was interrupted. What was interrupted, even by
    kill -9, is run again from its beginning, or from its last checkpoint if the recipe's options say
    `resume_from_checkpoint: true`.

    Args:
        sweep: What is to be run.
        jobs: Runs at a time. On a machine with several GPUs each gets its share of them, on a CPU its share of cores.
        budget: Seconds. No run starts that, by the mean of the runs so far, would end later. Default: no limit.
        launcher: Further options of `accelerate launch`.

    Raises:
        RuntimeError: by `run`, if another sweep is at work in the same folder.
    """

    def __init__(self, sweep: Sweep, *, jobs: int = 1, budget: float | None = None, launcher: Sequence[str] = ()):
        if jobs < 1:
            raise ValueError(f"jobs must be at least 1, got {jobs}.")
        self.sweep, self.jobs, self.budget, self.launcher = sweep, jobs, budget, list(launcher)
        self.folder = Path(sweep.output_dir)
        self.begin = time.monotonic()
        self.out_of_time = False
        self.seconds: list[float] = []  # of the runs that this call has made
        self._lock = threading.Lock()  # for the file of outcomes
        self._environments: queue.Queue[dict[str, str]] = queue.Queue()
        for environment in _environments(jobs):
            self._environments.put(environment)

    def run(self) -> list[Outcome]:
        """Runs all that is left and returns the outcomes of the whole sweep."""
        self.folder.mkdir(parents=True, exist_ok=True)
        optuna.logging.set_verbosity(optuna.logging.WARNING)  # the progress bar reports each run
        try:
            with FileLock(self.folder / ".lock", timeout=0):
                self.outcomes = read_outcomes(self.folder, self.sweep.metric)
                self._run_all(list(self.sweep.grid_runs()))
                for method in self.sweep.rows:
                    if method.ranges:
                        self._search(method)
                if self.sweep.fresh_seeds and not self.out_of_time:
                    self._run_all(fresh_runs(self.sweep, self.outcomes))
        except Timeout as error:
            raise RuntimeError(
                f"Another sweep is at work in {self.folder}; wait for it or choose another folder."
            ) from error
        return self.outcomes_of_sweep()

    def outcomes_of_sweep(self) -> list[Outcome]:
        """The outcomes that belong to this sweep so far."""
        return outcomes_of_sweep(self.sweep, self.outcomes)

    def _run_all(self, runs: list[PlannedRun]) -> None:
        """Runs those of `runs` that have no final outcome, in their order."""
        left = {run.id: run for run in runs if not self._is_done(run)}
        if not left or self.out_of_time:
            return
        study = optuna.create_study()
        for id in left:
            study.enqueue_trial({"run": id})
        with self._progress(len(left)) as bar:
            study.optimize(
                lambda trial: self._objective(left[trial.suggest_categorical("run", list(left))], trial, bar),
                n_trials=len(left),
                n_jobs=self.jobs,
            )

    def _search(self, method: Method) -> None:
        """Searches the ranges of `method`, for every combination of the values in its lists."""
        for cell in method.cells():
            if self.out_of_time:
                return
            distributions: dict[str, BaseDistribution] = {
                name: FloatDistribution(r.low, r.high, log=True) for name, r in method.ranges.items()
            }
            earlier = [
                outcome
                for outcome in outcomes_of(searched_runs(self.sweep, self.outcomes), self.outcomes)
                if outcome.method == method.name
                and outcome.status in FINAL
                and all(outcome.choice[name] == value for name, value in cell.items())
            ]
            # The seed depends on the number of runs so far: the same seed would suggest the first values once more.
            study = optuna.create_study(
                direction="maximize" if self.sweep.maximizes else "minimize",
                sampler=optuna.samplers.TPESampler(seed=len(earlier)),
            )
            for outcome in earlier:
                params = {name: outcome.choice[name] for name in distributions}
                study.add_trial(create_trial(params=params, distributions=distributions, value=self._value(outcome)))
            left = (self.sweep.trials or 0) - len(earlier)
            if left <= 0:
                continue

            def objective(trial: Trial, cell: dict[str, Any] = cell) -> float:
                found = {name: trial.suggest_float(name, r.low, r.high, log=True) for name, r in method.ranges.items()}
                return self._objective(self.sweep.planned(method, {**cell, **found}), trial, bar)

            with self._progress(left) as bar:
                study.optimize(objective, n_trials=left, n_jobs=self.jobs)

    def _objective(self, run: PlannedRun, trial: Trial, bar: tqdm) -> float:
        """Runs `run` unless time is up, and returns its value."""
        expected = statistics.mean(self.seconds) if self.seconds else 0.0
        if self.budget is not None and time.monotonic() - self.begin + expected > self.budget:
            self.out_of_time = True
            trial.study.stop()
            raise optuna.TrialPruned
        environment = self._environments.get()
        try:
            outcome = self._run_one(run, environment)
        finally:
            self._environments.put(environment)
        with self._lock:
            append_outcome(self.folder, outcome)
            self.outcomes[run.id] = outcome
            self.seconds.append(outcome.seconds)
            shown = f"{self.sweep.metric} {outcome.value:.4g}" if outcome.value is not None else outcome.status
            bar.write(f"{run}: {shown}, {outcome.seconds:.0f} s, {run.options['output_dir']}")
            if outcome.status == "failed":
                bar.write(outcome.error)
            bar.update()
        if outcome.status == "interrupted":
            raise KeyboardInterrupt
        if outcome.status == "failed":
            raise optuna.TrialPruned
        return self._value(outcome)

    def _run_one(self, run: PlannedRun, environment: dict[str, str]) -> Outcome:
        started, begin = datetime.now(timezone.utc).isoformat(timespec="seconds"), time.monotonic()
        folder = Path(run.options["output_dir"])
        error, status = "", 0
        wait_for_earlier(folder)
        try:
            # An earlier sweep may have been killed before it could write down the outcome of this run.
            outcome = self._collect(run, started, begin)
            if outcome is None:
                status = self._start(run, environment)
                outcome = self._collect(run, started, begin)
        except ValueError as wrong:
            outcome, error = None, str(wrong)
        if outcome is not None:
            return outcome
        return Outcome(
            id=run.id,
            method=run.method,
            choice=run.choice,
            status="interrupted" if status in INTERRUPTED else "failed",
            started=started,
            seconds=round(time.monotonic() - begin, 1),
            metric=self.sweep.metric,
            error=error or f"exit status {status}; the end of its log:\n{last_lines(folder)}",
            options=run.options,
        )

    def _start(self, run: PlannedRun, environment: dict[str, str]) -> int:
        folder = Path(run.options["output_dir"])
        if folder.exists() and not run.options.get("resume_from_checkpoint"):
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
        options = {"cpu_threads": max(1, usable_cores() // self.jobs), **run.options}
        return run_process(self.sweep.recipe, replace(run, options=options), self.launcher, environment)

    def _collect(self, run: PlannedRun, started: str, begin: float) -> Outcome | None:
        return outcome_of(run, self.sweep.metric, started, round(time.monotonic() - begin, 1))

    def _is_done(self, run: PlannedRun) -> bool:
        return run.id in self.outcomes and self.outcomes[run.id].status in FINAL

    def _value(self, outcome: Outcome) -> float:
        if outcome.value is not None:
            return outcome.value
        return float("-inf" if self.sweep.maximizes else "inf")

    def _progress(self, total: int) -> tqdm:
        return tqdm(total=total, unit="run", desc=str(self.folder))


def _environments(jobs: int) -> list[dict[str, str]]:
    """For each of the jobs that run at a time, the environment variables that give it its share of the GPUs."""
    import torch

    # Waiting threads of OpenMP otherwise keep the cores busy that other runs need.
    passive = {"OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "PASSIVE")}
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = visible.split(",") if visible else [str(i) for i in range(torch.cuda.device_count())]
    if jobs == 1 or not devices:
        return [passive] * jobs
    return [passive | {"CUDA_VISIBLE_DEVICES": ",".join(_share(devices, jobs, job))} for job in range(jobs)]


def _share(devices: list[str], jobs: int, job: int) -> list[str]:
    return devices[job::jobs] or [devices[job % len(devices)]]
