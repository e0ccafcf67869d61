"""QLoRA: both methods on 4- and 8-bit bases of bitsandbytes, made by TRL's quantization_config, on the CPU."""

import json

import pytest
import tiny
import tiny_trainer
import torch
from adapter_layers import adapters, delta, factors, truncation
from peft import LoraConfig, PeftModel
from peft.utils.integrations import dequantize_module_weight
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TrainerCallback
from trl import SFTConfig, SFTTrainer, get_quantization_config

from hf_reflora import LoraSbCallback, LoraSbConfig, LoraSbSFTTrainer, RefLoraCallback, RefLoraSFTTrainer
from hf_reflora.recipes import sft


bnb = pytest.importorskip("bitsandbytes")

BITS = {
    4: BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    8: BitsAndBytesConfig(load_in_8bit=True),
}
METHODS = {
    "reflora": (LoraConfig, lambda: [RefLoraCallback()]),
    "reflora_s": (LoraConfig, lambda: [RefLoraCallback("reflora_s")]),
    "lora_sb": (LoraSbConfig, lambda: [LoraSbCallback()]),
    "reflora on lora_sb": (LoraConfig, lambda: [LoraSbCallback(), RefLoraCallback()]),
}
PLAIN = {"lora": (LoraConfig, list)}  # to compare with
BF16 = 2.0**-8  # of rounding to nearest


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("base")
    tiny.save(folder, hidden_size=64, intermediate_size=64)
    return str(folder)


def make_trainer(folder, base, bits, method, more=(), **changes) -> SFTTrainer:
    config, callbacks = {**METHODS, **PLAIN}[method]
    torch.manual_seed(1)
    adapter = {
        "quantization_config": BITS[bits],
        "peft_config": config(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"),
        "callbacks": [*callbacks(), *more],
    }
    return tiny_trainer.build(folder, SFTTrainer, base, more=adapter, **changes)


def losses(trainer) -> list[float]:
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def quantized(model) -> dict[str, nn.Module]:
    return {n: m for n, m in model.named_modules() if isinstance(m, bnb.nn.Linear4bit | bnb.nn.Linear8bitLt)}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bits", BITS)
def test_training(tmp_path, base, bits, method):
    """The same rows again and again: the loss falls; adapters are bf16 (R is float32), the base does not change."""
    changes = {"max_steps": 16, "per_device_train_batch_size": 16, "lr_scheduler_type": "constant"}
    trainer = make_trainer(tmp_path, base, bits, method, **changes)
    layers = quantized(trainer.model)
    assert len(layers) == 14
    packed = {name: layer.weight.data.clone() for name, layer in layers.items()}
    trainer.train()
    dtype = torch.float32 if method == "lora_sb" else torch.bfloat16
    assert {p.dtype for p in trainer.model.parameters() if p.requires_grad} == {dtype}
    assert {s["exp_avg"].dtype for s in trainer.optimizer.state.values()} == {dtype}
    assert losses(trainer)[-1] < losses(trainer)[0] - (0.01 if method == "lora_sb" else 0.1)
    tiny.assert_same(packed, {name: layer.weight.data for name, layer in layers.items()})
    assert all(value.isfinite().all() for value in tiny.trainable(trainer.model).values())


class Watch(TrainerCallback):
    """Keeps the factors, gradients and first moments before and after the callback that it stands around."""

    def __init__(self, after: bool = False):
        self.after, self.kept = after, []

    def keep(self, model, optimizer):
        trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        moments = {n: optimizer.state.get(p, {}).get("exp_avg") for n, p in trained.items()}
        tensors = [trained, {n: p.grad for n, p in trained.items()}, moments]
        self.kept.append([{n: t.detach().clone() for n, t in kind.items() if t is not None} for kind in tensors])

    def on_pre_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs):
        self.keep(model, optimizer)

    def on_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs):
        self.keep(model, optimizer)


def assert_rounded(found, expected) -> None:
    """Equal to bf16's rounding of each entry, and a little of float32's."""
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), expected, rtol=1.01 * BF16, atol=1e-4 * expected.abs().max().item())


