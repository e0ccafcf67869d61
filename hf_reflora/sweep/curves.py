"""The plots of a sweep: the metric by learning rate, and the loss by step of each method at its best setting."""

import statistics
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .outcomes import Best, Outcome, settings_of
from .plan import Sweep
from .summary import best_settings


if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's colours, which colour-blind people can tell apart.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")
LABELS = {"losses": "training loss", "evaluations": "held-out loss"}
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")


def draw(sweep: Sweep, outcomes: list[Outcome], folder: Path) -> list[Path]:
    """Draws `learning_rate.png`, if there are several learning rates, and `loss.png`; returns their paths."""
    from matplotlib.figure import Figure  # here, because it takes half a second to import

    bests = best_settings(sweep, outcomes)
    paths = []
    rates = {o.choice.get("learning_rate") for o in outcomes} - {None}
    if len(rates) > 1 and bests:
        figure = Figure(figsize=(6.4, 4.2), layout="constrained")
        draw_learning_rates(figure.subplots(), sweep, outcomes)
        paths.append(folder / "learning_rate.png")
        figure.savefig(paths[-1], dpi=120)
    kinds = [kind for kind in LABELS if any(getattr(o, kind) for best in bests for o in best.outcomes)]
    if kinds:
        figure = Figure(figsize=(1 + 5 * len(kinds), 4.2), layout="constrained")
        for axes, kind in zip(figure.subplots(1, len(kinds), squeeze=False)[0], kinds, strict=True):
            draw_losses(axes, sweep, bests, kind)
        paths.append(folder / "loss.png")
        figure.savefig(paths[-1], dpi=120)
    return paths


def draw_learning_rates(axes: "Axes", sweep: Sweep, outcomes: list[Outcome]) -> None:
    """For each method the best mean at every learning rate, and the runs as points."""
    for i, method in enumerate(sweep.rows):
        finished = [o for o in outcomes if o.method == method.name and o.value is not None]
        if not finished:
            continue
        by_rate: dict[float, list[list[Outcome]]] = defaultdict(list)
        for runs in settings_of(finished):
            if "learning_rate" in runs[0].choice:
                by_rate[runs[0].choice["learning_rate"]].append(runs)
        pick = max if sweep.maximizes else min
        chosen = {
            rate: pick(settings, key=lambda runs: statistics.mean(o.number for o in runs))
            for rate, settings in sorted(by_rate.items())
        }
        style: dict[str, Any] = {"color": COLORS[i % len(COLORS)], "marker": MARKERS[i % len(MARKERS)]}
        means = [statistics.mean(o.number for o in runs) for runs in chosen.values()]
        axes.plot(list(chosen), means, label=method.name, markersize=6, **style)
        for rate, runs in chosen.items():
            axes.scatter([rate] * len(runs), [o.number for o in runs], s=12, alpha=0.5, **style)
    axes.set(xscale="log", xlabel="learning rate", ylabel=_label(sweep.metric))
    axes.grid(alpha=0.3)
    axes.legend()


def draw_losses(axes: "Axes", sweep: Sweep, bests: list[Best], kind: str) -> None:
    """The mean over the seeds of `losses` (training) or `evaluations` (held-out rows), between the extremes."""
    order = [method.name for method in sweep.rows]  # a method has the same colour in every plot
    for best in sorted(bests, key=lambda best: order.index(best.method)):
        by_step: dict[int, list[float]] = defaultdict(list)
        for outcome in best.outcomes:
            for step, loss in getattr(outcome, kind):
                by_step[step].append(loss)
        steps = sorted(by_step)
        color = COLORS[order.index(best.method) % len(COLORS)]
        axes.plot(steps, [statistics.mean(by_step[s]) for s in steps], label=best.method, color=color)
        axes.fill_between(
            steps, [min(by_step[s]) for s in steps], [max(by_step[s]) for s in steps], color=color, alpha=0.15, lw=0
        )
    positive = all(loss > 0 for best in bests for o in best.outcomes for _, loss in getattr(o, kind))
    axes.set(yscale="log" if positive else "linear", xlabel="optimizer step", ylabel=LABELS[kind])
    axes.grid(alpha=0.3, which="both")
    axes.legend()


def _label(metric: str) -> str:
    return "held-out loss" if metric == "loss" else metric.replace("_", " ")
