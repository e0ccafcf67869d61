"""The Space's engine: each side is what its model says alone, with the same luck, whoever else asks."""

import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import tiny
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_reflora import LoraSbConfig


sys.path.insert(0, str(Path(__file__).parent.parent / "spaces" / "before_after"))

from engine import CannotAnswer, Engine, Settings, settings_of


NAMES = ["org/model-1.5", "lora", "__base__"]  # awkward as names of adapters in PEFT
PROMPTS = ["2 + 2 =", "Hello", "a longer prompt, with some more words in it"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A base model and three adapters: two that change it, one that does not."""
    root = tmp_path_factory.mktemp("space")
    tiny.llama().save_pretrained(root / "base")
    tiny.tokenizer().save_pretrained(root / "base")
    for seed in range(2):
        model = tiny.lora(tiny.llama(), seed=seed)
        for layer in model.modules():
            if hasattr(layer, "lora_B"):
                layer.lora_B["default"].weight.data *= 20
        model.save_pretrained(root / f"adapter{seed}")
    get_peft_model(tiny.llama(), LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(root / "adapter2")
    return root


@pytest.fixture(scope="module")
def engine(folders):
    return Engine(str(folders / "base"), {name: str(folders / f"adapter{i}") for i, name in enumerate(NAMES)})


def last(iterator):
    return list(iterator)[-1]


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


def test_the_base_side_is_the_pristine_base_to_the_bit(engine, folders):
    pristine = AutoModelForCausalLM.from_pretrained(folders / "base", dtype=torch.float32).eval()
    ids = torch.arange(4, 40)[None]
    last(engine.compare("Hello", NAMES[0], Settings(max_new_tokens=3)))
    with torch.inference_mode(), engine.model.disable_adapter():
        assert torch.equal(engine.model(ids).logits, pristine(ids).logits)


@pytest.mark.parametrize("temperature", [0.0, 0.7, 2.0])
@pytest.mark.parametrize("seed", [0, 7])
def test_an_adapter_that_does_nothing_has_the_same_luck(engine, temperature, seed):
    settings = Settings(max_new_tokens=16, temperature=temperature, top_p=0.9, seed=seed)
    base, adapted = last(engine.compare("Hello", "__base__", settings))
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
    ids = torch.tensor([engine._prompt("Hello", "")])
    with torch.inference_mode():
        expected = (model(ids).logits[0, -1] / 0.05).softmax(-1)
    run = 4000
    noise = torch.stack([engine._gumbel(torch.Generator().manual_seed(seed)) for seed in range(run)])
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
    assert all(side.seconds > 0 for side in steps[-1])


def test_one_side_ends_while_the_other_goes_on(engine, monkeypatch):
    base, adapted = last(engine.compare("Hello", NAMES[0], Settings(max_new_tokens=12)))
    ids = engine.tokenizer(base.text, add_special_tokens=False)["input_ids"]
    theirs = engine.tokenizer(adapted.text, add_special_tokens=False)["input_ids"]
    end = next(token for token in ids if token not in theirs)
    monkeypatch.setattr(engine, "_ends", {end})
    base, adapted = last(engine.compare("Hello", NAMES[0], Settings(max_new_tokens=12)))
    assert base.ended == "end of text"
    assert base.tokens < adapted.tokens == 12


def test_the_system_prompt_counts(engine):
    settings = Settings(max_new_tokens=12)
    plain = last(engine.compare("Hello", NAMES[0], settings))
    assert last(engine.compare("Hello", NAMES[0], settings, system="Be brief."))[0].text != plain[0].text


def test_a_base_model_without_a_chat_template_completes(engine, folders, monkeypatch):
    monkeypatch.setattr(engine.tokenizer, "chat_template", None)
    base, _ = last(engine.compare("Hello", NAMES[0], Settings(max_new_tokens=8)))
    model = AutoModelForCausalLM.from_pretrained(folders / "base", dtype=torch.float32)
    inputs = engine.tokenizer("Hello", return_tensors="pt")
    output = model.generate(**inputs, do_sample=False, max_new_tokens=8, pad_token_id=0)
    text = engine.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
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
def test_what_a_visitor_can_change_is_said(engine, prompt, adapter, message):
    with pytest.raises(CannotAnswer, match=message):
        list(engine.compare(prompt, adapter))
    assert not engine._lock.locked()


def test_a_prompt_that_leaves_little_room_is_answered_as_far_as_it_goes(engine):
    prompt = "x" * 80
    room = 128 - len(engine._prompt(prompt, ""))
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

    hook = engine.model.get_base_model().model.layers[0].register_forward_pre_hook(fail)
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


def test_other_kinds_of_adapters_are_refused(folders, tmp_path):
    get_peft_model(tiny.llama(), LoraSbConfig(r=2, target_modules=["q_proj"], init_weights=True)).save_pretrained(
        tmp_path
    )
    with pytest.raises(ValueError, match=r"this page shows LoRA adapters, .* is LORASB\. Export it"):
        Engine(str(folders / "base"), {"x": str(tmp_path)})
    with pytest.raises(ValueError, match="Give at least one adapter"):
        Engine(str(folders / "base"), {})
