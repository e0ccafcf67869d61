"""A run resumed from a checkpoint is the unbroken run, bit for bit."""

import json

import pytest
import tiny
import torch
from transformers import Trainer, TrainingArguments
from trl import SFTConfig

from hf_reflora import RefLoraCallback, RefLoraSFTTrainer, RefLoraTrainer, create_reflora_optimizer


def losses(trainer) -> list[tuple]:
    return [(row["step"], row["loss"], row["grad_norm"]) for row in trainer.state.log_history if "loss" in row]


def arguments(tmp_path, config):
    changes = {"max_steps": 8, "save_strategy": "steps", "save_steps": 4, "train_sampling_strategy": "random"}
    return config(**tiny.arguments(tmp_path, gradient_accumulation_steps=2, **changes))


def resumed_is_unbroken(tmp_path, make):
    unbroken = make(tiny.lora(tiny.llama()))
    unbroken.train()
    resumed = make(tiny.lora(tiny.llama(), seed=7))
    before = tiny.trainable(resumed.model)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert losses(resumed) == losses(unbroken)
    assert [step for step, *_ in losses(resumed)] == list(range(1, 9))
    tiny.assert_same(tiny.trainable(resumed.model), tiny.trainable(unbroken.model))
    assert not all(torch.equal(value, before[name]) for name, value in tiny.trainable(resumed.model).items())


@pytest.mark.parametrize("method", ["reflora", "reflora_s"])
@pytest.mark.parametrize(("warmup", "interval"), [(0, 1), (6, 1), (0, 3)], ids=["plain", "in warm-up", "interval 3"])
@pytest.mark.parametrize("kind", ["Trainer", "SFTTrainer"])
def test_resumed_run(tmp_path, kind, method, warmup, interval):
    trainer_cls, config = {
        "Trainer": (RefLoraTrainer, TrainingArguments),
        "SFTTrainer": (RefLoraSFTTrainer, SFTConfig),
    }[kind]

    def make(model):
        return trainer_cls(
            model=model,
            args=arguments(tmp_path, config),
            train_dataset=tiny.token_dataset(32, labels=kind == "Trainer"),
            processing_class=tiny.tokenizer(),
            reflora=RefLoraCallback(method, warmup_steps=warmup, interval=interval),
        )

    resumed_is_unbroken(tmp_path, make)
    state = json.loads((tmp_path / "checkpoint-4" / "trainer_state.json").read_text())
    assert "RefLoraCallback" not in state["stateful_callbacks"]  # its steps are the Trainer's


@pytest.mark.parametrize("method", ["reflora", "reflora_s"])
def test_resumed_run_of_create_reflora_optimizer(tmp_path, method):
    """The count of steps travels in the Trainer's optimizer.pt."""

    def make(model):
        optimizer = create_reflora_optimizer(
            model, torch.optim.AdamW, lr=0.01, method=method, warmup_steps=3, interval=2
        )
        return Trainer(
            model=model,
            args=arguments(tmp_path, TrainingArguments),
            train_dataset=tiny.token_dataset(32),
            optimizers=(optimizer, None),
        )

    resumed_is_unbroken(tmp_path, make)


@pytest.mark.parametrize("method", ["reflora", "reflora_s"])
def test_a_run_without_reflora_goes_on_with_it(tmp_path, method):
    """The callback has no state, so a checkpoint of plain LoRA can be resumed with it: warm-up by switching."""

    def make(model, callbacks):
        data = tiny.token_dataset(32)
        return Trainer(
            model=model, args=arguments(tmp_path, TrainingArguments), train_dataset=data, callbacks=callbacks
        )

    make(tiny.lora(tiny.llama()), []).train()
    switched = make(tiny.lora(tiny.llama(), seed=7), [RefLoraCallback(method)])
    switched.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    unbroken = make(tiny.lora(tiny.llama()), [RefLoraCallback(method, warmup_steps=4)])
    unbroken.train()
    tiny.assert_same(tiny.trainable(switched.model), tiny.trainable(unbroken.model))
