"""`hf-reflora sweep`: which setting of which method is best."""

import argparse
import sys
from typing import Any

from ..recipes.launch import split
from .plan import Sweep, read_grid, read_sweep, read_value


EPILOG = """\
examples:
  hf-reflora sweep sft --config smollm2-135m/lora --eval_strategy epoch \\
      --grid method=lora,reflora learning_rate=1e-3,2e-3,4e-3 seed=0,1,2
  hf-reflora sweep my_sweep.yaml --budget 2h

All other options are the recipe's, or those of accelerate launch. The same command goes on where it stopped.
"""


def make_parser(prog: str | None = None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Run a recipe for every combination of some options and compare the methods at their best.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,  # an option of the recipe could look like the beginning of one of these
    )
    parser.add_argument("what", help="sft, dpo, classify, a script that takes their options, or a sweep's YAML file")
    parser.add_argument("--config", help="the recipe's YAML file, or the name of a shipped one")
    parser.add_argument(
        "--grid",
        nargs="+",
        default=[],
        metavar="NAME=VALUE,VALUE",
        help="options and the values to try; NAME=LOW..HIGH is searched by optuna's TPE. The values of method are the "
        "rows of the table, and the means are over the values of seed",
    )
    parser.add_argument("--trials", type=int, help="runs that search the ranges, for each combination of the rest")
    parser.add_argument(
        "--fresh_seeds",
        type=int,
        nargs="+",
        help="run the best setting of each method again with these seeds, and compare by them alone",
    )
    parser.add_argument("--metric", help="loss, or a score of the recipe (default: loss)")
    parser.add_argument("--output_dir", help="folder of the runs and their outcomes (default: runs/sweep)")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time (default: 1)")
    parser.add_argument("--budget", type=read_duration, help="such as 2h or 1h30m; no run starts that would end later")
    return parser


def main(arguments: list[str] | None = None, prog: str | None = None) -> None:
    """Runs the sweep that the command line describes, then prints its table and draws its plots.

    Raises:
        ValueError: before any run, for a sweep or an option of the recipe that is wrong.
    """
    own, sweep, launcher = parse(arguments, prog)
    from .checks import check_runs
    from .runner import Runner

    check_runs(sweep)
    runner = Runner(sweep, jobs=own.jobs, budget=own.budget, launcher=launcher)
    try:
        runner.run()
    except KeyboardInterrupt:
        show(sweep, runner)
        sys.exit("Interrupted. The same command goes on with the runs that are left.")
    show(sweep, runner)


def parse(arguments: list[str] | None, prog: str | None = None) -> tuple[argparse.Namespace, Sweep, list[str]]:
    """The command's own options, the sweep, and the options of `accelerate launch`."""
    own, rest = make_parser(prog).parse_known_args(arguments)
    from accelerate.commands.launch import launch_command_parser

    launcher, options = split(rest, launch_command_parser())
    names = ("config", "trials", "fresh_seeds", "metric", "output_dir")
    given = {name: getattr(own, name) for name in names if getattr(own, name) is not None}
    given |= {"options": read_options(options), "grid": read_grid(own.grid)}
    is_file = own.what.endswith((".yaml", ".yml"))
    return own, read_sweep(own.what, **given) if is_file else Sweep(own.what, **given), launcher


def show(sweep: Sweep, runner: Any) -> None:
    """Prints the table, the warnings and the command of the best run, and writes the table and the plots."""
    from .curves import draw
    from .summary import best_command, best_settings, table, warnings

    outcomes = runner.outcomes_of_sweep()
    bests = best_settings(sweep, outcomes)
    if not bests:
        print(f"No setting has finished yet. The outcomes are in {runner.folder}.")
        return
    text = table(sweep, outcomes)
    (runner.folder / "table.md").write_text(text, encoding="utf-8", newline="\n")
    print(f"\n{text}")
    for warning in warnings(sweep, outcomes):
        print(warning)
    if runner.out_of_time:
        print("The budget is spent before all runs were made. The same command goes on with those that are left.")
    print(f"Written: {', '.join(map(str, [runner.folder / 'table.md', *draw(sweep, outcomes, runner.folder)]))}")
    print(f"The best run again:\n  {best_command(sweep, bests[0])}")


def read_options(arguments: list[str]) -> dict[str, Any]:
    """The recipe's options of a command line: one value, a list of several, or True where there is none."""
    options: dict[str, list[str]] = {}
    for argument in arguments:
        if argument.startswith("--"):
            name, equals, value = argument[2:].partition("=")
            values = options.setdefault(name.replace("-", "_"), [])
            values += [value] if equals else []
        elif options:
            values.append(argument)
        else:
            raise ValueError(f"Expected an option, found {argument!r}.")
    values_of = {name: [read_value(text) for text in texts] for name, texts in options.items()}
    return {name: values if len(values) > 1 else (values or [True])[0] for name, values in values_of.items()}


def read_duration(text: str) -> float:
    """Seconds in a text such as "2h", "1h30m" or "45s"."""
    import pandas

    try:
        return pandas.Timedelta(text).total_seconds()
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no duration such as 2h, 1h30m or 45s") from None


if __name__ == "__main__":
    main()
