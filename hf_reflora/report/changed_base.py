"""LoRAs whose start was taken out of the base model's weights, as the ordinary LoRAs of the unchanged base model.

PiSSA, OLoRA, CorDA and LoRA-GA begin with factors A₀ and B₀ that are not 0 and with W_res = W − s B₀A₀ in place of W,
so that the model computes what it did. After training, W_res + s BA = W + s (BA − B₀A₀) = W + s [B, −B₀] [A; A₀], a
LoRA of twice the rank on the base model W that everybody has. PEFT's
`save_pretrained(path_initial_model_for_weight_conversion=…)` does the same, but loads the initial adapter into the
model that trains, and leaves `modules_to_save` out of the file.
"""

import copy

import torch
from peft import LoraConfig
from torch import Tensor


FACTORS = {".lora_A.": (0, 1), ".lora_B.": (1, -1)}  # the dimension of the rank, and the sign of the initial factor


def joined(
    tensors: dict[str, Tensor],  # lora_A.weight (r, in), lora_B.weight (out, r), and others, which stay
    start: dict[str, Tensor],  # A₀ (r, in) and B₀ (out, r)
) -> dict[str, Tensor]:
    """The trained factors joined with the initial ones: A becomes [A; A₀] and B becomes [B, −B₀].

    Args:
        tensors: By the names of the adapter's file, or by those of the model's parameters of the adapter "default".
        start: By the names of the file.
    """

    def join(name: str, tensor: Tensor) -> Tensor:
        initial = start.get(name.replace(".default.", "."))
        if initial is None:
            return tensor
        dim, sign = _factor(name)
        return torch.cat([tensor, sign * initial.to(tensor)], dim=dim)

    return {name: join(name, tensor) for name, tensor in tensors.items()}


def parted(tensors: dict[str, Tensor], start: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What `joined` was made of: the tensors with the trained factors, and the initial factors.

    Args:
        tensors: What `joined` has returned, by the names of the adapter's file.
        start: Whose names are those of the joined factors.
    """
    trained, initial = dict(tensors), {}
    for name in start:
        dim, sign = _factor(name)
        trained[name], second = (half.contiguous() for half in tensors[name].chunk(2, dim=dim))
        initial[name] = sign * second
    return trained, initial


def doubled(config: LoraConfig) -> LoraConfig:
    """The configuration of the joined factors: twice the rank, the same scaling, and PEFT's default start."""
    config = copy.deepcopy(config)
    config.init_lora_weights = True
    config.r *= 2
    # s is alpha / r, or with rsLoRA alpha / √r.
    config.lora_alpha *= 2**0.5 if config.use_rslora else 2
    return config


def _factor(name: str) -> tuple[int, int]:
    return next(value for mark, value in FACTORS.items() if mark in name)
