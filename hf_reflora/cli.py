"""The command `hf-reflora`."""

import argparse
import json
from pathlib import Path

from safetensors import SafetensorError


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="hf-reflora", description="Adapters trained with RefLoRA and LoRA-SB.")
    commands = parser.add_subparsers(required=True, metavar="command")
    for add in (add_card, add_export, add_inspect):
        add(commands)
    options = parser.parse_args(arguments)
    try:
        options.run(options)
    except (ValueError, OSError, SafetensorError) as error:
        parser.exit(1, f"hf-reflora: {error}\n")


def add_card(commands) -> None:
    parser = commands.add_parser(
        "card",
        help="render the model card of a run",
        description="Render the model card of a run: everything its run_record.json knows, nothing else.",
        epilog="example: hf-reflora card runs/smollm2-135m-reflora/run_record.json",
    )
    parser.add_argument("record", type=Path, help="run_record.json of the run")
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="file to write (default: README.md beside the record)"
    )
    parser.add_argument("--repo-id", metavar="ID", help="the adapter's id on the Hub, for the snippets")
    parser.add_argument("--plot", metavar="PNG", help="beside the card (default: training.png, if it is there)")
    parser.add_argument("--license", metavar="ID", help="Hub license id, such as apache-2.0")
    parser.add_argument("--language", nargs="+", metavar="CODE", help="language codes, such as en")
    parser.add_argument("--tags", nargs="+", metavar="TAG", default=(), help="further tags")
    parser.add_argument("--exported", action="store_true", help="the files are the exported LoRA of a LoRA-SB adapter")
    parser.set_defaults(run=card)


def card(options: argparse.Namespace) -> None:
    from .card import render

    record = json.loads(options.record.read_text(encoding="utf-8"))
    output = options.output or options.record.with_name("README.md")
    plot = options.plot or ("training.png" if output.with_name("training.png").exists() else None)
    names = ("repo_id", "exported", "license", "language", "tags")
    text = render(record, plot=plot, **{name: getattr(options, name) for name in names})
    output.write_text(text, encoding="utf-8")
    print(output)


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
    from .export import export_lora

    report = export_lora(options.adapter, options.output_dir, rank=options.rank)
    ranks = sorted(set(report.ranks.values()))
    print(f"{options.output_dir}: LoRA of rank {', '.join(map(str, ranks))} in {len(report.ranks)} layers.")
    if options.rank is None:
        print("Exact: the same function as the LoRA-SB adapter.")
    else:
        worst = max(report.relative_error_by_layer, key=report.relative_error_by_layer.get)
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
    from .inspect import inspect_adapter

    facts = inspect_adapter(options.adapter)
    width = max(map(len, facts))
    for name, value in facts.items():
        print(f"{name:{width}}  {value}")


if __name__ == "__main__":
    main()
