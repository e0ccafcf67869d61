"""The tokens of a comparison in the Space: the adapter's template and end tokens, where the base model has none."""

import json
import sys
from pathlib import Path

import pytest
import tiny
import torch
from peft import PeftModel
from space_adapters import last, save_adapter
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import clone_chat_template


sys.path.insert(0, str(Path(__file__).parents[2] / "spaces" / "before_after"))

from decoding import Settings
from engine import Engine


TEMPLATE = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}[assistant]"
BASE_HAS_NONE = "The base model has no chat template, so both sides get the adapter's."


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A base model without a chat template, and one with it; an adapter without any file of a tokenizer."""
    root = tmp_path_factory.mktemp("chat")
    for name, template in (("plain", None), ("chat", tiny.CHAT_TEMPLATE)):
        tiny.save(root / name)
        tokenizer = tiny.tokenizer()
        tokenizer.chat_template = template
        (root / name / "chat_template.jinja").unlink()
        tokenizer.save_pretrained(root / name)
    return root


def adapter(folder, tokenizer=None, **files) -> str:
    source = save_adapter(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(source)
    for name, text in files.items():
        (Path(source) / name.replace("__", ".")).write_text(text, encoding="utf-8")
    return source


def tokens_of(text: str, tokenizer=None) -> list[int]:
    return (tokenizer or tiny.tokenizer())(text, add_special_tokens=False)["input_ids"]


def test_the_adapters_template_where_the_base_has_none(root, tmp_path):
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = TEMPLATE
    sources = {
        "tokenizer": adapter(tmp_path / "tokenizer", tokenizer),
        "template": adapter(tmp_path / "template", chat_template__jinja=TEMPLATE),
        "neither": adapter(tmp_path / "neither"),
    }
    engine = Engine(str(root / "plain"), sources)
    assert engine.notes == {"tokenizer": [BASE_HAS_NONE], "template": [BASE_HAS_NONE], "neither": []}
    expected = tokens_of("[system] Be brief.\n[user] Hello\n[assistant]")
    assert engine.encode_prompt("Hello", "tokenizer", "Be brief.") == expected
    assert engine.encode_prompt("Hello", "template", "Be brief.") == expected
    assert engine.encode_prompt("Hello", "neither") == tokens_of("Hello")
    for name in sources:
        # What generate says of these tokens, on a model of its own
        model = AutoModelForCausalLM.from_pretrained(root / "plain")
        ids = engine.encode_prompt("Hello", name)
        output = model.generate(model.dummy_inputs["input_ids"].new_tensor([ids]), do_sample=False, max_new_tokens=8)
        base, _ = last(engine.compare("Hello", name, Settings(max_new_tokens=8)))
        assert base.text == tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True).rstrip("\ufffd")


def test_the_templates_special_tokens_are_the_adapters(root, tmp_path):
    """The base model has rows for them, as many have, and its tokenizer does not name them."""
    tiny.save(tmp_path / "base", vocab_size=262)
    base = tiny.tokenizer()
    base.chat_template = None
    (tmp_path / "base" / "chat_template.jinja").unlink()
    base.save_pretrained(tmp_path / "base")
    own = tiny.tokenizer()
    own.add_tokens(["<|turn|>", "<|over|>"], special_tokens=True)
    own.chat_template = "{% for m in messages %}<|turn|>{{ m.content }}<|over|>{% endfor %}"
    own.eos_token = "<|over|>"
    source = save_adapter(tmp_path / "adapter", model=tiny.llama(vocab_size=262))
    own.save_pretrained(source)
    engine = Engine(str(tmp_path / "base"), {"x": source})
    assert engine.encode_prompt("Hi", "x") == [260, *tokens_of("Hi"), 261]
    assert engine._chats["x"].end_tokens == {1, 261}


def test_what_trl_makes_of_another_models_template(root, tmp_path):
    """SFTConfig(chat_template_path=...), which adds the other tokenizer's tokens to the base model."""
    other = tiny.tokenizer()
    other.add_tokens(["<|turn|>", "<|over|>"], special_tokens=True)
    other.chat_template = "{% for m in messages %}<|turn|>{{ m.content }}<|over|>{% endfor %}"
    other.eos_token = "<|over|>"
    other.save_pretrained(tmp_path / "other")
    model = AutoModelForCausalLM.from_pretrained(root / "plain")
    tokenizer = AutoTokenizer.from_pretrained(root / "plain")
    model, tokenizer, added = clone_chat_template(model, tokenizer, str(tmp_path / "other"))
    config = {"trainable_token_indices": {"embed_tokens": added}, "modules_to_save": ["lm_head"]}
    source = save_adapter(tmp_path / "adapter", model=model, **config)
    tokenizer.save_pretrained(source)
    engine = Engine(str(root / "plain"), {"x": source})
    assert engine.notes["x"][0] == BASE_HAS_NONE
    assert f"{len(added)} tokens that the base model does not have" in engine.notes["x"][1]
    ids = engine.encode_prompt("Hi", "x")
    assert tokenizer.convert_ids_to_tokens(ids) == ["<|turn|>", "H", "i", "<|over|>"]
    assert engine._chats["x"].end_tokens == {1, ids[-1]}
    stock = AutoModelForCausalLM.from_pretrained(root / "plain")
    stock.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    stock = PeftModel.from_pretrained(stock, source).eval()
    output = stock.generate(input_ids=torch.tensor([ids]), do_sample=False, max_new_tokens=12, eos_token_id=ids[-1])
    base, adapted = last(engine.compare("Hi", "x", Settings(max_new_tokens=12)))
    assert adapted.text == engine._chats["x"].decode(output[0, len(ids) :].tolist())
    assert base.tokens


