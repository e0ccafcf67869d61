"""Three ways to answer with a base model and its adapter from one model in memory: seconds, and what they get wrong.

    python benchmarks/side_by_side.py [ADAPTER]

In turn and mixed batch: the two ways of the Space's engine. One after the other: `generate` with the adapter disabled,
then with it. Runs on the GPU, if there is one. Prints Markdown, writes records/side_by_side.json.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch
from transformers import DynamicCache
from transformers.utils import logging


ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "spaces" / "before_after"))

from engine import Engine, Settings, _Pass  # noqa: E402

from hf_reflora.recipes import embedded_model  # noqa: E402
from hf_reflora.report.environment import environment, usable_cores, write_json  # noqa: E402


RECORD = Path(__file__).parent / "records" / "side_by_side.json"
PROMPT, TOKENS, REPEATS = "Write a long poem about a mirror.", 64, 5
NAME = "adapter"
IN_ENGINE = {"in turn": False, "mixed batch": True}


def ways(engine: Engine) -> dict:
    ids = torch.tensor([engine.prompt(PROMPT, NAME)], device=engine.model.device)
    settings = {"do_sample": False, "pad_token_id": 0, "min_new_tokens": TOKENS, "max_new_tokens": TOKENS}
    engine._ends = set()

    def in_engine(mixed: bool):
        engine._mixed[NAME] = mixed
        [*_, _] = engine.compare(PROMPT, NAME, Settings(max_new_tokens=TOKENS))

    def one_after_the_other():
        with engine.model.disable_adapter():
            engine.model.generate(input_ids=ids, **settings)
        engine.model.generate(input_ids=ids, **settings)

    found = {name: lambda mixed=mixed: in_engine(mixed) for name, mixed in IN_ENGINE.items()}
    return {**found, "one after the other": one_after_the_other}


@torch.inference_mode()
def differences(engine: Engine) -> dict[str, dict[str, float]]:
    """How far the base side's logits are at most from the base model's: alone, and in a batch as large."""
    pristine, found = engine.model.get_base_model(), {}
    for name, mixed in IN_ENGINE.items():
        ours = _Pass(engine, [False, True] if mixed else [False])
        alone, same = DynamicCache(config=pristine.config), DynamicCache(config=pristine.config)
        tokens, off = engine.prompt(PROMPT, NAME), {"alone": 0.0, "in a batch as large": 0.0}
        for _ in range(TOKENS):
            row = ours.logits([tokens] * len(ours.sides))[0]
            with engine.model.disable_adapter():
                for what, cache, rows in [("alone", alone, 1), ("in a batch as large", same, len(ours.sides))]:
                    ids = torch.tensor([tokens] * rows, device=pristine.device)
                    logits = pristine(input_ids=ids, past_key_values=cache, logits_to_keep=1).logits[0, -1]
                    off[what] = max(off[what], (row - logits.float().cpu()).abs().max().item())
            tokens = [int(row.argmax())]
        found[name] = off
    return found


def table(record: dict) -> str:
    seconds = {name: statistics.median(found) for name, found in record["seconds"].items()}
    lines = ["| way | seconds | ratio | base's logits off by | in a batch as large |"]
    lines.append("| --- | ---: | ---: | ---: | ---: |")
    for name, value in seconds.items():
        off = [f"{value:.0e}" for value in record["differences"].get(name, {}).values()] or ["", ""]
        lines.append(f"| {name} | {value:.2f} | {value / seconds['in turn']:.2f} | {off[0]} | {off[1]} |")
    return "\n".join(lines)


def main(adapter: str) -> None:
    logging.set_verbosity_error()
    torch.set_num_threads(usable_cores())
    engine = Engine(embedded_model.resolve(embedded_model.NAME), {NAME: adapter})
    [*_, _] = engine.compare(PROMPT, NAME, Settings(max_new_tokens=1))
    record = {"tokens": TOKENS, "chosen": "mixed batch" if engine._mixed[NAME] else "in turn"}
    record |= {"differences": differences(engine), "seconds": {}}
    with torch.inference_mode():
        for repeat in range(REPEATS + 1):  # the first one warms up
            for name, way in ways(engine).items():
                begin = time.perf_counter()
                way()
                if repeat:
                    record["seconds"].setdefault(name, []).append(round(time.perf_counter() - begin, 3))
    record["environment"] = environment(Path(__file__).parent)
    write_json(RECORD, record)
    print(table(record))
    print(f"\nThe engine chose: {record['chosen']}.")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapter", nargs="?", default="runs/smollm2-135m-reflora", help="default: the demo's")
    main(parser.parse_args().adapter)
