"""RefLoraCallback in TRL trainers other than SFT, and in a sequence classification Trainer."""

import pytest
import tiny
import torch
from datasets import Dataset
from peft import LoraConfig, TaskType, get_peft_model
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaForSequenceClassification,
    Trainer,
    TrainingArguments,
)
from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer

from hf_reflora import RefLoraCallback
from hf_reflora.pairs import lora_layers, trainable_pairs


COMMON = {
    "max_steps": 3,
    "logging_steps": 1,
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-2,
    "report_to": "none",
    "save_strategy": "no",
    "use_cpu": True,
    "seed": 0,
}


def preferences():
    rows = [{"prompt": f"{i} + {i} = ", "chosen": str(2 * i), "rejected": str(i)} for i in range(8)]
    return Dataset.from_list(rows)


def dpo(folder, callbacks):
    return DPOTrainer(
        model=tiny.llama(),
        args=DPOConfig(output_dir=folder, bf16=False, gradient_checkpointing=False, **COMMON),
        train_dataset=preferences(),
        processing_class=tiny.tokenizer(),
        peft_config=LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
        callbacks=callbacks,
    )


def reward(folder, callbacks):
    rows = preferences().map(
        lambda row: {"chosen": row["prompt"] + row["chosen"], "rejected": row["prompt"] + row["rejected"]}
    )
    config = tiny.llama().config
    config.num_labels = 1
    torch.manual_seed(0)
    return RewardTrainer(
        model=LlamaForSequenceClassification(config),
        args=RewardConfig(output_dir=folder, bf16=False, gradient_checkpointing=False, **COMMON),
        train_dataset=rows.remove_columns("prompt"),
        processing_class=tiny.tokenizer(),
        peft_config=LoraConfig(r=4, target_modules="all-linear", task_type="SEQ_CLS"),
        callbacks=callbacks,
    )


def classify(folder, callbacks):
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=32,
    )
    model = get_peft_model(
        BertForSequenceClassification(config), LoraConfig(r=4, task_type=TaskType.SEQ_CLS, target_modules="all-linear")
    )
    rows = Dataset.from_list([{"input_ids": [5 + i, 9, 20 - i, 3], "labels": i % 2} for i in range(8)])
    return Trainer(model, TrainingArguments(folder, **COMMON), train_dataset=rows, callbacks=callbacks)


@pytest.mark.parametrize("make", [dpo, reward, classify])
def test_callback_changes_the_training_as_it_should(make, tmp_path):
    """The first step (B = 0) is LoRA's to the bit, the later ones are not, and the loss stays finite."""
    losses, factors = {}, {}
    for name, callbacks in (("lora", []), ("reflora", [RefLoraCallback()])):
        trainer = make(str(tmp_path / name), callbacks)
        trainer.train()
        losses[name] = [float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
        factors[name] = [pair.A.detach().clone() for pair in trainable_pairs(lora_layers(trainer.model))]
    assert len(losses["lora"]) == len(losses["reflora"]) == 3
    assert losses["lora"][:2] == losses["reflora"][:2]
    assert torch.tensor(losses["reflora"]).isfinite().all()
    assert any(not torch.equal(a, b) for a, b in zip(*factors.values(), strict=True))