@pytest.mark.parametrize("method", ["reflora", "reflora_s"])
@pytest.mark.parametrize("bits", BITS)
def test_step_is_that_of_float64_from_the_bf16_factors(tmp_path, base, bits, method):
    before, after = Watch(), Watch()
    trainer = make_trainer(tmp_path, base, bits, method, [after])
    trainer.callback_handler.callbacks.insert(0, before)
    trainer.train()
    assert len(before.kept) == len(after.kept) == 8
    seen = 0
    for i in range(2, 8):  # the first step starts with B = 0
        if (method == "reflora") == (i % 2 == 1):
            continue  # nothing happens there
        (values, grads, moments), (new_values, new_grads, new_moments) = before.kept[i], after.kept[i]
        for name in [n for n in values if "lora_A" in n]:
            other = name.replace("lora_A", "lora_B")
            A, B = values[name].double(), values[other].double()
            S = tiny.hand_S(A, B, method, eps=1e-5)
            if method == "reflora":
                assert_rounded(new_grads[name], torch.linalg.solve(S, grads[name].double()))
                assert_rounded(new_grads[other], grads[other].double() @ S)
                tiny.assert_same(new_values, values)
                assert (new_grads[name].double() - grads[name].double()).norm() > 0.3 * grads[name].double().norm()
            else:
                root = S[0, 0].sqrt()
                assert_rounded(new_values[name], A * root)
                assert_rounded(new_values[other], B / root)
                assert_rounded(new_moments[name], moments[name].double() / root)
                assert_rounded(new_moments[other], moments[other].double() * root)
            seen += 1
    assert seen == 3 * 4


@pytest.mark.parametrize("as_saved", [True, False])
@pytest.mark.parametrize("method", [*METHODS, *PLAIN])
@pytest.mark.parametrize("bits", BITS)
def test_resumed_run(tmp_path, monkeypatch, base, bits, method, as_saved):
    """Bit for bit where the adapter comes back in the dtype it was saved in.

    When the Trainer resumes, PEFT makes a bf16 LoRA float32, with RefLoRA or without. It then goes on in float32 and
    is the unbroken run only up to rounding. LoRA-SB's R is float32 before and after.
    """
    if as_saved:
        load = PeftModel.load_adapter
        monkeypatch.setattr(
            PeftModel, "load_adapter", lambda *args, **kwargs: load(*args, **kwargs, autocast_adapter_dtype=False)
        )
    changes = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "train_sampling_strategy": "random"}
    unbroken = make_trainer(tmp_path, base, bits, method, **changes)
    unbroken.train()
    resumed = make_trainer(tmp_path, base, bits, method, **changes)
    start, end = tiny.trainable(resumed.model), tiny.trainable(unbroken.model)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    found = tiny.trainable(resumed.model)
    assert len(losses(resumed)) == 6
    assert not all(torch.equal(value, start[name]) for name, value in found.items())
    if as_saved or method == "lora_sb":
        assert losses(resumed) == losses(unbroken)
        tiny.assert_same(found, end)
    else:
        assert {value.dtype for value in found.values()} == {torch.float32}
        assert losses(resumed) != losses(unbroken)
        assert losses(resumed) == pytest.approx(losses(unbroken), abs=1e-3)


@pytest.mark.parametrize("method", ["reflora", "lora_sb"])
@pytest.mark.parametrize("bits", BITS)
def test_save_reload_and_merge(tmp_path, base, bits, method):
    """On the quantized base as it was; merged into it (which rounds), and into the one that was not quantized."""
    trainer = make_trainer(tmp_path, base, bits, method, learning_rate=0.1)
    trainer.train()
    trainer.save_model()
    ids = torch.arange(4, 20)[None]
    trained = trainer.model.eval()
    deltas = {name: trained_delta(layer) for name, layer in adapters(trained).items()}

    def load(config):
        loaded = AutoModelForCausalLM.from_pretrained(base, quantization_config=config)
        return PeftModel.from_pretrained(loaded, tmp_path).eval()

    reloaded = load(BITS[bits])
    with torch.no_grad():
        expected, plain = trained(ids).logits, trained.get_base_model()
        torch.testing.assert_close(reloaded(ids).logits, expected, rtol=0.02, atol=0.02)
        with trained.disable_adapter():
            assert (plain(ids).logits - expected).abs().max() > 0.2
    for name, layer in adapters(reloaded).items():
        torch.testing.assert_close(trained_delta(layer), deltas[name], rtol=1e-2, atol=1e-4)
    W0 = {name: dequantize_module_weight(layer.get_base_layer()).float() for name, layer in adapters(reloaded).items()}
    merged = reloaded.merge_and_unload()
    for name, W in W0.items():
        layer = merged.get_submodule(name)
        assert isinstance(layer, bnb.nn.Linear4bit | bnb.nn.Linear8bitLt)
        error = (dequantize_module_weight(layer).float() - W - deltas[name]).norm() / (W + deltas[name]).norm()
        assert error < (0.12 if bits == 4 else 0.02)
        assert deltas[name].norm() > (0.2 if bits == 4 else 0.04) * W.norm()
    full = load(None)
    with torch.no_grad():
        expected = full(ids).logits
        torch.testing.assert_close(full.merge_and_unload()(ids).logits, expected, rtol=1e-4, atol=1e-4)


