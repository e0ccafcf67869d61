"""The plot of a run: the training loss by step, and the scores before and after."""

import math
import os
import re
from typing import TYPE_CHECKING

from transformers.utils import logging

from .numbers import alike
from .record import RunRecord


if TYPE_CHECKING:
    from matplotlib.axes import Axes

LARGEST = 1e30  # that a plot shows
logger = logging.get_logger(__name__)


def plot(record: RunRecord, path: str | os.PathLike) -> bool:
    """Draws a run as a PNG and returns whether it did: without matplotlib, or a loss in the record, there is no plot.

    Numbers that are not finite are left out of the curve and the bars, and the plot says so. A drawing that fails
    leaves an older file as it was.
    """
    if not record.losses:
        return False
    try:
        from matplotlib.figure import Figure  # here, because it is optional and takes half a second to import
    except ModuleNotFoundError:
        logger.warning_once('The plot is left out, for matplotlib is not installed: pip install "hf_reflora[hub]"')
        return False
    scores = bool(record.compared_scores)
    figure = Figure(figsize=(10 if scores else 6, 3.6), layout="constrained")
    axes = figure.subplots(1, 2 if scores else 1, squeeze=False)[0]
    _draw_loss(axes[0], record)
    if scores:
        _draw_scores(axes[1], record)
    unfinished = f"{os.fspath(path)}.tmp"
    # Without matplotlib's version in the file the same run gives the same bytes, and the Hub sees no change.
    figure.savefig(unfinished, dpi=120, format="png", metadata={"Software": None})
    os.replace(unfinished, path)
    return True


def _draw_loss(axes: "Axes", record: RunRecord) -> None:
    points = [(step, _drawn(loss)) for step, loss in record.losses if math.isfinite(step)]
    axes.plot([step for step, _ in points], [loss for _, loss in points], marker=".", color="tab:blue")
    model = record.base_model or re.split(r"[/\\]", record.model)[-1]  # a path of Windows, too
    axes.set(xlabel="optimizer step", ylabel="training loss", title=f"{record.method} on {model}")
    finite = [loss for _, loss in points if math.isfinite(loss)]
    if broken := len(record.losses) - len(finite):
        text = f"{broken} of {len(record.losses)} losses cannot be drawn"
        axes.text(0.98, 0.98, text, ha="right", va="top", transform=axes.transAxes, fontsize=8)
    if finite and min(finite) >= 0:  # a loss of reinforcement learning may be negative
        axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)


def _draw_scores(axes: "Axes", record: RunRecord) -> None:
    names = record.compared_scores
    sides = ((-0.2, "before", record.before, "tab:gray"), (0.2, "after", record.after, "tab:blue"))
    labels = [alike([record.before[name], record.after[name]], decimals=2) for name in names]
    for number, (offset, when, values, color) in enumerate(sides):
        places = [i + offset for i in range(len(names))]
        bars = axes.bar(places, [_drawn(values[name], instead=0.0) for name in names], 0.4, label=when, color=color)
        axes.bar_label(bars, labels=[texts[number] for texts in labels], fontsize=8)
    axes.set_xticks(range(len(names)), [name.replace("_", " ") for name in names])
    rows = record.evaluation_rows
    axes.set_title(f"{rows} evaluation rows" if rows else "before and after training")
    heights = [_drawn(values[name], instead=0.0) for _, _, values, _ in sides for name in names]
    lowest, highest = min(heights), max(heights)
    # Scores are mostly parts of 1, which the axis shows as such, unless all are much smaller.
    axes.set_ylim(top=max(1.0, highest) * 1.1 if highest > 0.05 or lowest < 0 else max(highest, 1e-6) * 1.2)
    axes.legend()


def _drawn(value: float, instead: float = math.nan) -> float:
    """The value, or another where matplotlib cannot draw it: not finite, or with an axis that overflows."""
    return value if math.isfinite(value) and abs(value) < LARGEST else instead
