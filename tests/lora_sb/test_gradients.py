"""weight_gradients of frozen weights against `.grad` of full fine-tuning, and what `frozen` leaves behind."""

import copy
import functools
import random
import weakref

import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D
from versions import checkpoint_activations

from hf_reflora.lora_sb.gradients import frozen, weight_gradients


LINEAR = (nn.Linear, Conv1D)


MODELS = {"llama": tiny.llama, "gpt2": tiny.gpt2, "bert": tiny.bert, "opt": tiny.opt}


def loss_of(model: nn.Module, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, 260, (2, 7), generator=generator)
    labels = torch.tensor([0, 1]) if hasattr(model, "classifier") else ids
    return model(input_ids=ids, labels=labels).loss


def linear(model: nn.Module, only: str = "") -> dict[str, nn.Module]:
    return {name: m for name, m in model.named_modules() if isinstance(m, LINEAR) and only in name}


def full_gradients(model: nn.Module, loss, names) -> dict[str, Tensor]:
    """`.grad` of a copy trained in full, without dropout and without checkpointing, as (out, in)."""
    model = copy.deepcopy(model).eval().requires_grad_(True)
    loss(model).backward()
    layers = {name: model.get_submodule(name) for name in names}
    return {name: m.weight.grad.T if isinstance(m, Conv1D) else m.weight.grad for name, m in layers.items()}


def captured(model: nn.Module, loss, modules=None, complete=None) -> dict[str, Tensor]:
    model.requires_grad_(False)
    with frozen(model), weight_gradients(linear(model) if modules is None else modules, complete) as sums:
        loss(model).backward()
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks for m in linear(model).values())
    return sums


def untied(model: nn.Module) -> dict[str, nn.Module]:
    """All linear layers but a head tied to the embedding, whose `.grad` is that of both."""
    return {name: m for name, m in linear(model).items() if name != "lm_head"}


def assert_near(left: dict[str, Tensor], right: dict[str, Tensor], relative: float) -> None:
    assert left.keys() == right.keys()
    for name, value in right.items():
        assert (left[name] - value).norm() <= relative * value.norm(), name
        assert value.any(), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["no checkpointing", "non-reentrant", "reentrant"])
@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_those_of_full_fine_tuning(name, checkpointing, dtype):
    model = MODELS[name]().to(dtype)
    expected = full_gradients(model, loss_of, untied(model))
    if checkpointing is not None:
        checkpoint_activations(model, {"use_reentrant": checkpointing})
        model.enable_input_require_grads()
    sums = captured(model.train(), loss_of, untied(model))
    assert all(G.dtype == dtype for G in sums.values())
    assert_near(sums, expected, 1e-6 if dtype == torch.float32 else 1e-14)


@pytest.mark.parametrize("complete", [False, True])
def test_a_model_that_is_no_transformer(complete):
    """A plain MLP in float64, with a batch of more than one dimension, to the bit where the sums are the same."""
    model = tiny.mlp()
    x = torch.randn(2, 3, 6, dtype=torch.float64)

    def loss(model):
        return model(x).square().mean()

    expected, found = full_gradients(model, loss, linear(model)), {}
    sums = captured(model, loss, complete=found.__setitem__ if complete else None)
    assert_near(found if complete else sums, expected, 1e-15)
    assert not (sums if complete else found)


def test_batches_are_summed():
    model = tiny.llama()

    def loss(model):
        return sum((i + 1) * loss_of(model, seed=i) for i in range(3))

    expected = full_gradients(model, loss, linear(model))
    model.requires_grad_(False)
    with frozen(model), weight_gradients(linear(model)) as sums:
        for i in range(3):
            ((i + 1) * loss_of(model, seed=i)).backward()
    assert_near(sums, expected, 1e-6)


def test_only_the_layers_asked_for():
    model = tiny.llama()
    expected = full_gradients(model, loss_of, linear(model, "layers.1.mlp.up_proj"))
    assert_near(captured(model, loss_of, linear(model, "layers.1.mlp.up_proj")), expected, 1e-6)


