"""The card's snippet takes the adapter's own tokenizer, tokens and end tokens. Each snippet runs here."""

import json

import pytest
import tiny
import torch
from peft import PeftModel
from snippets import run_snippet, snippet_of
from space_adapters import save_adapter
from transformers import AutoModelForCausalLM, AutoTokenizer, BertConfig, BertForSequenceClassification
from trl import clone_chat_template

from hf_reflora.hub.staging import read_record
from hf_reflora.report.card import render
from hf_reflora.report.snippet import OwnTokenizer, read_own_tokenizer


TEMPLATE = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}[assistant]"
CHAT = {"arguments": {"system_prompt": "Be brief."}, "examples": [{"prompt": "Hello", "before": "", "after": ""}]}


def base_model(folder, template=None):
    tiny.llama().save_pretrained(folder)
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return folder


def card_of(folder, **record) -> str:
    facts = read_record(folder)
    facts.replace(**record)
    return render(facts, tokenizer=read_own_tokenizer(folder))


def answer(base, adapter, ids, rows=None, ends=(1,), tokens=64) -> str:
    """What PEFT's model says after these tokens, in full, with its end token."""
    model = AutoModelForCausalLM.from_pretrained(base)
    if rows is not None:
        model.resize_token_embeddings(rows, mean_resizing=False)
    model = PeftModel.from_pretrained(model, adapter)
    output = model.generate(input_ids=torch.tensor([ids]), max_new_tokens=tokens, eos_token_id=list(ends))
    return AutoTokenizer.from_pretrained(base if rows is None else adapter).decode(output[0, len(ids) :])


def tokens_of(text: str) -> list[int]:
    return tiny.tokenizer()(text, add_special_tokens=False)["input_ids"]


def test_a_plain_adapter_takes_all_of_the_base(tmp_path, monkeypatch):
    base = base_model(tmp_path / "base", tiny.CHAT_TEMPLATE)
    adapter = save_adapter(tmp_path / "adapter", model=AutoModelForCausalLM.from_pretrained(base))
    card = card_of(tmp_path / "adapter", peft={"task_type": "CAUSAL_LM"})
    for absent in ("resize", "ends", "messages", "from_pretrained(adapter"):
        assert absent not in snippet_of(card)
    assert "tokenizer = AutoTokenizer.from_pretrained(base)" in card
    assert run_snippet(card, base, adapter, monkeypatch) == [answer(base, adapter, tokens_of("…"))]
    chat = card_of(tmp_path / "adapter", peft={"task_type": "CAUSAL_LM"}, **CHAT)
    ids = tokens_of(
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    )
    assert run_snippet(chat, base, adapter, monkeypatch) == [answer(base, adapter, ids)]


@pytest.mark.parametrize("record", [{}, CHAT], ids=["files alone", "record"])
def test_the_adapters_template_where_the_base_has_none(tmp_path, monkeypatch, record):
    base = base_model(tmp_path / "base")
    adapter = save_adapter(tmp_path / "adapter", model=AutoModelForCausalLM.from_pretrained(base))
    own = tiny.tokenizer()
    own.chat_template = TEMPLATE
    own.save_pretrained(adapter)
    card = card_of(tmp_path / "adapter", peft={"task_type": "CAUSAL_LM"}, **record)
    assert "resize" not in card
    chat = "[system] Be brief.\n[user] Hello\n" if record else "[user] …\n"
    expected = answer(base, adapter, tokens_of(chat + "[assistant]"))
    assert run_snippet(card, base, adapter, monkeypatch) == [expected]


@pytest.mark.parametrize("whose", ["tokenizer", "generation_config", "base"])
def test_an_end_token_of_the_adapter_or_of_the_base_ends_the_answer(tmp_path, monkeypatch, whose):
    base = base_model(tmp_path / "base", tiny.CHAT_TEMPLATE)
    adapter = save_adapter(tmp_path / "adapter", model=AutoModelForCausalLM.from_pretrained(base))
    ids = tokens_of("<|im_start|>user\n…<|im_end|>\n<|im_start|>assistant\n")
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
    free = model.generate(input_ids=torch.tensor([ids]), max_new_tokens=8, eos_token_id=1)[0, len(ids) :].tolist()
    end = free[4]  # a token that it says
    own = tiny.tokenizer()
    own.eos_token = own.convert_ids_to_tokens(end) if whose == "tokenizer" else "<|im_end|>"
    own.save_pretrained(adapter)
    if whose == "generation_config":
        (tmp_path / "adapter" / whose).with_suffix(".json").write_text(json.dumps({"eos_token_id": [1, end]}))
    if whose == "base":
        path = base / "generation_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token_id": [1, end]}))
    card = card_of(tmp_path / "adapter", peft={"task_type": "CAUSAL_LM"})
    [printed] = run_snippet(card, base, adapter, monkeypatch)
    assert printed == tiny.tokenizer().decode(free[: free.index(end) + 1])


