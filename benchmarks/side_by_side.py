"""Three ways to answer with a base model and its adapter from one model in memory: their times and their errors.

    python benchmarks/side_by_side.py [ADAPTER]

"In turn" and "mixed batch" are the two ways of the Space's engine. "One after the other" calls `generate` with the
adapter disabled and then with it enabled. Runs on the GPU if there is one. Prints a Markdown table and writes
records/side_by_side.json.
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

from decoding import Batch, Settings  # noqa: E402
from engine import Engine  # noqa: E402
from shared_model import Side  # noqa: E402

from hf_reflora.recipes import embedded_model  # noqa: E402
from hf_reflora.report.environment import environment, usable_cores, write_json  # noqa: E402


RECORD = Path(__file__).parent / "records" / "side_by_side.json"
PROMPT, TOKENS, REPEATS = "Write a long poem about a mirror.", 64, 5
NAME = "adapter"
SIDES_OF_BASES_BATCH = {"in turn": [Side.BASE], "mixed batch": [Side.BASE, Side.ADAPTER]}


def ways(engine: Engine) -> dict:
    """By the way's name: a function that makes both answers."""
    ids = torch.tensor([engine.encode_prompt(PROMPT, NAME)], device=engine.shared.model.device)
    settings = {"do_sample": False, "pad_token_id": 0, "min_new_tokens": TOKENS, "max_new_tokens": TOKENS}
    engine._chats[NAME].end_tokens = set()  # all answers have the full length

    def in_engine(way: str):
        engine._uses_mixed_batch[NAME] = way == "mixed batch"
        [*_, _] = engine.compare(PROMPT, NAME, Settings(max_new_tokens=TOKENS))

    def one_after_the_other():
        with engine.shared.model.disable_adapter():
            engine.shared.model.generate(input_ids=ids, **settings)
        engine.shared.model.generate(input_ids=ids, **settings)

    in_engine_ways = {way: lambda way=way: in_engine(way) for way in SIDES_OF_BASES_BATCH}
    return {**in_engine_ways, "one after the other": one_after_the_other}


@torch.inference_mode()
def differences(engine: Engine) -> dict[str, dict[str, float]]:
    """The largest difference between the base side's logits and the base model's: alone, and in a batch as large."""
    base_model, by_way = engine.shared.model.get_base_model(), {}
    for way, sides in SIDES_OF_BASES_BATCH.items():
        batch = Batch(engine.shared, sides)
        references = {"alone": 1, "in a batch as large": len(sides)}
        caches = {what: DynamicCache(config=base_model.config) for what in references}
        tokens, largest = engine.encode_prompt(PROMPT, NAME), dict.fromkeys(references, 0.0)
        for _ in range(TOKENS):
            row = batch.logits([tokens] * len(sides))[0]
            with engine.shared.model.disable_adapter():
                for what, rows in references.items():
                    ids = torch.tensor([tokens] * rows, device=base_model.device)
                    output = base_model(input_ids=ids, past_key_values=caches[what], logits_to_keep=1)
                    # Without the rows of tokens that were added for the adapter, which the base model has not.
                    logits = output.logits[0, -1, : len(row)].float().cpu()
                    difference = (row - logits).abs().max().item()
                    largest[what] = max(largest[what], difference)
            tokens = [int(row.argmax())]
        by_way[way] = largest
    return by_way


def table(record: dict) -> str:
    seconds = {way: statistics.median(times) for way, times in record["seconds"].items()}
    lines = ["| way | seconds | ratio | base's logits off by | in a batch as large |"]
    lines.append("| --- | ---: | ---: | ---: | ---: |")
    for way, median in seconds.items():
        differences = [f"{value:.0e}" for value in record["differences"].get(way, {}).values()] or ["", ""]
        lines.append(f"| {way} | {median:.2f} | {median / seconds['in turn']:.2f} | {' | '.join(differences)} |")
    return "\n".join(lines)


def main(adapter: str) -> None:
    logging.set_verbosity_error()
    torch.set_num_threads(usable_cores())
    engine = Engine(embedded_model.resolve(embedded_model.NAME), {NAME: adapter})
    [*_, _] = engine.compare(PROMPT, NAME, Settings(max_new_tokens=1))
    record = {"tokens": TOKENS, "chosen": "mixed batch" if engine._uses_mixed_batch[NAME] else "in turn"}
    record |= {"differences": differences(engine), "seconds": {}}
    with torch.inference_mode():
        for repeat in range(REPEATS + 1):  # the first one warms up
            for way, answer in ways(engine).items():
                begin = time.perf_counter()
                answer()
                if repeat:
                    record["seconds"].setdefault(way, []).append(round(time.perf_counter() - begin, 3))
    record["environment"] = environment(Path(__file__).parent)
    write_json(RECORD, record)
    print(table(record))
    print(f"\nThe engine chose: {record['chosen']}.")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "adapter", nargs="?", default="runs/smollm2-135m-reflora", help="folder of a LoRA adapter. Default: the demo's"
    )
    main(parser.parse_args().adapter)