def test_tokens_that_the_base_has_no_rows_for_are_not_used(root, tmp_path):
    own = tiny.tokenizer()
    own.add_tokens(["<|turn|>"], special_tokens=True)
    own.chat_template = "{% for m in messages %}<|turn|>{{ m.content }}{% endfor %}"
    engine = Engine(str(root / "plain"), {"x": adapter(tmp_path / "adapter", own)})
    assert engine.encode_prompt("Hi", "x") == tokens_of("<|turn|>Hi")
    assert last(engine.compare("Hi", "x", Settings(max_new_tokens=2)))[0].tokens == 2


def test_another_template_than_the_bases_is_noted_and_not_used(root, tmp_path):
    other = tiny.tokenizer()
    other.chat_template = TEMPLATE
    written = tiny.tokenizer()
    written.chat_template = "{# the same in effect #}" + tiny.CHAT_TEMPLATE
    sources = {name: adapter(tmp_path / name, own) for name, own in {"other": other, "same": written}.items()}
    engine = Engine(str(root / "chat"), sources)
    assert engine.notes["same"] == []
    [note] = engine.notes["other"]
    assert "another chat template than the base model's. Both sides get the base model's." in note
    assert engine.encode_prompt("Hello", "other") == engine.encode_prompt("Hello", "same")


def test_end_tokens_of_the_adapter_end_both_sides(root, tmp_path):
    own = tiny.tokenizer()
    own.eos_token = "<|im_end|>"
    sources = {
        "tokenizer": adapter(tmp_path / "tokenizer", own),
        "list": adapter(tmp_path / "list", generation_config__json=json.dumps({"eos_token_id": [1, 77]})),
        "number": adapter(tmp_path / "number", generation_config__json=json.dumps({"eos_token_id": 88})),
        "garbage": adapter(tmp_path / "garbage", generation_config__json="[eos"),
        "strange": adapter(tmp_path / "strange", generation_config__json='{"eos_token_id": "x"}'),
    }
    engine = Engine(str(root / "chat"), sources)
    ends = {name: chat.end_tokens for name, chat in engine._chats.items()}
    expected = {"tokenizer": {1, 3}, "list": {1, 77}, "number": {1, 88}, "garbage": {1}, "strange": {1}}
    assert ends == expected
    # An end token that the base model says, and this adapter's answer does not get past either
    plain = last(engine.compare("Hello", "garbage", Settings(max_new_tokens=12)))
    third = tokens_of(plain[0].text)[2]
    (Path(sources["number"]) / "generation_config.json").write_text(json.dumps({"eos_token_id": third}))
    base, _ = last(Engine(str(root / "chat"), sources).compare("Hello", "number", Settings(max_new_tokens=12)))
    assert (base.ended, plain[0].ended) == ("end of text", "length")
    assert plain[0].text.startswith(base.text)


def test_a_tokenizer_of_another_model_is_noted_and_not_used(root, tmp_path):
    data = json.loads(tiny.tokenizer().backend_tokenizer.to_str())
    numbers = data["model"]["vocab"]
    numbers["a"], numbers["b"] = numbers["b"], numbers["a"]
    source = adapter(tmp_path / "adapter", tiny.tokenizer())
    (Path(source) / "tokenizer.json").write_text(json.dumps(data), encoding="utf-8")
    engine = Engine(str(root / "chat"), {"x": source})
    [note] = engine.notes["x"]
    assert "numbers the tokens differently" in note
    assert engine._chats["x"].end_tokens == {1}
    expected = AutoTokenizer.from_pretrained(root / "chat")
    assert engine._chats["x"].decode(tokens_of("ab")) == expected.decode(tokens_of("ab")) == "ab"


def test_a_tokenizer_that_cannot_be_loaded_is_not_used(root, tmp_path):
    files = {"tokenizer_config__json": '{"tokenizer_class": "OfMine"}', "chat_template__jinja": TEMPLATE}
    engine = Engine(str(root / "plain"), {"x": adapter(tmp_path / "adapter", **files)})
    assert engine.notes == {"x": [BASE_HAS_NONE]}
    assert engine.encode_prompt("Hello", "x") == tokens_of("[user] Hello\n[assistant]")
