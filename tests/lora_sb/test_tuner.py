"""LoRA-SB as a PEFT tuner: what its layers compute, what is trained, and all that PEFT does with adapters."""

import copy
import json
import subprocess
import sys
import warnings

import numpy as np
import peft
import pytest
import reference_sb
import tiny
import torch
from adapter_layers import truncation
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from peft import AutoPeftModelForCausalLM, PeftConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils import set_peft_model_state_dict
from safetensors.torch import load_file
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, T5Config, T5ForConditionalGeneration
from transformers.pytorch_utils import Conv1D

from hf_reflora import LoraSbConfig, LoraSbModel
from hf_reflora.lora_sb import LoraSbLayer
from hf_reflora.lora_sb.export import export_lora
from hf_reflora.lora_sb.model import restore_float32


IDS = torch.randint(4, 260, (3, 8), generator=torch.Generator().manual_seed(0))
CLOSE = {"rtol": 0, "atol": 1e-5}
CAUSAL = {"task_type": "CAUSAL_LM"}


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = {"vocab_size": 260, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "attn_pdrop": 0.0}
    config |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0}
    return GPT2LMHeadModel(GPT2Config(**config))


def mlp() -> nn.Sequential:
    return tiny.mlp(dtype=torch.float32)


# kind: (the base model, target modules)
KINDS = {
    "llama": (tiny.llama, ["q_proj", "down_proj"]),
    "gpt2": (gpt2, ["c_attn", "c_fc"]),
    "mlp": (mlp, ["0", "2"]),
}
kinds = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    return request.param


def sb(kind: str = "mlp", seed: int = 1, **config) -> PeftModel:
    """A model with an adapter that is not the identity."""
    make, targets = KINDS[kind]
    base, task = make(), {} if kind == "mlp" else CAUSAL
    torch.manual_seed(seed)
    return get_peft_model(
        base, LoraSbConfig(**{"r": 4, "target_modules": targets, "init_weights": False, **task, **config})
    ).eval()


def run(model: nn.Module) -> torch.Tensor:
    if isinstance(model.get_base_model() if isinstance(model, PeftModel) else model, nn.Sequential):
        x = tiny.batch(0, torch.float32)[0]
        return model(x.to(next(model.parameters()).dtype))
    return model(input_ids=IDS).logits


def train(model: nn.Module, steps: int = 3, lr: float = 0.05) -> list[float]:
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    losses = []
    for _ in range(steps):
        out = run(model)
        loss = (out - 0.1).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.eval()
    return losses


def layers(model: nn.Module) -> dict[str, LoraSbLayer]:
    found = {name: module for name, module in model.named_modules() if isinstance(module, LoraSbLayer)}
    return {name.removeprefix("base_model.model."): layer for name, layer in found.items()}


def first(model: nn.Module) -> LoraSbLayer:
    return next(iter(layers(model).values()))


def base_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """The original model's tensors, by their original names."""
    state = {name.removeprefix("base_model.model."): t.detach().clone() for name, t in model.state_dict().items()}
    return {name.replace("base_layer.", ""): t for name, t in state.items() if "lorasb_" not in name}


def by_hand(layer: LoraSbLayer, adapter: str = "default") -> torch.Tensor:
    """s B R A, (out, in)."""
    B, R, A = (getattr(layer, f"lorasb_{k}")[adapter].detach().double().cpu().numpy() for k in "BRA")
    return torch.from_numpy(reference_sb.equivalent_gradient(R, B, A, layer.scaling[adapter])).float()


def assert_only_R_is_trainable(model: nn.Module) -> None:
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert all("lorasb_R" in name for name in trainable)
    parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    for name in {**parameters, **buffers}:
        if "lorasb_A" in name or "lorasb_B" in name:
            assert name not in parameters
            assert not buffers[name].requires_grad
        if "lorasb_R" in name:
            assert parameters[name].dtype == torch.float32


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("scaling", [1.0, 0.3])
@pytest.mark.parametrize("layer", ["Linear", "Conv1D"])
def test_the_layer_by_hand(layer, scaling, bias):
    torch.manual_seed(0)
    base = nn.Linear(6, 9, bias=bias) if layer == "Linear" else Conv1D(9, 6)
    if layer == "Conv1D":
        nn.init.normal_(base.bias) if bias else nn.init.zeros_(base.bias)
    W0 = (base.weight if layer == "Linear" else base.weight.T).detach().clone()
    model = get_peft_model(
        nn.Sequential(base), LoraSbConfig(r=3, scaling=scaling, target_modules=["0"], init_weights=False)
    )
    adapted = model.base_model.model[0]
    assert (adapted.lorasb_A["default"].shape, adapted.lorasb_B["default"].shape) == ((3, 6), (9, 3))
    W = W0 + by_hand(adapted)
    x = torch.randn(2, 5, 6)
    expected = nn.functional.linear(x, W, base.bias)
    torch.testing.assert_close(model(x), expected)
    delta = adapted.get_delta_weight("default")
    torch.testing.assert_close(delta if layer == "Linear" else delta.T, by_hand(adapted))
    adapted.merge()
    torch.testing.assert_close(base.weight if layer == "Linear" else base.weight.T, W)
    torch.testing.assert_close(model(x), expected)
    adapted.unmerge()
    torch.testing.assert_close(adapted.dequantized_weight(), W0)
    assert (W - W0).abs().max() > 0.05


@kinds
def test_the_base_is_never_modified(kind):
    """Neither by an adapter nor by its training: disable_adapter() gives the original model to the bit."""
    original = KINDS[kind][0]().eval()
    model = sb(kind)
    start = run(model).detach()
    losses = train(model)
    assert losses[-1] < losses[0]
    assert (run(model) - start).abs().max() > 1e-3
    tiny.assert_same(base_weights(model), dict(original.state_dict()))
    with model.disable_adapter():
        assert torch.equal(run(model), run(original))
    assert (run(model) - run(original)).abs().max() > 1e-3
    assert_only_R_is_trainable(model)
    assert torch.equal(run(model.unload()), run(original))


