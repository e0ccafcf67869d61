"""What an adapter is: method, rank, base model and diagnostics, from its files alone."""

import json
import math
import os
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig
from peft.utils import load_peft_weights
from torch import Tensor

from ..lora_sb.config import LoraSbConfig
from ..reflora.diagnose import diagnose


SHOWN = {
    "norm_A": "‖A‖, mean",
    "norm_B": "‖B‖, mean",
    "balance_gap": "balance gap, mean",
    "cond_P": "condition of AAᵀ, median",
    "cond_Q": "condition of BᵀB, median",
    "norm_R": "‖R‖, mean",
    "B_gap_I": "BᵀB − I, largest",
    "A_gap_I": "AAᵀ − I, largest",
}


def inspect_adapter(adapter: str | os.PathLike) -> dict[str, Any]:
    """Facts of a saved adapter, in the order to show them; what the files do not tell is left out.

    Args:
        adapter: A folder, or an id on the Hub. The base model is not loaded.

    Returns:
        method, base model, layers, rank, trained numbers, size, and diagnostics: for LoRA the means over the layers of
        ‖A‖, ‖B‖ and the balance gap ‖AAᵀ − BᵀB‖/‖BᵀB‖ and the medians of condition numbers; for LoRA-SB ‖R‖ and how
        far B and A are from orthonormal.

    Raises:
        ValueError: for an adapter that is neither LoRA nor LoRA-SB.
    """
    config = PeftConfig.from_pretrained(str(adapter))
    if type(config) not in (LoraConfig, LoraSbConfig):
        kind = getattr(config.peft_type, "value", config.peft_type)
        raise ValueError(f"inspect knows LoRA, LoRA-SB and LoRA-XS adapters; this one is {kind}.")
    tensors = load_peft_weights(str(adapter), device="cpu")
    record = Path(adapter) / "run_record.json"
    run = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else {}
    found = diagnostics(config, tensors)
    ranks = found.pop("ranks")
    facts = {
        "method": run.get("method", method_of(config)),
        "start": "LoRA-SB" if run.get("init") == "lora_sb" else None,
        "PEFT type": getattr(config.peft_type, "value", config.peft_type),
        "base model": config.base_model_name_or_path,
        "layers": found.pop("layers"),
        "rank": " to ".join(map(str, dict.fromkeys(ranks))) or None,
        "trained numbers": found.pop("trained_numbers"),
        "modules saved whole": ", ".join(config.modules_to_save or []) or None,
        "size": f"{sum(t.numel() * t.element_size() for t in tensors.values()) / 1e6:.1f} MB",
        "trained at commit": run.get("environment", {}).get("commit"),
        **{SHOWN[name]: f"{value:.4g}" for name, value in found.items()},
    }
    return {name: value for name, value in facts.items() if value is not None}


def method_of(config: PeftConfig) -> str:
    """The method that an adapter's configuration tells: lora, lora_sb or lora_xs."""
    if not isinstance(config, LoraSbConfig):
        return "lora"
    return "lora_xs" if config.init_weights == "lora_xs" else "lora_sb"


def diagnostics(config: PeftConfig, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Numbers that say in what state the adapter of `config` with the saved `tensors` is.

    Returns:
        layers, ranks [least, largest], trained_numbers, and as far as they are finite: for LoRA the means over the
        layers norm_A, norm_B and balance_gap and the medians cond_P and cond_Q (see
        `hf_reflora.reflora.diagnose.diagnose`); for LoRA-SB the mean norm_R and the
        largest entries B_gap_I of |BᵀB − I| and A_gap_I of |AAᵀ − I|.
    """
    native = isinstance(config, LoraSbConfig)
    kinds = (".lorasb_A", ".lorasb_B", ".lorasb_R") if native else (".lora_A.weight", ".lora_B.weight")
    names = [name.removesuffix(kinds[0]) for name in tensors if name.endswith(kinds[0])]
    layers = [[tensors[name + kind].detach().float().cpu() for kind in kinds] for name in names]
    ranks = [len(A) for A, *_ in layers]
    found = {
        "layers": len(layers),
        "ranks": [min(ranks), max(ranks)] if ranks else [],
        "trained_numbers": sum(layer[-1].numel() if native else sum(t.numel() for t in layer) for layer in layers),
    }
    numbers = (_sb_diagnostics if native else _lora_diagnostics)(layers) if layers else {}
    return found | {name: value for name, value in numbers.items() if math.isfinite(value)}


def _lora_diagnostics(layers: list[list[Tensor]]) -> dict[str, float]:
    pairs = [(A, B) for A, B in layers if A.ndim == 2 == B.ndim]
    if not pairs:
        return {}
    found = diagnose(*map(list, zip(*pairs, strict=True)), eps=None, dtype=torch.float32)
    numbers = {}
    for name in ("norm_A", "norm_B", "balance_gap"):
        values = found[name][found[name].isfinite()]
        numbers[name] = values.mean().item() if len(values) else math.nan
    return numbers | {name: found[name].median().item() for name in ("cond_P", "cond_Q")}


def _sb_diagnostics(layers: list[list[Tensor]]) -> dict[str, float]:
    def gap(gram: Tensor) -> float:
        return (gram - torch.eye(len(gram))).abs().max().item()

    return {
        "norm_R": sum(R.norm().item() for *_, R in layers) / len(layers),
        "B_gap_I": max(gap(B.T @ B) for _, B, _ in layers),
        "A_gap_I": max(gap(A @ A.T) for A, _, _ in layers),
    }
