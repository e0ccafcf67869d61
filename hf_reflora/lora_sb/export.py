"""Writes LoRA-SB adapters as ordinary LoRA adapters, which stock PEFT, vLLM and llama.cpp load."""

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model_state_dict
from peft.utils import SAFETENSORS_WEIGHTS_NAME, load_peft_weights
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import pad
from transformers import AutoConfig

from ..adapter_files import copy_companions, download
from .config import LoraSbConfig
from .subspace import balanced_factors


@dataclass(frozen=True)
class ExportReport:
    """What an export wrote.

    Attributes:
        ranks: The rank of each layer, without the zeros that fill it up to the largest.
        relative_error: What truncation to a smaller rank lost over all layers, ‖ΔW − ΔW_k‖_F / ‖ΔW‖_F; 0 if exact.
        relative_error_by_layer: The same for each layer.
    """

    ranks: dict[str, int]
    relative_error: float
    relative_error_by_layer: dict[str, float]


def export_lora(
    adapter: PeftModel | str | os.PathLike,
    output_dir: str | os.PathLike,
    *,
    rank: int | None = None,
    adapter_name: str = "default",
) -> ExportReport:
    """Writes a LoRA-SB (or LoRA-XS) adapter as an ordinary LoRA adapter, exactly: lora_B = s B R and lora_A = A.

    All layers have one rank r, with zeros in those of a smaller one, and `lora_alpha = r`, so that the LoRA's scaling
    is 1 for every library that reads it, also for llama.cpp and vLLM, which know no ranks of single layers. Stock PEFT
    loads it onto the same base model without hf_reflora and can train it further. `modules_to_save` are written as
    well, and the rows of embedding and head where the vocabulary has been resized. The tokenizer, chat templates and
    license beside a saved adapter go along. The factors (r, in) and (out, r) are computed in float64 and saved in
    float32.

    Args:
        adapter: A `PeftModel`, a folder with a saved adapter, or its id on the Hub. The base model is not needed.
        output_dir: Folder to write; it must not exist or be empty. After an error it is as it was.
        rank: If given, keep only that many singular triplets of each ΔW. The adapter is then smaller and not exact;
            the report says by how much. A layer whose own rank is smaller keeps that rank.
        adapter_name: Which adapter of a `PeftModel`.

    Returns:
        The ranks and, with `rank`, the error of the truncation.

    Raises:
        ValueError: for an adapter of another method, one that is not initialized, lacks a tensor or is not finite; for
            a `rank` out of range.
        FileExistsError: if `output_dir` has files.
    """
    source = None
    if not isinstance(adapter, PeftModel):
        source = Path(adapter) if Path(adapter).is_dir() else download(str(adapter))
    config, tensors = _load(adapter if source is None else source, adapter_name)
    largest = max([config.r, *config.rank_pattern.values()])
    if rank is not None and not (isinstance(rank, int) and 1 <= rank <= largest):
        raise ValueError(f"rank must be an integer between 1 and the adapter's own rank, {largest}; got {rank}.")
    output = Path(output_dir).resolve()
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise FileExistsError(f"{output} exists and is not empty. Choose another folder or remove it.")
    layers, others = _layers(tensors)
    folded, ranks = _without_base_weights(config, others), {}
    factors: dict[str, tuple[Tensor, Tensor]] = {}
    lost_energy, energy = {}, {}  # ‖ΔW − ΔW_k‖_F² and ‖ΔW‖_F² by layer
    for name, (A, B, R) in layers.items():
        # In float64, so that the only rounding is that of the product to float32.
        lora_A, lora_B = A.double(), config.scaling * (B.double() @ R.double())  # s B R A = lora_B lora_A
        module = _module_name(name)
        lost_energy[module] = 0.0
        energy[module] = (lora_B.T @ lora_B @ lora_A @ lora_A.T).trace().item()  # without the (out, in) product
        if rank is not None and rank < len(lora_A):
            lora_A, lora_B, lost_energy[module] = _truncate(lora_A, lora_B, rank)
        ranks[module] = len(lora_A)
        factors[name] = lora_A.float(), lora_B.float()
    r = max(ranks.values())
    for name, (lora_A, lora_B) in factors.items():
        # llama.cpp divides alpha by a layer's own rank, and vLLM takes the same rank for all: neither reads PEFT's
        # patterns. Rows and columns of zeros give all layers one rank, and change no product.
        missing = r - len(lora_A)
        folded[f"{name}.lora_A.weight"] = pad(lora_A, (0, 0, 0, missing))
        folded[f"{name}.lora_B.weight"] = pad(lora_B, (0, missing))
    # safetensors takes contiguous tensors only.
    folded = {name: tensor.contiguous() for name, tensor in folded.items()}
    _write(output, _lora_config(config, r), folded, source)
    return ExportReport(
        ranks=ranks,
        relative_error=(sum(lost_energy.values()) / (sum(energy.values()) or 1)) ** 0.5,
        relative_error_by_layer={module: (lost_energy[module] / (energy[module] or 1)) ** 0.5 for module in ranks},
    )


