"""The Space's engine: each side is what its model says alone, with the same luck, whoever else asks."""

import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import tiny
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from space_adapters import last, save_adapter
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BloomConfig,
    DynamicCache,
    MistralConfig,
    Qwen3NextConfig,
)


sys.path.insert(0, str(Path(__file__).parents[2] / "spaces" / "before_after"))

import engine as engine_module
from chat import CannotAnswer
from decoding import Batch, Settings, gumbel, settings_of
from engine import Engine
from shared_model import Side


NAMES = ["org/model-1.5", "lora", "."]  # awkward as names of adapters in PEFT
PROMPTS = ["2 + 2 =", "Hello", "a longer prompt, with some more words in it"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A base model and three adapters: two that change it, one that does not."""
    root = tmp_path_factory.mktemp("space")
    tiny.save(root / "base")
    for seed in range(2):
        model = tiny.lora(tiny.llama(), seed=seed)
        for layer in model.modules():
            if hasattr(layer, "lora_B"):
                layer.lora_B["default"].weight.data *= 20
        model.save_pretrained(root / f"adapter{seed}")
    get_peft_model(tiny.llama(), LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(root / "adapter2")
    return root


def three(folders):
    return Engine(str(folders / "base"), {name: str(folders / f"adapter{i}") for i, name in enumerate(NAMES)})


@pytest.fixture(scope="module", params=[False, True], ids=["in turn", "mixed batch"])
def engine(folders, request):
    engine = three(folders)
    engine._uses_mixed_batch = dict.fromkeys(NAMES, request.param)
    return engine


def greedy(folders, prompt, adapter=None, tokens=12):
    """transformers' own generate, on a model of its own."""
    model = AutoModelForCausalLM.from_pretrained(folders / "base", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folders / "base")
    if adapter is not None:
        model = PeftModel.from_pretrained(model, folders / adapter)
    chat = [{"role": "user", "content": prompt}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    output = model.eval().generate(**inputs, do_sample=False, max_new_tokens=tokens, pad_token_id=0)
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).rstrip("\ufffd")


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("i", [0, 1])
def test_each_side_is_what_its_model_says_alone(engine, folders, prompt, i):
    base, adapted = last(engine.compare(prompt, NAMES[i], Settings(max_new_tokens=12)))
    assert base.text == greedy(folders, prompt)
    assert adapted.text == greedy(folders, prompt, f"adapter{i}")
    assert base.text != adapted.text


@pytest.mark.parametrize("sides", [[Side.BASE], [Side.BASE, Side.ADAPTER]], ids=["in turn", "mixed batch"])
def test_the_base_side_is_bit_identical_to_the_pristine_base(engine, folders, sides):
    """Of the same batch: what a row is must not depend on the adapter of the other one."""
    pristine = AutoModelForCausalLM.from_pretrained(folders / "base", dtype=torch.float32).eval()
    pristine.requires_grad_(False)  # matmul chooses its kernel by this, too
    last(engine.compare("Hello", NAMES[0], Settings(max_new_tokens=3)))
    ours, cache, tokens = Batch(engine.shared, sides), DynamicCache(), list(range(4, 40))
    for _ in range(6):
        with torch.inference_mode():
            ids = torch.tensor([tokens] * len(sides))
            expected = pristine(ids, past_key_values=cache, logits_to_keep=1).logits[0, -1]
        found = ours.logits([tokens] * len(sides))
        assert torch.equal(found[0], expected)
        assert not torch.equal(found[-1], expected) or len(sides) == 1
        tokens = [int(expected.argmax())]


@pytest.mark.parametrize("temperature", [0.0, 0.7, 2.0])
@pytest.mark.parametrize("seed", [0, 7])
def test_an_adapter_that_does_nothing_has_the_same_luck(engine, temperature, seed):
    settings = Settings(max_new_tokens=16, temperature=temperature, top_p=0.9, seed=seed)
    base, adapted = last(engine.compare("Hello", NAMES[2], settings))
    assert base.text == adapted.text


def test_a_seed_gives_the_same_answers_again_and_another_one_others(engine):
    def texts(seed):
        sides = last(engine.compare("Hello", NAMES[0], Settings(max_new_tokens=16, temperature=1.0, seed=seed)))
        return [side.text for side in sides]

    assert texts(1) == texts(1)
    assert texts(1) != texts(2)


def test_sampling_is_by_the_models_probabilities(engine, folders):
    """Frequencies of the first token over seeds, against softmax at this temperature."""
    model = AutoModelForCausalLM.from_pretrained(folders / "base", dtype=torch.float32)
    ids = torch.tensor([engine.encode_prompt("Hello", NAMES[0])])
    with torch.inference_mode():
        expected = (model(ids).logits[0, -1] / 0.05).softmax(-1)
    run = 4000
    noise = torch.stack([gumbel(torch.Generator().manual_seed(seed), len(expected)) for seed in range(run)])
    found = torch.bincount((expected.log() + noise).argmax(-1), minlength=len(expected)) / run
    assert (found - expected).abs().max() < 4 * 0.5 / run**0.5


def test_top_p_leaves_out_the_unlikely(engine):
    greedy_text = last(engine.compare("Hello", NAMES[0], Settings(max_new_tokens=8)))[0].text
    narrow = Settings(max_new_tokens=8, temperature=1.0, top_p=1e-6, seed=3)
    assert last(engine.compare("Hello", NAMES[0], narrow))[0].text == greedy_text


def test_both_sides_grow_together_and_end_for_a_reason(engine):
    steps = list(engine.compare("Hello", NAMES[0], Settings(max_new_tokens=5)))
    assert [tuple(side.tokens for side in sides) for sides in steps] == [(n, n) for n in range(1, 6)]
    assert {side.ended for side in steps[-1]} == {"length"}
    assert {side.ended for sides in steps[:-1] for side in sides} == {None}
    assert all(side.seconds > 0 and side.first_token_seconds > 0 for side in steps[-1])


def test_one_side_ends_while_the_other_goes_on(engine, monkeypatch):
    base, adapted = last(engine.compare("Hello", NAMES[0], Settings(max_new_tokens=12)))
    chat = engine._chats[NAMES[0]]
    ids, theirs = (chat.tokenizer(side.text, add_special_tokens=False)["input_ids"] for side in (base, adapted))
    end = next(token for token in ids if token not in theirs)
    monkeypatch.setattr(chat, "end_tokens", {end})
    base, adapted = last(engine.compare("Hello", NAMES[0], Settings(max_new_tokens=12)))
    assert base.ended == "end of text"
    assert base.tokens < adapted.tokens == 12


def test_the_system_prompt_counts(engine):
    settings = Settings(max_new_tokens=12)
    plain = last(engine.compare("Hello", NAMES[0], settings))
    assert last(engine.compare("Hello", NAMES[0], settings, system="Be brief."))[0].text != plain[0].text


def test_a_base_model_without_a_chat_template_completes(engine, folders, monkeypatch):
    chat = engine._chats[NAMES[0]]
    monkeypatch.setattr(chat, "template", None)
    base, _ = last(engine.compare("Hello", NAMES[0], Settings(max_new_tokens=8)))
    model = AutoModelForCausalLM.from_pretrained(folders / "base", dtype=torch.float32)
    inputs = chat.tokenizer("Hello", return_tensors="pt")
    output = model.generate(**inputs, do_sample=False, max_new_tokens=8, pad_token_id=0)
    text = chat.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert base.text == text.rstrip("\ufffd")


@pytest.mark.parametrize(
    ("prompt", "adapter", "message"),
    [
        ("  ", "lora", "Type a prompt first"),
        ("x", "absent", "There is no adapter 'absent'; there are org/model-1.5, lora"),
        ("x", "../../etc/passwd", "There is no adapter"),
        ("x" * 200, "lora", r"The prompt is 2\d\d tokens long; the model takes 127"),
    ],
)
def test_a_wrong_question_gets_a_message(engine, prompt, adapter, message):
    with pytest.raises(CannotAnswer, match=message):
        list(engine.compare(prompt, adapter))
    assert not engine._lock.locked()


def test_a_prompt_that_leaves_little_room_is_answered_as_far_as_it_goes(engine):
    prompt = "x" * 80
    room = 128 - len(engine.encode_prompt(prompt, "lora"))
    base, adapted = last(engine.compare(prompt, "lora", Settings(max_new_tokens=100)))
    assert (base.tokens, adapted.tokens) == (room, room)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_new_tokens": 0}, "length limit must be between 1 and 4096"),
        ({"max_new_tokens": 10**9}, "length limit"),
        ({"temperature": -1}, "temperature must be between 0 and 5"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 0}, "top-p must be above 0"),
        ({"seed": -1}, "seed must be a whole number"),
        ({"seed": None}, "seed must be a whole number, not None"),
        ({"seed": float("inf")}, "seed must be a whole number, not inf"),
        ({"top_p": "much"}, "top_p must be a number, not 'much'"),
    ],
)
def test_settings_out_of_range(values, message):
    with pytest.raises(CannotAnswer, match=message):
        settings_of(**{"max_new_tokens": 5, "temperature": 0, "top_p": 1, "seed": 0, **values})


