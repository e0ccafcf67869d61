"""Adapters and callbacks in trainers other than SFT: TRL's DPO, KTO, Reward, GRPO, RLOO; classification, Seq2Seq."""

import math

import pytest
import tiny
import torch
import torch.nn.functional as F
from datasets import Dataset
from peft import LoraConfig, PeftModel, TaskType, get_peft_model, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaForCausalLM,
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
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    RewardConfig,
    RewardTrainer,
    RLOOConfig,
    RLOOTrainer,
    SFTConfig,
)
from versions import needs

from hf_reflora import LoraSbCallback, LoraSbConfig, LoraSbSFTTrainer, RefLoraCallback, export_lora
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


def grpo(folder, callbacks, config=lora, cls=GRPOTrainer, arguments=GRPOConfig):
    return cls(
        model=tiny.llama(),
        reward_funcs=byte_sum,
        args=arguments(
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


def rloo(folder, callbacks, config=lora):
    return grpo(folder, callbacks, config, RLOOTrainer, RLOOConfig)


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
        (reward, "a dictionary with labels, .* but it has input_ids, attention_mask.* give forward_fn"),
        (
            rloo,
            "a dictionary with labels, from which LlamaForCausalLM computes its loss, but it is a list.*forward_fn",
        ),
    ],
)
def test_lora_sb_asks_for_the_loss_where_it_is_not_the_models_own(make, match, tmp_path):
    trainer = make(str(tmp_path), [LoraSbCallback()], lora_sb)
    with pytest.raises(ValueError, match=match) as raised:
        trainer.train()
    assert len(str(raised.value)) < 400  # and not the model printed


# A trained adapter as its own reference


def trained_lora_sb(init_weights):
    """A LoRA-SB or LoRA-XS adapter whose outputs are far from the base model's."""
    model = get_peft_model(tiny.llama(), lora_sb(init_weights=init_weights, task_type="CAUSAL_LM"))
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lorasb_R" in name:
                parameter.copy_(3 * torch.randn(parameter.shape, generator=generator))
    return model


def with_reference(kind, folder, model, **changes):
    common = {"output_dir": str(folder), "bf16": False, "gradient_checkpointing": False, **COMMON, **changes}
    rows = preferences()
    more = {}
    if kind is KTOTrainer:
        rows = Dataset.from_list(
            [{"prompt": row["prompt"], "completion": row["chosen"], "label": i % 2 == 0} for i, row in enumerate(rows)]
        )
    elif kind is not DPOTrainer:
        rows = rows.select_columns("prompt")
        common |= {"num_generations": 4, "max_completion_length": 6, "beta": 0.1}
        more = {"reward_funcs": byte_sum}
    config = {DPOTrainer: DPOConfig, KTOTrainer: KTOConfig, GRPOTrainer: GRPOConfig, RLOOTrainer: RLOOConfig}[kind]
    tokenizer = tiny.tokenizer()
    return kind(model=model, args=config(**common), train_dataset=rows, processing_class=tokenizer, **more)


@pytest.mark.parametrize("init_weights", [True, "lora_xs"])
@pytest.mark.parametrize("kind", [DPOTrainer, KTOTrainer, GRPOTrainer, RLOOTrainer])
def test_a_trained_adapter_is_its_own_reference(tmp_path, kind, init_weights):
    """Stock trainers: the first loss is that of equal policies, and the reference stays while the policy moves."""
    trainer = with_reference(kind, tmp_path, trained_lora_sb(init_weights))
    at_start = adapter_tensors(trainer.model, "default")
    tiny.assert_same(adapter_tensors(trainer.model, "ref"), at_start)
    trainer.train()
    first, last = trainer.state.log_history[0], trainer.state.log_history[2]
    if kind is DPOTrainer:
        assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
        assert last["loss"] != pytest.approx(math.log(2), abs=1e-6)
    elif kind is KTOTrainer:
        assert first["loss"] == pytest.approx(0.5, abs=1e-6)
        assert first["kl"] == pytest.approx(0, abs=1e-6)
    else:
        assert first["kl"] == pytest.approx(0, abs=1e-6)
        assert abs(last["kl"]) > 1e-8
    tiny.assert_same(adapter_tensors(trainer.model, "ref"), at_start)
    assert not all(
        torch.equal(value, at_start[name]) for name, value in adapter_tensors(trainer.model, "default").items()
    )


