"""Adapters for the Space's engine, and the end of what it yields."""

import tiny
import torch
from peft import LoraConfig, get_peft_model


def save_adapter(folder, model=None, **config) -> str:
    """An adapter that changes what the model says, saved by PEFT; returns the folder's name."""
    config = {"r": 2, "target_modules": ["q_proj", "v_proj"], **config}
    model = get_peft_model(tiny.llama() if model is None else model, LoraConfig(**config))
    for name, parameter in model.named_parameters():
        if any(part in name for part in ("lora_B", "modules_to_save", "trainable_tokens_delta")):
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    return str(folder)


def last(iterator):
    return list(iterator)[-1]
