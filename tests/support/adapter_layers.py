"""What the layers of an adapter hold, read without the package's own functions."""

import numpy as np
import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from hf_reflora.lora_sb import LoraSbLayer


def truncation(M: Tensor, r: int) -> Tensor:
    U, S, V = np.linalg.svd(M.double().numpy(), full_matrices=False)
    return torch.from_numpy((U[:, :r] * S[:r]) @ V[:r])


def adapters(model: nn.Module, adapter: str = "default") -> dict[str, nn.Module]:
    layers = ((n, m) for n, m in model.named_modules() if isinstance(m, LoraLayer | LoraSbLayer) and adapter in m.r)
    return {name.removeprefix("base_model.model."): m for name, m in layers}


def factors(layer: nn.Module, adapter: str = "default") -> tuple[Tensor, ...]:
    """B, R, A of LoRA-SB or B, A of LoRA."""
    if isinstance(layer, LoraSbLayer):
        return layer.lorasb_B[adapter], layer.lorasb_R[adapter], layer.lorasb_A[adapter]
    return layer.lora_B[adapter].weight, layer.lora_A[adapter].weight


def delta(layer: nn.Module, adapter: str = "default") -> Tensor:
    """s B R A or s B A, in float64."""
    product = torch.linalg.multi_dot([f.detach().double() for f in factors(layer, adapter)])
    return layer.scaling[adapter] * product


def everything(model: nn.Module) -> dict[str, Tensor]:
    """All parameters and buffers with bytes of their own."""
    return {n: t.detach().clone() for n, t in [*model.named_parameters(), *model.named_buffers()]}
