"""What LoRA-SB's initialization costs.

    python benchmarks/init_cost.py [--rank 20] [--device cpu]

Compares its peak memory and time with those of a LoRA training step and of keeping all gradients, and its truncated
SVD with torch's. It initializes all linear layers of SmolLM2-135M (bfloat16) from 25 rows of the demo's data, 4 in a
batch. Each way runs in a process of its own. The memory is the peak above what the loaded model takes. On a CPU the
time is what one thread computes, because other programs disturb it less than the clock's.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_reflora import LoraSbConfig, initialize_lora_sb_weights
from hf_reflora.lora_sb.gradients import frozen, weight_gradients
from hf_reflora.lora_sb.subspace import truncated_svd
from hf_reflora.recipes import embedded_model
from hf_reflora.report.environment import environment, write_json


ROOT = Path(__file__).parent.parent

WAYS = {
    "a LoRA training step": "three AdamW steps of a LoRA of the same rank, same batches",
    "LoRA-SB": "the default: one pass block by block",
    "LoRA-SB, 1 pass": "passes=1: the sums of all layers' gradients at once",
    "all gradients": "the gradients of every weight, summed in the model's dtype, then their signs, as the authors do",
}
LAYERS = ("model.layers.0.mlp.down_proj", "model.layers.15.self_attn.q_proj", "model.layers.29.mlp.up_proj")
ETA = 4e-4


def load(device: str) -> tuple[torch.nn.Module, list[dict[str, torch.Tensor]]]:
    """The model and the batches."""
    path = embedded_model.resolve(embedded_model.NAME)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16, attn_implementation="eager").to(device)
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    lines = (ROOT / "recipes/data/tool_calls/train.jsonl").read_text(encoding="utf-8").splitlines()
    texts = ["{request} {call}".format(**json.loads(line)) for line in lines[:25]]
    batches = []
    for i in range(0, len(texts), 4):
        batch = tokenizer(texts[i : i + 4], padding="max_length", max_length=128, truncation=True, return_tensors="pt")
        batches.append(dict(batch) | {"labels": batch.input_ids.masked_fill(batch.attention_mask == 0, -100)})
    return model, [{name: tensor.to(device) for name, tensor in batch.items()} for batch in batches]


def lora_step(model, batches, rank: int) -> None:
    model = get_peft_model(model, LoraConfig(r=rank, target_modules="all-linear"))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for batch in batches[:3]:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def all_gradients(model, batches, rank: int) -> None:
    linear = {name + ".weight" for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)} - {
        "lm_head.weight"
    }
    sums: dict[str, torch.Tensor] = {}
    for batch in batches:
        model(**batch).loss.backward()
        for name, parameter in model.named_parameters():
            sums[name] = sums[name] + parameter.grad if name in sums else parameter.grad
            parameter.grad = None
    updates = {name: -ETA * total.sign() for name, total in sums.items()}
    for name in linear:
        torch.svd_lowrank(updates[name].float(), q=rank, niter=10)


def measure(way: str, rank: int, device: str) -> dict[str, float]:
    """Peak memory above the loaded model's, in GB, seconds, and the number of rows."""
    model, batches = load(device)

    def initialize(passes: int | None) -> None:
        adapted = get_peft_model(model, LoraSbConfig(r=rank, target_modules="all-linear"))
        initialize_lora_sb_weights(adapted, batches, eta=ETA, show_progress_bar=False, passes=passes)

    work = {
        "a LoRA training step": lambda: lora_step(model, batches, rank),
        "LoRA-SB": lambda: initialize(None),
        "LoRA-SB, 1 pass": lambda: initialize(1),
        "all gradients": lambda: all_gradients(model, batches, rank),
    }[way]
    rows = sum(len(batch["input_ids"]) for batch in (batches[:3] if way == "a LoRA training step" else batches))
    reset_peak(device)
    before, begin = memory(device, "VmRSS"), clock(device)
    work()
    return {"gb": memory(device, "VmHWM") - before, "seconds": clock(device) - begin, "rows": rows}


def clock(device: str) -> float:
    if device.startswith("cuda"):
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def reset_peak(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, Linux only


def memory(device: str, kind: str) -> float:
    """Memory of this process in GB, by Linux' names: what it takes now (VmRSS), or its peak (VmHWM)."""
    if device.startswith("cuda"):
        used = torch.cuda.memory_allocated() if kind == "VmRSS" else torch.cuda.max_memory_allocated()
        return used / 1e9
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status[kind].split()[0]) * 1024 / 1e9


