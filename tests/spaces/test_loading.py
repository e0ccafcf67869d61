"""Which models and adapters the Space's engine takes: the others are refused with what to change."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from peft import IA3Config, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from space_adapters import last, save_adapter
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    LlamaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
)

from hf_reflora import LoraSbConfig


SPACE = Path(__file__).parents[2] / "spaces" / "before_after"
sys.path.insert(0, str(SPACE))

from decoding import Batch, Settings  # noqa: E402
from engine import Engine  # noqa: E402
from shared_model import Side  # noqa: E402


WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("loading") / "base"
    tiny.save(folder)
    return str(folder)


def refused(base, source, *parts):
    """All parts are in the message, in this order."""
    with pytest.raises(ValueError, match=".*".join(re.escape(part) for part in parts)):
        Engine(base, {"x": str(source)})


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"init_lora_weights": "pissa"}, "changes the base model where it is loaded (init_lora_weights='pissa')"),
        ({"init_lora_weights": "olora"}, "path_initial_model_for_weight_conversion"),
        ({"bias": "lora_only"}, "can't show adapters with bias"),
        ({"layer_replication": [(0, 2), (1, 2)]}, "can't show adapters with layer_replication"),
        ({"alora_invocation_tokens": [5, 6]}, "can't show adapters with alora_invocation_tokens"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_adapters_that_would_change_the_base_are_refused(base, tmp_path, config, message):
    refused(base, save_adapter(tmp_path / "adapter", **config), message)


def test_names_are_checked(base, tmp_path):
    with pytest.raises(ValueError, match="Give at least one adapter"):
        Engine(base, {})
    with pytest.raises(ValueError, match="__base__ is PEFT's name for the base model"):
        Engine(base, {"__base__": str(tmp_path)})


def test_other_methods_are_refused_also_where_peft_does_not_know_them(base, tmp_path):
    get_peft_model(tiny.llama(), LoraSbConfig(r=2, target_modules=["q_proj"], init_weights=True)).save_pretrained(
        tmp_path / "sb"
    )
    refused(base, tmp_path / "sb", f"is LORASB. Export it to a LoRA: hf-reflora export {tmp_path / 'sb'}")
    IA3Config(target_modules=["q_proj"], feedforward_modules=[]).save_pretrained(tmp_path / "ia3")
    refused(base, tmp_path / "ia3", "this page shows LoRA adapters", "is IA3.")
    path = tmp_path / "ia3" / "adapter_config.json"
    path.write_text(json.dumps({"peft_type": "NEWER"}), encoding="utf-8")
    refused(base, tmp_path / "ia3", "is NEWER")
    path.write_text("[]", encoding="utf-8")
    refused(base, tmp_path / "ia3", "adapter_config.json of", "is not one of PEFT's")


def test_a_classifier_is_refused(base, tmp_path):
    model = LlamaForSequenceClassification(tiny.llama().config)
    source = save_adapter(tmp_path / "declared", model=model, task_type="SEQ_CLS")
    refused(base, source, "shows models that write text", "is for SEQ_CLS")
    source = save_adapter(tmp_path / "undeclared", model=model, modules_to_save=["score"])
    refused(base, source, "have no place in the model, such as base_model.model.score.weight")


@pytest.mark.parametrize(("trained", "shown"), [(2, 4), (4, 2)])
def test_another_number_of_layers_is_refused(tmp_path, trained, shown):
    tiny.save(tmp_path / "base", num_hidden_layers=shown)
    source = save_adapter(tmp_path / "adapter", model=tiny.llama(num_hidden_layers=trained))
    fault = "8 are missing, such as" if trained < shown else "8 have no place in the model, such as"
    counts = f"the model takes {4 * shown} weights, the adapter has {4 * trained}"
    refused(str(tmp_path / "base"), source, "do not fit the base model", counts, fault, "model.layers.2")


def test_another_width_is_refused(base, tmp_path):
    source = save_adapter(tmp_path / "adapter", model=tiny.llama(hidden_size=64))
    refused(base, source, "lora_A.weight has the shape (2, 64), and the model takes (2, 32)", "(8 differ)")


def test_names_of_another_model_are_refused(base, tmp_path):
    """Without the check both sides would be the base model's, and equal."""
    source = save_adapter(tmp_path / "adapter")
    path = Path(source) / WEIGHTS
    save_file({key.replace("model.layers", "language_model.layers"): w for key, w in load_file(path).items()}, path)
    refused(base, source, "8 are missing", "8 have no place in the model, such as", "language_model.layers.0")


