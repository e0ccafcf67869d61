"""LoRA-SB's start block by block, against passes over the samples that sum all gradients at once."""

import copy
import gc
import logging
import re
import weakref

import pytest
import tiny
import torch
from adapter_layers import everything
from init_samples import batches, initialize
from peft import get_peft_model
from torch import Tensor, nn
from transformers import MixtralConfig, MixtralForCausalLM
from transformers.modeling_layers import GradientCheckpointingLayer
from versions import checkpoint_activations

from hf_reflora import LoraSbConfig
from hf_reflora.lora_sb import blocks, first_step
from hf_reflora.lora_sb.blocks import CutGraphs, group_by_block, outermost_blocks
from hf_reflora.lora_sb.gradients import frozen, weight_gradients
from hf_reflora.lora_sb.memory import UsageMeter


BY_BLOCKS = "LoRA-SB's start: one pass block by block"
LOGGER = "hf_reflora.lora_sb.first_step"


@pytest.fixture
def fits(monkeypatch):
    """Tiny models' weights are large beside their activations, so that going block by block would not save memory."""
    monkeypatch.setattr(first_step.FirstSteps, "_check_memory", lambda *_: None)


@pytest.fixture
def log(caplog):
    caplog.set_level(logging.INFO, logger=LOGGER)
    return caplog


def adapted(base: nn.Module, targets="all-linear", r: int = 1) -> nn.Module:
    """Of rank 1, for which all gradients together take more memory than training does."""
    return get_peft_model(base, LoraSbConfig(r=r, target_modules=targets))


def same_as_one_pass(model: nn.Module, data, log, **changes) -> None:
    """The default way goes block by block and gives what one pass gives, to the bit."""
    expected = everything(initialize(copy.deepcopy(model), data, passes=1, **changes))
    assert BY_BLOCKS not in log.text
    tiny.assert_same(everything(initialize(model, data, **changes)), expected)
    assert BY_BLOCKS in log.text


class Block(GradientCheckpointingLayer):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(6, 6)

    def forward(self, x):
        return torch.tanh(self.inner(x))


def classes(*sizes: int) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    return [
        {"input_ids": torch.randint(4, 260, (n, 9), generator=generator), "labels": torch.arange(n) % 2} for n in sizes
    ]


MODELS = {
    "llama": (tiny.llama, "all-linear"),
    "llama in bfloat16": (lambda: tiny.llama().to(torch.bfloat16), "all-linear"),
    "llama with dropout": (lambda: tiny.llama(attention_dropout=0.5, attn_implementation="eager"), "all-linear"),
    "the head, too": (tiny.llama, ["q_proj", "down_proj", "lm_head"]),
    "a tied head": (lambda: tiny.llama(tie_word_embeddings=True), ["q_proj", "lm_head"]),
    "gpt2": (tiny.gpt2, ["c_attn", "c_fc"]),
    "opt": (tiny.opt, ["q_proj", "fc1"]),
}


@pytest.mark.parametrize("name", MODELS)
def test_as_in_one_pass(name, fits, log):
    make, targets = MODELS[name]
    same_as_one_pass(adapted(make(), targets).train(), batches(2, 3, 1), log)


def test_a_classifier(fits, log):
    same_as_one_pass(adapted(tiny.bert(), ["query", "dense"]), classes(2, 3, 1), log)


@pytest.mark.parametrize("update", ["sign", "gradient"])
def test_ranks_and_updates(update, fits, log):
    same_as_one_pass(adapted(tiny.llama(), r=2), batches(3, 2), log, update=update)


def test_encoder_decoder(fits, log):
    """The encoder's last norm leads to every block of the decoder, whose parts are summed in another order."""
    model, data = adapted(tiny.t5(), ["q", "v", "wi", "wo"]), batches(2, 3, 1)
    expected = everything(initialize(copy.deepcopy(model), data, passes=1, update="gradient"))
    result = everything(initialize(model, data, update="gradient"))
    assert BY_BLOCKS in log.text
    tiny.assert_same(result, expected, rtol=1e-4, atol=1e-6)