def test_closing_stops_at_once_and_lets_others_in(engine):
    answers = engine.compare("Hello", NAMES[0], Settings(max_new_tokens=60))
    next(answers)
    assert engine._lock.locked()
    answers.close()
    assert not engine._lock.locked()


def test_an_error_does_not_poison_the_model(engine, folders, monkeypatch):
    calls = []

    def fail(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("out of memory")

    hook = engine.shared.model.get_base_model().model.layers[0].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        list(engine.compare("Hello", NAMES[0], Settings(max_new_tokens=12)))
    hook.remove()
    assert not engine._lock.locked()
    base, adapted = last(engine.compare("Hello", NAMES[0], Settings(max_new_tokens=12)))
    assert (base.text, adapted.text) == (greedy(folders, "Hello"), greedy(folders, "Hello", "adapter0"))


def test_visitors_at_once_get_what_each_would_get_alone(engine):
    """8 clients × 12 requests: two adapters, mixed lengths, seeds and prompts."""
    requests = [
        (PROMPTS[i % 3], NAMES[i % 2], Settings(max_new_tokens=2 + i % 7, temperature=i % 3 * 0.5, seed=i))
        for i in range(96)
    ]

    def ask(request):
        return [side.text for side in last(engine.compare(*request))]

    alone = [ask(request) for request in requests]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(ask, requests)) == alone


