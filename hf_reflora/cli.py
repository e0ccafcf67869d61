"""The command `hf-reflora`.

`--help` must answer at once, so nothing large (torch, transformers, trl ...) is imported before a command runs.
"""

import argparse
import os
import sys
from pathlib import Path

from . import __version__
from .terminal import replace_unencodable_letters


RECIPES = {
    "sft": "supervised fine-tuning",
    "dpo": "direct preference optimization",
    "classify": "sequence classification",
}


def main(arguments: list[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = make_parser()
    replace_unencodable_letters()
    try:
        # A recipe has its own parser, with some 200 options, and the launcher's options stand among them. argparse
        # cannot leave them to it: even REMAINDER does not take options that come first.
        if arguments and arguments[0] in RECIPES:
            from .recipes.launch import launch

            launch(arguments[0], arguments[1:])
        elif arguments and arguments[0] == "sweep":
            from .sweep.command import main as sweep

            sweep(arguments[1:], prog="hf-reflora sweep")
        else:
            options = parser.parse_args(arguments)
            options.run(options)
    except Exception as error:
        from safetensors import SafetensorError

        if not isinstance(error, ImportError | OSError | RuntimeError | SafetensorError | ValueError):
            raise
        parser.exit(1, f"hf-reflora: {error}\n")


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hf-reflora", description="Trains, describes and publishes adapters with RefLoRA and LoRA-SB."
    )
    parser.add_argument("--version", action="version", version=f"hf-reflora {__version__}")
    commands = parser.add_subparsers(required=True, metavar="command")
    for name, what in RECIPES.items():
        commands.add_parser(name, help=f"train by {what}")
    commands.add_parser("sweep", help="run a recipe for every combination of some options and compare")
    for add in (add_card, add_eval, add_export, add_inspect, add_push, add_space):
        add(commands)
    return parser


def add_card(commands) -> None:
    parser = commands.add_parser(
        "card",
        help="render the model card of a run",
        description="Render the model card of a run from what its run_record.json knows, or else the adapter's files.",
        epilog="example: hf-reflora card runs/smollm2-135m-reflora/run_record.json",
    )
    parser.add_argument("record", type=Path, help="run_record.json of the run, or the adapter's folder")
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="file to write (default: README.md beside the record)"
    )
    parser.add_argument("--repo-id", metavar="ID", help="the adapter's id on the Hub, for the snippets")
    parser.add_argument("--plot", metavar="PNG", default="training.png", help="beside the card; drawn if not there")
    parser.add_argument("--license", metavar="ID", help="Hub license id, such as apache-2.0")
    parser.add_argument("--language", nargs="+", metavar="CODE", help="such as en")
    parser.add_argument("--tags", nargs="+", metavar="TAG", default=(), help="further tags")
    parser.add_argument("--base-model", metavar="ID", help="its id on the Hub, if the record names a local copy")
    parser.add_argument("--exported", action="store_true", help="the files are the exported LoRA of a LoRA-SB adapter")
    parser.set_defaults(run=card)


def card(options: argparse.Namespace) -> None:
    from .hub.staging import read_record
    from .report.card import render
    from .report.edits import headings, is_edited, is_kept, lost_lines
    from .report.front_matter import OwnEntries, own_entries
    from .report.licenses import check_license
    from .report.plot import plot as draw
    from .report.record import RunRecord
    from .report.snippet import read_own_tokenizer

    check_license(options.license)
    path = options.record
    if path.name == "adapter_config.json":
        path = path.parent
    record = read_record(path) if path.is_dir() else RunRecord.load(path)
    if options.base_model:
        record.replace(base_model=options.base_model)
    output = options.output or (path / "README.md" if path.is_dir() else path.with_name("README.md"))
    present = output.read_text(encoding="utf-8") if output.is_file() else ""
    if is_kept(present, has_record=record.is_of_run):
        lines = lost_lines(present, "") or [present.strip().splitlines()[0]]
        whose = "somebody has written" if is_edited(present) else "a Trainer has written and no run record has"
        raise ValueError(
            f"{output} has text that {whose}, under {headings(lines, present)}, and is not replaced. Name another "
            "file with --output, or remove it."
        )
    picture = output.with_name(options.plot)
    plot = options.plot if picture.exists() or draw(record, picture) else None
    entries = OwnEntries(options.license, options.language, list(options.tags)).over(own_entries(present))
    text = render(
        record,
        plot=plot,
        repo_id=options.repo_id,
        exported=options.exported,
        tokenizer=read_own_tokenizer(path if path.is_dir() else path.parent),
        **vars(entries),
    )
    output.write_text(text, encoding="utf-8", newline="\n")
    print(output)


