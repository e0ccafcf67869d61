"""What an adapter is: method, rank, base model and diagnostics, from its files alone."""

import json
import os
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig
from peft.utils import load_peft_weights
from torch import Tensor

from .lora_sb import LoraSbConfig
from .refactor import diagnose


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
    native = isinstance(config, LoraSbConfig)
    kinds = (".lorasb_A", ".lorasb_B", ".lorasb_R") if native else (".lora_A.weight", ".lora_B.weight")
    names = [name.removesuffix(kinds[0]) for name in tensors if name.endswith(kinds[0])]
    layers = {name: [tensors[name + kind].float() for kind in kinds] for name in names}
    ranks = sorted({len(A) for A, *_ in layers.values()})
    facts = {
        "method": run.get("method", config.init_weights if native else "lora"),
        "start": "LoRA-SB" if run.get("init") == "lora_sb" else None,
        "PEFT type": getattr(config.peft_type, "value", config.peft_type),
        "base model": config.base_model_name_or_path,
        "layers": len(layers),
        "rank": " to ".join(map(str, dict.fromkeys((ranks[0], ranks[-1])))) if ranks else None,
        "trained numbers": sum(
            layer[-1].numel() if native else sum(t.numel() for t in layer) for layer in layers.values()
        ),
        "modules saved whole": ", ".join(config.modules_to_save or []) or None,
        "size": f"{sum(t.numel() * t.element_size() for t in tensors.values()) / 1e6:.1f} MB",
        "trained at commit": run.get("environment", {}).get("commit"),
        **(_sb_diagnostics(list(layers.values())) if native else _lora_diagnostics(list(layers.values()))),
    }
    return {name: value for name, value in facts.items() if value is not None}


def _lora_diagnostics(layers: list[list[Tensor]]) -> dict[str, str]:
    pairs = [(A, B) for A, B in layers if A.ndim == 2 == B.ndim]
    if not pairs:
        return {}
    found = diagnose(*map(list, zip(*pairs, strict=True)), eps=None, dtype=torch.float32)
    shown = {}
    for key, name in (("norm_A", "‖A‖, mean"), ("norm_B", "‖B‖, mean"), ("balance_gap", "balance gap, mean")):
        values = found[key][found[key].isfinite()]
        shown[name] = f"{values.mean():.4g}" if len(values) else None
    for key, name in (("cond_P", "condition of AAᵀ, median"), ("cond_Q", "condition of BᵀB, median")):
        shown[name] = f"{found[key].median():.4g}"
    return shown


def _sb_diagnostics(layers: list[list[Tensor]]) -> dict[str, str]:
    def gap(gram: Tensor) -> float:
        return (gram - torch.eye(len(gram))).abs().max().item()

    return {
        "‖R‖, mean": f"{sum(R.norm().item() for *_, R in layers) / len(layers):.4g}",
        "BᵀB − I, largest": f"{max(gap(B.T @ B) for _, B, _ in layers):.1e}",
        "AAᵀ − I, largest": f"{max(gap(A @ A.T) for A, _, _ in layers):.1e}",
    }