def test_a_generator_may_be_driven_from_several_threads(engine):
    """As Gradio does."""
    answers, found = engine.compare("Hello", NAMES[0], Settings(max_new_tokens=6)), []
    for _ in range(6):
        thread = threading.Thread(target=lambda: found.append(next(answers)))
        thread.start()
        thread.join()
    assert len(found) == 6
    answers.close()
    assert not engine._lock.locked()


SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
HEADS = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
EXPERTS = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16}
EXPERTS |= {"shared_expert_intermediate_size": 16}


@pytest.mark.parametrize("mixed", [False, True], ids=["in turn", "mixed batch"])
@pytest.mark.parametrize(
    "config",
    [
        MistralConfig(**SMALL, num_hidden_layers=2, sliding_window=8),
        Qwen3NextConfig(**SMALL, **HEADS, **EXPERTS, num_hidden_layers=4),
    ],
    ids=["sliding windows", "linear attention"],
)
def test_other_caches(folders, tmp_path, config, mixed):
    """Also where one side ends first: its row leaves the cache."""
    tokenizer = AutoTokenizer.from_pretrained(folders / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    config.vocab_size, config.eos_token_id, config.pad_token_id = len(tokenizer), tokenizer.eos_token_id, 0
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for weight in model.parameters():
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=0.3)
    model.save_pretrained(tmp_path / "base")
    lora = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    get_peft_model(model, lora).save_pretrained(tmp_path / "adapter")
    engine = Engine(str(tmp_path / "base"), {"x": str(tmp_path / "adapter")})
    engine._uses_mixed_batch = {"x": mixed}
    sides = last(engine.compare("Hello", "x", Settings(max_new_tokens=24)))
    expected = [greedy(tmp_path, "Hello", tokens=24), greedy(tmp_path, "Hello", "adapter", tokens=24)]
    assert [side.text for side in sides] == expected
    base, adapted = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in expected)
    end = next(token for token in base if token not in adapted)
    engine._chats["x"].end_tokens = {end}
    sides = last(engine.compare("Hello", "x", Settings(max_new_tokens=24)))
    assert [side.ended for side in sides] == ["end of text", "length"]
    assert [side.text for side in sides] == [tokenizer.decode(base[: base.index(end)]).rstrip("\ufffd"), expected[1]]


