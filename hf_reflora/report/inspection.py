"""What a saved adapter is, told from its files alone: method, rank, base model and diagnostics."""

import os
from pathlib import Path
from typing import Any

from peft import LoraConfig

from ..lora_sb.config import LoraSbConfig
from .adapter_config import read_adapter_config
from .diagnostics import diagnostics, method_of
from .record import RECORD_NAME, RunRecord
from .weights import read_weights


SHOWN = {
    "norm_A": "‖A‖, mean",
    "norm_B": "‖B‖, mean",
    "balance_gap": "balance gap, mean",
    "cond_P": "condition of AAᵀ, median",
    "cond_Q": "condition of BᵀB, median",
    "norm_R": "‖R‖, mean",
    "B_gap_I": "BᵀB − I, largest",
    "A_gap_I": "AAᵀ − I, largest",
    "not_finite": "tensors with values that are not finite",
}


def inspect_adapter(adapter: str | os.PathLike) -> dict[str, Any]:
    """Facts of a saved adapter by their names for people, in the order to show them.

    What the files do not tell is left out.

    Args:
        adapter: A folder, or an id on the Hub. The base model is not loaded.

    Returns:
        method, base model, layers, rank, trained numbers, size, and diagnostics: for LoRA the means over the layers of
        ‖A‖, ‖B‖ and the balance gap ‖AAᵀ − BᵀB‖/‖BᵀB‖ and the medians of condition numbers; for LoRA-SB ‖R‖ and how
        far B and A are from orthonormal.

    Raises:
        ValueError: for an adapter that is neither LoRA nor LoRA-SB, or whose files are broken.
    """
    config = read_adapter_config(adapter)
    if type(config) not in (LoraConfig, LoraSbConfig):
        kind = getattr(config.peft_type, "value", config.peft_type)
        raise ValueError(f"inspect knows LoRA, LoRA-SB and LoRA-XS adapters; this one is {kind}.")
    tensors = read_weights(adapter)
    path = Path(adapter) / RECORD_NAME
    record = RunRecord.load(path) if path.is_file() else RunRecord(method=method_of(config))
    numbers = diagnostics(config, tensors)
    ranks = numbers.pop("ranks")
    facts = {
        "method": record.method,
        "start": "LoRA-SB" if record.init == "lora_sb" else None,
        "PEFT type": getattr(config.peft_type, "value", config.peft_type),
        "base model": config.base_model_name_or_path,
        "layers": numbers.pop("layers"),
        "rank": " to ".join(map(str, dict.fromkeys(ranks))) or None,
        "trained numbers": numbers.pop("trained_numbers"),
        "saved modules": ", ".join(config.modules_to_save or []) or None,
        "size": f"{sum(t.numel() * t.element_size() for t in tensors.values()) / 1e6:.1f} MB",
        "trained at commit": record.environment.get("commit"),
        **{SHOWN[name]: f"{value:.4g}" for name, value in numbers.items()},
    }
    return {name: value for name, value in facts.items() if value is not None}