@kinds
def test_trainable_parameters(kind, capsys):
    model = sb(kind, r=3, rank_pattern={"0": 2, "q_proj": 2, "c_fc": 2})
    ranks = [len(layer.lorasb_R["default"]) for layer in layers(model).values()]
    assert set(ranks) == {2, 3}
    trainable, total = model.get_nb_trainable_parameters()
    assert trainable == sum(r * r for r in ranks)
    assert total == trainable + sum(p.numel() for p in KINDS[kind][0]().parameters())
    model.print_trainable_parameters()
    assert f"trainable params: {trainable:,d} ||" in capsys.readouterr().out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_those_of_the_product(dtype):
    """Into R and the input, also of a base in half precision, where the adapter computes in float32."""
    layer = nn.Linear(6, 9).to(dtype)
    model = get_peft_model(nn.Sequential(layer), LoraSbConfig(r=3, target_modules=["0"], init_weights=False))
    adapted = first(model)
    x = torch.randn(4, 6, dtype=dtype, requires_grad=True)
    out = model(x)
    assert out.dtype == dtype
    delta = torch.randn_like(out)
    out.backward(delta)
    G = delta.float().T @ x.detach().float()
    B, A = adapted.lorasb_B["default"], adapted.lorasb_A["default"]
    assert adapted.lorasb_R["default"].grad.dtype == torch.float32
    torch.testing.assert_close(adapted.lorasb_R["default"].grad, B.T @ G @ A.T)
    W = layer.weight.detach().float() + by_hand(adapted)
    torch.testing.assert_close(
        x.grad.float(), delta.float() @ W, **({} if dtype == torch.float32 else {"rtol": 0.02, "atol": 0.05})
    )


# What may happen to an adapter


class AnySequence(RuleBasedStateMachine):
    """Whatever PEFT is asked for, in any order, only R's are trainable, in float32, and the base stays as it was."""

    @initialize()
    def build(self):
        torch.manual_seed(0)
        self.model = sb("mlp", r=2)
        self.original = dict(mlp().state_dict())
        self.x = tiny.batch(0, torch.float32)[0]
        self.merged_once = False

    def names(self) -> list[str]:
        return list(self.model.peft_config)

    @rule(
        name=st.sampled_from("xyz"),
        init=st.sampled_from([True, False, "lora_xs", "lora_sb"]),
        modules=st.sampled_from([["0"], ["0", "2"], ["4"]]),
        inference=st.booleans(),
    )
    def add_adapter(self, name, init, modules, inference):
        if name not in self.names():
            config = LoraSbConfig(r=2, target_modules=modules, init_weights=init, inference_mode=inference)
            self.model.add_adapter(name, config)

    @rule(name=st.sampled_from("xyz"), trainable=st.booleans(), low=st.booleans())
    def load_adapter(self, name, trainable, low):
        if name not in self.names():
            self.model.load_adapter(str(SAVED), name, is_trainable=trainable, low_cpu_mem_usage=low)

    @rule(data=st.data(), inference=st.booleans())
    def set_adapter(self, data, inference):
        self.model.set_adapter(data.draw(st.sampled_from(self.names())), inference_mode=inference)

    @rule()
    def set_all_adapters(self):
        self.model.base_model.set_adapter(self.names())

    @rule(data=st.data())
    def delete_adapter(self, data):
        if len(self.names()) > 1:
            self.model.delete_adapter(data.draw(st.sampled_from(self.names())))
            self.model.set_adapter(self.names()[0])  # PEFT's PeftModel, of any tuner, may still name the deleted one

    @rule(data=st.data(), requires_grad=st.booleans())
    def set_requires_grad(self, data, requires_grad):
        self.model.set_requires_grad(data.draw(st.sampled_from(self.names())), requires_grad)

    @rule(enabled=st.booleans())
    def layers_on_and_off(self, enabled):
        (self.model.base_model.enable_adapter_layers if enabled else self.model.base_model.disable_adapter_layers)()

    @rule()
    def disable_for_a_while(self):
        with self.model.disable_adapter():
            self.model(self.x)

    @rule(training=st.booleans())
    def mode(self, training):
        self.model.train(training)

    @rule()
    @precondition(lambda self: self.model.active_adapters)
    def merge_and_unmerge(self):
        self.model.merge_adapter()
        self.model.unmerge_adapter()
        self.merged_once = True

    @rule()
    def half_and_back(self):
        # A and B are rounded; the base would be, too, were its dtype to change
        for layer in layers(self.model).values():
            for part in (layer.lorasb_R, layer.lorasb_A, layer.lorasb_B):
                before = [t.detach().clone() for t in part.values()]
                part.to(torch.bfloat16)
                part.to(torch.float32)
                assert part is not layer.lorasb_R or all(map(torch.equal, before, part.values()))

    @rule()
    def copied(self):
        self.model = copy.deepcopy(self.model)

    @rule()
    def step(self):
        R = [p for p in self.model.parameters() if p.requires_grad]
        ready = all(set(layer.r) <= layer.initialized for layer in layers(self.model).values())
        if R and ready:
            (self.model(self.x).square().mean() + sum(0 * p.sum() for p in R)).backward()
            torch.optim.SGD(R, lr=0.01).step()

    @invariant()
    def only_R_is_trainable(self):
        if not hasattr(self, "model"):
            return
        assert_only_R_is_trainable(self.model)
        tolerance = {"rtol": 0, "atol": 1e-5} if self.merged_once else {}
        tiny.assert_same(self.original, base_weights(self.model), **tolerance)
        for layer in layers(self.model).values():
            assert set(layer.r) == set(layer.scaling) == set(layer.lorasb_R) == set(layer.lorasb_dropout)
            assert set(layer.r) == set(layer.lorasb_A.keys()) == set(layer.lorasb_B.keys())
            assert layer.initialized <= set(layer.r)


AnySequence.TestCase.settings = settings(max_examples=25, stateful_step_count=12, deadline=None)
TestAnySequence = AnySequence.TestCase
SAVED = None


@pytest.fixture(scope="module", autouse=True)
def saved(tmp_path_factory):
    global SAVED
    SAVED = tmp_path_factory.mktemp("adapter")
    sb("mlp", seed=3, r=2).save_pretrained(SAVED)


def test_even_requires_grad_of_everything_leaves_A_and_B_frozen():
    model = sb()
    model.requires_grad_(True)
    names = [name for name, p in model.named_parameters() if "lorasb" in name]
    assert names
    assert all("lorasb_R" in name for name in names)
    assert not any(buffer.requires_grad for buffer in model.buffers())


def test_torchaos_weights_are_not_merged_into():
    """Nothing would change, without a word. Forward passes and the start from W0 work, and the model stays usable."""
    quantization = pytest.importorskip("torchao.quantization")
    quantization.quantize_(model := tiny.llama(hidden_size=64), quantization.Int8WeightOnlyConfig())
    W = model.model.layers[0].self_attn.q_proj.weight.dequantize()
    model = get_peft_model(model, LoraSbConfig(r=3, target_modules=["q_proj"], init_weights="lora_xs", **CAUSAL))
    A, B = first(model).lorasb_A["default"], first(model).lorasb_B["default"]
    torch.testing.assert_close(B @ A, truncation(W, 3).float(), rtol=0, atol=1e-5)
    with torch.no_grad():
        first(model).lorasb_R["default"].fill_(0.5)
    before = model(IDS).logits
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(TypeError, match=r"a weight that torchao has quantized \(Int8Tensor\)"):
            merge()
    torch.testing.assert_close(model(IDS).logits, before)


