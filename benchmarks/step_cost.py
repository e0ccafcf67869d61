"""What RefLoRA adds to an optimizer's step, and how that grows.

    python benchmarks/step_cost.py [--device cpu] [--record FILE] [--plot FILE]

Adapters of the shapes of three models, with random gradients, take steps of AdamW alone, with RefLoRA, with RefLoRA
as its authors compute it (two `eigh` for each layer, in a loop) and of PEFT's Riemannian optimizer. There is no model
behind the adapters: DoRA, whose cost lies in the forward pass, is in whole_step.py. All methods of a case take turns
on the same adapters, and the figures are medians; with one thread on a CPU they are CPU time, else wall time. Where
other programs run, set OMP_WAIT_POLICY=PASSIVE: a thread that waits otherwise keeps the core that another one needs.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from peft import LoraConfig, get_peft_model
from peft.optimizers import create_riemannian_optimizer
from torch import Tensor, nn

from hf_reflora import RefLora, create_reflora_optimizer
from hf_reflora.reflora.factors import LoraPair, lora_layers, require_pairs
from hf_reflora.reflora.step_plain import PlainStep
from hf_reflora.report.environment import environment, write_json


ATTENTION_AND_MLP = {  # (in, out) of a layer's adapted modules, and the number of layers
    "DeBERTaV3-base": (4 * [(768, 768)] + [(768, 3072), (3072, 768)], 12),
    "SmolLM2-135M": (2 * [(576, 576)] + 2 * [(576, 192)] + 2 * [(576, 1536)] + [(1536, 576)], 30),
    "Llama-3-8B, 8 layers": (2 * [(4096, 4096)] + 2 * [(4096, 1024)] + 2 * [(4096, 14336)] + [(14336, 4096)], 8),
}
CASES = [
    ("DeBERTaV3-base", 8, "float32"),
    ("SmolLM2-135M", 8, "float32"),
    ("SmolLM2-135M", 32, "float32"),
    ("SmolLM2-135M", 64, "float32"),
    ("SmolLM2-135M", 8, "bfloat16"),
    ("SmolLM2-135M", 32, "bfloat16"),
    ("Llama-3-8B, 8 layers", 16, "float32"),
    ("Llama-3-8B, 8 layers", 64, "float32"),
]
GROWTH = {  # what grows: its values, and the (r, in, out, pairs) of each
    "pairs": ((14, 28, 56, 112, 224, 448), lambda n: (8, 576, 576, n)),
    "rank": ((4, 8, 16, 32, 64, 128, 256), lambda r: (r, 2048, 2048, 14)),
    "width": ((512, 1024, 2048, 4096, 8192, 16384), lambda width: (16, width, width, 14)),
}
SHARE = 0.01  # a step's time beyond which RefLoRA is not negligible


def adapters(shapes: list[tuple[int, int]], rank: int, dtype: str = "float32", device: str = "cpu") -> nn.Module:
    """LoRA adapters of linear modules of these shapes (in, out), with random gradients. The base takes no memory."""
    torch.manual_seed(0)
    base = nn.Sequential(*(nn.Linear(*shape, bias=False, device="meta") for shape in shapes))
    model = get_peft_model(base, LoraConfig(r=rank, target_modules=r"\d+", init_lora_weights=False))
    for layer in lora_layers(model).values():
        for linear in (layer.lora_A["default"], layer.lora_B["default"]):
            linear.to_empty(device=device).to(getattr(torch, dtype))
            nn.init.normal_(linear.weight, std=0.02)
            linear.weight.grad = torch.randn_like(linear.weight) * 1e-3
    return model


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


@torch.no_grad()
def authors_way_(pairs: list[LoraPair]) -> None:
    """∇A ← S⁻¹ ∇A and ∇B ← ∇B S with S = P^(-1/2) (P^(1/2) Q P^(1/2))^(1/2) P^(-1/2) by `eigh`, pair after pair."""

    def roots(M: Tensor) -> tuple[Tensor, Tensor]:
        values, vectors = torch.linalg.eigh(M.float())
        root = values.clamp(min=1e-12).sqrt()
        return (vectors * root) @ vectors.mT, (vectors / root) @ vectors.mT

    for pair in pairs:
        root, inverse_root = roots(pair.A @ pair.A.mT)
        middle, inverse_middle = roots(root @ (pair.B.mT @ pair.B).float() @ root)
        S = (inverse_root @ middle @ inverse_root).to(pair.A.dtype)
        S_inv = (root @ inverse_middle @ root).to(pair.A.dtype)
        pair.A.grad = S_inv @ pair.A.grad
        pair.B.grad = pair.B.grad @ S


def adamw(model: nn.Module, **arguments) -> torch.optim.Optimizer:
    return torch.optim.AdamW(trained(model), lr=1e-4, **arguments)


def with_authors_way(model: nn.Module) -> torch.optim.Optimizer:
    optimizer, pairs = adamw(model, foreach=True), require_pairs(model)
    optimizer.register_step_pre_hook(lambda *_: authors_way_(pairs))
    return optimizer


def with_reflora(**settings) -> Callable[[nn.Module], torch.optim.Optimizer]:
    return lambda model: create_reflora_optimizer(model, torch.optim.AdamW, lr=1e-4, foreach=True, **settings)


ALONE = ("AdamW", "AdamW fused")
METHODS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "AdamW": lambda model: adamw(model, foreach=True),
    "AdamW fused": lambda model: adamw(model, fused=True),
    "authors' way": with_authors_way,
    "RefLoRA": with_reflora(),
    "RefLoRA-S rescale": with_reflora(method="reflora_s"),
    "RefLoRA-S precondition": with_reflora(method="reflora_s", form="precondition"),
    "Riemannian (PEFT)": lambda model: create_riemannian_optimizer(model, torch.optim.AdamW, lr=1e-4, foreach=True),
}


def medians(
    calls: dict[str, Callable[[], object]], prepare: Callable[[], object], device: str, seconds: float
) -> dict[str, float]:
    """Milliseconds of each call, which take turns for `seconds` or five times, whichever is longer."""
    one_thread = device == "cpu" and torch.get_num_threads() == 1
    clock = time.process_time if one_thread else time.perf_counter
    times: dict[str, list[float]] = {name: [] for name in calls}
    end, rounds = time.perf_counter() + seconds, 0
    while rounds < 6 or time.perf_counter() < end:
        for name, call in calls.items():
            prepare()
            synchronize(device)
            begin = clock()
            call()
            synchronize(device)
            times[name].append((clock() - begin) * 1e3)
        rounds += 1
    return {name: statistics.median(values[1:]) for name, values in times.items()}  # the first makes AdamW's state


def synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def bandwidth(device: str) -> float:
    """GB that are read or written in a second when a large tensor is copied."""
    source = torch.zeros(2**26, device=device)
    target = torch.zeros_like(source)
    ms = medians({"copy": lambda: target.copy_(source)}, lambda: None, device, 0.5)["copy"]
    return 2 * source.nbytes / ms / 1e6


def measure(model_name: str, rank: int, dtype: str, device: str, seconds: float) -> dict:
    """A case: milliseconds of each method's step, and the least that RefLoRA could add."""
    shapes, layers = ATTENTION_AND_MLP[model_name]
    model = adapters(shapes * layers, rank, dtype, device)
    parameters = trained(model)
    gradients = [parameter.grad for parameter in parameters]
    originals = [gradient.clone() for gradient in gradients]

    def prepare() -> None:  # every step starts from the same gradients, in the same memory
        torch._foreach_copy_(gradients, originals)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient

    calls = {name: make(model).step for name, make in METHODS.items()}
    calls["diagnostics"] = PlainStep(RefLora(), lora_layers(model)).diagnose
    # A and B are read, and both gradients are read and written.
    floor = 3 * sum(parameter.nbytes for parameter in parameters)
    return {
        "model": model_name,
        "rank": rank,
        "dtype": dtype,
        "threads": torch.get_num_threads(),
        "pairs": len(shapes) * layers,
        "floor_ms": floor / bandwidth(device) / 1e6,
        "ms": medians(calls, prepare, device, seconds),
    }


