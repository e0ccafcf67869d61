"""Batches whose common beginning is computed once: the same loss, gradients, trainings and answers."""

import json

import pytest
import tiny
import torch
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Gemma3TextConfig,
    GPT2Config,
    Lfm2Config,
    Mamba2Config,
    MambaConfig,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    set_seed,
)
from trl import SFTConfig, SFTTrainer

from hf_reflora.recipes import sft
from hf_reflora.recipes.scores import answers
from hf_reflora.recipes.shared_prefix import Layout, attach, check_options, common_beginning, share_prefix


def batch(rows: list[list[int]], unlabelled: list[int]) -> dict[str, torch.Tensor]:
    """Padded on the right; the first tokens of each row, as many as `unlabelled` says, have no label."""
    length = max(map(len, rows))
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])
    input_ids = torch.tensor([row + [0] * (length - len(row)) for row in rows])
    labels = input_ids.masked_fill(mask == 0, -100)
    for row, n in zip(labels, unlabelled, strict=True):
        row[:n] = -100
    return {"input_ids": input_ids, "attention_mask": mask, "labels": labels}


def test_the_layout_by_hand():
    """The rows part at the fourth token. The third, which predicts it, is in both rows."""
    inputs = batch([[5, 6, 7, 8, 9], [5, 6, 7, 4]], [4, 3])
    layout = Layout.of(**inputs)
    assert layout.pack(inputs["input_ids"]).tolist() == [[5, 6, 7, 8, 9, 7, 4]]
    assert layout.positions().tolist() == [[0, 1, 2, 3, 4, 2, 3]]
    assert layout.pack(inputs["labels"]).tolist() == [[-100, -100, -100, -100, 9, -100, 4]]
    wanted = ["1......", "11.....", "111....", "1111...", "11111..", "11...1.", "11...11"]
    assert ["".join(".1"[allowed] for allowed in row) for row in layout.attends().int().tolist()] == wanted
    logits = layout.pack(inputs["input_ids"])[..., None] + torch.tensor([0, 100])
    assert layout.unpack(logits)[..., 0].tolist() == [[5, 6, 7, 8, 9], [5, 6, 7, 4, 0]]
    assert layout.unpack(logits)[0, :, 1].tolist() == [105, 106, 107, 108, 109]


@pytest.mark.parametrize(
    "rows",
    [
        batch([[5, 6, 7], [4, 6, 7]], [2, 2]),  # nothing in common
        batch([[5, 6, 7], [5, 8, 9]], [2, 2]),  # one token, which predicts the next
        batch([[5, 6, 7], [5, 6, 8]], [0, 0]),  # the beginning is learned
        batch([[5, 6, 7, 8]], [2]),
        {name: tensor.flip(1) for name, tensor in batch([[5, 6, 7, 8], [5, 6, 7]], [1, 2]).items()},
    ],
    ids=["nothing", "one", "labelled", "one_row", "padded_on_the_left"],
)
def test_rows_without_a_common_beginning_stay(rows):
    assert Layout.of(**rows) is None


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("same", [False, True])
def test_loss_and_gradients(attention, same):
    """Rows of unequal lengths; `same`: two of them are equal to their ends."""
    start = list(range(10, 30))
    rows = [[*start, 40, 41, 42], [*start, 50], [*start, 60, 61, 62, 63, 64]]
    rows = [rows[0], rows[0], rows[2]] if same else rows
    inputs = batch(rows, [21, 20, 23])
    losses, gradients = [], []
    for shares in (False, True):
        model = tiny.lora(tiny.llama(attn_implementation=attention).double()).double()
        lengths = []
        model.get_input_embeddings().register_forward_hook(lambda _, __, out, seen=lengths: seen.append(out.shape[:2]))
        if shares:
            attach(model)
        loss = model(**inputs).loss
        loss.backward()
        losses.append(loss)
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
        tokens = sum(map(len, rows)) - 2 * 19
        assert lengths == [(1, tokens) if shares else (3, 25)]
    # transformers computes norms, softmax and rotary angles in float32 even here.
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-7, atol=0)
    scale = max(gradient.abs().max().item() for gradient in gradients[0])
    torch.testing.assert_close(gradients[1], gradients[0], rtol=0, atol=1e-6 * scale)


def test_batches_with_other_tensors_stay():
    inputs, seen = batch([[5, 6, 7, 8], [5, 6, 7, 9]], [3, 3]), []
    model = tiny.llama()
    model.get_input_embeddings().register_forward_hook(lambda _, __, out: seen.append(tuple(out.shape[:2])))
    plain = model(**inputs).logits
    handles = attach(model)
    torch.testing.assert_close(model(**inputs).logits, plain)
    model(**inputs, position_ids=torch.arange(4)[None])
    model(**{name: tensor for name, tensor in inputs.items() if name != "labels"})
    for handle in handles:
        handle.remove()
    model(**inputs)
    assert seen == [(2, 4), (1, 6), (2, 4), (2, 4), (2, 4)]


def test_common_beginning_leaves_each_prompt_a_token():
    assert common_beginning([[1, 2, 3, 4], [1, 2, 5]]) == [1, 2]
    assert common_beginning([[1, 2, 3], [1, 2]]) == [1]
    assert common_beginning([[1, 2]]) == [1]
    assert common_beginning([[2], [3, 4]]) == []


