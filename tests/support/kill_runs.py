"""Trainings that trainers/test_checkpoints.py kills, in processes forked from one that has imported everything.

A run trains for 8 steps, saves at every second, and appends a line to losses.jsonl at every one. With `die` it kills
itself at an exact moment.
"""

import itertools
import json
import os
import shutil
import signal
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path

import forks
import peft
import tiny
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import Trainer, TrainerCallback, TrainerState
from trl import SFTConfig

from hf_reflora import LoraSbConfig, LoraSbSFTTrainer, RefLoraCallback, RefLoraSFTTrainer
from hf_reflora.recipes import sft
from hf_reflora.trainers import mixin


METHODS = ("reflora", "lora_sb")
STEPS, SAVE = 8, 2


@dataclass(frozen=True)
class Run:
    """What to train where, in one or two processes; the process of rank `dies` dies at the moment `die`: see `arm`."""

    out: Path
    method: str = "reflora"
    processes: int = 1
    resume: str | bool = True
    die: tuple[str, str] | None = None
    dies: int = 0
    recipe: Path | None = None  # the base model of the recipe, which then runs instead
    arguments: dict = field(default_factory=dict)

    def start(self) -> list[BaseProcess]:
        """Starts it; returns when all processes are about to train."""
        self.out.mkdir(exist_ok=True)
        started = [forks.CONTEXT.Event() for _ in range(self.processes)]
        processes = forks.start(train, self, started, processes=self.processes, logs=self.out)
        for event in started:
            if not event.wait(120):
                raise TimeoutError(self.log())
        return processes

    def end(self, processes: list[BaseProcess] | None = None, timeout: float = 120) -> list[int]:
        """Starts it unless that was done, and waits; returns the exit codes."""
        return forks.end(self.start() if processes is None else processes, timeout)

    def log(self) -> str:
        """The end of what the processes have written, for a failure's message."""
        return forks.output(self.out)

    def taken(self) -> int:
        """How many steps were taken, by all attempts together."""
        path = self.out / "losses.jsonl"
        return path.read_bytes().count(b"\n") if path.exists() else 0

    def losses(self) -> dict[int, list[tuple[float, float]]]:
        """Loss and gradient norm of every step, each time it was taken."""
        found = {}
        for line in (self.out / "losses.jsonl").read_text().splitlines():
            step, *values = json.loads(line)
            found.setdefault(step, []).append(tuple(values))
        return found

    def adapter(self) -> dict[str, torch.Tensor]:
        return load_file(self.out / "final" / "adapter_model.safetensors")


def arm(trainer: Trainer | None, when: str, file: str) -> None:
    """Makes this process kill itself at the moment `when` of `file`.

    - "before", "half": before the file is written, or when half of it is, in checkpoint-4 or where its path says;
    - "remove": before it is removed from there;
    - "delete": when checkpoint-2 is deleted and of all its files only this one is gone;
    - "collate": when the batch of this number is put together.
    """
    end = file if "/" in file else f"checkpoint-4/{file}"

    def die(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGKILL)

    def chosen(path) -> bool:
        return isinstance(path, str | os.PathLike) and os.fspath(path).endswith(end)

    def spoilt(write, position: int):
        """`write`, whose argument at `position` is a path, with the kill in it."""

        def spoilt_write(*args, **kwargs):
            if not chosen(args[position]):
                return write(*args, **kwargs)
            if when == "half":
                write(*args, **kwargs)
                os.truncate(args[position], os.path.getsize(args[position]) // 2)
            die()

        return spoilt_write

    if when == "collate":
        batches, collate = itertools.count(1), trainer.data_collator
        trainer.data_collator = lambda rows: die() if next(batches) == int(file) else collate(rows)
    elif when == "delete":
        rmtree = shutil.rmtree

        def spoilt_rmtree(folder, *args, **kwargs):
            if os.path.basename(folder) != "checkpoint-2":
                return rmtree(folder, *args, **kwargs)
            os.unlink(os.path.join(folder, file))
            die()

        shutil.rmtree = spoilt_rmtree
    else:
        torch.save = spoilt(torch.save, 1)
        peft.peft_model.safe_save_file = spoilt(peft.peft_model.safe_save_file, 1)
        TrainerState.save_to_json = spoilt(TrainerState.save_to_json, 1)
        os.replace = spoilt(os.replace, 1)
        os.unlink = spoilt(os.unlink, 0) if when == "remove" else os.unlink


class Losses(TrainerCallback):
    """One line a step, in one write."""

    def __init__(self, path: Path):
        self.path = path

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            line = json.dumps([state.global_step, logs["loss"], logs["grad_norm"]]) + "\n"
            with open(self.path, "ab", buffering=0) as file:
                file.write(line.encode())


def make(run: Run) -> Trainer:
    model = tiny.llama()
    settings = {"max_steps": STEPS, "save_strategy": "steps", "save_steps": SAVE, "warmup_steps": 3}
    settings |= {"gradient_accumulation_steps": 2, "train_sampling_strategy": "random", "ddp_broadcast_buffers": False}
    common = {
        "args": SFTConfig(**tiny.arguments(run.out, **(settings | run.arguments))),
        "train_dataset": tiny.token_dataset(24),
        "processing_class": tiny.tokenizer(),
        "callbacks": [],
    }
    targets = {"target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}
    if run.method == "lora_sb":
        return LoraSbSFTTrainer(model=get_peft_model(model, LoraSbConfig(r=4, **targets)), **common)
    torch.manual_seed(1)
    model = get_peft_model(model, LoraConfig(r=4, lora_dropout=0.1, **targets))
    return RefLoraSFTTrainer(model=model, reflora=RefLoraCallback(warmup_steps=2), **common)


def train_recipe(run: Run, started) -> None:
    """The recipe with evaluations and scores, 6 steps."""
    os.chdir(Path(__file__).parents[2])
    options = {"config": "recipes/smollm2-135m/reflora.yaml", "model_name_or_path": run.recipe, "output_dir": run.out}
    options |= {"dtype": "float32", "use_cpu": "true", "cpu_threads": 1, "dataset_train_split": "train[:24]"}
    options |= {"dataset_test_split": "test[:3]", "score_max_new_tokens": 4, "logging_steps": 1, "max_length": 1024}
    options |= {"reflora_warmup_steps": 0}
    options |= {"eval_strategy": "epoch", "save_strategy": "steps", "save_steps": 2, "resume_from_checkpoint": "true"}
    arguments = [str(value) for name, setting in options.items() for value in (f"--{name}", setting)]
    if run.die is not None:
        arm(None, *run.die)
    started.set()
    sft.main(*sft.make_parser().parse_args_and_config(arguments))


def train(run: Run, started: list) -> None:
    """The whole life of a process; `started` has an event for each."""
    rank = int(os.environ.get("RANK", 0))
    if run.recipe is not None:
        return train_recipe(run, started[rank])
    mixin.plot = lambda *args: False  # most of the time of such a run
    trainer = make(run)
    if rank == 0:
        trainer.add_callback(Losses(run.out / "losses.jsonl"))
    if run.die is not None and run.dies == rank:
        arm(trainer, *run.die)
    started[rank].set()
    trainer.train(resume_from_checkpoint=run.resume)
    trainer.save_model(str(run.out / "final"))
