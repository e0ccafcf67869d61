"""Whether llama.cpp computes the same with an exported adapter as PEFT: greedy tokens and their log-probabilities.

    python benchmarks/llama_cpp.py [--record FILE]

SmolLM2-135M in float32 with LoRA-SB adapters on all linear layers, whose R are random, exported to ordinary LoRAs. The
adapter's GGUF file is written as llama.cpp's convert_lora_to_gguf.py writes it, which no package on PyPI has. Prints a
Markdown table. Needs the packages xllamacpp and gguf.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import gguf_files
import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from hf_reflora import LoraSbConfig, export_lora
from hf_reflora.recipes import embedded_model
from hf_reflora.report.environment import environment, write_json


PROMPT = [1, 4093, 198, 1780, 506, 260, 6330, 282, 4649, 47]
TOKENS = 16
PATTERN = {"q_proj": 8, "layers.1.mlp.down_proj": 24, "v_proj": 3}  # layers of other ranks than 16
ADAPTERS = {
    "one rank": {},
    "several ranks": {"rank_pattern": PATTERN},
    "several ranks, truncated to 12": {"rank_pattern": PATTERN, "rank": 12},
}
# In a process of its own, because llama.cpp writes to the terminal as it likes.
ANSWER = f"""
import json, sys
import xllamacpp

params = xllamacpp.CommonParams()
params.model.path, params.n_ctx, params.cpuparams.n_threads, params.warmup = sys.argv[1], 128, 1, False
if len(sys.argv) > 2:
    params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(sys.argv[2], 1.0)]
request = {{"prompt": {PROMPT}, "n_predict": {TOKENS}, "temperature": 0, "n_probs": 1, "ignore_eos": True}}
answer = xllamacpp.Server(params).handle_completions(request)
tokens = answer["choices"][0]["logprobs"]["content"]
print("ANSWER", json.dumps([(token["id"], token["logprob"]) for token in tokens]))
"""
Answer = list[tuple[int, float]]  # the tokens, and their log-probabilities


def in_llama_cpp(base: Path, *adapter: Path) -> Answer:
    """The greedy answer to PROMPT of a GGUF model, with an adapter if one is given."""
    command = [sys.executable, "-c", ANSWER, str(base), *map(str, adapter)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    if "ANSWER" not in done.stdout:
        raise RuntimeError(f"llama.cpp gave no answer: {done.stderr[-3000:]}")
    return [tuple(entry) for entry in json.loads(done.stdout.split("ANSWER ")[1])]


@torch.no_grad()
def in_peft(model: PeftModel) -> Answer:
    """The greedy answer to PROMPT of a model."""
    ids, answer = torch.tensor([PROMPT]), []
    for _ in range(TOKENS):
        scores = model(ids).logits[0, -1].log_softmax(-1)
        scores[[0, 2]] = -torch.inf  # what ends a text, which llama.cpp was told to ignore
        answer.append((int(scores.argmax()), scores.max().item()))
        ids = torch.cat([ids, scores.argmax()[None, None]], dim=1)
    return answer


def write_base(target: Path) -> None:
    """The embedded model as a float32 GGUF file."""
    gguf_files.write_float32(Path(embedded_model._wheel_folder(), embedded_model.GGUF), target)


def load() -> torch.nn.Module:
    """The embedded model in float32, in transformers."""
    return AutoModelForCausalLM.from_pretrained(
        embedded_model.resolve(embedded_model.NAME), dtype=torch.float32
    ).eval()


def export(folder: Path, *, rank: int | None = None, rank_pattern: dict[str, int] | None = None) -> None:
    """Writes into `folder` an exported adapter as `lora` and, for llama.cpp, as `lora.gguf`."""
    torch.manual_seed(1)
    config = LoraSbConfig(
        r=16,
        rank_pattern=rank_pattern or {},
        target_modules="all-linear",
        init_weights="lora_xs",
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(load(), config)
    for name, parameter in model.named_parameters():
        if "lorasb_R" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    export_lora(model, folder / "lora", rank=rank)
    gguf_files.write_adapter(folder / "lora", folder / "lora.gguf", heads=9, kv_heads=3)


def gap(one: Answer, other: Answer) -> float:
    """The largest difference of two answers' log-probabilities, infinite if their tokens differ."""
    if [token for token, _ in one] != [token for token, _ in other]:
        return float("inf")
    return max(abs(a - b) for (_, a), (_, b) in zip(one, other, strict=True))


def measure() -> dict[str, dict[str, float | int]]:
    """The gap between llama.cpp and PEFT for the base model and each of ADAPTERS, and what the adapter changes."""
    rows: dict[str, dict[str, float | int]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        base = Path(temporary) / "base.gguf"
        write_base(base)
        for name, settings in ADAPTERS.items():
            folder = Path(temporary) / name
            folder.mkdir()
            export(folder, **settings)
            model = PeftModel.from_pretrained(load(), folder / "lora").eval()
            adapted = in_peft(model)
            with model.disable_adapter():
                plain = in_peft(model)
            if not rows:
                rows["the base model alone"] = {"gap": gap(in_llama_cpp(base), plain)}
            changed = sum(token != other for (token, _), (other, _) in zip(adapted, plain, strict=True))
            rows[name] = {"gap": gap(in_llama_cpp(base, folder / "lora.gguf"), adapted), "changed": changed}
    return rows


def table(rows: dict[str, dict[str, float | int]]) -> str:
    """A Markdown table of `measure`'s rows."""
    lines = [
        f"| adapter | tokens it changes, of {TOKENS} | same tokens | largest gap of a log-probability |",
        "| --- | ---: | --- | ---: |",
    ]
    for name, row in rows.items():
        same, largest = ("yes", f"{row['gap']:.3f}") if row["gap"] < float("inf") else ("no", "")
        lines.append(f"| {name} | {row.get('changed', '')} | {same} | {largest} |")
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", type=Path, help="write the figures and the environment to this JSON file")
    options = parser.parse_args()
    figures = measure()
    print(table(figures))
    if options.record:
        write_json(options.record, {"rows": figures, "environment": environment(Path(__file__).parent)})
