"""The callbacks in trainers other than SFT: TRL's DPO, Reward and GRPO, sequence classification and Seq2Seq."""

import pytest
import tiny
import torch
import torch.nn.functional as F
from datasets import Dataset
from peft import LoraConfig, TaskType, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaForSequenceClassification,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
)
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, RewardConfig, RewardTrainer
from versions import needs

from hf_reflora import LoraSbCallback, LoraSbConfig, RefLoraCallback
from hf_reflora.recipes.dpo import loss_at_the_reference


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
EPS = 1e-5


def lora(**changes):
    return LoraConfig(**{"r": 4, "target_modules": "all-linear", **changes})


def lora_sb(**changes):
    return LoraSbConfig(**{"r": 4, "target_modules": "all-linear", **changes})


def preferences():
    rows = [{"prompt": f"{i} + {i} = ", "chosen": str(2 * i), "rejected": str(i)} for i in range(8)]
    return Dataset.from_list(rows)


def dpo(folder, callbacks, config=lora):
    return DPOTrainer(
        model=tiny.llama(),
        args=DPOConfig(output_dir=folder, bf16=False, gradient_checkpointing=False, **COMMON),
        train_dataset=preferences(),
        processing_class=tiny.tokenizer(),
        peft_config=config(task_type="CAUSAL_LM"),
        callbacks=callbacks,
    )


def reward(folder, callbacks, config=lora):
    rows = preferences().map(
        lambda row: {"chosen": row["prompt"] + row["chosen"], "rejected": row["prompt"] + row["rejected"]}
    )
    model_config = tiny.llama().config
    model_config.num_labels = 1
    torch.manual_seed(0)
    return RewardTrainer(
        model=LlamaForSequenceClassification(model_config),
        args=RewardConfig(output_dir=folder, bf16=False, gradient_checkpointing=False, **COMMON),
        train_dataset=rows.remove_columns("prompt"),
        processing_class=tiny.tokenizer(),
        peft_config=config(task_type="SEQ_CLS"),
        callbacks=callbacks,
    )


def byte_sum(completions, **kwargs):
    """A reward that differs from one sampled completion to the next."""
    return [sum(text.encode()) / 1000 for text in completions]


def grpo(folder, callbacks, config=lora):
    return GRPOTrainer(
        model=tiny.llama(),
        reward_funcs=byte_sum,
        args=GRPOConfig(
            output_dir=folder,
            bf16=False,
            gradient_checkpointing=False,
            num_generations=4,
            max_completion_length=6,
            **COMMON,
        ),
        train_dataset=preferences().select_columns("prompt"),
        processing_class=tiny.tokenizer(),
        peft_config=config(task_type="CAUSAL_LM"),
        callbacks=callbacks,
    )


def classify(folder, callbacks, config=lora):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = BertForSequenceClassification(BertConfig(vocab_size=64, max_position_embeddings=32, **sizes))
    rows = Dataset.from_list([{"input_ids": [5 + i, 9, 20 - i, 3], "labels": i % 2} for i in range(8)])
    return Trainer(
        get_peft_model(model, config(task_type=TaskType.SEQ_CLS)),
        TrainingArguments(folder, adam_epsilon=1e-4, **COMMON),  # or gradients of rounding take whole steps
        train_dataset=rows,
        callbacks=callbacks,
    )


def seq2seq(folder, callbacks, config=lora):
    torch.manual_seed(0)
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    model = T5ForConditionalGeneration(T5Config(vocab_size=64, decoder_start_token_id=0, **sizes))
    rows = [{"input_ids": [5 + i, 9, 20 - i, 1], "labels": [20 - i, 5 + i, 1]} for i in range(8)]
    return Seq2SeqTrainer(
        get_peft_model(model, config(task_type=TaskType.SEQ_2_SEQ_LM)),
        Seq2SeqTrainingArguments(folder, **COMMON),
        train_dataset=Dataset.from_list(rows),
        callbacks=callbacks,
    )


