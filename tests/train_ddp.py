"""A small training for test_distributed.py: `accelerate launch ... train_ddp.py OUT ACCUMULATION`."""

import sys
from pathlib import Path

import tiny
import torch
from transformers import Trainer, TrainingArguments

from hf_reflora import RefLoraCallback


METHODS = {"lora": [], "reflora": [RefLoraCallback()], "reflora_s": [RefLoraCallback("reflora_s")]}


def train(out: Path, accumulation: int) -> None:
    """Trains with every method; every process writes its losses, gradient norms and factors."""
    torch.set_num_threads(1)
    for method, callbacks in METHODS.items():
        changes = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": accumulation, "max_steps": 5}
        args = TrainingArguments(**tiny.arguments(out, **changes, max_grad_norm=0.02))
        model = tiny.lora(tiny.llama())
        trainer = Trainer(model=model, args=args, train_dataset=tiny.token_dataset(16), callbacks=callbacks)
        trainer.train()
        rows = [(row["loss"], row["grad_norm"]) for row in trainer.state.log_history if "loss" in row]
        result = {"rows": rows, "factors": tiny.trainable(model), "processes": args.world_size}
        torch.save(result, out / f"{method}-{args.process_index}.pt")


if __name__ == "__main__":
    train(Path(sys.argv[1]), int(sys.argv[2]))
