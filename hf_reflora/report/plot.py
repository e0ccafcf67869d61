"""The plot of a run: the training loss by step, and the scores before and after."""

import os
import re
from typing import TYPE_CHECKING

from transformers.utils import logging

from .record import RunRecord


if TYPE_CHECKING:
    from matplotlib.axes import Axes

logger = logging.get_logger(__name__)


def plot(record: RunRecord, path: str | os.PathLike) -> bool:
    """Draws a run as a PNG and returns whether it did: without matplotlib, or a loss in the record, there is no plot.

    A drawing that fails leaves an older file as it was.
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
    axes.plot(*zip(*record.losses, strict=True), marker=".", color="tab:blue")
    model = record.base_model or re.split(r"[/\\]", record.model)[-1]  # a path of Windows, too
    axes.set(xlabel="optimizer step", ylabel="training loss", title=f"{record.method} on {model}")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)


def _draw_scores(axes: "Axes", record: RunRecord) -> None:
    names = record.compared_scores
    sides = ((-0.2, "before", record.before, "tab:gray"), (0.2, "after", record.after, "tab:blue"))
    for offset, when, values, color in sides:
        places = [i + offset for i in range(len(names))]
        bars = axes.bar(places, [values[name] for name in names], 0.4, label=when, color=color)
        axes.bar_label(bars, fmt="%.2f", fontsize=8)
    axes.set_xticks(range(len(names)), [name.replace("_", " ") for name in names])
    rows = record.evaluation_rows
    axes.set_title(f"{rows} evaluation rows" if rows else "before and after training")
    highest = max(values[name] for _, _, values, _ in sides for name in names)
    axes.set_ylim(top=max(1.0, highest) * 1.1)
    axes.legend()
