"""Initializations in two processes, for lora_sb/test_initialize_distributed.py."""

import contextlib
import io
import logging
from pathlib import Path

import tiny
import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_reflora import LoraSbCallback, LoraSbConfig, initialize_lora_sb_weights
from hf_reflora.lora_sb.initialize import mean_loss


SAMPLES = 7  # an odd number: one process has a sample more
CASES = {
    "default": ("lora_sb", {}),
    "block by block": ("lora_sb", {"r": 1}),
    "one pass": ("lora_sb", {"passes": 1}),
    "three passes": ("lora_sb", {"passes": 3}),
    "gradient": ("lora_sb", {"update": "gradient", "eta": 0.1}),
    "one sample": ("lora_sb", {"num_samples": 1}),  # none for the second process
    "lora": ("lora", {"passes": 3}),
}


class Keep(TrainerCallback):
    def __init__(self):
        self.factors = {}

    def on_epoch_begin(self, args, state, control, model=None, **kwargs):
        tensors = [*model.named_parameters(), *model.named_buffers()]
        self.factors = {name: t.detach().clone() for name, t in tensors if "lora" in name and "base_layer" not in name}


def train(out: Path) -> None:
    """Initializes in a Trainer in every way; every process writes its factors at the start and after two steps."""
    for case, (kind, changes) in CASES.items():
        config = LoraSbConfig if kind == "lora_sb" else LoraConfig
        torch.manual_seed(1)
        changes = dict(changes)
        rank = changes.pop("r", 4)
        model = get_peft_model(tiny.llama(), config(r=rank, target_modules=["q_proj", "down_proj"]))
        keep, seen = Keep(), []

        def forward_fn(model, batch):
            seen.extend(batch["input_ids"].tolist())  # noqa: B023
            return mean_loss(model, batch)

        args = TrainingArguments(**tiny.arguments(out, max_steps=2, ddp_broadcast_buffers=False, ddp_timeout=60))
        callbacks = [LoraSbCallback(**{"num_samples": SAMPLES, "forward_fn": forward_fn, **changes}), keep]
        Trainer(model=model, args=args, train_dataset=tiny.token_dataset(16), callbacks=callbacks).train()
        result = {"start": keep.factors, "end": tiny.trainable(model), "seen": seen, "processes": args.world_size}
        torch.save(result, out / f"{case}-{args.process_index}.pt")


class Unused(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.unused = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        return self.b(torch.tanh(self.a(x)))


def loss(model: nn.Module, batch: dict) -> tuple:
    return model(batch["x"]).square().mean(), len(batch["x"])


def fail(out: Path) -> None:
    """What goes wrong on one process is raised by all, in good time; every process writes the messages."""
    rank, messages = dist.get_rank(), {}
    x = torch.randn(2, 6, generator=torch.Generator().manual_seed(rank))
    for case in ("unused", "nan on one", "forward on one", "no data", "no data on one", "float64"):
        model = get_peft_model(
            Unused(), LoraSbConfig(r=2, target_modules=["a", "b", *["unused"] * (case == "unused")])
        )
        data = {"nan on one": [{"x": x * float("nan")}] if rank else [{"x": x}]}
        data |= {"forward on one": [{"x": x[:, : 6 - rank]}]}  # a shape that the model does not take
        data |= {"no data": [], "no data on one": [{"x": x}] if rank else []}
        if case == "float64":  # whose gradients are float64 where there are any
            model, data[case] = model.double(), [{"x": x.double()}] if rank else []
        shown = io.StringIO()
        try:
            with contextlib.redirect_stderr(shown):
                initialize_lora_sb_weights(model, data.get(case, [{"x": x}]), eta=0.1, forward_fn=loss, passes=1)
            messages[case] = None
        except Exception as error:
            messages[case] = f"{type(error).__name__}: {error}"
        bar = "LoRA-SB initialization" in shown.getvalue()
        assert bar == (rank == 0), "a progress bar on the main process only"
        dist.barrier()
    torch.save(messages, out / f"messages-{rank}.pt")


def uneven(out: Path) -> None:
    """Two batches for one process and 40 for the other."""
    ids = torch.randint(4, 260, (2, 120), generator=torch.Generator().manual_seed(dist.get_rank()))
    data = [{"input_ids": ids, "labels": ids}] * (40 if dist.get_rank() else 2)
    log = io.StringIO()
    logging.getLogger("hf_reflora").addHandler(logging.StreamHandler(log))
    result = {}
    for name, passes in (("default", None), ("one pass", 1)):
        model = get_peft_model(tiny.llama(), LoraSbConfig(r=1, target_modules="all-linear"))
        initialize_lora_sb_weights(model, data, eta=0.1, passes=passes, show_progress_bar=False)
        result[name] = {name: t.clone() for name, t in model.state_dict().items() if "lorasb" in name}
    torch.save(result | {"log": log.getvalue()}, out / f"uneven-{dist.get_rank()}.pt")


def main(out: Path) -> None:
    train(out)
    fail(out)
    uneven(out)
