"""What a run shows at its end: a table of the scores before and after, and examples side by side."""

import textwrap
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..report.benchmarks import benchmark_rows, benchmark_versions
from ..report.record import RunRecord


def show(record: RunRecord, console: Console | None = None) -> None:
    """Prints the scores before and after training, the examples and the benchmarks, where the run has them."""
    console = console or Console()
    if record.before:
        _show_scores(record, console)
    if record.benchmarks:
        show_benchmarks(record.benchmarks, console)


def show_benchmarks(entries: list[dict[str, Any]], console: Console | None = None) -> None:
    """Prints entries of `RunRecord.benchmarks` as a table."""
    table = Table(title=f"Benchmarks by lm-eval {benchmark_versions(entries)}")
    table.add_column("", overflow="fold")
    for column in ("rows", "before", "after", "change"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in benchmark_rows(entries):
        cells = (f"{row['task']}: {row['metric']}", row["rows"], row["before"], row["after"], row["change"])
        table.add_row(*map(Text, cells))
    (console or Console()).print(table)


def _show_scores(record: RunRecord, console: Console) -> None:
    table = Table(title=f"{record.method}, {record.evaluation_rows} held-out rows")
    for column in ("", "before", "after", "change"):
        table.add_column(column, justify="right" if column else "left")
    for name, before in record.before.items():
        after = record.after[name]
        table.add_row(name, f"{before:.3f}", f"{after:.3f}", f"{after - before:+.3f}")
    console.print(table)
    if not record.examples:
        return
    table = Table(title="The first held-out rows", show_lines=True)
    for column in ("request", "before", "after", "reference"):
        table.add_column(column, ratio=1, overflow="fold")
    for example in record.examples:
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