def test_modules_of_another_model_are_refused(base, tmp_path):
    source = save_adapter(tmp_path / "adapter", model=tiny.gpt2(), target_modules=["c_attn"])
    refused(base, source, "does not fit the base model: ", "c_attn")


def test_a_layer_of_its_own_without_weights_is_refused(base, tmp_path):
    source = save_adapter(tmp_path / "adapter", modules_to_save=["lm_head"])
    path = Path(source) / WEIGHTS
    save_file({key: w for key, w in load_file(path).items() if "lm_head" not in key}, path)
    refused(base, source, "1 are missing, such as base_model.model.lm_head.weight")


def test_no_weights_or_no_whole_file(base, tmp_path):
    source = Path(save_adapter(tmp_path / "adapter"))
    content = (source / WEIGHTS).read_bytes()
    for broken in (content[:-10], b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n"):
        (source / WEIGHTS).write_bytes(broken)
        refused(base, source, f"x: {WEIGHTS} of", "cannot be read")
    (source / WEIGHTS).unlink()
    refused(base, source, f"has an adapter_config.json, but no weights ({WEIGHTS})")
    (source / "adapter_config.json").unlink()
    refused(base, source, "is no adapter, as it has no adapter_config.json")


def test_a_folder_that_does_not_exist_yet(base, monkeypatch, tmp_path):
    """`make space` before `make demo`."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for source in ("runs/smollm2-135m-reflora", "runs/of/mine", str(tmp_path / "absent")):
        refused(base, source, f"x: there is no folder {source} here", "Train it first, or set ADAPTERS")


def test_weights_in_pytorchs_format(base, tmp_path):
    source = Path(save_adapter(tmp_path / "adapter"))
    torch.save(load_file(source / WEIGHTS), source / "adapter_model.bin")
    expected = last(Engine(base, {"x": str(source)}).compare("Hello", "x", Settings(max_new_tokens=8)))
    (source / WEIGHTS).unlink()
    answers = last(Engine(base, {"x": str(source)}).compare("Hello", "x", Settings(max_new_tokens=8)))
    assert [side.text for side in answers] == [side.text for side in expected]
    assert answers[0].text != answers[1].text


def resized(folder, rows, tied=False, **config) -> str:
    """An adapter of a base model whose embeddings were resized; the base model itself is saved beside it."""
    tiny.save(folder / "base", tie_word_embeddings=tied)
    model = AutoModelForCausalLM.from_pretrained(folder / "base")
    model.resize_token_embeddings(rows)
    return save_adapter(folder / "adapter", model=model, **config)


@pytest.mark.parametrize("mixed", [False, True], ids=["in turn", "mixed batch"])
@pytest.mark.parametrize(
    ("rows", "tied", "config"),
    [
        (263, False, {}),
        (263, True, {}),
        (263, False, {"trainable_token_indices": {"embed_tokens": [260, 262]}}),
        (263, True, {"trainable_token_indices": {"embed_tokens": [260, 262]}}),
        (263, False, {"trainable_token_indices": {"embed_tokens": [260, 262]}, "modules_to_save": ["lm_head"]}),
        (263, False, {"modules_to_save": ["lm_head", "embed_tokens"]}),
        (250, False, {"trainable_token_indices": {"embed_tokens": [247, 249]}}),
        (250, True, {"trainable_token_indices": {"embed_tokens": [247, 249]}}),
    ],
)
def test_an_adapter_with_tokens_of_its_own(tmp_path, rows, tied, config, mixed):
    """Trained with more tokens than the base model has, or with fewer, as where the base model has spare rows."""
    source = resized(tmp_path, rows, tied, **config)
    engine = Engine(str(tmp_path / "base"), {"x": source})
    assert any(f"{rows - 260} tokens that the base model does not have" in note for note in engine.notes["x"]) == (
        rows > 260
    )
    engine._uses_mixed_batch["x"] = mixed
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    stock.resize_token_embeddings(rows, mean_resizing=False)
    stock = PeftModel.from_pretrained(stock, source).eval()
    sides = last(engine.compare("Hello", "x", Settings(max_new_tokens=16)))
    ids = engine.encode_prompt("Hello", "x")
    for side, model in zip(sides, (base, stock), strict=True):
        output = model.generate(input_ids=torch.tensor([ids]), do_sample=False, max_new_tokens=16, pad_token_id=0)
        assert side.text == engine._chats["x"].decode(output[0, len(ids) :].tolist())
    assert sides[0].text != sides[1].text
    last(engine.compare("Hello", "x", Settings(max_new_tokens=4, temperature=1.0, top_p=0.9)))
    # Alone, the base's side has the base model's very logits: its last layer has the size that it has without them.
    base.requires_grad_(False)
    with torch.inference_mode():
        expected = base.eval()(torch.tensor([ids]), past_key_values=DynamicCache(), logits_to_keep=1).logits[0, -1]
    assert torch.equal(Batch(engine.shared, [Side.BASE]).logits([ids])[0], expected)
    assert len(engine.shared.head.weight) == max(rows, 260)


def test_an_adapter_with_tokens_of_its_own_needs_a_page_of_its_own(tmp_path):
    source = resized(tmp_path, 262)
    plain = save_adapter(tmp_path / "plain")
    message = "was trained with a vocabulary of 262 tokens, the base model has 260.*set ADAPTERS to it alone"
    with pytest.raises(ValueError, match=message):
        Engine(str(tmp_path / "base"), {"x": source, "y": plain})


def test_embeddings_of_another_width_are_refused(base, tmp_path):
    model = tiny.llama(hidden_size=64, vocab_size=300)
    source = save_adapter(tmp_path / "head", model=model, modules_to_save=["lm_head"])
    refused(base, source, "lm_head.weight has the shape (300, 64), and the model takes (260, 32)")
    model = tiny.llama(hidden_size=64, vocab_size=300)  # without the adapter, which PEFT leaves in the model
    source = save_adapter(tmp_path / "embeddings", model=model, target_modules=["embed_tokens"])
    refused(base, source, "has model.embed_tokens.weight of the base model with other values")


def test_a_trained_head_with_fewer_rows_is_refused(tmp_path):
    source = resized(tmp_path, 250, modules_to_save=["lm_head"])
    refused(str(tmp_path / "base"), source, "lm_head.weight has the shape (250, 32), and the model takes (260, 32)")


def test_tokens_past_the_rows_of_the_base_are_named(base, tmp_path):
    """Where the adapter's file has no copy of the resized embeddings."""
    source = Path(save_adapter(tmp_path / "adapter", trainable_token_indices=[250, 259]))
    config = json.loads((source / "adapter_config.json").read_text(encoding="utf-8"))
    config["trainable_token_indices"] = [250, 263]
    (source / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    refused(base, source, "has a token 263, and the base model has 260 tokens", "save_embedding_layers=True")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_copy_of_the_bases_embeddings_leaves_the_base_as_it_is(base, tmp_path, dtype):
    """PEFT saves one beside an adapter of the embeddings; in 16 bits it is rounded."""
    source = save_adapter(tmp_path / "adapter", target_modules=["embed_tokens", "q_proj"])
    path = Path(source) / WEIGHTS
    weights = load_file(path)
    [copy] = [key for key in weights if key.endswith("embed_tokens.base_layer.weight")]
    weights[copy] = AutoModelForCausalLM.from_pretrained(base).get_input_embeddings().weight.detach().to(dtype)
    save_file(weights, path)
    engine = Engine(base, {"x": source})
    pristine = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    assert torch.equal(
        engine.shared.model.get_input_embeddings().base_layer.weight, pristine.get_input_embeddings().weight
    )
    weights[copy][5] += 1
    save_file(weights, path)
    refused(base, source, "has model.embed_tokens.weight of the base model with other values", "modules_to_save")


def test_an_encoder_decoder_base_is_refused(base, tmp_path):
    config = T5Config(vocab_size=260, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0)
    T5ForConditionalGeneration(config).save_pretrained(tmp_path / "t5")
    refused(str(tmp_path / "t5"), save_adapter(tmp_path / "adapter"), "is an encoder-decoder model (t5)")


def test_a_base_without_a_head_is_refused(tmp_path):
    LlamaForSequenceClassification(tiny.llama().config).save_pretrained(tmp_path / "classifier")
    source = save_adapter(tmp_path / "adapter")
    refused(str(tmp_path / "classifier"), source, "lacks 1 weights", "lm_head.weight; they would be random")


@pytest.mark.parametrize(
    ("quantization", "library"),
    [({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"), ({"quant_method": "gptq"}, "optimum")],
    ids=["bitsandbytes", "gptq"],
)
def test_a_quantized_base_names_the_library_that_is_missing(tmp_path, quantization, library):
    """In a process of its own: transformers remembers which libraries it has seen."""
    tiny.save(tmp_path / "base")
    path = tmp_path / "base" / "config.json"
    config = json.loads(path.read_text(encoding="utf-8")) | {"quantization_config": {"bits": 4, **quantization}}
    path.write_text(json.dumps(config), encoding="utf-8")
    code = (
        f"import sys; sys.modules[{library!r}] = None; sys.path.insert(0, {str(SPACE)!r})\n"
        "from engine import Engine\n"
        f"Engine({str(tmp_path / 'base')!r}, {{'x': {str(save_adapter(tmp_path / 'adapter'))!r}}})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    message = done.stderr.splitlines()[-1]
    for part in (
        "ValueError",
        "is quantized and cannot be loaded here",
        library,
        "requirements.txt, or set BASE_MODEL",
    ):
        assert part in message


def test_an_unknown_dtype_is_refused(base, tmp_path):
    with pytest.raises(ValueError, match="DTYPE must be one of auto, float32, bfloat16, float16, not 'int4'"):
        Engine(base, {"x": save_adapter(tmp_path / "adapter")}, dtype="int4")


def test_a_base_of_another_name_is_noted(base, tmp_path):
    """It may be the same model, so it is shown."""
    model = AutoModelForCausalLM.from_pretrained(base)
    source = save_adapter(tmp_path / "adapter", model=model)
    assert Engine(base, {"x": source}).notes == {"x": []}
    shutil.copytree(base, tmp_path / "moved" / "base")
    assert Engine(str(tmp_path / "moved" / "base"), {"x": source}).notes == {"x": []}
    shutil.copytree(base, tmp_path / "other")
    [note] = Engine(str(tmp_path / "other"), {"x": source}).notes["x"]
    assert note == f"The adapter was trained from {base}, and is shown with {tmp_path / 'other'}."


def test_loading_is_pefts(base, tmp_path):
    """Every weight of every adapter, and of the base model."""
    sources = {str(i): save_adapter(tmp_path / str(i), init_lora_weights="gaussian") for i in range(2)}
    ours = Engine(base, sources).shared.model.state_dict()
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = PeftModel.from_pretrained(model, sources["0"], adapter_name="adapter0")
    model.load_adapter(sources["1"], adapter_name="adapter1")
    theirs = model.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