def compare_svds(rank: int, device: str) -> dict[str, dict[str, dict[str, float]]]:
    """For each layer and way: seconds (the faster of two runs), and the share of the best rank-r energy it misses."""
    model, batches = load(device)
    with frozen(model), weight_gradients({name: model.get_submodule(name) for name in LAYERS}) as sums:
        for batch in batches:
            model(**batch).loss.backward()
    matrices = {name: (G.sign(), rank) for name, G in sums.items()}
    generator = torch.Generator().manual_seed(0)
    # The signs of a matrix of a size that this model does not have: that of Llama-3-8B's MLP.
    decay = torch.arange(1, 401) ** -0.5
    low = torch.randn(4096, 400, generator=generator) * decay @ torch.randn(400, 14336, generator=generator)
    noise = torch.randn(low.shape, generator=generator)
    matrices["rank 400, decaying, and noise"] = ((low + noise).sign().to(device), 96)
    by_layer = {}
    for name, (M, r) in matrices.items():
        best = torch.linalg.eigvalsh(gram(M))[-r:].sum()
        by_layer[f"{name}, {M.shape[0]} × {M.shape[1]}, r = {r}"] = {
            "block Krylov": timed_svd(lambda M: truncated_svd(M, r)[0], M, best),  # noqa: B023
            "svd_lowrank, niter=10": timed_svd(lambda M: torch.svd_lowrank(M, r, niter=10)[0], M, best),  # noqa: B023
            "svd_lowrank, niter=40": timed_svd(lambda M: torch.svd_lowrank(M, r, niter=40)[0], M, best),  # noqa: B023
        }
    return by_layer


def gram(M: torch.Tensor) -> torch.Tensor:
    """M Mᵀ or Mᵀ M, whichever is smaller, in float64: its eigenvalues are M's squared singular values."""
    M = (M if M.shape[0] <= M.shape[1] else M.T).double()
    return M @ M.T


def timed_svd(svd, M: torch.Tensor, best: torch.Tensor) -> dict[str, float]:
    times = []
    for _ in range(2):
        begin = clock(M.device.type)
        U = svd(M)
        times.append(clock(M.device.type) - begin)
    captured = (torch.linalg.qr(U.double()).Q.T @ M.double()).square().sum()
    return {"seconds": min(times), "missed_energy": (1 - captured / best).item()}


def memory_table(results: dict[str, dict[str, float]]) -> str:
    step, one_pass = results["a LoRA training step"], results["LoRA-SB, 1 pass"]
    rows = [
        "| | peak above the model | ratio to a LoRA step | seconds | ratio to one pass |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for way, cost in results.items():
        seconds, ratio = "", ""
        if cost is not step:
            seconds, ratio = f"{cost['seconds']:.0f}", f"{cost['seconds'] / one_pass['seconds']:.2f}"
        rows.append(f"| {way} | {cost['gb']:.2f} GB | {cost['gb'] / step['gb']:.2f} | {seconds} | {ratio} |")
    return "\n".join(rows)


def seconds_per_row(results: dict[str, dict[str, float]]) -> tuple[float, float]:
    """Seconds of a row in the initialization and in a training step with LoRA."""
    start, step = results["LoRA-SB"], results["a LoRA training step"]
    return start["seconds"] / start["rows"], step["seconds"] / step["rows"]


def epoch_text(results: dict[str, dict[str, float]]) -> str:
    """What the initialization adds to an epoch of the paper, 50 rows to 50 000, at these costs of a row."""
    start, step = seconds_per_row(results)
    return (
        f"Here a row costs {start:.2f} s in the initialization, its SVDs included, and {step:.2f} s in a training "
        f"step: 50 × {start:.2f} / (50 000 × {step:.2f}) = {start / step / 1000:.2%} of the epoch."
    )


def svd_table(results: dict[str, dict[str, dict[str, float]]]) -> str:
    rows = ["| layer | way | ms | ratio | energy missed |", "| --- | --- | ---: | ---: | ---: |"]
    for layer, ways in results.items():
        for way, result in ways.items():
            ratio = result["seconds"] / ways["block Krylov"]["seconds"]
            missed = max(result["missed_energy"], 0)
            rows.append(f"| {layer} | {way} | {result['seconds'] * 1e3:.0f} | {ratio:.1f} | {missed:.0e} |")
    return "\n".join(rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rank", type=int, default=20)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--record", type=Path, help="write the figures and the environment to this JSON file")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)  # measures one way, in this process
    options = parser.parse_args()
    if options.device == "cpu":
        torch.set_num_threads(1)
    if options.way:
        print(json.dumps(measure(options.way, options.rank, options.device)))
        sys.exit()
    results = {}
    for way in WAYS:
        print(f"{way}: {WAYS[way]} ...", file=sys.stderr)
        # A process of its own: what one way has allocated stays with the process and would hide the next one's peak.
        command = [sys.executable, __file__, "--way", way, "--rank", str(options.rank), "--device", options.device]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        results[way] = json.loads(done.stdout.splitlines()[-1])
    svds = compare_svds(options.rank, options.device)
    print(memory_table(results), epoch_text(results), svd_table(svds), sep="\n\n")
    if options.record:
        facts = {"memory": results, "svd": svds, "rank": options.rank, "device": options.device}
        facts |= {"threads": torch.get_num_threads(), "environment": environment(Path(__file__).parent)}
        write_json(options.record, facts)