def count_hooks(engine):
    return sum(
        len(layer._forward_pre_hooks) + len(layer._forward_pre_hooks_with_kwargs) for layer in engine.shared.layers
    )


def test_the_faster_way_is_measured(folders):
    """With a model that sleeps: for each row, or for each pass."""
    engine = three(folders)
    model = engine.shared.model.get_base_model().model
    for i, sleep in enumerate([lambda rows: 0.03 * (rows > 1), lambda rows: 0.03]):
        hook = model.embed_tokens.register_forward_pre_hook(lambda _, inputs, s=sleep: time.sleep(s(len(inputs[0]))))
        sides = last(engine.compare("Hello", NAMES[i], Settings(max_new_tokens=12)))
        hook.remove()
        assert engine._uses_mixed_batch == dict(zip(NAMES, [False, True][: i + 1], strict=False))
        assert [side.text for side in sides] == [greedy(folders, "Hello"), greedy(folders, "Hello", f"adapter{i}")]


def test_a_base_row_that_is_not_the_bases_is_not_shown(folders):
    engine = Engine(str(folders / "base"), {"x": str(folders / "adapter0")})

    def leak(module, inputs, output):
        if len(output) == 2 and not next(iter(engine.shared.layers))._disable_adapters:
            output[0] += 1e-6 * output[1]

    engine.shared.model.get_base_model().model.embed_tokens.register_forward_hook(
        lambda _, inputs, output: time.sleep(0.03)  # a mixed batch would be faster
    )
    engine.shared.model.get_base_model().lm_head.register_forward_hook(leak)
    base, _ = last(engine.compare("Hello", "x", Settings(max_new_tokens=12)))
    assert engine._uses_mixed_batch == {"x": False}
    assert base.text == greedy(folders, "Hello")


def test_dora_has_no_mixed_batch(folders):
    save_adapter(folders / "dora", use_dora=True)
    engine = Engine(str(folders / "base"), {"dora": str(folders / "dora"), "lora": str(folders / "adapter0")})
    before = count_hooks(engine)
    sides = last(engine.compare("Hello", "dora", Settings(max_new_tokens=12)))
    assert engine._uses_mixed_batch == {"dora": False}
    assert count_hooks(engine) == before
    assert [side.text for side in sides] == [greedy(folders, "Hello"), greedy(folders, "Hello", "dora")]
    sides = last(engine.compare("Hello", "lora", Settings(max_new_tokens=12)))
    assert [side.text for side in sides] == [greedy(folders, "Hello"), greedy(folders, "Hello", "adapter0")]


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 1, 0]])
def test_adapters_with_modules_and_tokens_of_their_own_beside_a_plain_one(folders, order):
    sources = [
        save_adapter(folders / "plain"),
        save_adapter(folders / "modules", modules_to_save=["lm_head"]),
        save_adapter(folders / "tokens", trainable_token_indices={"embed_tokens": list(range(4, 100))}),
    ]
    engine = Engine(str(folders / "base"), {Path(sources[i]).name: sources[i] for i in order})
    for name in ["plain", "modules", "tokens", "plain"]:
        base, adapted = last(engine.compare("Hello", name, Settings(max_new_tokens=12)))
        assert base.text == greedy(folders, "Hello"), name
        assert adapted.text == greedy(folders, "Hello", name), name


def test_a_long_prompt_is_read_in_pieces(engine, folders, monkeypatch):
    """So that Stop need not wait for all of it."""
    monkeypatch.setattr(engine_module, "PROMPT_CHUNK", 8)
    prompt = "a longer prompt, with some more words in it"
    steps = list(engine.compare(prompt, NAMES[0], Settings(max_new_tokens=12)))
    assert [side.text for side in steps[-1]] == [greedy(folders, prompt), greedy(folders, prompt, "adapter0")]
    pieces = (len(engine.encode_prompt(prompt, NAMES[0])) - 1) // 8
    empty = [sides for sides in steps if not any(side.tokens for side in sides)]
    assert len(empty) == pieces * (1 if engine._uses_mixed_batch[NAMES[0]] else 2)
    answers = engine.compare(prompt, NAMES[0])
    next(answers)
    answers.close()
    assert not engine._lock.locked()
    assert last(engine.compare(prompt, NAMES[0], Settings(max_new_tokens=12)))[0].text == steps[-1][0].text


