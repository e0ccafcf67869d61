"""Three ways to answer with a base model and its adapter from one model in memory: seconds, and what they get wrong.

    python benchmarks/side_by_side.py runs/smollm2-135m-reflora

In turn: the Space's engine, a token of each side at a time. Mixed batch: one batch of two, PEFT's `adapter_names`. One
after the other: `generate` with the adapter disabled, then with it. Prints Markdown, writes records/side_by_side.json.
"""

import statistics
import sys
import time
from pathlib import Path

import torch
from transformers.utils import logging


ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT / "spaces" / "before_after"), str(ROOT / "recipes")]

import embedded_model  # noqa: E402
from engine import Engine, Settings  # noqa: E402

from hf_reflora.environment import environment, usable_cores, write_json  # noqa: E402


RECORD = Path(__file__).parent / "records" / "side_by_side.json"
PROMPT, TOKENS, REPEATS = "Write a long poem about a mirror.", 64, 5


def ways(engine: Engine) -> dict:
    ids = torch.tensor([engine._prompt(PROMPT, "")], device=engine.device)
    [name] = engine._names.values()
    model, settings = engine.model, {"do_sample": False, "pad_token_id": 0}
    settings |= {"min_new_tokens": TOKENS, "max_new_tokens": TOKENS}
    engine._ends = set()

    def in_turn():
        [*_, _] = engine.compare(PROMPT, next(iter(engine._names)), Settings(max_new_tokens=TOKENS))

    def mixed_batch():
        model.generate(input_ids=ids.repeat(2, 1), adapter_names=["__base__", name], **settings)

    def one_after_the_other():
        with model.disable_adapter():
            model.generate(input_ids=ids, **settings)
        model.generate(input_ids=ids, **settings)

    return {"in turn": in_turn, "mixed batch": mixed_batch, "one after the other": one_after_the_other}


def differences(engine: Engine) -> dict[str, float]:
    """Largest difference of the base side's logits from those of the base model alone."""
    ids = torch.tensor([engine._prompt(PROMPT, "")], device=engine.device)
    [name] = engine._names.values()
    with torch.inference_mode():
        pristine = engine.model.get_base_model()
        with engine.model.disable_adapter():
            alone = pristine(input_ids=ids).logits[0]
            in_turn = engine.model(input_ids=ids).logits[0]
        mixed = engine.model(input_ids=ids.repeat(2, 1), adapter_names=["__base__", name]).logits[0]
    return {"in turn": (in_turn - alone).abs().max().item(), "mixed batch": (mixed - alone).abs().max().item()}


def table(record: dict) -> str:
    seconds = {name: statistics.median(found) for name, found in record["seconds"].items()}
    lines = ["| way | seconds | ratio | base side's logits off by |", "| --- | ---: | ---: | ---: |"]
    for name, value in seconds.items():
        off = record["differences"].get(name, 0.0)
        lines.append(f"| {name} | {value:.2f} | {value / seconds['in turn']:.2f} | {off:.0e} |")
    return "\n".join(lines)


def main(adapter: str) -> None:
    logging.set_verbosity_error()
    torch.set_num_threads(usable_cores())
    engine = Engine(embedded_model.resolve(embedded_model.NAME), {"adapter": adapter})
    record = {"tokens": TOKENS, "differences": differences(engine), "seconds": {}}
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


if __name__ == "__main__":
    main(sys.argv[1])
