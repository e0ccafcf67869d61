"""What a run shows at its end: a table before/after, examples side by side, and a plot."""

import textwrap
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from rich.text import Text


def show(record: dict[str, Any], console: Console | None = None) -> None:
    """Prints the scores before and after and the examples, as far as the run has any."""
    console = console or Console()
    scores = record["scores"]
    if not scores["before"]:
        return
    table = Table(title=f"{record['method']}, {scores['rows']} held-out rows")
    for column in ("", "before", "after", "change"):
        table.add_column(column, justify="right" if column else "left")
    for name, before in scores["before"].items():
        after = scores["after"][name]
        table.add_row(name, f"{before:.3f}", f"{after:.3f}", f"{after - before:+.3f}")
    console.print(table)
    if not record["examples"]:
        return
    table = Table(title="The first held-out rows", show_lines=True)
    for column in ("request", "before", "after", "reference"):
        table.add_column(column, ratio=1, overflow="fold")
    for example in record["examples"]:
        right = example["after"] == example["reference"]
        table.add_row(
            Text(_shortened(example["prompt"])),
            Text(_shortened(example["before"])),
            Text(_shortened(example["after"]), style="green" if right else "red"),
            Text(_shortened(example["reference"])),
        )
    console.print(table)


def _shortened(text: str) -> str:
    return textwrap.shorten(text, 160, placeholder=" …")


def plot(record: dict[str, Any], path: Path) -> None:
    """Training loss by step and the scores before and after, as a PNG."""
    points = [(entry["step"], float(entry["loss"])) for entry in record["log"] if "loss" in entry]
    scores = record["scores"]
    names = list(scores["before"])
    figure = Figure(figsize=(10 if names else 6, 3.6), layout="constrained")
    axes = figure.subplots(1, 2 if names else 1, squeeze=False)
    loss = axes[0][0]
    loss.plot(*zip(*points, strict=True), marker=".", color="tab:blue")
    loss.set(xlabel="optimizer step", ylabel="training loss", title=f"{record['method']} on {record['model']}")
    loss.set_ylim(bottom=0)
    loss.grid(alpha=0.3)
    if names:
        bars = axes[0][1]
        for offset, when, color in ((-0.2, "before", "tab:gray"), (0.2, "after", "tab:blue")):
            places = [i + offset for i in range(len(names))]
            drawn = bars.bar(places, [scores[when][name] for name in names], 0.4, label=when, color=color)
            bars.bar_label(drawn, fmt="%.2f", fontsize=8)
        bars.set_xticks(range(len(names)), [name.replace("_", " ") for name in names])
        bars.set_title(f"{scores['rows']} held-out rows")
        bars.set_ylim(top=max(1.0, *(value for when in ("before", "after") for value in scores[when].values())) * 1.1)
        bars.legend()
    figure.savefig(path, dpi=120)