def adapter_tensors(model, adapter):
    state = get_peft_model_state_dict(model, adapter_name=adapter)
    return {name: tensor.clone() for name, tensor in state.items()}


def test_a_resumed_run_has_the_same_reference(tmp_path):
    changes = {"save_strategy": "steps", "save_steps": 1}
    unbroken = with_reference(DPOTrainer, tmp_path / "a", trained_lora_sb(True), **changes)
    unbroken.train()
    # The new model's adapter is the trained one, as a script would load it; the checkpoint has both.
    trainer = with_reference(DPOTrainer, tmp_path / "b", trained_lora_sb(True), **changes)
    trainer.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-1"))
    losses = [[entry["loss"] for entry in t.state.log_history if "loss" in entry] for t in (unbroken, trainer)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)


def test_only_trls_reference_is_a_copy():
    model = trained_lora_sb(True)
    config = model.peft_config["default"]
    model.add_adapter("other", config)
    model.add_adapter("ref", lora_sb(init_weights=True, task_type="CAUSAL_LM"))
    for name in ("other", "ref"):
        R = [value for key, value in adapter_tensors(model, name).items() if key.endswith("lorasb_R")]
        assert not any(value.any() for value in R)


# New tokens of a chat template


@pytest.mark.parametrize("init_weights", ["lora_sb", "lora_xs"])
def test_a_chat_template_with_new_tokens(tmp_path, init_weights):
    """TRL marks them to be trained; native and exported adapter have them."""
    source = tiny.tokenizer()
    source.add_tokens(["<new1>", "<new2>"])
    source.save_pretrained(tmp_path / "source")
    tiny.save(tmp_path / "base")
    rows = Dataset.from_list([{"text": f"{i} <new1> {2 * i} <new2>"} for i in range(8)])
    trainer = LoraSbSFTTrainer(
        model=str(tmp_path / "base"),
        args=SFTConfig(
            **{"output_dir": str(tmp_path / "out"), "bf16": False, "gradient_checkpointing": False, **COMMON},
            chat_template_path=str(tmp_path / "source"),
            model_init_kwargs={"dtype": "float32"},
        ),
        train_dataset=rows,
        peft_config=lora_sb(init_weights=init_weights, task_type="CAUSAL_LM"),
    )
    trainer.train()
    trainer.save_model()
    assert 260 in trainer.model.peft_config["default"].trainable_token_indices["embed_tokens"]
    export_lora(tmp_path / "out", tmp_path / "exported")
    ids = torch.tensor([[260, 5, 6, 261, 7]])
    expected = trainer.model.eval()(ids).logits
    for folder in (tmp_path / "out", tmp_path / "exported"):
        base = LlamaForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
        base.resize_token_embeddings(trainer.model.config.vocab_size)
        loaded = PeftModel.from_pretrained(base, folder).eval()
        torch.testing.assert_close(loaded(ids).logits, expected, rtol=0, atol=1e-6)


def test_a_chat_template_with_new_tokens_in_the_reward_trainer(tmp_path):
    source = tiny.tokenizer()
    source.add_tokens(["<new1>"])
    source.save_pretrained(tmp_path / "source")
    config = tiny.llama().config
    config.num_labels = 1
    LlamaForSequenceClassification(config).save_pretrained(tmp_path / "base")
    tiny.tokenizer().save_pretrained(tmp_path / "base")
    trainer = RewardTrainer(
        model=str(tmp_path / "base"),
        args=RewardConfig(
            **{"output_dir": str(tmp_path / "out"), "bf16": False, "gradient_checkpointing": False, **COMMON},
            chat_template_path=str(tmp_path / "source"),
        ),
        train_dataset=preferences(),
        peft_config=lora_sb(init_weights="lora_xs", task_type="SEQ_CLS"),
    )
    trainer.train()
    assert trainer.state.global_step == 3