def growth(device: str, seconds: float) -> dict[str, dict[str, dict[str, float]]]:
    """By what grows and its value: milliseconds that each method adds, and of a token's forward and backward pass."""
    results: dict[str, dict[str, dict[str, float]]] = {}
    for name, (values, sizes) in GROWTH.items():
        results[name] = {}
        for value in values:
            rank, n_in, n_out, count = sizes(value)
            model = adapters([(n_in, n_out)] * count, rank, device=device)
            optimizer, pairs = adamw(model, foreach=True), require_pairs(model)
            step = PlainStep(RefLora(), lora_layers(model))
            calls = {
                "AdamW": optimizer.step,
                "authors' way": lambda pairs=pairs: authors_way_(pairs),
                "RefLoRA": lambda step=step, optimizer=optimizer: step.before_optimizer(0, optimizer),
            }
            gradients = [parameter.grad for parameter in trained(model)]
            originals = [gradient.clone() for gradient in gradients]
            restore = lambda g=gradients, o=originals: torch._foreach_copy_(g, o)  # noqa: E731
            results[name][str(value)] = medians(calls, restore, device, seconds)
            results[name][str(value)]["a token"] = count * token_ms(n_in, n_out, rank, device)
    return results


def token_ms(n_in: int, n_out: int, rank: int, device: str, tokens: int = 256) -> float:
    """Milliseconds of a token's forward and backward pass through a frozen linear module and its adapter."""
    W, A, B = (torch.randn(shape, device=device) for shape in ((n_out, n_in), (rank, n_in), (n_out, rank)))
    A.requires_grad_()
    B.requires_grad_()
    x = torch.randn(tokens, n_in, device=device, requires_grad=True)

    def forward_and_backward() -> None:
        (nn.functional.linear(x, W) + nn.functional.linear(nn.functional.linear(x, A), B)).sum().backward()

    return medians({"pass": forward_and_backward}, lambda: None, device, 0)["pass"] / tokens