def trained_delta(layer) -> torch.Tensor:
    return layer.get_delta_weight("default").detach().float()


@pytest.mark.parametrize("method", ["lora_sb", "reflora on lora_sb"])
@pytest.mark.parametrize("bits", BITS)
def test_initialization_is_of_the_dequantized_models_gradient(tmp_path, base, bits, method):
    trainer = make_trainer(tmp_path, base, bits, method, max_steps=1, learning_rate=1e-30)
    callback = next(c for c in trainer.callback_handler.callbacks if isinstance(c, LoraSbCallback))
    callback.update, callback.eta = "gradient", 0.1
    dense = AutoModelForCausalLM.from_pretrained(base)
    for name, layer in quantized(trainer.model).items():
        name = name.removeprefix("base_model.model.").removesuffix(".base_layer")
        dense.get_submodule(name).weight.data = dequantize_module_weight(layer).float()
    trainer.train()
    ids = torch.tensor(tiny.token_dataset(16)["input_ids"])
    dense(ids, labels=ids).loss.backward()
    for name, layer in adapters(trainer.model).items():
        best = truncation(-0.1 * dense.get_submodule(name).weight.grad, 4)
        bound = (1e-4 if method == "lora_sb" else 0.01) if bits == 4 else 0.1  # a LoRA's factors are bf16
        assert (delta(layer) - best).norm() < bound * best.norm(), name
        assert {f.dtype for f in factors(layer)} == {torch.float32 if method == "lora_sb" else torch.bfloat16}


@pytest.mark.parametrize("method", ["reflora", "lora_sb"])
def test_double_quantization_bf16_and_a_paged_8_bit_adam(tmp_path, monkeypatch, base, method):
    """The settings of the QLoRA paper, with an optimizer of bitsandbytes."""
    settings = {"bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": torch.bfloat16}
    monkeypatch.setitem(BITS, 4, BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", **settings))
    changes = {"per_device_train_batch_size": 16, "lr_scheduler_type": "constant", "activation_checkpointing": True}
    trainer = make_trainer(tmp_path, base, 4, method, optim="paged_adamw_8bit", bf16=True, max_steps=8, **changes)
    trainer.train()
    assert type(trainer.optimizer.optimizer).__module__.startswith("bitsandbytes")
    assert losses(trainer)[-1] < losses(trainer)[0] - 0.005


# The trainers and the recipe


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(
    ("cls", "method"),
    [(RefLoraSFTTrainer, "reflora"), (LoraSbSFTTrainer, "lora_sb")],
    ids=lambda v: getattr(v, "__name__", ""),
)
def test_the_trainers_are_their_callbacks(tmp_path, base, bits, cls, method):
    stock = make_trainer(tmp_path, base, bits, method)
    stock.train()
    torch.manual_seed(1)
    trainer = cls(
        model=base,
        args=SFTConfig(**tiny.arguments(tmp_path)),
        train_dataset=tiny.token_dataset(16, labels=False),
        processing_class=tiny.tokenizer(),
        quantization_config=BITS[bits],
        peft_config=METHODS[method][0](r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"),
    )
    trainer.train()
    tiny.assert_same(tiny.trainable(trainer.model), tiny.trainable(stock.model))


@pytest.mark.parametrize(("bits", "method"), [(4, "reflora"), (4, "lora_sb"), (8, "reflora")])
def test_recipe(tmp_path, monkeypatch, base, bits, method):
    """The script's own parser and main, in this process."""
    import trl.trainer.utils

    monkeypatch.setattr(trl.trainer.utils, "_use_triton", trl.trainer.utils._use_triton)  # main sets it
    rows = [{"prompt": f"{i} + {i} = ", "completion": str(2 * i)} for i in range(8)]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    arguments = sft.make_parser().parse_args_and_config(
        [
            *("--model_name_or_path", base, "--dataset_name", str(tmp_path), "--output_dir", str(tmp_path / "out")),
            *("--method", method, f"--load_in_{bits}bit", "true", "--dtype", "float32", "--bf16", "false"),
            *("--max_steps", "2", "--logging_steps", "1", "--use_cpu", "true", "--cpu_threads", "1"),
        ]
    )
    quantization = get_quantization_config(arguments[2])
    assert (quantization.load_in_4bit, quantization.load_in_8bit) == (bits == 4, bits == 8)
    sft.main(*arguments)
    record = json.loads((tmp_path / "out" / "run_record.json").read_text(encoding="utf-8"))
    assert record["method"] == method
    assert record["arguments"][f"load_in_{bits}bit"] is True
    assert len([row for row in record["log"] if "loss" in row]) == 2
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()