def add_eval(commands) -> None:
    parser = commands.add_parser(
        "eval",
        help="evaluate an adapter and its base model on lm-eval's benchmarks",
        description="Evaluate an adapter, and its base model without it, on benchmarks of lm-eval. The results are "
        "added to the run_record.json in the adapter's folder, if it has one.",
        epilog="example: hf-reflora eval runs/smollm2-135m-reflora --tasks gsm8k,arc_easy --limit 200",
    )
    parser.add_argument("adapter", help="folder of a saved adapter, or its id on the Hub")
    parser.add_argument("--tasks", nargs="+", required=True, metavar="TASK", help="as `lm-eval ls tasks` lists them")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N rows of each task")
    parser.add_argument("--num_fewshot", type=int, metavar="N", help="examples in the prompt (default: the task's)")
    parser.add_argument("--batch_size", type=int, default=8, metavar="N", help="texts computed at a time (default: 8)")
    parser.add_argument("--seed", type=int, default=0, help="draws the examples in the prompt (default: 0)")
    parser.add_argument("--include_path", metavar="FOLDER", help="with tasks of your own as lm-eval's YAML files")
    parser.add_argument("--base-model", metavar="ID", help="id or folder (default: the one in adapter_config.json)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="JSON file to write the results to")
    parser.set_defaults(run=eval)


def eval(options: argparse.Namespace) -> None:
    from .recipes.benchmarks import Benchmarks, evaluate_adapter
    from .recipes.summary import show_benchmarks
    from .report.environment import write_json

    names = ("limit", "num_fewshot", "batch_size", "seed", "include_path")
    benchmarks = Benchmarks(options.tasks, **{name: getattr(options, name) for name in names})
    done = evaluate_adapter(options.adapter, benchmarks, base_model=options.base_model)
    show_benchmarks(done.entries)
    if options.output:
        facts = {"adapter": options.adapter, "base_model": done.base_model}
        write_json(options.output, {**facts, "benchmarks": done.entries})
        print(options.output)
    if done.record is not None:
        print(f"Added to {done.record}. Render the card again with: hf-reflora card {options.adapter}")


def add_export(commands) -> None:
    parser = commands.add_parser(
        "export",
        help="write a LoRA-SB adapter as an ordinary LoRA adapter",
        description="Write a LoRA-SB adapter as an ordinary LoRA adapter that stock PEFT, vLLM and llama.cpp load.",
        epilog="example: hf-reflora export runs/smollm2-135m-lora_sb exported --rank 8",
    )
    parser.add_argument("adapter", help="folder of a saved adapter, or its id on the Hub")
    parser.add_argument("output_dir", help="folder to write; it must not exist or be empty")
    parser.add_argument("--rank", type=int, help="keep only this rank of each layer (default: all, exactly)")
    parser.set_defaults(run=export)


def export(options: argparse.Namespace) -> None:
    from .lora_sb.export import export_lora

    report = export_lora(options.adapter, options.output_dir, rank=options.rank)
    ranks = sorted(set(report.ranks.values()))
    print(f"{options.output_dir}: LoRA of rank {', '.join(map(str, ranks))} in {len(report.ranks)} layers.")
    if options.rank is None:
        print("Exact: the same function as the LoRA-SB adapter.")
    else:
        worst = max(report.relative_error_by_layer, key=lambda name: report.relative_error_by_layer[name])
        print(
            f"Relative error of the update by truncation: {report.relative_error:.2e} in all, "
            f"{report.relative_error_by_layer[worst]:.2e} in the worst layer, {worst}."
        )


def add_inspect(commands) -> None:
    parser = commands.add_parser(
        "inspect",
        help="show what an adapter is",
        description="Show an adapter's method, rank, base model and diagnostics, from its files alone.",
        epilog="example: hf-reflora inspect runs/smollm2-135m-reflora",
    )
    parser.add_argument("adapter", help="folder of a saved adapter, or its id on the Hub")
    parser.set_defaults(run=inspect)


def inspect(options: argparse.Namespace) -> None:
    from .report.inspection import inspect_adapter

    facts = inspect_adapter(options.adapter)
    width = max(map(len, facts))
    for name, value in facts.items():
        print(f"{name:{width}}  {value}")


def add_push(commands) -> None:
    parser = commands.add_parser(
        "push",
        help="push an adapter to the Hub, with its card",
        description="Push an adapter to the Hub in one commit, with the card of its run.",
        epilog="example: hf-reflora push runs/smollm2-135m-reflora me/tool-calls --private",
        usage="%(prog)s [options] folder repo_id",
    )
    parser.add_argument("folder", type=Path, help="the adapter: an output_dir or a checkpoint")
    parser.add_argument("repo_id", help="repository on the Hub, made if there is none")
    parser.add_argument("--private", action="store_true", default=None, help="make a new repository private")
    parser.add_argument("--revision", metavar="BRANCH", help="branch to push to, made if there is none")
    parser.add_argument("--create-pr", action="store_true", help="propose a pull request")
    parser.add_argument("--base-model", metavar="ID", help="its id on the Hub, if trained from a local copy")
    parser.add_argument("--other-base", action="store_true", help="replace an adapter of another base model")
    parser.add_argument("--license", metavar="ID", help="default: the card's, or the base model's")
    parser.add_argument("--language", nargs="+", metavar="CODE", help="such as en")
    parser.add_argument("--tags", nargs="+", metavar="TAG", default=(), help="further tags")
    parser.add_argument("--replace-card", action="store_true", help="replace a card that was edited on the Hub")
    parser.set_defaults(run=push)


def push(options: argparse.Namespace) -> None:
    from .hub.adapter import push_adapter

    names = ["private", "revision", "create_pr", "base_model", "other_base", "license", "language", "tags"]
    names.append("replace_card")
    done = push_adapter(options.folder, options.repo_id, **{name: getattr(options, name) for name in names})
    print(f"{done.commit.pr_url or done.commit.commit_url}")
    print(f"{done.repo_id}: {', '.join(done.files)}")
    if done.left_out:
        print(f"Left out: {', '.join(done.left_out)}")
    if done.kept_card:
        print("README.md on the Hub was edited by hand and is kept; --replace-card puts the folder's in its place.")
    for note in done.notes:
        print(note)


def add_space(commands) -> None:
    parser = commands.add_parser(
        "space",
        help="make a Space that shows an adapter beside its base model",
        description="Create or update a Gradio Space that shows the answers of a base model and of its adapters.",
        epilog="example: hf-reflora space me/demo --base org/model --adapter me/tool-calls",
    )
    parser.add_argument("repo_id", help="name of the Space, made if there is none")
    parser.add_argument("--base", required=True, metavar="ID", help="base model on the Hub")
    parser.add_argument("--adapter", required=True, nargs="+", metavar="ID", help="LoRA adapters of it on the Hub")
    parser.add_argument("--private", action="store_true", default=None, help="make a new Space private")
    parser.add_argument("--hardware", help="such as cpu-basic or zero-a10g (default: as it is)")
    parser.add_argument("--license", metavar="ID", default="apache-2.0", help="of the Space (default: apache-2.0)")
    parser.add_argument(
        "--secret", nargs="+", metavar="NAME", default=(), help="NAME or NAME=VARIABLE, from the environment"
    )
    parser.set_defaults(run=space)


def space(options: argparse.Namespace) -> None:
    from .hub.space import deploy_space

    secrets = {}
    for given in options.secret:
        name, _, variable = given.partition("=")
        if (variable or name) not in os.environ:
            raise ValueError(f"--secret {given}: there is no environment variable {variable or name}.")
        secrets[name] = os.environ[variable or name]
    names = ("base", "private", "hardware", "license")
    done = deploy_space(
        options.repo_id,
        adapters=options.adapter,
        secrets=secrets,
        **{name: getattr(options, name) for name in names},
    )
    print(done.url)
    for warning in done.warnings:
        print(warning)


if __name__ == "__main__":
    main()