def test_trainable_parameters_keep_their_own_gradients():
    """Outside `frozen`, the hooks change neither the gradients of what is trained nor the loss."""
    model = tiny.llama()
    expected = copy.deepcopy(model)
    loss_of(expected).backward()
    with weight_gradients(linear(model)) as sums:
        loss = loss_of(model)
        loss.backward()
    assert torch.equal(loss, loss_of(model))
    tiny.assert_same(
        {name: p.grad for name, p in model.named_parameters()},
        {name: p.grad for name, p in expected.named_parameters()},
    )
    assert_near(sums, {name: m.weight.grad for name, m in linear(expected).items()}, 1e-6)


class Shared(nn.Module):
    """One layer used twice, with others before, between and behind."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.shared, self.last = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x):
        return self.last(self.shared(torch.tanh(self.shared(torch.tanh(self.first(x))))))


def square(model: nn.Module) -> Tensor:
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(1), dtype=next(model.parameters()).dtype)
    return model(x).square().mean()


@pytest.mark.parametrize("complete", [False, True])
def test_a_layer_used_twice(complete):
    model = Shared().double()
    expected, calls = full_gradients(model, square, linear(model)), []
    sums = captured(model, square, complete=(lambda *call: calls.append(call)) if complete else None)
    assert len(calls) == (3 if complete else 0)
    assert [name for name, _ in calls] == (["last", "shared", "first"] if complete else [])
    assert_near(dict(calls) if complete else sums, expected, 1e-15)


def test_layers_that_share_a_weight():
    """Each has its own gradient; `.grad` is their sum."""
    model = Shared().double()
    model.first.weight = model.shared.weight
    expected = full_gradients(model, square, ["shared"])["shared"]
    sums = captured(model, square)
    torch.testing.assert_close(sums["first"] + sums["shared"], expected, rtol=1e-13, atol=1e-15)


def test_a_head_tied_to_the_embedding():
    """The head's part: that of a head of its own."""
    model = tiny.gpt2()
    own = copy.deepcopy(model)
    own.lm_head.weight = nn.Parameter(own.lm_head.weight.detach().clone())
    expected = full_gradients(own, loss_of, ["lm_head"])
    assert_near(captured(model, loss_of, {"lm_head": model.lm_head}), expected, 1e-6)


@pytest.mark.parametrize("complete", [False, True])
def test_a_layer_that_is_never_reached_is_absent(complete):
    model, found = Shared(), {}
    model.unused = nn.Linear(6, 6)
    sums = captured(model, square, complete=found.__setitem__ if complete else None)
    assert (found if complete else sums).keys() == {"first", "shared", "last"}


def test_complete_is_called_when_the_gradient_is_whole_and_frees_it():
    """Whenever it is called no other gradient is alive: neither waiting in the sums nor held by an earlier call."""
    model, order, earlier = tiny.llama(num_hidden_layers=3), [], []
    expected = full_gradients(model, loss_of, linear(model))
    modules = linear(model)
    with frozen(model), weight_gradients(modules, lambda *call: complete(*call)) as sums:

        def complete(name, G):
            assert not sums
            assert all(reference() is None for reference in earlier)
            torch.testing.assert_close(G, expected[name], rtol=1e-4, atol=1e-7)
            order.append(name)
            earlier.append(weakref.ref(G))

        loss_of(model).backward()
    assert sorted(order) == sorted(modules)
    assert order[0] == "lm_head"
    assert order[-1].startswith("model.layers.0.self_attn")


@pytest.mark.parametrize("reentrant", [False, True])
def test_complete_with_gradient_checkpointing(reentrant):
    model, calls = tiny.llama(), []
    expected = full_gradients(model, loss_of, linear(model))
    checkpoint_activations(model, {"use_reentrant": reentrant})
    model.enable_input_require_grads()
    captured(model.train(), loss_of, complete=lambda *call: calls.append(call))
    assert len(calls) == len(expected)
    assert_near(dict(calls), expected, 1e-6)