def _load(adapter: PeftModel | str | os.PathLike, adapter_name: str) -> tuple[LoraSbConfig, dict[str, Tensor]]:
    if isinstance(adapter, PeftModel):
        if adapter_name not in adapter.peft_config:
            raise ValueError(f"There is no adapter {adapter_name!r}; the model has {', '.join(adapter.peft_config)}.")
        config = adapter.peft_config[adapter_name]
    else:
        config = PeftConfig.from_pretrained(str(adapter))
    if not isinstance(config, LoraSbConfig):
        name = getattr(config.peft_type, "value", config.peft_type)
        hint = (
            "It is an ordinary LoRA already: load or push it as it is."
            if name == "LORA"
            else "Only LoRA-SB and LoRA-XS adapters can be folded."
        )
        raise ValueError(f"export_lora folds LORASB adapters; this one is {name}. {hint}")
    if isinstance(adapter, PeftModel):
        return config, get_peft_model_state_dict(adapter, adapter_name=adapter_name)
    return config, load_peft_weights(str(adapter), device="cpu")


def _layers(tensors: dict[str, Tensor]) -> tuple[dict[str, list[Tensor]], dict[str, Tensor]]:
    """A (r, in), B (out, r) and R (r, r) of each layer, and the other tensors of the adapter."""
    kinds = (".lorasb_A", ".lorasb_B", ".lorasb_R")
    tensors = {name: tensor.detach().cpu() for name, tensor in tensors.items()}
    names = sorted({name.removesuffix(kind) for name in tensors for kind in kinds if name.endswith(kind)})
    missing = [name + kind for name in names for kind in kinds if name + kind not in tensors]
    if missing or not names:
        raise ValueError(
            f"The adapter is incomplete: it lacks {', '.join(missing) or 'A, B and R of any layer'}. Save it again."
        )
    layers = {name: [tensors.pop(name + kind) for kind in kinds] for name in names}
    for name, (A, B, R) in layers.items():
        if not all(torch.isfinite(tensor).all() for tensor in (A, B, R)):
            raise ValueError(f"The adapter has values that are not finite, in {_module_name(name)}.")
        if not A.any():  # as a new adapter with init_weights="lora_sb" has it
            raise ValueError(f"The adapter is not initialized yet: A is 0 in {_module_name(name)}. Train it first.")
    return layers, tensors


def _without_base_weights(config: LoraSbConfig, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors without the base weights of embedding and head, where they are those of the base model.

    PEFT saves them along with an adapter of the embedding or the head. Other readers of a LoRA do not expect them, so
    they are left out if the base model's own configuration is on this machine and says that the vocabulary has not
    been resized. Otherwise they may be in no other file.
    """
    base_weights = {name: tensor for name, tensor in tensors.items() if ".base_layer." in name}
    if any(len(tensor) != _vocabulary_of_base(config) for tensor in base_weights.values()):
        return tensors
    return {name: tensor for name, tensor in tensors.items() if name not in base_weights}


def _vocabulary_of_base(config: LoraSbConfig) -> int | None:
    """The size of the base model's vocabulary, None where its configuration is not on this machine."""
    if not config.base_model_name_or_path:
        return None
    try:
        base = AutoConfig.from_pretrained(
            config.base_model_name_or_path, revision=config.revision, local_files_only=True
        )
    except (OSError, ValueError):  # not there, or of a kind that needs its own code
        return None
    return base.get_text_config().vocab_size


def _truncate(lora_A: Tensor, lora_B: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """The best factors (rank, in) and (out, rank) of a smaller rank, and the energy ‖ΔW − ΔW_k‖_F² that they lack.

    The SVD is that of the r × r product of the triangular factors of two QRs, not of the (out, in) product.
    """
    Q_B, R_B = torch.linalg.qr(lora_B)
    Q_A, R_A = torch.linalg.qr(lora_A.T)
    U, S, Vt = torch.linalg.svd(R_B @ R_A.T)
    B, A = balanced_factors(Q_B @ U[:, :rank], S[:rank], Q_A @ Vt[:rank].T)
    return A, B, S[rank:].square().sum().item()


def _module_name(name: str) -> str:
    return name.removeprefix("base_model.model.")


def _lora_config(config: LoraSbConfig, r: int) -> LoraConfig:
    # What names the base model and the layers; the rest of LoraConfig keeps its defaults.
    copied: tuple[str, ...] = (
        "base_model_name_or_path",
        "revision",
        "task_type",
        "auto_mapping",
        "target_modules",
        "exclude_modules",
    )
    copied += ("layers_to_transform", "layers_pattern", "modules_to_save", "trainable_token_indices")
    return LoraConfig(
        r=r,
        lora_alpha=r,
        lora_dropout=config.lorasb_dropout,
        init_lora_weights=True,
        inference_mode=True,
        **{name: getattr(config, name) for name in copied},
    )


def _write(output: Path, config: LoraConfig, tensors: dict[str, Tensor], source: Path | None) -> None:
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent) as temporary:
        unfinished = Path(temporary) / output.name
        unfinished.mkdir()
        config.save_pretrained(unfinished)
        save_file(tensors, unfinished / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
        if source is not None:
            copy_companions(source, unfinished)
        if output.exists():
            output.rmdir()  # it is empty; Windows does not rename a folder onto another one
        unfinished.rename(output)  # in one step, so that no half-written adapter is ever there