def test_answers_after_a_shared_beginning():
    model, tokenizer = tiny.llama(hidden_size=64).eval(), tiny.tokenizer()
    rows = Dataset.from_list([{"prompt": f"Answer in one word: {'ab' * n}{n}"} for n in (5, 0, 3, 1, 4)])
    asked = {"max_new_tokens": 12, "batch_size": 2, "description": "test"}
    lengths = []
    model.get_input_embeddings().register_forward_hook(lambda _, __, out: lengths.append(out.shape[1]))
    plain = answers(model, tokenizer, rows, **asked)
    longest, lengths[:] = max(lengths), []
    assert answers(model, tokenizer, rows, share_prefix=True, **asked) == plain
    assert max(lengths) == len("Answer in one word: ") < longest  # the beginning, read once
    assert lengths.count(max(lengths)) == 1
    assert len(set(plain)) > 1


@pytest.mark.parametrize("method", ["reflora", "lora_sb"])
def test_a_training_with_and_without(data, tmp_path, method, monkeypatch):
    """The recipe itself, with LoRA-SB's start, evaluations and scores."""
    records, shared = {}, []
    monkeypatch.setattr(sft, "share_prefix", lambda trainer: shared.append(trainer) or share_prefix(trainer))
    options = {"method": method, "model_name_or_path": data / "model", "dataset_name": data / "rows.jsonl"}
    options |= {"prompt_template": "Add these two numbers: {prompt}", "completion_template": "#### {completion}"}
    options |= {"dataset_test_split": "train[:8]", "eval_strategy": "epoch", "score": "final_answer"}
    options |= {"score_max_new_tokens": 4, "score_batch_size": 4, "use_cpu": "true", "bf16": "false"}
    options |= {"cpu_threads": 1, "dtype": "float32", "max_steps": 6, "optim": "sgd", "learning_rate": 0.1}
    options |= {"lora_r": 4, "lora_dropout": 0, "lora_target_modules": "all-linear", "report_to": "none"}
    options |= {"per_device_train_batch_size": 4, "save_strategy": "no", "logging_steps": 1}
    for share in ("false", "true"):
        own = {"share_prefix": share, "output_dir": tmp_path / share}
        set_seed(0)  # older versions of TRL make the adapter before they set the seed
        line = [str(part) for name, value in (options | own).items() for part in (f"--{name}", value)]
        sft.main(*sft.make_parser().parse_args_and_config(line))
        records[share] = json.loads((tmp_path / share / "run_record.json").read_text(encoding="utf-8"))
    assert len(shared) == 1
    losses = {
        share: [e[k] for e in record["log"] for k in ("loss", "eval_loss") if k in e]
        for share, record in records.items()
    }
    assert len(losses["false"]) >= 6
    assert losses["true"] == pytest.approx(losses["false"], rel=1e-5)
    assert records["true"]["tokens"] == records["false"]["tokens"]
    assert records["true"]["scores"]["after"]["loss"] < records["true"]["scores"]["before"]["loss"]


def trainer_of(model, folder, **arguments):
    rows = Dataset.from_list([{"prompt": "a b", "completion": "c"}] * 4)
    args = {"output_dir": folder, "use_cpu": True, "bf16": False, "report_to": "none", "max_length": 32} | arguments
    return SFTTrainer(model=model, args=SFTConfig(**args), train_dataset=rows, processing_class=tiny.tokenizer())


SIZES = {"vocab_size": 260, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
LAYERS = {"n_layer": 2, "n_head": 4}


@pytest.mark.parametrize(
    ("config", "refusal"),
    [
        (Gemma3TextConfig(**SIZES, **HEADS, head_dim=8, sliding_window=64), None),  # two kinds of attention
        (GPT2Config(vocab_size=260, n_embd=32, n_positions=64, **LAYERS), None),  # learned positions
        (
            MixtralConfig(**SIZES, **HEADS, num_local_experts=2, router_aux_loss_coef=0.0, output_router_logits=False),
            None,
        ),
        (BloomConfig(vocab_size=260, hidden_size=32, **LAYERS), "BloomForCausalLM does not take"),  # ALiBi
        (MambaConfig(**SIZES, state_size=8), "MambaForCausalLM does not take"),
        (Mamba2Config(**SIZES, state_size=8, num_heads=8, head_dim=8, n_groups=1), "Mamba2ForCausalLM differ by"),
        (Lfm2Config(**SIZES, **HEADS, layer_types=["conv", "full_attention"]), "Lfm2ForCausalLM differ by"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_models_that_do_not_connect_tokens_by_attention_are_refused(tmp_path, config, refusal):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    trainer = trainer_of(model, tmp_path)
    if refusal is None:
        share_prefix(trainer)
        return
    with pytest.raises(ValueError, match=refusal):
        share_prefix(trainer)
    assert not model._forward_pre_hooks


def test_windows_shorter_than_the_rows_are_refused(tmp_path):
    trainer = trainer_of(MistralForCausalLM(MistralConfig(**SIZES, **HEADS, sliding_window=16)), tmp_path)
    with pytest.raises(ValueError, match="window of 16 tokens, and max_length is 32"):
        share_prefix(trainer)
    trainer.args.max_length = 16
    share_prefix(trainer)


def test_losses_of_experts_are_refused(tmp_path):
    config = MixtralConfig(**SIZES, **HEADS, num_local_experts=2, sliding_window=None, output_router_logits=True)
    trainer = trainer_of(MixtralForCausalLM(config), tmp_path)
    assert trainer.aux_loss_enabled
    with pytest.raises(ValueError, match="auxiliary loss of the experts"):
        share_prefix(trainer)


@pytest.mark.parametrize("option", ["packing", "padding_free", "eval_packing"])
def test_other_ways_to_pack_are_refused(tmp_path, option):
    with pytest.raises(ValueError, match=f"and {option} packs rows in another way"):
        check_options(SFTConfig(output_dir=tmp_path, use_cpu=True, bf16=False, **{option: True}))
