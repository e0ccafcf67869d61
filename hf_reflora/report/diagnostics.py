"""Numbers that say in what state an adapter is, from its configuration and its tensors."""

import math
from typing import Any

import torch
from peft import LoraConfig, PeftConfig
from torch import Tensor

from ..lora_sb.config import LoraSbConfig
from ..reflora.diagnose import diagnose


def method_of(config: PeftConfig) -> str:
    """The method that an adapter's configuration tells: lora, lora_sb, lora_xs, or another type of PEFT, as "vera"."""
    if not isinstance(config, LoraSbConfig):
        return str(getattr(config.peft_type, "value", config.peft_type)).lower()
    return "lora_xs" if config.init_weights == "lora_xs" else "lora_sb"


def diagnostics(config: PeftConfig, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Numbers that say in what state the adapter is.

    Args:
        config: The adapter's configuration.
        tensors: The adapter's tensors by the names that they have in its file.

    Returns:
        layers, ranks [least, largest], trained_numbers (all that was trained, also saved modules, biases, tokens and
        DoRA's magnitudes), and those of the following that are finite. For LoRA the means over the layers norm_A,
        norm_B and balance_gap and the medians cond_P and cond_Q (see `hf_reflora.reflora.diagnose.diagnose`); for
        LoRA-SB the mean norm_R and the largest entries B_gap_I of |BᵀB − I| and A_gap_I of |AAᵀ − I|. Where there
        are any, not_finite is the number of tensors with values that are not finite: the training has diverged.

    Raises:
        ValueError: a factor of a layer is missing.
    """
    native = isinstance(config, LoraSbConfig)
    kinds = (".lorasb_A", ".lorasb_B", ".lorasb_R") if native else (".lora_A.weight", ".lora_B.weight")
    names = [name.removesuffix(kinds[0]) for name in tensors if name.endswith(kinds[0])]
    if missing := [name + kind for name in names for kind in kinds if name + kind not in tensors]:
        raise ValueError(
            f"The adapter's weights have only one factor of a LoRA pair: {missing[0]} is missing. Save the adapter "
            "again with save_pretrained (trainer.save_model)."
        )
    layers = [[tensors[name + kind].detach().float().cpu() for kind in kinds] for name in names]
    # An embedding has factors of other names, which are no Linear layer's and not part of the means.
    embeddings = [tensor for name, tensor in tensors.items() if name.endswith(".lora_embedding_A")]
    ranks = [_rank(config, len(A)) for A in [*(A for A, *_ in layers), *embeddings]]
    size = {
        "layers": len(ranks),
        "ranks": [min(ranks), max(ranks)] if ranks else [],
        "trained_numbers": sum(t.numel() for name, t in tensors.items() if _is_trained(config, name)),
    }
    if not_finite := sum(not bool(tensor.detach().float().isfinite().all()) for tensor in tensors.values()):
        size["not_finite"] = not_finite
    numbers = (_sb_diagnostics if native else _lora_diagnostics)(layers) if layers else {}
    return size | {name: value for name, value in numbers.items() if math.isfinite(value)}


def _rank(config: PeftConfig, rows: int) -> int:
    """The rank of a layer whose A has so many rows. Those of all experts are in one A, one below the other."""
    ranks = {config.r, *(getattr(config, "rank_pattern", None) or {}).values()}
    if getattr(config, "target_parameters", None) and rows not in ranks:
        return max((rank for rank in ranks if rows % rank == 0), default=rows)
    return rows


def _is_trained(config: PeftConfig, name: str) -> bool:
    """Whether the tensor of this name was trained, and is not only saved along."""
    if ".lorasb_A" in name or ".lorasb_B" in name:
        return False
    if not isinstance(config, LoraConfig | LoraSbConfig):
        return True
    # PEFT saves the embeddings of a model whose vocabulary has changed, without training them.
    saved = config.modules_to_save or []
    marks = (".lora", ".trainable_tokens")
    return (
        any(mark in name for mark in marks) or name.endswith(".bias") or any(f".{module}." in name for module in saved)
    )


def same_weights(left: dict[str, Any], right: dict[str, Any]) -> bool:
    """Whether two results of `diagnostics` are of the same weights, up to the rounding of the norms of float32.

    The means of the norms tell any two steps of a training apart. Condition numbers do not count, because they magnify
    rounding.
    """
    names = {name for name in (*left, *right) if name.startswith("norm")}
    return all(math.isclose(left.get(n, math.nan), right.get(n, math.nan), rel_tol=1e-6) for n in names)


def _lora_diagnostics(layers: list[list[Tensor]]) -> dict[str, float]:
    pairs = [(A, B) for A, B in layers if A.ndim == 2 == B.ndim]  # convolutions have factors of four dimensions
    if not pairs:
        return {}
    by_layer = diagnose(*map(list, zip(*pairs, strict=True)), eps=None, dtype=torch.float32)
    numbers = {}
    for name in ("norm_A", "norm_B", "balance_gap"):
        values = by_layer[name][by_layer[name].isfinite()]
        numbers[name] = values.mean().item() if len(values) else math.nan
    return numbers | {name: by_layer[name].median().item() for name in ("cond_P", "cond_Q")}


def _sb_diagnostics(layers: list[list[Tensor]]) -> dict[str, float]:
    def gap(gram: Tensor) -> float:
        return (gram - torch.eye(len(gram))).abs().max().item()

    return {
        "norm_R": sum(R.norm().item() for *_, R in layers) / len(layers),
        "B_gap_I": max(gap(B.T @ B) for _, B, _ in layers),
        "A_gap_I": max(gap(A @ A.T) for A, _, _ in layers),
    }