def exponent(results: dict[str, dict[str, float]], method: str) -> float:
    """b of the power law a xᵇ that fits the cost best, in logarithms."""
    x = np.log([float(value) for value in results])
    return float(np.polyfit(x, np.log([cost[method] for cost in results.values()]), 1)[0])


def negligible_from(cost: dict[str, float]) -> float:
    """The tokens in a step from which on RefLoRA takes less than `SHARE` of their forward and backward pass."""
    return cost["RefLoRA"] / SHARE / cost["a token"]


def table(cases: list[dict]) -> str:
    """A Markdown table: AdamW's step, and what each method adds to it, in ms and as a share of AdamW's step."""
    names = [name for name in METHODS if name not in ALONE]
    head = ["model", "r", "dtype", "threads", "AdamW", "fused", *(f"+ {name}" for name in names)]
    head += ["RefLoRA / authors'", "RefLoRA / floor", "diagnostics / RefLoRA"]
    rows = ["| " + " | ".join(head) + " |", "| --- | ---: | --- |" + " ---: |" * (len(head) - 3)]
    for case in cases:
        ms, base = case["ms"], case["ms"]["AdamW"]
        added = {name: ms[name] - base for name in names}
        cells = [
            case["model"],
            case["rank"],
            case["dtype"],
            case["threads"],
            f"{base:.1f}",
            f"{ms['AdamW fused']:.1f}",
        ]
        cells += [f"{added[name]:.1f} ({added[name] / base:.2f})" for name in names]
        cells += [f"{added['RefLoRA'] / added[names[0]]:.2f}", f"{added['RefLoRA'] / case['floor_ms']:.1f}"]
        cells.append(f"{ms['diagnostics'] / added['RefLoRA']:.1f}")
        rows.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(rows)


def growth_table(results: dict[str, dict[str, dict[str, float]]]) -> str:
    """A Markdown table of fitted exponents, and of the tokens from which on RefLoRA is negligible at both ends."""
    methods = ("AdamW", "authors' way", "RefLoRA")
    rows = ["| what grows | from … to | " + " | ".join(methods) + " | 1 % at … tokens |"]
    rows.append("| --- | --- |" + " ---: |" * (len(methods) + 1))
    for name, costs in results.items():
        first, *_, last = costs
        powers = [f"{exponent(costs, method):.2f}" for method in methods]
        tokens = [f"{negligible_from(costs[value]):.0f}" for value in (first, last)]
        rows.append(f"| {name} | {first} … {last} | " + " | ".join(powers) + f" | {tokens[0]} … {tokens[1]} |")
    return "\n".join(rows)


def plot(results: dict[str, dict[str, dict[str, float]]], path: Path) -> None:
    figure = Figure(figsize=(10, 3.2), layout="constrained")
    for axes, (name, costs) in zip(figure.subplots(1, len(results)), results.items(), strict=True):
        for method in ("AdamW", "authors' way", "RefLoRA"):
            axes.loglog([int(value) for value in costs], [cost[method] for cost in costs.values()], "o-", label=method)
        axes.set(xlabel=name, ylabel="ms a step")
        axes.set_xticks([int(value) for value in costs], list(costs), fontsize="small")
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120, metadata={"Software": None})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="on a CPU")
    parser.add_argument("--seconds", type=float, default=2.0, help="how long to measure each case, at least")
    parser.add_argument("--cases", type=int, nargs="+", default=range(len(CASES)), help="numbers of cases, from 0")
    parser.add_argument("--record", type=Path, help="write the figures and the environment to this JSON file")
    parser.add_argument("--plot", type=Path, help="draw how the cost grows into this PNG file")
    arguments = parser.parse_args()
    facts = {"device": arguments.device, "environment": environment(Path(__file__).parent), "cases": []}
    for threads in arguments.threads if arguments.device == "cpu" else [torch.get_num_threads()]:
        torch.set_num_threads(threads)
        for number in arguments.cases:
            facts["cases"].append(measure(*CASES[number], arguments.device, arguments.seconds))
            print(table(facts["cases"][-1:]).splitlines()[-1], flush=True)
    torch.set_num_threads(arguments.threads[0])
    facts["growth"] = growth(arguments.device, arguments.seconds / 10)
    print("", table(facts["cases"]), growth_table(facts["growth"]), sep="\n\n")
    if arguments.plot:
        plot(facts["growth"], arguments.plot)
    if arguments.record:
        write_json(arguments.record, facts)