@pytest.mark.parametrize("what", ["lora_xs", "merge"])
def test_weights_whose_scales_are_elsewhere_are_refused(what):
    """Such as those of transformers' FP8Linear: SVD and sum would be of numbers that are no weight."""
    model = mlp()
    model[0].weight = nn.Parameter(model[0].weight.to(torch.float8_e4m3fn), requires_grad=False)
    config = {"r": 3, "target_modules": ["0"], "init_weights": what if what == "lora_xs" else True}
    with pytest.raises(TypeError, match=r"stored as torch.float8_e4m3fn.*in bfloat16 or float32"):
        get_peft_model(model, LoraSbConfig(**config)).merge_adapter()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("init_weights", ["lora_sb", "lora_xs", True, False])
def test_adapters_are_float32_whatever_the_default_dtype(init_weights, dtype):
    model = mlp()
    torch.set_default_dtype(dtype)
    try:
        model = get_peft_model(model, LoraSbConfig(r=3, target_modules=["0", "2"], init_weights=init_weights))
    finally:
        torch.set_default_dtype(torch.float32)
    assert {t.dtype for name, t in model.state_dict().items() if "lorasb" in name} == {torch.float32}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("how", ["to", "method", "to device and dtype"])
def test_R_stays_float32_under_a_cast(how, dtype):
    model = sb()
    parameter, R = first(model).lorasb_R["default"], first(model).lorasb_R["default"].detach().clone()
    parameter.grad = torch.ones_like(parameter)
    if how == "method":
        model.bfloat16() if dtype == torch.bfloat16 else model.half()
    else:
        model.to(dtype) if how == "to" else model.to("cpu", dtype)
    layer = first(model)
    assert layer.lorasb_R["default"] is parameter  # an optimizer holds it
    assert parameter.dtype == parameter.grad.dtype == torch.float32
    assert torch.equal(parameter, R)
    assert layer.lorasb_A["default"].dtype == layer.lorasb_B["default"].dtype == dtype
    assert layer.base_layer.weight.dtype == dtype
    assert layer.get_delta_weight("default").dtype == torch.float32
    assert run(model).dtype == dtype
    train(model, steps=1)
    assert not torch.equal(parameter, R)
    R = parameter.detach().clone()
    model.float()
    assert torch.equal(first(model).lorasb_R["default"], R)
    assert {t.dtype for t in model.state_dict().values()} == {torch.float32}
    model.double()
    assert first(model).lorasb_R["default"].dtype == torch.float64
    model.to(dtype)
    assert first(model).lorasb_R["default"].dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("autocast", [True, False])
def test_dtypes_at_the_start(autocast, dtype):
    config = LoraSbConfig(r=2, target_modules=["0"], init_weights=False)
    model = get_peft_model(tiny.mlp(dtype=dtype), config, autocast_adapter_dtype=autocast)
    layer = first(model)
    expected = torch.float32 if autocast else dtype
    assert {getattr(layer, f"lorasb_{k}")["default"].dtype for k in "ABR"} == {expected}
    assert layer.lorasb_R["default"].requires_grad
    assert run(model.eval()).dtype == dtype
    if expected in (torch.bfloat16, torch.float16):
        model.train()
        with pytest.raises(RuntimeError, match=r"R of the LoRA-SB adapter \"default\" is torch.*rounded away"):
            run(model)
        with torch.no_grad():
            run(model)
        restore_float32(model)
        assert layer.lorasb_R["default"].dtype == torch.float32
    train(model, steps=1)


def test_restoring_float32_keeps_the_parameter():
    model = sb()
    parameter = first(model).lorasb_R["default"]
    parameter.data = parameter.data.bfloat16()  # as TRL does
    restore_float32(model)
    assert parameter.dtype == torch.float32
    assert first(model).lorasb_R["default"] is parameter
    before = parameter.data_ptr()
    restore_float32(model)
    assert parameter.data_ptr() == before


def test_setting_the_factors_is_in_place():
    layer = first(sb())
    held = [getattr(layer, f"lorasb_{k}")["default"] for k in "BRA"]
    new = [torch.randn_like(t) for t in held]
    layer.set_factors("default", *new)
    for before, after, value in zip(held, [getattr(layer, f"lorasb_{k}")["default"] for k in "BRA"], new, strict=True):
        assert after is before
        assert torch.equal(after, value)


# What is adapted


def names_of(model: nn.Module) -> set[str]:
    return {".".join(name.split(".")[-4:]).removeprefix("model.").removeprefix("layers.") for name in layers(model)}