class ByHand(TrainerCallback):
    """RefLoRA from the paper in float64, without hf_reflora; B = 0 has no S and is left alone."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        pairs = [pair for pair in tiny.linear_pairs(model) if pair[1].any()]
        tiny.precondition_by_hand(pairs, "reflora", eps=EPS)


def trained(make, folder, callbacks):
    """Losses by step, and the trained tensors."""
    trainer = make(str(folder), callbacks)
    trainer.train()
    losses = [float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
    return losses, tiny.trainable(trainer.model)


@pytest.mark.parametrize("make", [dpo, reward, grpo, classify, seq2seq])
def test_callback_changes_the_training_as_it_should(make, tmp_path):
    """The first step (B = 0) is LoRA's to the bit, the later ones are not; they are those taken by hand."""
    plain, left = trained(make, tmp_path / "lora", [])
    losses, right = trained(make, tmp_path / "reflora", [RefLoraCallback(eps=EPS)])
    by_hand, expected = trained(make, tmp_path / "by_hand", [ByHand()])
    assert len(plain) == len(losses) == 3
    assert losses[:2] == plain[:2]
    assert losses == pytest.approx(by_hand, abs=1e-4)
    assert not all(torch.allclose(value, left[name], rtol=1e-3, atol=1e-3) for name, value in right.items())
    tiny.assert_same(right, expected, rtol=1e-3, atol=1e-3)


class Start(TrainerCallback):
    """ΔW of every layer before the first step."""

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step == 0:
            self.updates = {name: layer.get_delta_weight("default") for name, layer in adapted(model).items()}


def adapted(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, BaseTunerLayer) and "default" in m.r}


def first_update(make, folder):
    """-η sign(G), the first step of full fine-tuning with Adam, by the trainer's own loss, cut to rank 4."""
    trainer = make(folder, [], lora)
    model = trainer.model.eval()
    layers = adapted(model)
    weights = [layer.get_base_layer().weight.requires_grad_() for layer in layers.values()]
    with model.disable_adapter():
        loss = sum(trainer.compute_loss(model, inputs) for inputs in trainer.get_train_dataloader())
    updates = {}
    for name, G in zip(layers, torch.autograd.grad(loss, weights), strict=True):
        U, S, Vh = torch.linalg.svd(-COMMON["learning_rate"] * G.sign(), full_matrices=False)
        updates[name] = U[:, :4] * S[:4] @ Vh[:4]
    return updates


def reward_loss(model, inputs):
    scores = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits.squeeze(-1)
    chosen, rejected = scores.chunk(2)
    return -F.logsigmoid(chosen - rejected).mean(), len(chosen)


FORWARD_FN = {
    classify: None,
    seq2seq: None,
    dpo: lambda *batch: loss_at_the_reference(0.1)(*batch),
    reward: reward_loss,
}


@pytest.mark.parametrize("config", [lora, lora_sb])
@pytest.mark.parametrize(
    "make",
    [pytest.param(m, marks=needs("trl", "1.15", "the LM head's log_probs")) if m is dpo else m for m in FORWARD_FN],
)
def test_lora_sb_starts_at_the_first_step_of_full_fine_tuning(make, config, tmp_path):
    start = Start()
    trainer = make(str(tmp_path), [LoraSbCallback(forward_fn=FORWARD_FN[make]), start], config)
    trainer.train()
    expected = first_update(make, str(tmp_path))
    assert start.updates.keys() == expected.keys()
    for name, update in start.updates.items():
        assert (update - expected[name]).norm() < 0.01 * expected[name].norm(), name
    after = Start()
    after.on_step_begin(trainer.args, TrainerState(), None, model=trainer.model)
    assert all(not torch.equal(update, start.updates[name]) for name, update in after.updates.items())
    assert all(torch.isfinite(tensor).all() for tensor in tiny.trainable(trainer.model).values())


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (dpo, r"The loss is not the model's own \(loss_type=\['sigmoid'\].*forward_fn"),
        (grpo, r"The loss is not the model's own \(loss_type='dapo'.*forward_fn"),
        (reward, "LlamaForSequenceClassification must return a loss; the batch has .*Give forward_fn"),
    ],
)
def test_lora_sb_asks_for_the_loss_where_it_is_not_the_models_own(make, match, tmp_path):
    trainer = make(str(tmp_path), [LoraSbCallback()], lora_sb)
    with pytest.raises(ValueError, match=match):
        trainer.train()
