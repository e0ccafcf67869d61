"""The plot of a run: training loss by step, and the scores before and after."""

import os
import re
from typing import Any

from matplotlib.figure import Figure


def plot(record: dict[str, Any], path: str | os.PathLike) -> bool:
    """Draws a run record as a PNG, whole or not at all; returns whether there was anything to draw."""
    points = [(entry["step"], float(entry["loss"])) for entry in record.get("log", []) if "loss" in entry]
    scores = record["scores"]
    before, after = scores.get("before", {}), scores.get("after", {})
    names = [name for name in before if name in after]
    if not points:
        return False
    figure = Figure(figsize=(10 if names else 6, 3.6), layout="constrained")
    axes = figure.subplots(1, 2 if names else 1, squeeze=False)
    loss = axes[0][0]
    loss.plot(*zip(*points, strict=True), marker=".", color="tab:blue")
    model = record.get("base_model") or re.split(r"[/\\]", record["model"])[-1]  # a path of Windows, too
    loss.set(xlabel="optimizer step", ylabel="training loss", title=f"{record['method']} on {model}")
    loss.set_ylim(bottom=0)
    loss.grid(alpha=0.3)
    if names:
        bars = axes[0][1]
        for offset, when, values, color in ((-0.2, "before", before, "tab:gray"), (0.2, "after", after, "tab:blue")):
            places = [i + offset for i in range(len(names))]
            drawn = bars.bar(places, [values[name] for name in names], 0.4, label=when, color=color)
            bars.bar_label(drawn, fmt="%.2f", fontsize=8)
        bars.set_xticks(range(len(names)), [name.replace("_", " ") for name in names])
        bars.set_title(f"{scores['rows']} evaluation rows" if scores.get("rows") else "before and after training")
        bars.set_ylim(top=max(1.0, *(found[name] for found in (before, after) for name in names)) * 1.1)
        bars.legend()
    unfinished = f"{os.fspath(path)}.tmp"
    figure.savefig(unfinished, dpi=120, format="png", metadata={"Software": None})
    os.replace(unfinished, path)
    return True
