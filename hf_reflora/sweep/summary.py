"""The table of a sweep: each method at its own best setting, and what the user should know about it."""

import math
import shlex
import statistics
from collections.abc import Iterator
from typing import Any

from .outcomes import Best, Outcome, best_of
from .plan import RECIPES, Method, Range, Sweep


def best_settings(sweep: Sweep, outcomes: list[Outcome]) -> list[Best]:
    """The best setting of each method that has one, the best method first."""
    bests = [best_of(sweep, [o for o in outcomes if o.method == method.name]) for method in sweep.rows]
    return sorted((best for best in bests if best is not None), key=lambda b: b.mean, reverse=sweep.maximizes)


def table(sweep: Sweep, outcomes: list[Outcome]) -> str:
    """A Markdown table of the methods at their best settings: mean ± standard error over the seeds."""
    bests = best_settings(sweep, outcomes)
    scores = [name for name in (bests[0].outcomes[0].scores if bests else ()) if name != sweep.metric]
    header = ["method", "best setting", "seeds", sweep.metric, *scores, "runs", "diverged", "failed", "minutes a run"]
    lines = [header, ["---"] * 2 + ["---:"] * (len(header) - 2)]
    for best in bests:
        runs = [outcome for outcome in outcomes if outcome.method == best.method]
        lines.append(
            [
                best.method,
                ", ".join(f"{name} {value}" for name, value in best.setting.items() if name != "method") or "–",
                str(len(best.outcomes)),
                *(mean_and_error([o.scores[name] for o in best.outcomes]) for name in (sweep.metric, *scores)),
                str(len(runs)),
                *(str(sum(o.status == status for o in runs)) for status in ("diverged", "failed")),
                f"{statistics.mean(o.seconds for o in best.outcomes) / 60:.1f}",
            ]
        )
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def mean_and_error(values: list[float]) -> str:
    """The mean ± its standard error, with two digits of the error; the value alone if there is one."""
    mean = statistics.mean(values)
    if len(values) == 1:
        return f"{mean:.4g}"
    error = statistics.stdev(values) / math.sqrt(len(values))
    exponent = int(f"{error:.1e}".partition("e")[2])  # of the rounded error
    digits = 4 if error == 0 else max(0, 1 - exponent)
    return f"{mean:.{digits}f} ± {error:.{digits}f}"


def warnings(sweep: Sweep, outcomes: list[Outcome]) -> Iterator[str]:
    """Sentences about best values at the edge of what was tried, and about methods without a finished run."""
    bests = {best.method: best for best in best_settings(sweep, outcomes)}
    for method in sweep.rows:
        best = bests.get(method.name)
        if best is None:
            yield f"{method.name} has no setting that finished."
            continue
        for name, value in best.setting.items():
            if edge := _edge(method, name, value):
                yield (
                    f"The best {name} of {method.name}, {value}, is the {edge} that was tried: the optimum may lie "
                    "beyond it. Widen the grid; the runs that are there are not repeated."
                )


def _edge(method: Method, name: str, value: Any) -> str | None:
    """ "largest" or "smallest" where `value` is at an end of the numbers tried."""
    if isinstance(tried := method.ranges.get(name), Range):
        place = math.log(value / tried.low) / math.log(tried.high / tried.low)
        return "largest" if place > 0.95 else "smallest" if place < 0.05 else None
    values = method.grid.get(name, [])
    if len(values) < 2 or any(isinstance(v, bool) or not isinstance(v, int | float) for v in values):
        return None
    return "largest" if value == max(values) else "smallest" if value == min(values) else None


def best_command(sweep: Sweep, best: Best) -> str:
    """The command that runs the best setting alone."""
    method = next(method for method in sweep.rows if method.name == best.method)
    start = f"hf-reflora {sweep.recipe}" if sweep.recipe in RECIPES else f"accelerate launch {sweep.recipe}"
    config = [] if sweep.config is None else ["--config", sweep.config]
    options = {**sweep.options, **method.fixed, **best.setting}
    return " ".join([start, shlex.join([*config, *_arguments(options)])])


def _arguments(options: dict[str, Any]) -> Iterator[str]:
    for name, value in options.items():
        yield f"--{name}"
        yield from map(str, value if isinstance(value, list) else [value])