def test_tokens_that_trl_has_added(tmp_path, monkeypatch):
    """With TRL's clone_chat_template, as SFTConfig(chat_template_path=…) does it."""
    base = base_model(tmp_path / "base")
    other = tiny.tokenizer()
    other.add_tokens(["<|turn|>", "<|over|>"], special_tokens=True)
    other.chat_template = "{% for m in messages %}<|turn|>{{ m.content }}<|over|>{% endfor %}"
    other.eos_token = "<|over|>"
    other.save_pretrained(tmp_path / "other")
    model = AutoModelForCausalLM.from_pretrained(base)
    model, own, added = clone_chat_template(model, AutoTokenizer.from_pretrained(base), str(tmp_path / "other"))
    rows = model.get_input_embeddings().weight.shape[0]
    config = {"trainable_token_indices": {"embed_tokens": added}, "modules_to_save": ["lm_head"]}
    adapter = save_adapter(tmp_path / "adapter", model=model, task_type="CAUSAL_LM", **config)
    own.save_pretrained(adapter)
    card = card_of(tmp_path / "adapter", **CHAT)
    assert f"resize_token_embeddings({rows}, mean_resizing=False)" in card
    assert "vllm" not in card
    ids = own.apply_chat_template([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}])
    ids = ids["input_ids"] if not isinstance(ids, list) else ids
    expected = answer(base, adapter, ids, rows, ends=[1, own.eos_token_id])
    assert run_snippet(card, base, adapter, monkeypatch) == [expected]


def test_a_classifier_with_a_token_of_its_own(tmp_path, monkeypatch):
    """Such as one for padding, which a base model may lack."""
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = BertForSequenceClassification(BertConfig(vocab_size=260, num_labels=3, **sizes))
    base = tmp_path / "base"
    model.save_pretrained(base)
    tiny.tokenizer().save_pretrained(base)
    model = BertForSequenceClassification.from_pretrained(base)
    model.resize_token_embeddings(261)
    config = {"task_type": "SEQ_CLS", "target_modules": ["query"]}
    adapter = save_adapter(tmp_path / "adapter", model=model, **config)
    own = tiny.tokenizer()
    own.add_special_tokens({"pad_token": "<|pad|>"})
    own.save_pretrained(adapter)
    card = card_of(tmp_path / "adapter")
    assert "model.resize_token_embeddings(261, mean_resizing=False)" in card
    [logits] = run_snippet(card, base, adapter, monkeypatch)
    assert len(logits) == 3


def test_embeddings_that_were_trained_but_not_resized_are_not_resized(tmp_path, monkeypatch):
    """Unless the base model is not on this machine, so that it cannot be told."""
    base = base_model(tmp_path / "base", tiny.CHAT_TEMPLATE)
    model = AutoModelForCausalLM.from_pretrained(base)
    adapter = save_adapter(tmp_path / "adapter", model=model, modules_to_save=["embed_tokens", "lm_head"])
    tiny.tokenizer().save_pretrained(adapter)
    folder = tmp_path / "adapter"
    assert read_own_tokenizer(folder) == OwnTokenizer(has_template=True, has_end=True)
    base.rename(tmp_path / "moved")
    assert read_own_tokenizer(folder).vocabulary == 260
    card = card_of(folder, peft={"task_type": "CAUSAL_LM"})
    ids = tokens_of("<|im_start|>user\n…<|im_end|>\n<|im_start|>assistant\n")
    expected = answer(tmp_path / "moved", adapter, ids)
    assert run_snippet(card, tmp_path / "moved", adapter, monkeypatch) == [expected]


@pytest.mark.parametrize(
    "files",
    [
        {"chat_template.jinja": TEMPLATE},
        {"tokenizer_config.json": '{"tokenizer_class": "OfMine"}'},
        {"tokenizer_config.json": "{"},
        {"tokenizer_config.json": '{"auto_map": {"AutoTokenizer": ["mine.Mine", null]}}', "mine.py": "1 / 0"},
    ],
    ids=["template", "class", "broken", "code"],
)
def test_files_that_are_no_tokenizer(tmp_path, files):
    save_adapter(tmp_path)
    for name, text in files.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    assert read_own_tokenizer(tmp_path) is None


def test_files_that_a_person_has_broken(tmp_path):
    save_adapter(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    for name in ("generation_config.json", "adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / name).write_text("[eos", encoding="utf-8")
    assert read_own_tokenizer(tmp_path) == OwnTokenizer(has_template=True, has_end=True)