def test_batches_without_labels(fits, log):
    empty = {"input_ids": torch.full((1, 5), 7), "labels": torch.full((1, 5), -100)}
    same_as_one_pass(adapted(tiny.llama()), [*batches(2, 3), empty], log)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_of_the_user(reentrant, fits, log):
    """A block runs once forward and once again in the backward pass, not a third time; the setting stays on."""
    base = tiny.llama()
    expected = everything(initialize(adapted(copy.deepcopy(base)), batches(2, 3, 1), passes=1))
    checkpoint_activations(base, {"use_reentrant": reentrant})
    base.enable_input_require_grads()
    model = adapted(base).train()
    calls = []
    base.model.layers[1].mlp.up_proj.register_forward_hook(lambda *_: calls.append(1))
    initialize(model, batches(2, 3, 1))
    assert BY_BLOCKS in log.text
    assert len(calls) == 2 * 3
    assert all(layer.gradient_checkpointing for layer in base.model.layers)
    tiny.assert_same(everything(model), expected)


def test_autocast(fits, log):
    """Of the model's forward pass, as accelerate sets it for bf16=True: it is on in the recomputation, too."""
    results = []
    for passes in (1, None):
        base = tiny.llama()
        base.forward = torch.autocast("cpu", torch.bfloat16)(base.forward)
        results.append(everything(initialize(adapted(base), batches(2, 3), passes=passes)))
    assert BY_BLOCKS in log.text
    tiny.assert_same(*results)
    plain = everything(initialize(adapted(tiny.llama()), batches(2, 3), passes=1))
    assert any(not torch.equal(value, plain[name]) for name, value in results[0].items())


def test_a_block_that_draws_numbers(fits, log):
    """The recomputation has the same ones, which are those of an ordinary pass."""

    class Noisy(nn.Module):
        def forward(self, x):
            return nn.functional.dropout(x, 0.5, training=True)

    base = tiny.llama()
    base.model.layers[0].mlp.act_fn = Noisy()
    results = []
    for passes in (1, None):
        torch.manual_seed(5)
        results.append(everything(initialize(adapted(copy.deepcopy(base)), batches(2, 3), passes=passes)))
    tiny.assert_same(*results)
    assert BY_BLOCKS in log.text


def test_inputs_that_are_offloaded(log, monkeypatch):
    """By the hooks that move them; here from the CPU to the CPU."""
    moved = []

    def offload(self, graphs, meter):
        graphs.offload = True

    monkeypatch.setattr(first_step.FirstSteps, "_check_memory", offload)
    monkeypatch.setattr(blocks, "_to_cpu", lambda tensor: moved.append(tensor.shape) or (tensor.device, tensor))
    same_as_one_pass(adapted(tiny.llama()), batches(2, 3, 1), log)
    assert torch.Size([3, 16, 32]) in moved


@pytest.mark.gpu
def test_inputs_are_offloaded_where_they_do_not_fit(log):
    """From a GPU, with so many batches that the blocks' inputs take more than training does."""
    model, data = adapted(tiny.llama().cuda()), batches(*[1] * 100)
    expected = everything(initialize(copy.deepcopy(model), data, passes=1, update="gradient"))
    result = everything(initialize(model, data, update="gradient"))
    assert BY_BLOCKS in log.text
    tiny.assert_same(result, expected, rtol=1e-3, atol=1e-6)


# Memory


def alive(shapes: set[torch.Size]) -> int:
    """Float32 tensors of these shapes."""
    gc.collect()
    return sum(1 for o in gc.get_objects() if isinstance(o, Tensor) and o.dtype == torch.float32 and o.shape in shapes)