class Block(GradientCheckpointingLayer):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return torch.tanh(self.inner(x))


class SharedBlocks(nn.Module):
    """Two checkpointed blocks around one layer, as in models that share their layers."""

    def __init__(self, reentrant):
        super().__init__()
        torch.manual_seed(0)
        self.shared = nn.Linear(6, 6)
        self.blocks = nn.ModuleList(Block(self.shared) for _ in range(2))
        for block in self.blocks:
            block.gradient_checkpointing = True
            block._gradient_checkpointing_func = functools.partial(
                torch.utils.checkpoint.checkpoint, use_reentrant=reentrant
            )

    def forward(self, x):
        for block in self.blocks:
            x = block(x.requires_grad_())
        return x


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("complete", [False, True])
def test_a_layer_shared_by_checkpointed_blocks(reentrant, complete):
    model, calls = SharedBlocks(reentrant).double(), []
    expected = full_gradients(model, square, ["shared"])
    sums = captured(model, square, {"shared": model.shared}, (lambda *call: calls.append(call)) if complete else None)
    assert len(calls) == int(complete)
    assert_near(dict(calls) if complete else sums, expected, 1e-15)


def test_an_error_in_complete_is_raised_and_hooks_are_removed():
    model = Shared().requires_grad_(False)

    def fail(name, G):
        raise ValueError(f"no, {name}")

    with pytest.raises(ValueError, match="no, last"), weight_gradients(linear(model), fail):
        square(model).backward()
    assert not any(m._forward_hooks for m in linear(model).values())


@pytest.mark.parametrize("activation", [nn.ReLU(inplace=True), nn.Hardswish(inplace=True)])
def test_operations_in_place_on_the_output(activation):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), activation, nn.Linear(8, 2)).double()
    expected = full_gradients(model, square, linear(model))
    assert_near(captured(model, square), expected, 1e-15)


def test_gradients_in_half_precision():
    """A bfloat16 model: float32 sums near the float32 gradient of the same weights."""
    model = tiny.llama().to(torch.bfloat16)
    expected = full_gradients(copy.deepcopy(model).float(), loss_of, linear(model))
    sums = captured(model, loss_of)
    assert all(G.dtype == torch.float32 for G in sums.values())
    assert_near(sums, expected, 0.03)


def test_sums_of_half_precision_gradients_are_not_rounded():
    """256 equal gradients: in bfloat16 the sum would stop growing long before."""
    model = nn.Linear(1, 1, bias=False).to(torch.bfloat16).requires_grad_(False)
    with weight_gradients({"": model}) as sums:
        for _ in range(600):
            model(torch.ones(1, 1, dtype=torch.bfloat16)).sum().backward()
    assert sums[""].item() == 600


def test_autocast():
    model = tiny.llama()
    expected = full_gradients(model, loss_of, linear(model))

    def loss(model):
        with torch.autocast("cpu", torch.bfloat16):
            return loss_of(model)

    sums = captured(model, loss)
    assert all(G.dtype == torch.float32 for G in sums.values())
    assert_near(sums, expected, 0.03)
    with pytest.raises(AssertionError):
        assert_near(sums, expected, 1e-5)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["no checkpointing", "non-reentrant", "reentrant"])
def test_quantized_layers(bits, checkpointing):
    """The gradient with respect to the dequantized weight; the quantized one is what it was.

    In evaluation mode bitsandbytes repacks 4-bit weights on some CPUs, for products that have no backward pass.
    """
    pytest.importorskip("bitsandbytes")
    model = tiny.llama(hidden_size=64, intermediate_size=64)
    reference = tiny.quantize(model, bits)
    names = [name for name in linear(model) if name != "lm_head"]
    expected = full_gradients(reference, loss_of, names)
    if checkpointing is not None:
        checkpoint_activations(model, {"use_reentrant": checkpointing})
        model.enable_input_require_grads()
    before = {name: model.get_submodule(name).weight.data.clone() for name in names}
    sums = captured(model.train(), loss_of, {name: model.get_submodule(name) for name in names})
    assert_near(sums, expected, 1e-5 if bits == 4 else 0.03)  # 8 bit rounds activations, too
    tiny.assert_same(before, {name: model.get_submodule(name).weight.data for name in names})


