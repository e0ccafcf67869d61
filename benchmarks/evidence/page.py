"""Writes the sections on language models and the encoder in README.md, from the records only.

    python benchmarks/evidence/page.py

The records are the outcomes of the sweeps, `benchmarks/records/evidence/TASK/runs.jsonl`. Beside them it draws a plot
for each task. What has not been run yet is named.
"""

import statistics
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from matplotlib.figure import Figure

from hf_reflora.sweep.curves import draw_learning_rates, draw_losses
from hf_reflora.sweep.outcomes import Best, Outcome, outcomes_of_sweep, read_outcomes
from hf_reflora.sweep.plan import Sweep, read_sweep
from hf_reflora.sweep.summary import best_settings, mean_and_error, table, warnings


FOLDER = Path(__file__).parent
PAGE = FOLDER / "README.md"
RECORDS = FOLDER.parent / "records" / "evidence"
TASKS = {
    "tool_calls": "SmolLM2-135M-Instruct on the project's tool calls",
    "snips": "SmolLM2-135M-Instruct on SNIPS",
    "sst2": "all-MiniLM-L6-v2 on SST-2",
    "mrpc": "all-MiniLM-L6-v2 on MRPC",
}
BEGIN, END = "<!-- written by page.py -->", "<!-- end of what page.py writes -->"
BASELINE = "LoRA"


def load(task: str) -> tuple[Sweep, list[Outcome]]:
    """The sweep of a task and its outcomes, without those of runs that had other options than its file has now."""
    sweep = read_sweep(FOLDER / f"{task}.yaml")
    return sweep, outcomes_of_sweep(sweep, read_outcomes(RECORDS / task, sweep.metric))


def section(task: str) -> str:
    """The section of one task: its table, comparisons with LoRA, and what is missing."""
    sweep, outcomes = load(task)
    lines = [f"### {TASKS[task]}", ""]
    bests = best_settings(sweep, outcomes)
    if bests:
        lines += [table(sweep, outcomes), *comparisons(bests), ""]
        lines += [f"![Held-out loss by learning rate and by step](../records/evidence/{task}/{task}.png)", ""]
    if not outcomes:
        lines.append("Not run yet.")
    else:
        tried = {name: own for name, own in sweep.methods.items() if any(o.method == name for o in outcomes)}
        sentences = [*warnings(replace(sweep, methods=tried), outcomes), *missing(sweep, outcomes)]
        others = len(read_outcomes(RECORDS / task, sweep.metric)) - len(outcomes)
        if others:
            sentences.append(
                f"The records have {others} more runs, with other options than {task}.yaml has now. They do not count."
            )
        lines += [f"- {sentence}" for sentence in sentences]
    return "\n".join(lines).rstrip() + "\n"


def comparisons(bests: list[Best]) -> Iterator[str]:
    """For each method: the paired difference from LoRA's loss, and when it reaches LoRA's last loss."""
    baseline = next((best for best in bests if best.method == BASELINE), None)
    if baseline is None:
        return
    goal = statistics.mean(o.evaluations[-1][1] for o in baseline.outcomes)
    yield "| method | loss minus LoRA's, same seeds | step at which LoRA's last loss is reached |"
    yield "| --- | ---: | ---: |"
    for best in bests:
        pairs = paired(best, baseline)
        difference = mean_and_error(pairs) if pairs and best is not baseline else "–"
        yield f"| {best.method} | {difference} | {first_step(best, goal) or 'never'} |"


def paired(best: Best, baseline: Best) -> list[float]:
    """The differences of the losses of runs that have the same seed."""
    theirs = {outcome.choice.get("seed"): outcome.value for outcome in baseline.outcomes}
    return [o.value - theirs[o.choice.get("seed")] for o in best.outcomes if o.choice.get("seed") in theirs]


def first_step(best: Best, goal: float) -> int | None:
    """The first evaluated step at which the mean of the losses is at most `goal`."""
    runs = [dict(outcome.evaluations) for outcome in best.outcomes]
    for step in sorted(set.intersection(*(set(run) for run in runs))):
        if statistics.mean(run[step] for run in runs) <= goal:
            return step
    return None


def missing(sweep: Sweep, outcomes: list[Outcome]) -> Iterator[str]:
    """Sentences about runs of the protocol that have not been made."""
    done = {outcome.id for outcome in outcomes if outcome.value is not None or outcome.status == "diverged"}
    left = [run for run in sweep.grid_runs() if run.id not in done]
    if left:
        names = ", ".join(dict.fromkeys(run.method for run in left))
        yield f"{len(left)} of the {len(list(sweep.grid_runs()))} runs of this grid are not made yet, of {names}."
    bests = best_settings(sweep, outcomes)
    if not sweep.fresh_seeds or any(len(best.outcomes) < len(sweep.fresh_seeds) for best in bests):
        so_far = [
            f"{best.method} {', '.join(f'{o.number:.4f} (seed {seed})' for seed, o in sorted(fresh.items()))}"
            for best in bests
            if (fresh := fresh_outcomes(sweep, best, outcomes))
        ]
        yield (
            "Not all runs with fresh seeds are made: the numbers above are one seed's, which also chose the settings."
            + (f" The losses with fresh seeds so far: {'; '.join(so_far)}." if so_far else "")
        )


def fresh_outcomes(sweep: Sweep, best: Best, outcomes: list[Outcome]) -> dict[int, Outcome]:
    """The finished runs of a best setting with fresh seeds, by the seed."""
    runs = [o for o in outcomes if o.method == best.method and o.setting == best.setting and o.value is not None]
    return {o.choice["seed"]: o for o in runs if o.choice.get("seed") in sweep.fresh_seeds}


def draw(task: str) -> None:
    sweep, outcomes = load(task)
    bests = best_settings(sweep, outcomes)
    if not bests:
        return
    figure = Figure(figsize=(12, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    draw_learning_rates(left, sweep, outcomes)
    draw_losses(right, sweep, bests, "evaluations")
    left.set(title="after training, all held-out rows")
    right.set(title="during training, some held-out rows, at the best learning rates")
    figure.savefig(RECORDS / task / f"{task}.png", dpi=110, metadata={"Software": None})


def written() -> str:
    """The text between the marks of the page."""
    return "\n".join(section(task) for task in TASKS)


def write() -> None:
    text = PAGE.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n\n{written()}\n{END}{rest.split(END)[1]}", encoding="utf-8", newline="\n")
    for task in TASKS:
        draw(task)


if __name__ == "__main__":
    write()