def test_the_speed_is_that_of_decoding(engine, monkeypatch):
    """With a model that takes 0.1 s for a piece of the prompt and 0.02 s for a token."""
    monkeypatch.setattr(engine_module, "PROMPT_CHUNK", 8)
    prompt, embed = "a longer prompt, with some more words in it", engine.shared.model.get_input_embeddings()
    pause = lambda _, inputs: time.sleep(0.1 if inputs[0].shape[1] > 1 else 0.02)  # noqa: E731
    hook = embed.register_forward_pre_hook(pause)
    sides = last(engine.compare(prompt, NAMES[0], Settings(max_new_tokens=5)))
    hook.remove()
    pieces = -(-len(engine.encode_prompt(prompt, NAMES[0])) // 8)
    for side in sides:
        assert 0.08 <= side.seconds < 0.1 * pieces <= side.first_token_seconds
        assert side.tokens_per_second == 4 / side.seconds


def test_one_token_has_no_speed(engine):
    for side in last(engine.compare("Hello", NAMES[0], Settings(max_new_tokens=1))):
        assert side.tokens_per_second is None
        assert side.first_token_seconds > 0


def test_measured_at_the_start_the_first_question_is_answered_at_once(folders):
    engine = three(folders)
    engine.measure()
    assert set(engine._uses_mixed_batch) == set(NAMES)
    assert not engine._lock.locked()
    assert [side.tokens for side in next(engine.compare("Hello", NAMES[1]))] == [1, 1]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_base_can_be_kept_in_another_dtype(folders, dtype):
    engine = Engine(str(folders / "base"), {"x": str(folders / "adapter0")}, dtype=dtype)
    assert engine.shared.model.get_base_model().lm_head.weight.dtype == getattr(torch, dtype)
    base, _ = last(engine.compare("Hello", "x", Settings(max_new_tokens=4)))
    assert base.tokens == 4


def test_the_measurement_can_be_stopped(folders):
    engine = Engine(str(folders / "base"), {"x": str(folders / "adapter0")})
    answers = engine.compare("Hello", "x")
    assert [side.tokens for side in next(answers)] == [0, 0]
    answers.close()
    assert engine._uses_mixed_batch == {}
    assert not engine._lock.locked()
    assert last(engine.compare("Hello", "x", Settings(max_new_tokens=12)))[0].text == greedy(folders, "Hello")


def test_half_a_character_is_no_error(engine):
    assert engine.encode_prompt("a\ud800b", NAMES[0], "\udfff") == engine.encode_prompt("a?b", NAMES[0], "?")


def test_a_template_may_refuse_a_system_prompt(engine, monkeypatch):
    refuse = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    chat = engine._chats[NAMES[0]]
    monkeypatch.setattr(chat, "template", refuse + chat.template)
    assert engine.encode_prompt("Hello", NAMES[0])
    with pytest.raises(CannotAnswer, match="This model takes no system prompt: leave it empty"):
        engine.encode_prompt("Hello", NAMES[0], "Be brief.")


def test_a_completion_goes_on_where_a_tokenizer_ends_the_text(engine, monkeypatch):
    chat = engine._chats[NAMES[0]]
    monkeypatch.setattr(chat, "template", None)
    ids = engine.encode_prompt("Hello", NAMES[0])
    monkeypatch.setattr(chat, "tokenizer", lambda text: {"input_ids": [*ids, engine.shared.model.config.eos_token_id]})
    assert engine.encode_prompt("Hello", NAMES[0]) == ids


def test_a_model_without_a_longest_context(folders, tmp_path):
    config = BloomConfig(vocab_size=260, hidden_size=32, n_layer=2, n_head=4, eos_token_id=1, pad_token_id=0)
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(folders / "base").save_pretrained(tmp_path / "base")
    get_peft_model(model, LoraConfig(r=2)).save_pretrained(tmp_path / "adapter")
    engine = Engine(str(tmp_path / "base"), {"x": str(tmp_path / "adapter")})
    assert last(engine.compare("Hello", "x", Settings(max_new_tokens=12)))[0].text == greedy(tmp_path, "Hello")