ATTENTION, MLP = ["q_proj", "k_proj", "v_proj", "o_proj"], ["gate_proj", "up_proj", "down_proj"]
ALL = {f"{i}.self_attn.{n}" for i in (0, 1) for n in ATTENTION} | {f"{i}.mlp.{n}" for i in (0, 1) for n in MLP}
TARGETS = {
    "default": ({}, {f"{i}.self_attn.{n}" for i in (0, 1) for n in ("q_proj", "v_proj")}),
    "list": ({"target_modules": ["q_proj"]}, {"0.self_attn.q_proj", "1.self_attn.q_proj"}),
    "regex": ({"target_modules": r".*\.1\..*\.(q|up)_proj"}, {"1.self_attn.q_proj", "1.mlp.up_proj"}),
    "all-linear": ({"target_modules": "all-linear"}, ALL),
    "excluded names": (
        {"target_modules": "all-linear", "exclude_modules": [*MLP, "o_proj"]},
        {n for n in ALL if "mlp" not in n and "o_proj" not in n},
    ),
    "excluded regex": (
        {"target_modules": "all-linear", "exclude_modules": r".*\.0\..*|.*mlp.*"},
        {n for n in ALL if n.startswith("1.self_attn")},
    ),
    "one layer": ({"target_modules": ["q_proj"], "layers_to_transform": 1}, {"1.self_attn.q_proj"}),
    "layers": ({"target_modules": ["q_proj"], "layers_to_transform": [0]}, {"0.self_attn.q_proj"}),
    "layers_pattern": (
        {"target_modules": ["up_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
        {"1.mlp.up_proj"},
    ),
    "layers_pattern list": (
        {"target_modules": ["up_proj"], "layers_to_transform": [1], "layers_pattern": ["layers", "h"]},
        {"1.mlp.up_proj"},
    ),
}


@pytest.mark.parametrize("which", TARGETS)
def test_target_modules(which):
    config, expected = TARGETS[which]
    assert names_of(get_peft_model(tiny.llama(), LoraSbConfig(r=2, init_weights=True, **config))) == expected


def test_default_target_modules():
    assert {n.split(".")[-1] for n in layers(get_peft_model(gpt2(), LoraSbConfig(init_weights=True)))} == {"c_attn"}
    with pytest.raises(ValueError, match="specify `target_modules`"):
        get_peft_model(mlp(), LoraSbConfig())


def test_ranks():
    """By pattern, and no larger than the layer."""
    model = sb("llama", r=40, target_modules="all-linear", rank_pattern={"o_proj": 3, r"layers\.0\..*up_proj": 5})
    ranks = {".".join(name.split(".")[-3:]): layer.r["default"] for name, layer in layers(model).items()}
    kv = {f"{n}_proj": 16 for n in "kv"}  # 16 x 32
    expected = {"q_proj": 32, "o_proj": 3, "gate_proj": 32, "up_proj": 32, "down_proj": 32, **kv}
    for name, rank in ranks.items():
        assert rank == (5 if name == "0.mlp.up_proj" else expected[name.split(".")[-1]]), name
    for layer in layers(model).values():
        r = layer.r["default"]
        assert layer.lorasb_R["default"].shape == (r, r)
        assert layer.lorasb_A["default"].shape == (r, layer.in_features)
        assert layer.lorasb_B["default"].shape == (layer.out_features, r)


@pytest.mark.parametrize(
    ("base", "kind"),
    [
        (nn.Embedding(10, 6), "Embedding"),
        (nn.Conv2d(3, 4, 3), "Conv2d"),
        (nn.LayerNorm(6), "LayerNorm"),
        (nn.MultiheadAttention(6, 2).out_proj, "NonDynamicallyQuantizableLinear"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_layers_that_are_not_linear_are_refused(base, kind):
    with pytest.raises(TypeError, match=rf"cannot adapt body\.part, a {kind}: it knows torch\.nn\.Linear.*LoraConfig"):
        get_peft_model(nn.ModuleDict({"body": nn.ModuleDict({"part": base})}), LoraSbConfig(target_modules=["part"]))


ERRORS = {
    "r 0": ({"r": 0}, "rank must be a positive integer, got 0 for r"),
    "r float": ({"r": 4.0}, "positive integer, got 4.0 for r"),
    "r bool": ({"r": True}, "positive integer, got True for r"),
    "rank_pattern": ({"rank_pattern": {"q": -1}}, "positive integer, got -1 for q"),
    "scaling 0": ({"scaling": 0.0}, "scaling must be a positive number, got 0.0"),
    "scaling < 0": ({"scaling": -1.0}, "scaling must be a positive number"),
    "scaling inf": ({"scaling": float("inf")}, "scaling must be a positive number"),
    "scaling nan": ({"scaling": float("nan")}, "scaling must be a positive number"),
    "dropout 1": ({"lorasb_dropout": 1.0}, r"lorasb_dropout must be in \[0, 1\), got 1.0"),
    "dropout < 0": ({"lorasb_dropout": -0.1}, "lorasb_dropout must be in"),
    "init_weights": ({"init_weights": "pissa"}, "init_weights must be one of .*got 'pissa'"),
    "init_weights 1": ({"init_weights": 1}, "init_weights must be one of .*got 1"),
    "init_weights None": ({"init_weights": None}, "init_weights must be one of"),
    "layers_pattern": ({"layers_pattern": "h"}, "layers_pattern needs layers_to_transform"),
    # PEFT would adapt all layers without a word
    "layers and regex": ({"target_modules": ".*q", "layers_to_transform": [0]}, "layers_to_transform needs target_mo"),
    "layers and all": ({"target_modules": "all-linear", "layers_to_transform": 0}, "layers_to_transform needs target"),
}


@pytest.mark.parametrize("which", ERRORS)
def test_configurations_that_are_refused(which):
    config, match = ERRORS[which]
    with pytest.raises(ValueError, match=match):
        LoraSbConfig(**config)


def test_config_round_trip(tmp_path):
    config = LoraSbConfig(
        r=5, target_modules=["b", "a"], exclude_modules=["c"], scaling=0.5, lorasb_dropout=0.1, init_weights="lora_xs"
    )
    config.rank_pattern = {"a": 3}
    assert (config.target_modules, config.exclude_modules) == ({"a", "b"}, {"c"})
    config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "LORASB"
    for loaded in (PeftConfig.from_pretrained(tmp_path), LoraSbConfig.from_pretrained(tmp_path)):
        assert isinstance(loaded, LoraSbConfig)
        assert loaded.to_dict() == config.to_dict()
    defaults = LoraSbConfig()
    assert (defaults.r, defaults.scaling, defaults.lorasb_dropout, defaults.init_weights) == (64, 1.0, 0.0, "lora_sb")


# Initialization and training


@kinds
@pytest.mark.parametrize("init", ["lora_sb", "lora_xs", True, False])
def test_init_weights(kind, init):
    original = KINDS[kind][0]().eval()
    model = sb(kind, init_weights=init, scaling=0.7)
    identity = init is not False
    assert torch.equal(run(model), run(original)) == identity
    for layer in layers(model).values():
        B, R, A = (getattr(layer, f"lorasb_{k}")["default"].detach() for k in "BRA")
        W0 = layer.base_layer.weight.detach()
        W0 = W0.T if kind == "gpt2" else W0
        assert torch.equal(layer.dequantized_weight(), W0)
        assert bool(R.any()) != identity
        assert ("default" in layer.initialized) == (init != "lora_sb")
        if init == "lora_sb":
            assert not A.any()
            assert not B.any()
            continue
        torch.testing.assert_close(A @ A.T, torch.eye(4), rtol=0, atol=1e-6)
        if init == "lora_xs":
            S = np.linalg.svd(W0.double().numpy(), compute_uv=False)[:4]
            torch.testing.assert_close(B.T @ B, torch.diag(torch.from_numpy(S**2).float()), rtol=1e-4, atol=1e-4)
            best = reference_sb.truncation(W0.double().numpy(), 4)
            np.testing.assert_allclose((B @ A).numpy(), best, rtol=0, atol=1e-5)
        else:
            torch.testing.assert_close(B.T @ B, torch.eye(4), rtol=0, atol=1e-6)
    if init != "lora_sb":
        losses = train(model)
        assert losses[-1] < losses[0]


def test_random_starts_differ_from_layer_to_layer_and_follow_the_seed():
    A = [layer.lorasb_A["default"] for layer in layers(sb("llama", init_weights=True)).values()]
    again = [layer.lorasb_A["default"] for layer in layers(sb("llama", init_weights=True)).values()]
    other = [layer.lorasb_A["default"] for layer in layers(sb("llama", seed=2, init_weights=True)).values()]
    assert all(map(torch.equal, A, again))
    assert not any(map(torch.equal, A, other))
    assert not torch.equal(A[0], A[2])


def test_training_before_the_initialization_raises():
    model = sb(init_weights="lora_sb")
    run(model)
    model.train()
    with pytest.raises(RuntimeError, match=r"\"default\".*not initialized yet.*initialize_lora_sb_weights"):
        run(model)
    with torch.no_grad():
        run(model)
    with model.disable_adapter():
        run(model)
    model.set_requires_grad("default", False)
    run(model)
    model.set_requires_grad("default")
    for layer in layers(model).values():
        B, A = torch.eye(layer.out_features, 4), torch.eye(4, layer.in_features)
        layer.set_factors("default", B, torch.eye(4), A)
    train(model)


def test_inference_mode():
    for init in (False, "lora_sb"):
        model = sb(init_weights=init, inference_mode=True)
        assert not any(p.requires_grad for p in model.parameters())
        model.train()
        run(model)  # nothing is trained, so nothing to raise for


def test_dropout_in_training_only():
    model = sb(lorasb_dropout=0.5)
    without = sb()
    assert torch.equal(run(model), run(without))
    model.train()
    torch.manual_seed(0)
    one, another = run(model), run(model)
    assert not torch.equal(one, another)
    with model.disable_adapter():  # of the adapter's input only
        assert torch.equal(run(model), run(mlp()))
    torch.manual_seed(0)
    layer = first(model)
    x = torch.randn(5, layer.in_features)
    torch.manual_seed(1)
    out = layer(x)
    torch.manual_seed(1)
    dropped = nn.functional.dropout(x, 0.5)
    torch.testing.assert_close(out, layer.base_layer(x) + dropped @ by_hand(layer).T)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(use_reentrant):
    gradients = []
    for checkpointing in (False, True):
        base = tiny.llama()
        if checkpointing:
            base.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        torch.manual_seed(1)
        config = LoraSbConfig(r=4, target_modules=["q_proj", "down_proj"], init_weights=False, **CAUSAL)
        model = get_peft_model(base, config).train()
        model(input_ids=IDS, labels=IDS).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert gradients[0]
    tiny.assert_same(*gradients)


def test_torch_compile():
    model = sb()
    expected = run(model)
    compiled = torch.compile(model, backend="aot_eager")
    x = tiny.batch(0, torch.float32)[0]
    torch.testing.assert_close(compiled(x), expected)
    model.train()
    compiled(x).square().mean().backward()
    gradients = [p.grad.clone() for p in model.parameters() if p.requires_grad]
    model.zero_grad()
    run(model).square().mean().backward()
    for gradient, p in zip(gradients, (p for p in model.parameters() if p.requires_grad), strict=True):
        torch.testing.assert_close(gradient, p.grad)


def test_autocast():
    model = sb("llama")
    expected = run(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert run(model).dtype == torch.bfloat16
        torch.testing.assert_close(run(model).float(), expected, rtol=0.05, atol=0.05)
        run(model).square().mean().backward()
    assert {p.grad.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}


# Saving and loading


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_adapters_come_to_the_device_of_their_base(low_cpu_mem_usage, device):
    model = get_peft_model(mlp().to(device), LoraSbConfig(r=2, target_modules=["0"], init_weights="lora_xs"))
    model.load_adapter(str(SAVED), "other", low_cpu_mem_usage=low_cpu_mem_usage)
    assert {t.device.type for name, t in model.state_dict().items() if "lorasb" in name} == {device}


@kinds
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("init", ["lora_xs", True])
def test_every_way_to_the_same_function(kind, init, low_cpu_mem_usage, tmp_path):
    make = KINDS[kind][0]
    model = sb(kind, init_weights=init, scaling=0.5, rank_pattern={"0": 2, "q_proj": 2, "c_fc": 2})
    train(model)
    expected = run(model).detach()
    assert (expected - run(make().eval())).abs().max() > 1e-3
    model.save_pretrained(tmp_path / "native")
    export_lora(model, tmp_path / "lora")
    for folder in ("native", "lora"):
        loaded = PeftModel.from_pretrained(make(), tmp_path / folder, low_cpu_mem_usage=low_cpu_mem_usage).eval()
        torch.testing.assert_close(run(loaded), expected, **CLOSE)
        assert not any(p.requires_grad for p in loaded.parameters())
        assert not any(t.is_meta for t in loaded.state_dict().values())
        if folder == "native":
            tiny.assert_same(
                {k: t for k, t in loaded.state_dict().items() if "lorasb" in k},
                {k: t for k, t in model.state_dict().items() if "lorasb" in k},
            )
        loaded.merge_adapter(safe_merge=True)
        torch.testing.assert_close(run(loaded), expected, **CLOSE)
        loaded.unmerge_adapter()
        merged = loaded.merge_and_unload(safe_merge=True)
        torch.testing.assert_close(run(merged), expected, **CLOSE)
        assert merged.state_dict().keys() == make().state_dict().keys()


def test_the_saved_file_is_the_three_factors(tmp_path):
    model = sb("llama", target_modules=["q_proj"], modules_to_save=["lm_head"])
    model.save_pretrained(tmp_path)
    keys = set(load_file(tmp_path / "adapter_model.safetensors"))
    prefix = "base_model.model.model.layers.{}.self_attn.q_proj.lorasb_{}"
    expected = {prefix.format(i, k) for i in (0, 1) for k in "ABR"} | {"base_model.model.lm_head.weight"}
    assert keys == expected


@pytest.mark.parametrize("init", ["lora_xs", True])
def test_a_loaded_adapter_can_be_trained_on(init, tmp_path):
    sb("llama", init_weights=init).save_pretrained(tmp_path)
    for low_cpu_mem_usage in (False, True):
        model = PeftModel.from_pretrained(
            tiny.llama(), tmp_path, is_trainable=True, low_cpu_mem_usage=low_cpu_mem_usage
        )
        assert_only_R_is_trainable(model)
        losses = train(model, lr=0.01)
        assert losses[-1] < losses[0]


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_whether_it_is_initialized_is_kept(low_cpu_mem_usage, tmp_path):
    sb(init_weights="lora_sb").save_pretrained(tmp_path / "before")
    after = sb(init_weights="lora_sb")
    for layer in layers(after).values():
        B, A = torch.eye(layer.out_features, 4), torch.eye(4, layer.in_features)
        layer.set_factors("default", B, torch.zeros(4, 4), A)  # as with start_at_base
    after.save_pretrained(tmp_path / "after")
    for which in ("before", "after"):
        model = PeftModel.from_pretrained(
            mlp(), tmp_path / which, is_trainable=True, low_cpu_mem_usage=low_cpu_mem_usage
        ).train()
        assert all((layer.initialized == {"default"}) == (which == "after") for layer in layers(model).values())
        if which == "after":
            train(model)
            continue
        with pytest.raises(RuntimeError, match="not initialized yet"):
            run(model)
    # into an adapter that is there, as a Trainer resumes and loads its best model
    model = sb(init_weights="lora_sb")
    model.load_adapter(tmp_path / "after", "default", is_trainable=True)
    train(model)


def test_loading_an_uninitialized_adapter_over_an_initialized_one(tmp_path):
    sb(init_weights="lora_sb").save_pretrained(tmp_path)
    model = sb()
    model.load_adapter(tmp_path, "default", is_trainable=True)
    model.train()
    with pytest.raises(RuntimeError, match="not initialized yet"):
        run(model)


def test_modules_to_save(tmp_path):
    model = sb("llama", modules_to_save=["lm_head"])
    head = model.base_model.model.lm_head.modules_to_save["default"].weight
    assert head.requires_grad
    before = head.detach().clone()
    losses = train(model, lr=0.01)
    assert losses[-1] < losses[0]
    assert not torch.equal(head, before)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny.llama(), tmp_path).eval()
    torch.testing.assert_close(run(loaded), run(model), **CLOSE)
    assert torch.equal(loaded.base_model.model.lm_head.modules_to_save["default"].weight, head)
    with loaded.disable_adapter():
        assert torch.equal(run(loaded), run(tiny.llama().eval()))


IN_A_FRESH_PROCESS = """
import sys
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)
base, adapter, expected = sys.argv[1], sys.argv[2], torch.load(sys.argv[3])
try:
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
except KeyError as error:
    print("KeyError", error)
import hf_reflora
loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
auto = AutoPeftModelForCausalLM.from_pretrained(adapter)
with torch.no_grad():
    for model in (loaded, auto):
        print(type(model).__name__, torch.equal(model.eval()(input_ids=expected["ids"]).logits, expected["logits"]))
"""


def test_loading_in_another_process(tmp_path):
    """PEFT alone must not take the adapter for anything else; after the import it loads it."""
    tiny.llama().save_pretrained(tmp_path / "base")
    model = sb("llama")
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORASB"
    torch.save({"ids": IDS, "logits": run(model).detach()}, tmp_path / "expected.pt")
    paths = [str(tmp_path / name) for name in ("base", "adapter", "expected.pt")]
    done = subprocess.run([sys.executable, "-c", IN_A_FRESH_PROCESS, *paths], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "KeyError 'LORASB'"
    assert lines[1:] == ["PeftModelForCausalLM True"] * 2


def test_auto_model_in_this_process(tmp_path):
    tiny.llama().save_pretrained(tmp_path / "base")
    model = sb("llama")
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    auto = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", is_trainable=True)
    assert isinstance(auto.base_model, LoraSbModel)
    torch.testing.assert_close(run(auto.eval()), run(model), **CLOSE)
    assert_only_R_is_trainable(auto)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("convert", ["convert_to_lora", "save_as_lora"])
def test_pefts_own_conversion_to_lora(kind, convert, tmp_path):
    """No LoRA without R comes out of it: it computes the same."""
    model = sb(kind, scaling=0.5)
    expected = run(model).detach()
    if convert == "save_as_lora":
        peft.save_as_lora(tmp_path, model, rank=4)
        converted = PeftModel.from_pretrained(KINDS[kind][0](), tmp_path).eval()
    else:
        config, state_dict = peft.convert_to_lora(model, rank=4)
        assert all("lora_A" in name or "lora_B" in name for name in state_dict)
        converted = get_peft_model(KINDS[kind][0](), config).eval()
        set_peft_model_state_dict(converted, state_dict)
    assert sum(isinstance(module, LoraLayer) for module in converted.modules()) == len(layers(model))
    assert not layers(converted)
    assert (run(KINDS[kind][0]().eval()) - expected).abs().max() > 1e-3
    torch.testing.assert_close(run(converted), expected, **CLOSE)


@kinds
def test_copies_and_pickles(kind, tmp_path):
    model = sb(kind)
    expected = run(model)
    torch.save(model, tmp_path / "model.pt")
    for other in (copy.deepcopy(model), torch.load(tmp_path / "model.pt", weights_only=False)):
        assert torch.equal(run(other), expected)
        train(other)
        assert_only_R_is_trainable(other)
        other.bfloat16()
        assert first(other).lorasb_R["default"].dtype == torch.float32
    assert torch.equal(run(model), expected)


def test_state_dict_into_another_model():
    model, other = sb(seed=1), sb(seed=2, init_weights="lora_sb")
    other.load_state_dict(model.state_dict())
    assert torch.equal(run(other), run(model))
    assert all(layer.initialized == {"default"} for layer in layers(other).values())


# Several adapters


def two(**changes) -> PeftModel:
    """ "default" on two kinds of layers, and "other", of another rank and scaling, on one of them and a third."""
    model = sb("llama", **changes)
    torch.manual_seed(5)
    config = LoraSbConfig(r=2, scaling=3.0, target_modules=["q_proj", "v_proj"], init_weights=False, **CAUSAL)
    model.add_adapter("other", config)
    return model.eval()


def test_switching_adapters():
    model = two()
    results = {}
    for name in ("default", "other"):
        model.set_adapter(name)
        results[name] = run(model)
        trainable = [n for n, p in model.named_parameters() if p.requires_grad]
        assert trainable
        assert all(n.endswith(f"lorasb_R.{name}") for n in trainable)
    assert torch.equal(results["default"], run(sb("llama")))
    assert (results["default"] - results["other"]).abs().max() > 1e-3
    model.base_model.set_adapter(["default", "other"])
    together = run(model)
    for name, layer in layers(model).items():
        own = [a for a in ("default", "other") if a in layer.r]
        assert own == (["default", "other"] if "q_proj" in name else ["other"] if "v_proj" in name else ["default"])
    torch.testing.assert_close(run(model.merge_and_unload()), together, **CLOSE)


def test_a_further_adapter_is_not_trainable_by_itself():
    model = two()
    assert {n.split(".")[-1] for n, p in model.named_parameters() if p.requires_grad} == {"default"}
    assert_only_R_is_trainable(model)


def test_a_further_adapter_with_low_cpu_mem_usage():
    """On fewer layers than there are with adapters."""
    model = sb(target_modules=["4"])
    model.load_adapter(str(SAVED), "other", low_cpu_mem_usage=True)
    model.set_adapter("other")
    assert torch.equal(run(model), run(sb(seed=3, r=2)))


def test_deleting_an_adapter_leaves_no_trace():
    model, never = two(), sb("llama")
    model.delete_adapter("other")
    tiny.assert_same(
        {n: t for n, t in model.state_dict().items() if "v_proj" not in n},
        {n: t for n, t in never.state_dict().items() if "v_proj" not in n},
    )
    assert not any("other" in name for name in model.state_dict())
    for layer in layers(model).values():
        for attribute in ("r", "scaling", "initialized", "lorasb_dropout", "lorasb_R", "lorasb_A", "lorasb_B"):
            assert "other" not in getattr(layer, attribute)
        assert "other" not in layer.active_adapters
    assert list(model.peft_config) == ["default"]
    assert torch.equal(run(model), run(never))
    model.delete_adapter("default")
    assert torch.equal(model.base_model.model(IDS).logits, run(tiny.llama().eval()))


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_mixed_batches(kind):
    model = sb(kind)
    targets = KINDS[kind][1][:1]
    model.add_adapter("other", LoraSbConfig(r=2, scaling=2.0, target_modules=targets, init_weights=False, **CAUSAL))
    model.eval()
    alone = {}
    for name in ("default", "other"):
        model.set_adapter(name)
        alone[name] = run(model)
    with model.disable_adapter():
        alone["__base__"] = run(model)
    for names in (["default", "other", "__base__"], ["other"] * 3, ["__base__"] * 3, ["other", "__base__", "other"]):
        mixed = model(input_ids=IDS, adapter_names=names).logits
        expected = torch.stack([alone[name][row] for row, name in enumerate(names)])
        torch.testing.assert_close(mixed, expected, **CLOSE)
    assert torch.equal(run(model), alone["other"])  # no hook is left
    with model.disable_adapter():
        disabled = model(input_ids=IDS, adapter_names=["default", "other", "default"]).logits
        assert torch.equal(disabled, alone["__base__"])
        layer = first(model)
        x = torch.randn(3, layer.in_features)
        assert torch.equal(layer(x, adapter_names=["default", "other", "default"]), layer.base_layer(x))


@pytest.mark.parametrize("beams", [1, 2, 3])
def test_generation_with_mixed_batches(beams):
    model = two()
    with torch.no_grad():
        for layer in layers(model).values():
            for R in layer.lorasb_R.values():
                R.mul_(20)  # so that the adapters' texts differ
    options = {"max_new_tokens": 6, "do_sample": False, "num_beams": beams, "use_cache": True}
    names = ["default", "other", "__base__"]
    alone = []
    for row, name in enumerate(names):
        prompt = IDS[row : row + 1]
        if name == "__base__":
            with model.disable_adapter():
                alone.append(model.generate(input_ids=prompt, **options)[0])
        else:
            model.set_adapter(name)
            alone.append(model.generate(input_ids=prompt, **options)[0])
    mixed = model.generate(input_ids=IDS, adapter_names=names, **options)
    pad = model.config.pad_token_id
    for row, expected in enumerate(alone):
        assert torch.equal(mixed[row, : len(expected)], expected)
        assert (mixed[row, len(expected) :] == pad).all()
    texts = [tuple(text[IDS.shape[1] :].tolist()) for text in alone]
    assert len(set(texts)) == 3


def test_beam_search_behind_an_encoder():
    """The encoder sees each row once, the decoder once per beam."""
    torch.manual_seed(0)
    config = {"vocab_size": 260, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4}
    base = T5ForConditionalGeneration(T5Config(decoder_start_token_id=0, **config))
    sb_config = {"r": 4, "init_weights": False, "target_modules": ["q", "v", "wo"], "task_type": "SEQ_2_SEQ_LM"}
    model = get_peft_model(base, LoraSbConfig(**sb_config)).eval()
    model.add_adapter("other", LoraSbConfig(scaling=20.0, **sb_config))
    model.eval()
    options, alone = {"max_new_tokens": 5, "num_beams": 2, "do_sample": False, "min_new_tokens": 5}, []
    for row, name in enumerate(["other", "default"]):
        model.set_adapter(name)
        alone.append(model.generate(input_ids=IDS[row : row + 1], **options)[0])
    mixed = model.generate(input_ids=IDS[:2], adapter_names=["other", "default"], **options)
    assert torch.equal(mixed, torch.stack(alone))
    assert not torch.equal(*alone)


def test_mixed_batches_with_modules_to_save():
    model = sb("llama", modules_to_save=["lm_head"])
    config = {"r": 2, "target_modules": ["q_proj"], "init_weights": False, "modules_to_save": ["lm_head"], **CAUSAL}
    model.add_adapter("other", LoraSbConfig(**config))
    model.eval()
    with torch.no_grad():
        model.base_model.model.lm_head.modules_to_save["other"].weight.mul_(2)
    alone = {}
    for name in ("default", "other"):
        model.set_adapter(name)
        alone[name] = run(model)
    mixed = model(input_ids=IDS, adapter_names=["other", "default", "other"]).logits
    torch.testing.assert_close(
        mixed, torch.stack([alone["other"][0], alone["default"][1], alone["other"][2]]), **CLOSE
    )


def test_errors_of_mixed_batches():
    model = two()
    names = ["default", "other", "__base__"]
    with pytest.raises(ValueError, match=r"non-existing adapter\(s\): nobody$"):
        model(input_ids=IDS, adapter_names=["default", "nobody", "other"])
    with pytest.raises(ValueError, match="same as the number of inputs, but got 2 and 3 respectively"):
        model(input_ids=IDS, adapter_names=names[:2])
    model.train()
    with pytest.raises(ValueError, match="in training mode"):
        model(input_ids=IDS, adapter_names=names)
    model.eval()
    model.merge_adapter()
    with pytest.raises(ValueError, match="unmerge_adapter"):
        model(input_ids=IDS, adapter_names=names)
    model.unmerge_adapter()
    run(model)
    assert not any(layer._forward_pre_hooks for layer in layers(model).values())


# Merging


@kinds
def test_merge_and_unmerge(kind):
    original = KINDS[kind][0]().eval()
    model = sb(kind)
    expected = run(model)
    model.merge_adapter()
    assert all(layer.merged_adapters == ["default"] for layer in layers(model).values())
    torch.testing.assert_close(run(model), expected, **CLOSE)
    for name, layer in layers(model).items():
        W = layer.base_layer.weight.detach()
        W0 = original.get_submodule(name).weight.detach()
        delta = by_hand(layer)
        torch.testing.assert_close(W, W0 + (delta.T if kind == "gpt2" else delta))
        assert W.is_contiguous()  # safetensors saves no other
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.merge_adapter()  # once is enough
    torch.testing.assert_close(run(model), expected, **CLOSE)
    with model.disable_adapter():
        torch.testing.assert_close(run(model), run(original), **CLOSE)
    assert not any(layer.merged for layer in layers(model).values())
    torch.testing.assert_close(run(model), expected, **CLOSE)
    with pytest.warns(UserWarning, match="Already unmerged"):
        first(model).unmerge()


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_safe_merge_leaves_the_base_alone(value):
    model = sb()
    last = list(layers(model).values())[-1]
    with torch.no_grad():
        last.lorasb_R["default"][0, 0] = value
    with pytest.raises(
        ValueError, match=r"NaNs detected in the merged weights\. The adapter default seems to be broken"
    ):
        last.merge(safe_merge=True)
    assert last.merged_adapters == []
    tiny.assert_same(base_weights(model), dict(mlp().state_dict()))
    with pytest.raises(ValueError, match="NaNs detected"):
        model.merge_and_unload(safe_merge=True)


def test_safe_merge_sees_an_overflow_of_float16():
    model = get_peft_model(mlp().half(), LoraSbConfig(r=4, target_modules=["0"], init_weights=False))
    with torch.no_grad():
        first(model).lorasb_R["default"].mul_(1e7)
    with pytest.raises(ValueError, match="merged weights"):
        first(model).merge(safe_merge=True)


def test_merging_keeps_weights_tied():
    config = LoraSbConfig(r=2, target_modules=["lm_head"], init_weights=False, **CAUSAL)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(tiny.llama(tie_word_embeddings=True), config)
    base = model.get_base_model()
    model.merge_adapter()
    assert torch.equal(base.model.embed_tokens.weight, base.lm_head.base_layer.weight)
    merged = model.merge_and_unload()
    assert merged.lm_head.weight is merged.model.embed_tokens.weight


def test_merging_some_adapters():
    model = two()
    model.base_model.set_adapter(["default", "other"])
    model.merge_adapter(adapter_names=["other"])
    merged = {name: layer.merged_adapters for name, layer in layers(model).items()}
    assert all(names == ([] if "down_proj" in name else ["other"]) for name, names in merged.items())
    model.unmerge_adapter()
    tiny.assert_same(base_weights(model), dict(tiny.llama().state_dict()), rtol=0, atol=1e-6)


def test_half_precision_bases_merge_in_their_dtype():
    model = sb()
    model.bfloat16()
    expected = run(model)
    model.merge_adapter(safe_merge=True)
    assert first(model).base_layer.weight.dtype == torch.bfloat16
    torch.testing.assert_close(run(model), expected, rtol=0.05, atol=0.05)


# Quantized layers


def quantized(kind: str, device: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, torch.Tensor]:
    """A layer of bitsandbytes, and the weight it was made of."""
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    linear = nn.Linear(128, 64)
    if kind == "int8":
        layer = bnb.nn.Linear8bitLt(128, 64, has_fp16_weights=False, threshold=0.0)
    else:
        quant_type, double = kind.removesuffix(" double"), kind.endswith("double")
        layer = bnb.nn.Linear4bit(
            128, 64, compute_dtype=dtype, quant_type=quant_type, compress_statistics=double, quant_storage=torch.uint8
        )
    layer.load_state_dict(linear.state_dict())
    return layer.to(device), linear.weight.detach().clone().to(device)


# the largest error of one quantization, of weights up to 1 / sqrt(128) in size
QUANTIZED = {"nf4": 0.015, "nf4 double": 0.015, "fp4": 0.017, "int8": 0.0004}


@pytest.mark.parametrize("init", [False, "lora_xs"])
@pytest.mark.parametrize("kind", QUANTIZED)
def test_bitsandbytes(kind, init, device):
    layer, W = quantized(kind, device)
    dtype = torch.float16 if kind == "int8" and device == "cuda" else torch.float32
    x = torch.randn(6, 128, device=device, dtype=dtype, requires_grad=True)
    packed = layer.weight.data.clone()
    model = get_peft_model(nn.Sequential(layer), LoraSbConfig(r=4, target_modules=["0"], init_weights=init))
    adapted = first(model)
    assert {getattr(adapted, f"lorasb_{k}")["default"].dtype for k in "ABR"} == {torch.float32}
    W0 = adapted.dequantized_weight().float()
    assert W0.shape == W.shape
    assert (W0 - W).abs().max() < QUANTIZED[kind]
    if init == "lora_xs":
        best = reference_sb.truncation(W0.double().cpu().numpy(), 4)
        product = adapted.lorasb_B["default"] @ adapted.lorasb_A["default"]
        np.testing.assert_allclose(product.cpu().numpy(), best, rtol=0, atol=1e-5)
    with torch.no_grad():
        adapted.lorasb_R["default"].copy_(0.05 * torch.randn(4, 4))
    delta = by_hand(adapted).to(device)
    out, base_out = model(x), layer(x)
    tolerance = {"rtol": 2e-3, "atol": 2e-3} if dtype == torch.float16 else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(out, base_out + (x.float() @ delta.T).to(dtype), **tolerance)

    out.float().square().sum().backward()
    G = (2 * out.detach().float()).T @ x.detach().float()
    B, A = adapted.lorasb_B["default"], adapted.lorasb_A["default"]
    gradient = adapted.lorasb_R["default"].grad
    torch.testing.assert_close(gradient, B.T @ G @ A.T, rtol=1e-2 if dtype == torch.float16 else 1e-4, atol=1e-3)
    assert x.grad is not None
    assert torch.equal(adapted.base_layer.weight.data, packed)
    assert_only_R_is_trainable(model)

    adapted.merge(safe_merge=True)
    assert type(adapted.base_layer.weight) is type(layer.weight)
    assert adapted.base_layer.weight.dtype == packed.dtype
    assert not adapted.base_layer.weight.requires_grad
    merged = adapted.dequantized_weight().float()
    error = 2.5 * QUANTIZED[kind]
    assert (merged - W0 - delta).abs().max() < error
    assert (delta.abs().max() > 2 * error) or kind != "int8"
    cosine = nn.functional.cosine_similarity((merged - W0).flatten(), delta.flatten(), dim=0)
    assert cosine > (0.99 if kind == "int8" else 0.1)
    torch.testing.assert_close(model(x).float(), (x.float() @ merged.T + layer.bias.float()), rtol=1e-2, atol=1e-2)
    adapted.unmerge()
    assert (adapted.dequantized_weight().float() - W0).abs().max() < error
    with torch.no_grad():
        adapted.lorasb_R["default"].fill_(float("inf"))
    packed = adapted.base_layer.weight.data.clone()
    with pytest.raises(ValueError, match="NaNs detected"):
        adapted.merge(safe_merge=True)
    assert torch.equal(adapted.base_layer.weight.data, packed)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_training_on_a_quantized_base(kind, device):
    layer, _ = quantized(kind, device)
    model = get_peft_model(nn.Sequential(layer), LoraSbConfig(r=4, target_modules=["0"], init_weights="lora_xs"))
    x = torch.randn(16, 128, device=device)
    target = model(x).detach() + x @ (torch.randn(64, 128, device=device) / 50).T
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    packed, losses = layer.weight.data.clone(), []
    for _ in range(10):
        loss = (model(x) - target).float().square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert torch.equal(layer.weight.data, packed)
    with model.disable_adapter():
        assert torch.equal(model(x), layer(x))


def test_lora_xs_is_of_the_base_weight_while_another_adapter_is_merged():
    """Adding an adapter takes merged ones out, as LoRA's does."""
    config = LoraSbConfig(r=3, target_modules=["0"], init_weights="lora_xs")
    alone = get_peft_model(mlp(), config)
    model = get_peft_model(mlp(), LoraSbConfig(r=3, target_modules=["0"], init_weights=False))
    model.merge_adapter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.add_adapter("xs", config)
    layers = [next(m for m in each.modules() if isinstance(m, LoraSbLayer)) for each in (alone, model)]
    for kind in ("lorasb_A", "lorasb_B"):
        expected, found = getattr(layers[0], kind)["default"], getattr(layers[1], kind)["xs"]
        torch.testing.assert_close(found.abs(), expected.abs(), rtol=0, atol=1e-5)
