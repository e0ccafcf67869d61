"""What the parts have in common: the device, models of random weights, batches, timing, a short training."""

import math
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments


LLAMA_3_8B = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32}
LLAMA_3_8B |= {"num_key_value_heads": 8, "vocab_size": 128256}
MEDIUM = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 8, "num_attention_heads": 16}
MEDIUM |= {"num_key_value_heads": 4, "vocab_size": 4096}
TINY = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
TINY |= {"num_key_value_heads": 2, "vocab_size": 256}
# Half-precision weights take 16 GB for Llama-3-8B; a card with less gets fewer layers.
BYTES_A_LAYER, BYTES_OF_THE_REST = 0.44e9, 8e9


class Skipped(Exception):
    """The machine lacks what a part needs; the message says what."""


@dataclass(frozen=True)
class Setting:
    """Where the parts run: on the GPU, or with `dry` in miniature on the CPU."""

    dry: bool

    @property
    def device(self) -> torch.device:
        if self.dry:
            return torch.device("cpu")
        self.require_gpu()
        return torch.device("cuda")

    def require_gpu(self) -> None:
        if self.dry or not torch.cuda.is_available():
            raise Skipped("there is no CUDA device")

    def large(self) -> LlamaConfig:
        """Llama-3-8B, with fewer layers on a small card."""
        if self.dry:
            return LlamaConfig(**TINY)
        free, _ = torch.cuda.mem_get_info()
        layers = max(1, min(32, int((free - BYTES_OF_THE_REST) / BYTES_A_LAYER)))
        return LlamaConfig(**LLAMA_3_8B | {"num_hidden_layers": layers})

    def medium(self) -> LlamaConfig:
        return LlamaConfig(**TINY if self.dry else MEDIUM)

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32 if self.dry else torch.bfloat16

    def synchronize(self) -> None:
        if not self.dry:
            torch.cuda.synchronize()

    def milliseconds(self, work: Callable[[], Any], repeats: int, warm_up: int = 2) -> float:
        """The median time of `work`."""
        times = []
        for i in range(warm_up + repeats):
            self.synchronize()
            begin = time.perf_counter()
            work()
            self.synchronize()
            times += [time.perf_counter() - begin] if i >= warm_up else []
        return round(statistics.median(times) * 1e3, 3)

    def reset_peak(self) -> None:
        if not self.dry:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def peak_gb(self) -> float | None:
        return None if self.dry else round(torch.cuda.max_memory_allocated() / 1e9, 3)


def random_model(config: LlamaConfig, device: torch.device, dtype: torch.dtype) -> LlamaForCausalLM:
    """The weights are made on the device itself: on the CPU those of 8 billion parameters take minutes."""
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            return LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(default)


def adapters(
    config: LlamaConfig,
    rank: int,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    drawn_on: torch.device | None = None,  # where the random numbers are drawn. Default: `device`
) -> nn.Module:
    """LoRA factors in the middle of training on all linear layers, with gradients; the base weights have no memory."""
    with torch.device("meta"):
        model = get_peft_model(LlamaForCausalLM(config), LoraConfig(r=rank, target_modules="all-linear"))
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            for factors in (layer.lora_A, layer.lora_B):
                factors.to_empty(device=device).to(dtype)
    generator = torch.Generator(drawn_on or device).manual_seed(0)
    for parameter in trainable(model):
        numbers = torch.randn(2, *parameter.shape, generator=generator, device=generator.device)
        parameter.data.copy_(numbers[0] * 0.02)
        parameter.grad = (numbers[1] * 1e-3).to(parameter)
    return model


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def random_batches(config: LlamaConfig, count: int, size: int, length: int, device: torch.device) -> list[dict]:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(config.vocab_size, (count, size, length), generator=generator).to(device)
    return [{"input_ids": batch, "labels": batch, "attention_mask": torch.ones_like(batch)} for batch in tokens]


def train(trainer_class: type, model: nn.Module, vocabulary: int, dry: bool, steps: int = 6, **more: Any):
    """A few steps of a trainer on rows that repeat themselves, so that the loss falls; the trainer and its losses.

    Args:
        more: TrainingArguments, and "callbacks" for the trainer.

    Raises:
        AssertionError: if a loss is not finite or the last is not below the first.
    """
    tokens = (torch.arange(32)[None] + torch.arange(16)[:, None] * 7) % min(vocabulary, 64)
    rows = [{"input_ids": row, "labels": row} for row in tokens]
    callbacks = more.pop("callbacks", None)
    options = {"max_steps": steps, "per_device_train_batch_size": 4, "learning_rate": 5e-3, "logging_steps": 1}
    options |= {"save_strategy": "no", "report_to": "none", "disable_tqdm": True, "seed": 0, "use_cpu": dry}
    options |= {"lr_scheduler_type": "constant"}
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(folder, **options | more)
        trainer = trainer_class(model=model, args=arguments, train_dataset=rows, callbacks=callbacks)
        trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert all(map(math.isfinite, losses)), f"the losses are {losses}"
    assert losses[-1] < losses[0], f"the loss does not fall: {losses}"
    return trainer, losses