@pytest.mark.parametrize("passes", [None, 1])
def test_gradients_of_one_block_are_alive(passes, fits, monkeypatch):
    """A block has 7 layers; the decomposition has ΔW as well. One ordinary pass has all 4 blocks' gradients."""
    model = adapted(tiny.llama(num_hidden_layers=4, num_key_value_heads=4).to(torch.bfloat16))
    shapes, counts, svd = (
        {torch.Size([32, 32]), torch.Size([48, 32]), torch.Size([32, 48])},
        [],
        first_step.truncated_svd,
    )

    def counting(M, r):
        counts.append(alive(shapes) - before)
        return svd(M, r)

    monkeypatch.setattr(first_step, "truncated_svd", counting)
    before = alive(shapes)
    initialize(model, batches(2, 3), passes=passes)
    assert len(counts) == 28
    assert max(counts) == (7 if passes is None else 28) + 1


@pytest.mark.parametrize("passes", [None, 1])
def test_activations_of_one_block_and_logits_of_one_batch_are_alive(passes, fits):
    base = tiny.llama(num_hidden_layers=4)
    model = adapted(base)
    seen = {"activations": [], "logits": []}
    most = dict.fromkeys(seen, 0)

    def watch(module, args, output, kind):
        seen[kind] = [reference for reference in seen[kind] if reference() is not None]
        seen[kind].append(weakref.ref(output if kind == "logits" else args[0]))
        most[kind] = max(most[kind], len(seen[kind]))

    for layer in base.model.layers:
        layer.mlp.down_proj.register_forward_hook(lambda *call: watch(*call, "activations"))
    base.lm_head.register_forward_hook(lambda *call: watch(*call, "logits"))
    initialize(model, batches(2, 3, 1), passes=passes)
    assert most == {"activations": 1 if passes is None else 4, "logits": 1}


def test_what_is_measured():
    """Inputs: the hidden states of each block, and once the position embeddings, all float32."""
    model = adapted(tiny.llama(num_hidden_layers=3))
    graphs, (batch,) = CutGraphs(outermost_blocks(model)), batches(3)
    graphs.meter = meter = UsageMeter(model)
    graphs.next_batch()
    layers = {name: m for name, m in model.named_modules() if name.endswith("_proj.base_layer")}
    with model.disable_adapter(), frozen(model), weight_gradients(layers), graphs.cutting():
        model(**batch)
    tokens = batch["input_ids"].numel()
    hidden = 4 * 32 * tokens
    assert 3 * hidden <= meter.inputs <= 3.7 * hidden
    # Each keeps at least the inputs of its norms and of its linear layers.
    assert meter.activations == 3 * meter.largest_activations
    assert meter.largest_activations >= 5 * hidden + 4 * 48 * tokens


def test_groups_by_block():
    """A layer that blocks share is complete in the first one's turn; one outside all blocks at the end."""
    first, second, head = Block(), Block(), nn.Linear(6, 6)
    second.shared = first.shared = nn.Linear(6, 6)
    layers = {"head": head, "a": first.inner, "b": second.inner, "shared": second.shared}
    groups = group_by_block({"first": first, "second": second}, layers)
    assert groups == {None: ["head"], "first": ["a", "shared"], "second": ["b"]}


# Where it is not possible


class Stack(nn.Module):
    """Runs its blocks in an order that may depend on the batch."""

    def __init__(self, order):
        super().__init__()
        torch.manual_seed(0)
        self.blocks, self.order, self.calls = nn.ModuleList(Block() for _ in range(3)), order, 0

    def forward(self, x):
        order = self.order[self.calls % len(self.order)]
        self.calls += 1
        for i in order:
            x = self.blocks[i](x)
        return x


class UsedOutside(Stack):
    """The last block's layer also comes before the first block."""

    def forward(self, x):
        return super().forward(self.blocks[2].inner(x))


def square(model, batch):
    return model(batch["x"]).square().mean(), len(batch["x"])


def rows(number: int = 2) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [{"x": torch.randn(40, 6, generator=generator)} for _ in range(number)]


