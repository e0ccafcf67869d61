"""What RefLoRA costs of a whole training step: throughput and memory of the methods on the demo's model.

    python benchmarks/whole_step.py [--rounds 6] [--record FILE]

Each method trains the demo's SmolLM2-135M with the settings of its recipe: bfloat16, batches of 4 rows of the demo's
data, adapters on all linear layers, AdamW. The methods take turns, in one process and on the same batches, so that
whatever else the machine does strikes all of them. Each method's peak memory is that of a process of its own.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import yaml
from init_cost import memory, reset_peak
from peft import LoraConfig, get_peft_model
from peft.optimizers import create_riemannian_optimizer
from step_cost import synchronize, trained
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_reflora import LoraSbConfig, create_reflora_optimizer
from hf_reflora.recipes import embedded_model
from hf_reflora.report.environment import environment, write_json


ROOT = Path(__file__).parent.parent
RECIPE = yaml.safe_load((ROOT / "recipes/smollm2-135m/reflora.yaml").read_text(encoding="utf-8"))
ADAPTER = {"lora_alpha": RECIPE["lora_alpha"], "target_modules": RECIPE["lora_target_modules"]}
LR = RECIPE["learning_rate"]


def lora(**settings) -> LoraConfig:
    return LoraConfig(r=RECIPE["lora_r"], **ADAPTER, **settings)


def adamw(model: nn.Module) -> Optimizer:
    return AdamW(trained(model), lr=LR, fused=True)  # the Trainer's default


def reflora(**settings) -> Callable[[nn.Module], Optimizer]:
    return lambda model: create_reflora_optimizer(model, AdamW, lr=LR, fused=True, **settings)


# The configuration of the adapter and the optimizer of each method. How LoRA-SB is initialized does not change what a
# step costs: init_cost.py measures the initialization, which is left out here.
SB = LoraSbConfig(r=20, target_modules=RECIPE["lora_target_modules"], init_weights=True)
METHODS = {
    "LoRA": (lora(), adamw),
    "RefLoRA": (lora(), reflora()),
    "RefLoRA-S": (lora(), reflora(method="reflora_s")),
    "RefLoRA-S precondition": (lora(), reflora(method="reflora_s", form="precondition")),
    "LoRA-SB": (SB, adamw),
    "DoRA": (lora(use_dora=True), adamw),
    "Riemannian (PEFT)": (lora(), lambda model: create_riemannian_optimizer(model, AdamW, lr=LR, fused=True)),
}


def batches(count: int, device: str) -> list[dict[str, Tensor]]:
    """Rows of the demo's data in its chat format, padded to the longest row of their batch."""
    tokenizer = AutoTokenizer.from_pretrained(embedded_model.resolve(embedded_model.NAME))
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    size = RECIPE["per_device_train_batch_size"]
    lines = (ROOT / RECIPE["dataset_name"] / "train.jsonl").read_text(encoding="utf-8").splitlines()[: count * size]
    chats = [
        [
            {"role": "system", "content": RECIPE["system_prompt"]},
            {"role": "user", "content": row["request"]},
            {"role": "assistant", "content": row["call"]},
        ]
        for row in map(json.loads, lines)
    ]
    texts = [tokenizer.apply_chat_template(chat, tokenize=False) for chat in chats]
    results = []
    for i in range(0, len(texts), size):
        batch = tokenizer(texts[i : i + size], padding=True, return_tensors="pt").to(device)
        results.append(dict(batch) | {"labels": batch.input_ids.masked_fill(batch.attention_mask == 0, -100)})
    return results


def load(device: str) -> nn.Module:
    path = embedded_model.resolve(embedded_model.NAME)
    dtype, attention = getattr(torch, RECIPE["dtype"]), RECIPE["attn_implementation"]
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation=attention).to(device)


def training_step(name: str, base: nn.Module, device: str) -> Callable[[dict[str, Tensor]], None]:
    """One step of a method: forward and backward pass, clipping, the optimizer's step."""
    config, make_optimizer = METHODS[name]
    torch.manual_seed(0)
    model = get_peft_model(base, config).train()
    optimizer = make_optimizer(model)

    def step(batch: dict[str, Tensor]) -> None:
        model(**batch).loss.backward()
        nn.utils.clip_grad_norm_(trained(model), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        synchronize(device)

    return step


def measure_memory(name: str, device: str) -> float:
    """Peak memory of three steps above the loaded model's, in GB."""
    base, data = load(device), batches(3, device)
    reset_peak(device)
    before = memory(device, "VmRSS")
    step = training_step(name, base, device)
    for batch in data:
        step(batch)
    return memory(device, "VmHWM") - before


def measure_seconds(rounds: int, device: str) -> dict[str, list[float]]:
    """The seconds of each method's steps, round by round, all on the batch of the round."""
    steps = {name: training_step(name, load(device), device) for name in METHODS}
    seconds: dict[str, list[float]] = {name: [] for name in METHODS}
    for number, batch in enumerate(batches(rounds + 1, device)):
        names = list(METHODS)
        first = number % len(names)
        for name in names[first:] + names[:first]:  # who comes first changes, in case the place matters
            begin = time.perf_counter()
            steps[name](batch)
            if number:  # the first round makes the optimizers' states
                seconds[name].append(time.perf_counter() - begin)
    return seconds


def throughput(seconds: dict[str, list[float]], name: str) -> float:
    """Steps of a method in the time of one of LoRA: the median of the rounds."""
    return statistics.median(lora / own for lora, own in zip(seconds["LoRA"], seconds[name], strict=True))


def table(record: dict) -> str:
    """A Markdown table of a record."""
    rows = [
        "| method | seconds a step | throughput, LoRA = 1 | peak memory above the model |",
        "| --- | ---: | ---: | ---: |",
    ]
    for name, seconds in record["seconds"].items():
        ratio = throughput(record["seconds"], name)
        rows.append(f"| {name} | {statistics.median(seconds):.2f} | {ratio:.3f} | {record['gb'][name]:.2f} GB |")
    return "\n".join(rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--record", type=Path, help="write the figures and the environment to this JSON file")
    parser.add_argument("--memory-of", choices=list(METHODS), help=argparse.SUPPRESS)  # what the processes are told
    arguments = parser.parse_args()
    if arguments.memory_of:
        print(json.dumps(measure_memory(arguments.memory_of, arguments.device)))
        sys.exit()
    facts = {"device": arguments.device, "threads": torch.get_num_threads()}
    facts["environment"] = environment(Path(__file__).parent)
    facts["seconds"] = measure_seconds(arguments.rounds, arguments.device)
    command = [sys.executable, __file__, "--device", arguments.device, "--memory-of"]
    facts["gb"] = {
        name: json.loads(subprocess.run([*command, name], check=True, capture_output=True, text=True).stdout)
        for name in METHODS
    }
    print(table(facts))
    if arguments.record:
        write_json(arguments.record, facts)
