"""How long an optimizer step takes with RefLoRA, compared with AdamW alone and with PEFT's Riemannian optimizer.

    python benchmarks/step_cost.py [--rank 8] [--device cpu]

The adapters have the shapes of SmolLM2-135M's linear layers, and the gradients are random. Prints a Markdown table of
medians and of their ratios to AdamW's, which carry over to other machines better than times do.
"""

import argparse
import statistics
import time
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from peft.optimizers import create_riemannian_optimizer
from transformers import LlamaConfig, LlamaForCausalLM

from hf_reflora import create_reflora_optimizer
from hf_reflora.report.environment import environment, write_json


def adapters(rank: int, device: str) -> torch.nn.Module:
    """A model with SmolLM2-135M's linear layers, LoRA adapters on all of them and random gradients."""
    config = LlamaConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=64,
    )
    torch.manual_seed(0)
    model = get_peft_model(
        LlamaForCausalLM(config).to(device), LoraConfig(r=rank, target_modules="all-linear", init_lora_weights=False)
    )
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.randn_like(parameter) * 1e-3
    return model


def synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def measure(rank: int, device: str, seconds: float) -> dict[str, float]:
    """The median seconds of each optimizer's step, over steps that take `seconds` in all."""
    makers = {
        "AdamW": lambda model: torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4),
        "Riemannian (PEFT)": lambda model: create_riemannian_optimizer(model, torch.optim.AdamW, lr=1e-4),
        "RefLoRA": lambda model: create_reflora_optimizer(model, torch.optim.AdamW, lr=1e-4),
        "RefLoRA float64": lambda model: create_reflora_optimizer(model, torch.optim.AdamW, lr=1e-4, dtype="float64"),
        "RefLoRA-S rescale": lambda model: create_reflora_optimizer(
            model, torch.optim.AdamW, lr=1e-4, method="reflora_s"
        ),
        "RefLoRA-S precondition": lambda model: create_reflora_optimizer(
            model, torch.optim.AdamW, lr=1e-4, method="reflora_s", form="precondition"
        ),
    }
    medians = {}
    for name, make in makers.items():
        model = adapters(rank, device)
        optimizer = make(model)
        gradients = [(p.grad, p.grad.clone()) for p in model.parameters() if p.requires_grad]
        times = []
        while sum(times) < seconds:
            # Preconditioning changes the gradients in place; each step shall start from the same ones.
            for gradient, original in gradients:
                gradient.copy_(original)
            synchronize(device)
            begin = time.perf_counter()
            optimizer.step()
            synchronize(device)
            times.append(time.perf_counter() - begin)
        medians[name] = statistics.median(times)
    return medians


def table(results: dict[str, dict[str, float]]) -> str:
    """A Markdown table of `measure`'s medians, by rank."""
    ranks = list(results)
    rows = ["| step of | " + " | ".join(f"r = {r}: ms | ratio to AdamW" for r in ranks) + " |"]
    rows.append("| --- |" + " ---: |" * (2 * len(ranks)))
    for name in results[ranks[0]]:
        cells = [f"{results[r][name] * 1e3:.1f} | {results[r][name] / results[r]['AdamW']:.2f}" for r in ranks]
        rows.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rank", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=3.0, help="how long to measure each optimizer, at least")
    parser.add_argument("--record", type=Path, help="write the figures and the environment to this JSON file")
    arguments = parser.parse_args()
    results = {str(rank): measure(rank, arguments.device, arguments.seconds) for rank in arguments.rank}
    print(table(results))
    if arguments.record:
        facts = {"seconds": results, "device": arguments.device, "threads": torch.get_num_threads()}
        facts["environment"] = environment(Path(__file__).parent)
        write_json(arguments.record, facts)
