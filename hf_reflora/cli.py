"""The command `hf-reflora`."""

import argparse

from safetensors import SafetensorError

from .export import export_lora


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="hf-reflora", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    export = commands.add_parser(
        "export",
        help="write a LoRA-SB adapter as an ordinary LoRA adapter",
        description="Write a LoRA-SB adapter as an ordinary LoRA adapter that stock PEFT, vLLM and llama.cpp load.",
    )
    export.add_argument("adapter", help="folder of a saved adapter, or its id on the Hub")
    export.add_argument("output_dir", help="folder to write; it must not exist or be empty")
    export.add_argument("--rank", type=int, help="keep only this rank of each layer (default: all, exactly)")
    options = parser.parse_args(arguments)
    try:
        report = export_lora(options.adapter, options.output_dir, rank=options.rank)
    except (ValueError, OSError, SafetensorError) as error:
        parser.exit(1, f"hf-reflora: {error}\n")
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


if __name__ == "__main__":
    main()