def state_of(model: nn.Module) -> tuple:
    return (
        {name: p.requires_grad for name, p in model.named_parameters()},
        {name: m.training for name, m in model.named_modules()},
        {name: dict.get(m.__dict__, "forward") for name, m in model.named_modules()},
        model.config.use_cache,
    )


def random_states() -> tuple:
    return torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state())


def draw() -> None:
    torch.rand(3), random.random(), np.random.rand()


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("use_cache", [True, False])
def test_frozen_leaves_everything_as_it_was(fails, use_cache):
    model = tiny.opt().train()
    model.config.use_cache = use_cache
    model.model.decoder.layers[0].eval()
    model.model.decoder.layers[1].self_attn.requires_grad_(False)
    checkpoint_activations(model)
    before, states = state_of(model), random_states()

    def body():
        with frozen(model):
            assert not any(m.training for m in model.modules())
            assert not any(p.requires_grad for p in model.parameters())
            assert not model.config.use_cache
            draw()
            if fails:
                raise KeyError("stop")

    if fails:
        with pytest.raises(KeyError, match="stop"):
            body()
    else:
        body()
    assert state_of(model) == before
    assert random_states() == states


def test_frozen_enables_gradients():
    model = tiny.mlp()
    with torch.no_grad(), frozen(model):
        assert torch.is_grad_enabled()
    assert torch.is_grad_enabled()


def test_frozen_keeps_a_forward_of_the_layer_itself():
    """With a device map over several devices, accelerate's hooks are instance attributes."""
    model = tiny.llama()
    layer, calls = model.model.layers[0], []
    original = layer.forward

    def hooked(*args, **kwargs):
        calls.append(layer)
        return original(*args, **kwargs)

    layer.forward = hooked
    checkpoint_activations(model)
    with frozen(model):
        loss_of(model)
    assert len(calls) == 1
    loss_of(model)
    assert len(calls) == 2


@pytest.mark.parametrize("reentrant", [None, False, True])
@pytest.mark.parametrize("name", MODELS)
def test_dropout_is_off_and_checkpointing_goes_on(name, reentrant):
    """Each layer runs a second time in the backward pass, and the loss is that of evaluation mode, to the bit."""
    model = MODELS[name]().train()
    expected = loss_of(copy.deepcopy(model).eval()).detach()
    if name != "llama":
        assert not torch.equal(loss_of(model).detach(), expected)
    if reentrant is not None:
        checkpoint_activations(model, {"use_reentrant": reentrant})
        model.enable_input_require_grads()
    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    counts = [0] * len(layers)
    for i, layer in enumerate(layers):
        inner = next(m for m in layer.modules() if isinstance(m, LINEAR))
        inner.register_forward_hook(lambda *_, i=i: counts.__setitem__(i, counts[i] + 1))
    with frozen(model), weight_gradients(linear(model)):
        loss = loss_of(model)
        assert counts == [1] * len(layers)
        loss.backward()
    assert torch.equal(loss.detach(), expected)
    assert counts == [1 if reentrant is None else 2] * len(layers)
    assert len(counts) == 2


def test_attention_dropout_is_off():
    """F.dropout and attention take `self.training` themselves."""
    model = tiny.llama(attention_dropout=0.5, attn_implementation="eager").train()
    with frozen(model):
        losses = {loss_of(model).item() for _ in range(3)}
    assert len(losses) == 1
    assert losses == {loss_of(model.eval()).item()}
    assert F.dropout(torch.ones(100), training=model.training).sum() == 100
