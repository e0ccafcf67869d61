"""Compares the run records of one recipe in a table and, with --plot, in a plot.

    python benchmarks/compare.py runs/smollm2-135m-*/run_record.json [--plot comparison.png]

Prints a Markdown table. Where a method has several records, from several seeds, it has means and standard deviations.
"""

import argparse
import itertools
import json
import statistics
from collections import defaultdict
from pathlib import Path

from matplotlib.figure import Figure

from hf_reflora.report.record import RunRecord


# Runs are comparable if these are equal. Whatever else differs belongs to the method.
SAME = ("model", "dataset", "train_rows", "processes")


def name(record: RunRecord) -> str:
    return record.method + (" from the SB start" if record.init == "lora_sb" else "")


def load(paths: list[Path]) -> dict[str, list[RunRecord]]:
    """The records of each method, by seed.

    Raises:
        SystemExit: if they are not of the same recipe.
    """
    records = [RunRecord.load(path) for path in paths]
    for key in SAME:
        values = {json.dumps(getattr(record, key)) for record in records}
        if len(values) > 1:
            raise SystemExit(f"These runs cannot be compared: {key} is {' and '.join(sorted(values))}.")
    methods = defaultdict(list)
    for record in sorted(records, key=lambda r: (name(r), r.seed)):
        methods[name(record)].append(record)
    return methods


def mean_and_spread(values: list[float]) -> str:
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{spread}"


def final_loss(record: RunRecord) -> float:
    """The mean training loss over the last tenth of the logged steps."""
    losses = [loss for _, loss in record.losses]
    return statistics.mean(losses[-max(1, len(losses) // 10) :])


def table(methods: dict[str, list[RunRecord]]) -> str:
    first = next(iter(methods.values()))[0]
    scores = list(first.after)
    head = ["", "trained", "seeds", *(score.replace("_", " ") for score in scores), "final training loss"]
    rows = [head, ["---"] * len(head)]
    rows.append(["before", "", "", *(f"{first.before[score]:.3f}" for score in scores), ""])
    for method, records in methods.items():
        means = [mean_and_spread([record.after[score] for record in records]) for score in scores]
        seeds = ", ".join(str(record.seed) for record in records)
        trained = f"{records[0].trainable_parameters:,}".replace(",", " ")
        rows.append([method, trained, seeds, *means, mean_and_spread([final_loss(r) for r in records])])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def plot(methods: dict[str, list[RunRecord]], path: Path) -> None:
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    loss, gap = figure.subplots(1, 2)
    colors = itertools.cycle(("tab:gray", "tab:green", "tab:olive", "tab:blue", "tab:cyan", "tab:orange"))
    for color, (method, records) in zip(colors, methods.items(), strict=False):
        for i, record in enumerate(records):
            label = method if i == 0 else None
            for axes, key in ((loss, "loss"), (gap, "reflora/balance_gap")):
                points = [(entry["step"], float(entry[key])) for entry in record.log if key in entry]
                if points:
                    axes.plot(*zip(*points, strict=True), color=color, label=label, alpha=0.8, linewidth=1)
    loss.set(xlabel="optimizer step", ylabel="training loss", yscale="log", title="Training loss")
    gap.set(xlabel="optimizer step", yscale="log", title="Balance gap ‖AAᵀ - BᵀB‖ / ‖BᵀB‖, mean over pairs")
    for axes in (loss, gap):
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("records", type=Path, nargs="+", help="run_record.json of each run")
    parser.add_argument("--plot", type=Path, help="write the loss curves to this PNG")
    arguments = parser.parse_args()
    methods = load(arguments.records)
    print(table(methods))
    if arguments.plot:
        plot(methods, arguments.plot)
