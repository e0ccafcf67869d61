"""The plots and tables of `theory.py`, from its records only."""

import itertools
import json
import math
import statistics
from collections import defaultdict
from collections.abc import Iterable

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from theory import RECORDS
from theory_descent import GAUGE_METHODS
from theory_regression import REGRESSION_METHODS


METHODS = ("LoRA", "ScaledGD", "RefLoRA-S", "RefLoRA")
COLORS = {  # of Okabe and Ito, which differ for colour-blind readers, too
    "LoRA": "#000000",
    "ScaledGD": "#E69F00",
    "RefLoRA-S": "#56B4E9",
    "RefLoRA": "#D55E00",
    "RefLoRA, small η": "#009E73",
}
# Norms that are equal lie on each other, so the second of each two is dashed and thinner.
NORMS = (
    ("‖A‖", {"color": "#0072B2", "linewidth": 4}),
    ("‖B‖", {"color": "#F0C000", "linewidth": 2, "linestyle": "--"}),
    ("‖∇A‖", {"color": "#CC79A7", "linewidth": 4}),
    ("‖∇B‖", {"color": "#000000", "linewidth": 1.5, "linestyle": "--"}),
)


def load(name: str) -> dict:
    return json.loads((RECORDS / f"{name}.json").read_text(encoding="utf-8"))


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    lines = [list(head), *map(list, rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def save(figure: Figure, name: str) -> None:
    # Without matplotlib's version in the file the same record gives the same bytes.
    figure.savefig(RECORDS / f"{name}.png", dpi=110, metadata={"Software": None})


# Matrix factorization


def draw_factorization(record: dict) -> None:
    figure = Figure(figsize=(13, 7), layout="constrained")
    axes = figure.subplot_mosaic([["left"] * 2 + ["right"] * 2, list(METHODS)])
    rates = record["settings"]["learning_rates"]
    for panel, lr in zip(("left", "right"), rates, strict=True):
        for curve in (c for c in record["curves"] if c["lr"] == lr):
            label = curve["method"] + (
                "" if len(curve["loss"]) > record["settings"]["plotted_steps"] else ", diverges"
            )
            axes[panel].plot(curve["loss"], label=label, color=COLORS[curve["method"]], linewidth=2)
        axes[panel].set(title=f"Loss, learning rate {lr}", xlabel="step", yscale="log", ylim=(1e-4, 1e5))
        axes[panel].legend()
    for method in METHODS:
        curve = next(c for c in record["curves"] if c["method"] == method and c["lr"] == rates[0])
        for (label, style), values in zip(NORMS, zip(*curve["norms"], strict=True), strict=True):
            axes[method].plot(values, label=label, **style)
        pair = ", refactored pair" if method.startswith("RefLoRA") else ""
        axes[method].set(title=f"{method}{pair}", xlabel="step", yscale="log", ylim=(1e-2, 1e6))
    axes[METHODS[0]].set_ylabel(f"Frobenius norm, learning rate {rates[0]}")
    axes[METHODS[0]].legend(ncols=2)
    for panel in axes.values():
        panel.grid(alpha=0.3)
    save(figure, "matrix_factorization")


def steps_needed(entry: dict, limit: int) -> str:
    """The median over seeds, or how many seeds did not get there."""
    steps = entry["steps"]
    diverged, never = steps.count("diverged"), steps.count(None)
    if diverged or never:
        parts = [f"{n} of {len(steps)} {word}" for n, word in ((diverged, "diverge"), (never, f"need > {limit}")) if n]
        return ", ".join(parts)
    return f"{statistics.median(steps):g}"


def factorization_table(record: dict) -> str:
    settings = record["settings"]
    rows = []
    for size, lr in itertools.product(settings["sizes"], settings["learning_rates"]):
        entries = {e["method"]: e for e in record["reached"] if e["size"] == size and e["lr"] == lr}
        cells = [steps_needed(entries[method], settings["steps"]) for method in METHODS]
        rows.append([f"{size[0]} × {size[1]}, rank {size[2]}", str(lr), *cells])
    return table(["Y", "learning rate", *METHODS], rows)


def median_steps(entry: dict) -> float:
    """The median over seeds, where a seed that does not get there counts as infinity."""
    return statistics.median(steps if isinstance(steps, int) else math.inf for steps in entry["steps"])


def best_rates(record: dict) -> dict[tuple[int, ...], dict[str, dict]]:
    """By size and method, the entry of the grid with the fewest steps in the median."""
    best: dict[tuple[int, ...], dict[str, dict]] = defaultdict(dict)
    for entry in record["grid"]:
        of_size = best[tuple(entry["size"])]
        of_size[entry["method"]] = min(of_size.get(entry["method"], entry), entry, key=median_steps)
    return best


def best_table(record: dict) -> str:
    rows = []
    for size, entries in best_rates(record).items():
        cells = [f"{median_steps(entries[m]):g} at {entries[m]['lr']:g}" for m in METHODS]
        rows.append([f"{size[0]} × {size[1]}, rank {size[2]}", *cells])
    return table(["Y", *METHODS], rows)


# Linear regression


def draw_regression(record: dict) -> None:
    figure = Figure(figsize=(12, 8), layout="constrained")
    axes = figure.subplots(2, len(record["curves"]), squeeze=False)
    for (losses, objective), curves in zip(axes.T, record["curves"], strict=True):
        for method, curve in curves["methods"].items():
            draw_one_step(losses, objective, method, curve, curves)
        losses.axhline(curves["loss"], color="gray", linewidth=1, linestyle=":", label="loss before the step")
        losses.set(title=f"Standard deviation of B: {curves['std_B']}", ylim=(0, 1.5 * curves["loss"]))
        losses.set_ylabel("loss and bound (6) after one step")
        near = 4 * curves["threshold"]
        shown = [y for x, y in zip(curves["eta"], curves["methods"]["LoRA"]["objective"], strict=True) if x <= near]
        objective.set(ylabel="objective (8) times η²", xlim=(0, near), ylim=(-0.03 * max(shown), max(shown)))
        for axis in (losses, objective):
            axis.set_xlabel("step size η")
            axis.grid(alpha=0.3)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=9)
    save(figure, "linear_regression")


def draw_one_step(losses: Axes, objective: Axes, method: str, curve: dict, curves: dict) -> None:
    small = method.endswith("small η")
    # The branch for small η differs from RefLoRA's other curve up to the threshold only.
    points = [i for i, eta in enumerate(curves["eta"]) if not small or eta <= curves["threshold"]]
    eta = [curves["eta"][i] for i in points]
    style = {"color": COLORS[method], "linewidth": 2}
    losses.plot(eta, [curve["loss"][i] for i in points], label=f"{method}: loss", **style)
    losses.plot(eta, [curve["bound"][i] for i in points], "--", label=f"{method}: bound", **style)
    objective.plot(eta, [curve["objective"][i] for i in points], **style)


def regression_table(record: dict) -> str:
    rows = []
    for std_B in record["settings"]["std_B"]:
        draws = [entry["methods"] for entry in record["draws"] if entry["std_B"] == std_B]
        for method in REGRESSION_METHODS:
            own = [draw[method] for draw in draws]
            wider, lower = (
                "" if method == "LoRA" else f"{sum(better(d[method], d['LoRA']) for d in draws)} of {len(draws)}"
                for better in (lambda a, b: a["widest"] > b["widest"], lambda a, b: a["least"] < b["least"])
            )
            widest, least = (statistics.median(entry[name] for entry in own) for name in ("widest", "least"))
            rows.append([str(std_B), method, f"{widest:.2f}", wider, f"{least:.3f}", lower])
    head = ["std of B", "S of", "largest η that lowers the loss", "larger than LoRA's in"]
    return table([*head, "least loss after the step ÷ loss before", "lower than LoRA's in"], rows)


# The gauge test


def gauge_runs(record: dict, kind: str, method: str) -> dict[str, dict]:
    """The runs of one method by their start."""
    return {run["start"]: run for run in record["runs"] if run["optimizer"] == kind and run["method"] == method}


def draw_gauge(record: dict) -> None:
    figure = Figure(figsize=(14, 7), layout="constrained")
    axes = figure.subplots(len(GAUGE_METHODS), 4, sharex=True, sharey=True)
    for row, (kind, methods) in zip(axes, GAUGE_METHODS.items(), strict=True):
        for axis, method in zip(row, methods, strict=True):
            draw_starts(axis, gauge_runs(record, kind, method))
            axis.set_title(f"{method}, {kind}")
        row[0].set_ylabel(f"loss, {kind} at {record['settings']['rates'][kind]}")
        row[0].legend(fontsize=9, loc="upper right")
    for axis in axes[-1]:
        axis.set_xlabel("step")
    save(figure, "gauge")


def draw_starts(axis: Axes, runs: dict[str, dict]) -> None:
    # Curves that coincide lie on each other: thick light ones below, thin dark ones above.
    widths, colors = (9, 6.5, 4.5, 2.5, 1.2), ("#CCCCCC", "#56B4E9", "#E69F00", "#CC0033", "#000000")
    for (start, run), width, color in zip(runs.items(), widths, colors, strict=True):
        label = "general T" if start == "T" else start
        axis.plot(run["loss"], color=color, linewidth=width, label=label, linestyle="--" if start == "T" else "-")
    ended = [start for start, run in runs.items() if run["difference"] is None]
    if ended:
        axis.text(8, 1700, f"{' and '.join(ended)} diverge", fontsize=9)
    axis.set(yscale="log", ylim=(3, 3000))
    axis.grid(alpha=0.3)


def largest(runs: list[dict], name: str) -> str:
    """The largest of the runs' differences from the first start, or how many of the runs diverged."""
    differences = [run["difference"] for run in runs]
    if None in differences:
        return "diverges" if len(runs) == 1 else f"{differences.count(None)} of {len(runs)} diverge"
    value = max(difference[name] for difference in differences)
    return f"{value:.2f}" if value >= 0.01 else f"{value:.0e}" if value else "0"


def gauge_table(record: dict) -> str:
    rows = []
    for kind, methods in GAUGE_METHODS.items():
        for method in methods:
            runs = gauge_runs(record, kind, method)
            scaled, general = [runs[start] for start in runs if start not in ("c = 1", "T")], [runs["T"]]
            cells = [largest(starts, name) for starts in (scaled, general) for name in ("largest", "last")]
            rows.append([kind, method, *cells])
    head = ["optimizer", "method", "scales: at any step", "scales: at the end", "T: at any step", "T: at the end"]
    return table(head, rows)


PARTS = {  # by record: the plot and the tables
    "matrix_factorization": (draw_factorization, (factorization_table, best_table)),
    "linear_regression": (draw_regression, (regression_table,)),
    "gauge": (draw_gauge, (gauge_table,)),
}


def write() -> None:
    """Draws the plots beside the records and prints the tables, which README.md of this folder shows."""
    for name, (draw, tables) in PARTS.items():
        record = load(name)
        draw(record)
        for make_table in tables:
            print(make_table(record), end="\n\n")