def mixtral() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"num_key_value_heads": 2, "num_local_experts": 2, "num_experts_per_tok": 1, "vocab_size": 260}
    # The routers' logits reach the loss past the blocks' outputs.
    return MixtralForCausalLM(MixtralConfig(**sizes, output_router_logits=True, router_aux_loss_coef=10.0))


def stack(*order) -> nn.Module:
    return adapted(Stack(order), ["inner"])


CASES = {
    "no blocks": (
        lambda: adapted(tiny.mlp(dtype=torch.float32), ["0", "2"]),
        rows(),
        square,
        "the model has no layers that transformers can checkpoint",
    ),
    "a block used again": (
        lambda: stack((0, 1, 2, 1)),
        rows(),
        square,
        r"\S+blocks\.1 is used again after other blocks",
    ),
    "another order": (
        lambda: stack((0, 1, 2), (0, 2, 1)),
        rows(),
        square,
        "not all batches go through the same blocks in the same order",
    ),
    "a layer used outside its block": (
        lambda: adapted(UsedOutside([(0, 1, 2)]), ["inner"]),
        rows(),
        square,
        r"\S+blocks\.2\.inner is used outside its block, too",
    ),
    "a loss beside the blocks": (
        lambda: adapted(mixtral(), ["q_proj", "v_proj"]),
        batches(2, 3),
        None,
        "RuntimeError: Trying to backward through the graph a second time",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_several_passes_instead(name, fits, log):
    """With a warning that says why, and the same start."""
    make, data, forward_fn, reason = CASES[name]
    expected = everything(initialize(make(), data, passes=1, forward_fn=forward_fn))
    assert not log.messages
    model = initialize(make(), data, forward_fn=forward_fn)
    (message,) = log.messages
    assert re.match(r"LoRA-SB's start makes \d passes over the samples, to keep within the memory of train", message)
    assert re.search(f"One pass block by block is not possible: {reason}", message)
    tiny.assert_same(everything(model), expected)
    assert not any("forward" in module.__dict__ for module in model.modules())


@pytest.mark.parametrize(("number", "fit"), [(2, True), (40, False)])
def test_memory_decides(number, fit, log):
    """Long rows, whose activations are larger than the weights: a few batches fit into what training takes."""
    ids = torch.randint(4, 260, (2, 120), generator=torch.Generator().manual_seed(0))
    data = [{"input_ids": ids, "labels": ids}] * number
    initialize(adapted(tiny.llama()), data)
    if fit:
        assert BY_BLOCKS in log.text
    else:
        assert re.search(r"is not possible: it would take \S+ GB, training \S+ GB", log.text)


def test_a_block_used_twice_in_a_row(fits, log):
    """Its gradients are complete in its turn."""
    same_as_one_pass(stack((0, 1, 1, 2)), rows(), log, forward_fn=square)


def test_the_other_ways_are_in_the_log(log):
    initialize(adapted(tiny.llama()), batches(3))
    initialize(adapted(tiny.llama(), r=16), batches(2, 1))
    initialize(adapted(tiny.llama()), batches(2, 1), passes=2)
    assert log.messages == [
        "LoRA-SB's start: one pass over the samples, which are one batch.",
        "LoRA-SB's start: one pass; all gradients together keep within the memory of training.",
    ]


def test_an_error_of_the_model_is_raised(fits, log):
    data = [*rows(), {"x": torch.ones(3, 5)}]
    model = stack((0, 1, 2))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        initialize(model, data, forward_fn=square)
    assert not any("forward" in module.__dict__ or module._forward_hooks for module in model.modules())


def test_memory_that_runs_out_is_not_tried_again(log):
    model, calls = stack((0, 1, 2)), []

    def fail(model, batch):
        calls.append(1)
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB.")

    with pytest.raises(torch.OutOfMemoryError):
        initialize(model, rows(), forward_fn=fail)
    assert len(calls) == 1
