"""initialize_lora_sb_weights against an independent gradient, its truncation, and every error."""

import copy
import random
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F
from adapter_layers import adapters, delta, everything, factors, truncation
from init_samples import ETA, batches, collate, initialize, make_rows
from peft import LoraConfig, VeraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers.pytorch_utils import Conv1D
from versions import checkpoint_activations

from hf_reflora import LoraSbConfig
from hf_reflora.lora_sb.passes import plan_passes
from hf_reflora.lora_sb.targets import is_initialized


LAYERS = ["q_proj", "down_proj"]


def gradients(model: nn.Module, rows=None) -> dict[str, Tensor]:
    """Of the mean over all labels, in one padded batch, by `.grad` of a copy without adapters; by last name parts."""
    model = copy.deepcopy(model).eval().requires_grad_(True)
    batch = collate(make_rows() if rows is None else rows)
    labels = batch.pop("labels")
    logits = model(**batch).logits[:, :-1]
    F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten()).backward()
    layers = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D)}
    return {name: m.weight.grad.T if isinstance(m, Conv1D) else m.weight.grad for name, m in layers.items()}


def config(kind: str, **changes):
    changes = {"r": 4, "target_modules": LAYERS, **changes}
    scaling = changes.pop("scaling", 1)
    if kind == "lora_sb":
        return LoraSbConfig(scaling=scaling, **changes)
    return LoraConfig(**{"lora_alpha": scaling * changes["r"], **changes})


KINDS = pytest.mark.parametrize("kind", ["lora_sb", "lora"])


@KINDS
@pytest.mark.parametrize("update", ["sign", "gradient"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_start_is_the_best_approximation_of_the_first_step(kind, update, name):
    """Batches of 2, 3 and 1 rows of unlike length with prompts and padding are the same as one batch of all."""
    base = {"llama": tiny.llama, "gpt2": tiny.gpt2}[name]().double()
    expected = gradients(base)
    targets = LAYERS if name == "llama" else ["c_attn", "c_proj"]
    pattern = {"down_proj": 2, r"1\.attn\.c_proj": 2}
    model = get_peft_model(base, config(kind, target_modules=targets, rank_pattern=pattern, scaling=2.5))
    initialize(model, update=update)
    layers = adapters(model)
    assert len(layers) == (4 if name == "llama" else 6)
    assert {layer.r["default"] for layer in layers.values()} == {2, 4}
    for name, layer in layers.items():
        G = expected[name]
        step = -ETA * (G.sign() if update == "sign" else G)
        best = truncation(step, layer.r["default"])
        assert best.norm() > 0.3 * step.norm()
        assert layer.scaling["default"] == (2.5 if kind == "lora_sb" else 10 / layer.r["default"])
        assert (delta(layer) - best).norm() < 1e-5 * best.norm(), name


@pytest.mark.parametrize("kind", ["lora_sb", "lora"])
def test_conv1d_in_one_batch(kind):
    """(in, out) weights, in one batch, which needs no weighting."""
    base = tiny.gpt2().double()
    expected = gradients(base)
    changes = {"fan_in_fan_out": True} if kind == "lora" else {}
    model = initialize(get_peft_model(base, config(kind, target_modules=["c_attn", "c_fc"], **changes)), batches(6))
    for name, layer in adapters(model).items():
        best = truncation(-ETA * expected[name].sign(), 4)
        assert (delta(layer) - best).norm() < 1e-5 * best.norm(), name


def test_in_float32():
    base = tiny.llama()
    expected = gradients(base)
    model = initialize(get_peft_model(base, config("lora_sb")), update="gradient")
    for name, layer in adapters(model).items():
        best = truncation(-ETA * expected[name], 4)
        assert (delta(layer) - best).norm() < 1e-4 * best.norm(), name


def test_factors_are_orthonormal_and_the_core_is_the_singular_values():
    base = tiny.llama()
    expected = gradients(copy.deepcopy(base).double())
    model = initialize(get_peft_model(base, config("lora_sb", scaling=0.5)))
    for name, layer in adapters(model).items():
        B, R, A = factors(layer)
        torch.testing.assert_close(B.T @ B, torch.eye(4), rtol=0, atol=1e-6)
        torch.testing.assert_close(A @ A.T, torch.eye(4), rtol=0, atol=1e-6)
        assert torch.equal(R, R.diag().diag())
        values = torch.linalg.svdvals(expected[name].sign())[:4] * ETA / 0.5
        torch.testing.assert_close(R.diag().double(), values, rtol=1e-2, atol=0)  # float32 signs may differ
        assert (R.diag() > 0).all()


def test_lora_factors_are_balanced():
    model = initialize(get_peft_model(tiny.llama(), config("lora", scaling=3)))
    for layer in adapters(model).values():
        B, A = factors(layer)
        gram = B.T @ B
        torch.testing.assert_close(gram, A @ A.T, rtol=0, atol=1e-6 * gram.norm().item())
        assert torch.linalg.matrix_rank(gram) == 4
        torch.testing.assert_close(gram, gram.diag().diag(), rtol=0, atol=1e-6 * gram.norm().item())


@KINDS
def test_start_at_base(kind):
    """The base model's logits to the bit, in the subspace of the other start."""
    base = tiny.llama()
    ids = torch.arange(4, 20)[None]
    expected = base.eval()(ids).logits
    there = adapters(initialize(get_peft_model(copy.deepcopy(base), config(kind))))
    model = initialize(get_peft_model(base, config(kind)), start_at_base=True).eval()
    assert torch.equal(model(ids).logits, expected)
    for name, layer in adapters(model).items():
        here, full = factors(layer), factors(there[name])
        zero = 1 if kind == "lora_sb" else 0
        for i, factor in enumerate(here):
            assert torch.equal(factor, torch.zeros_like(factor) if i == zero else full[i])
    if kind == "lora_sb":
        assert is_initialized(model, "default")


@KINDS
def test_passes_do_not_matter(kind):
    data = [batches(2, 3, 1), batches(6)]
    model = get_peft_model(tiny.llama(), config(kind))
    for rows in data:
        results = []
        for passes in (None, 1, 3, 4, 50):
            fresh = initialize(copy.deepcopy(model), rows, passes=passes)
            results.append(everything(fresh))
        for result in results[1:]:
            tiny.assert_same(results[0], result)


@KINDS
def test_runs_are_deterministic_and_depend_on_no_random_state(kind):
    model = get_peft_model(tiny.llama(attention_dropout=0.5), config(kind))
    results = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        results.append(everything(initialize(copy.deepcopy(model).train())))
    tiny.assert_same(*results)


@pytest.mark.parametrize("passes", [None, 1, 2, 4, 9])
def test_number_of_passes(passes):
    """One forward pass per pass and batch. By default one pass, block by block where all sums need more memory."""
    model = get_peft_model(tiny.llama(), config("lora_sb", r=8))
    calls = []
    model.get_base_model().lm_head.register_forward_hook(lambda *_: calls.append(1))
    initialize(model, passes=passes)
    assert len(calls) == 3 * (min(passes, 4) if passes else 1)
    sums, factors, budget = 2 * 4 * 32 * (32 + 48), *(2 * n * 8 * (32 + 32 + 32 + 48) for n in (4, 12))
    assert budget < sums + factors < 2 * budget


def test_a_single_batch_is_one_pass():
    model = get_peft_model(tiny.llama(), config("lora_sb", r=1))
    calls = []
    model.get_base_model().lm_head.register_forward_hook(lambda *_: calls.append(1))
    initialize(model, batches(6))
    assert calls == [1]


def groups_of(shapes, passes) -> tuple[list[int], int]:
    """Bytes of each group's sums; and of a LoRA's gradients and Adam moments, less the new factors."""
    layers = {
        str(i): SimpleNamespace(out_features=n, in_features=m, r={"default": r}) for i, (n, m, r) in enumerate(shapes)
    }
    groups = plan_passes(layers, "default", passes)
    assert [name for group in groups for name in group] == list(layers)
    assert all(groups)
    return [sum(4 * shapes[int(i)][0] * shapes[int(i)][1] for i in group) for group in groups], sum(
        (12 - 4) * r * (n + m) for n, m, r in shapes
    )


@pytest.mark.parametrize("r", [1, 8, 64, 256])
def test_sums_of_a_real_model_keep_within_the_bound(r):
    """Llama-3-8B: as the documentation promises, or hardly more than one layer at a time."""
    block = [(4096, 4096), (1024, 4096), (1024, 4096), (4096, 4096), (14336, 4096), (14336, 4096), (4096, 14336)]
    shapes = [(n, m, r) for _ in range(32) for n, m in block]
    sizes, budget = groups_of(shapes, None)
    assert max(sizes) <= (budget if budget > 4 * 14336 * 4096 else 2 * 4 * 14336 * 4096)
    assert len(sizes) <= len(shapes)


def test_sums_of_any_model_keep_within_the_bound():
    rng = random.Random(0)
    for _ in range(2000):
        shapes = [
            (rng.choice([4, 16, 64, 256, 1024]), rng.choice([4, 16, 64, 256, 1024]), rng.choice([1, 2, 4, 8]))
            for _ in range(rng.randint(1, 12))
        ]
        sizes, budget = groups_of(shapes, None)
        largest = max(4 * n * m for n, m, _ in shapes)
        assert max(sizes) <= max(budget, largest), shapes


@pytest.mark.parametrize("passes", [1, 2, 3, 7, 40])
def test_given_passes_are_of_similar_size(passes):
    sizes, _ = groups_of([(32, 32, 4)] * 21, passes)
    assert len(sizes) == min(passes, 21)
    assert max(sizes) - min(sizes) <= 4 * 32 * 32


@KINDS
def test_nothing_else_changes(kind):
    """Base weights, other adapters, requires_grad, training modes, gradients, random states: as before, to the bit."""
    base = tiny.llama(attention_dropout=0.3)
    model = get_peft_model(base, config(kind, target_modules=["q_proj"], modules_to_save=["lm_head"]))
    model.add_adapter(
        "other",
        LoraConfig(r=2, init_lora_weights=False)
        if kind == "lora"
        else LoraSbConfig(r=2, target_modules=["q_proj", "v_proj"], init_weights=False),
    )
    model.set_adapter("default")
    model.train()
    model.get_base_model().model.layers[1].eval()
    model.get_base_model().model.norm.requires_grad_(True)
    for i, parameter in enumerate(p for p in model.parameters() if p.requires_grad):
        parameter.grad = torch.full_like(parameter, float(i))

    def state():
        return (
            {
                n: (p.requires_grad, None if p.grad is None else p.grad.unique().tolist())
                for n, p in model.named_parameters()
            },
            {n: m.training for n, m in model.named_modules()},
            model.active_adapters,
            (random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()),
        )

    values, before = everything(model), state()
    initialize(model)
    assert state() == before
    changed = {n for n, t in everything(model).items() if not torch.equal(t, values[n])}
    letters = "BRA" if kind == "lora_sb" else "BA"
    stem = "lorasb_" if kind == "lora_sb" else "lora_"
    ends = tuple(f"q_proj.{stem}{x}.default" + (".weight" if kind == "lora" else "") for x in letters)
    assert len(changed) == 2 * len(letters)
    assert all(name.endswith(ends) for name in changed)


def test_a_dataloader_leaves_the_random_state():
    model = get_peft_model(tiny.llama(), config("lora_sb"))
    torch.manual_seed(3)
    state = torch.get_rng_state()
    initialize(model, DataLoader(make_rows(), batch_size=2, shuffle=False, collate_fn=collate))
    assert torch.equal(torch.get_rng_state(), state)


@KINDS
def test_another_adapter_by_name(kind):
    """The gradient is that of the base model, whatever the active adapter does."""
    base = tiny.llama()
    alone = adapters(initialize(get_peft_model(copy.deepcopy(base), config(kind))))
    model = (
        get_peft_model(base, LoraConfig(r=2, target_modules=LAYERS, init_lora_weights=False), "first")
        if (kind == "lora")
        else get_peft_model(base, LoraSbConfig(r=2, target_modules=LAYERS, init_weights=False), "first")
    )
    model.add_adapter("second", config(kind))
    initialize(model, adapter_name="second")
    assert model.active_adapters == ["first"]
    for name, layer in adapters(model, "second").items():
        for left, right in zip(factors(layer, "second"), factors(alone[name]), strict=True):
            assert torch.equal(left, right)
    with pytest.raises(ValueError, match="There is no adapter 'third'; the model has first, second"):
        initialize(model, adapter_name="third")


def test_forward_fn():
    """Any loss, with its own weights: here a batch counts by its rows."""
    base = tiny.mlp()
    data = [{"x": tiny.batch(0)[0], "y": tiny.batch(0)[1]}, {"x": tiny.batch(1)[0][:2], "y": tiny.batch(1)[1][:2]}]
    full = copy.deepcopy(base)
    x, y = (torch.cat([batch[key] for batch in data]) for key in "xy")
    (full(x) - y).square().mean().backward()
    model = get_peft_model(base, LoraSbConfig(r=2, target_modules=["0", "2"]))
    seen = []

    def forward_fn(given, batch):
        seen.append(given)
        return (given(batch["x"]) - batch["y"]).square().mean(), len(batch["x"])

    initialize(model, data, forward_fn=forward_fn, update="gradient", passes=1)
    assert seen == [model] * 2
    for name, layer in adapters(model).items():
        best = truncation(-ETA * full.get_submodule(name).weight.grad, 2)
        assert (delta(layer) - best).norm() < 1e-5 * best.norm()


def test_classifier_counts_rows():
    """Not causal: every label counts. The new classifier is in modules_to_save."""
    base = tiny.bert().double()
    ids = torch.randint(4, 260, (5, 9), generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 1, 1, 0, 1])
    full = copy.deepcopy(base).eval()
    full(input_ids=ids, labels=labels).loss.backward()
    model = get_peft_model(base, config("lora_sb", target_modules=["query"], modules_to_save=["classifier"]))
    initialize(model, [{"input_ids": ids[:4], "labels": labels[:4]}, {"input_ids": ids[4:], "labels": labels[4:]}])
    for name, layer in adapters(model).items():
        best = truncation(-ETA * full.get_submodule(name).weight.grad.sign(), 4)
        assert (delta(layer) - best).norm() < 1e-5 * best.norm()


def test_batches_without_labels_to_predict_count_nothing():
    """A batch of prompts only has no mean loss; it is passed over."""
    empty = {"input_ids": torch.full((1, 5), 7), "labels": torch.full((1, 5), -100)}
    model = get_peft_model(tiny.llama(), config("lora_sb"))
    expected = everything(initialize(copy.deepcopy(model), batches(2, 1)))
    tiny.assert_same(everything(initialize(model, [empty, *batches(2, 1), empty])), expected)


def test_shift_labels():
    """Labels that are shifted already all count."""
    data = batches(2, 3, 1)
    shifted = [{**b, "shift_labels": F.pad(b["labels"][:, 1:], (0, 1), value=-100)} for b in data]
    model = get_peft_model(tiny.llama(), config("lora_sb"))
    expected = everything(initialize(copy.deepcopy(model), data))
    tiny.assert_same(everything(initialize(model, shifted)), expected)


@KINDS
@pytest.mark.parametrize("update", ["sign", "gradient"])
def test_the_loss_falls(kind, update):
    """W0 + ΔW is better than W0, which start_at_base is."""
    model, data = get_peft_model(tiny.llama(), config(kind, target_modules="all-linear")), batches(6)

    def loss():
        with torch.no_grad():
            return model.eval()(**data[0]).loss.item()

    eta = 1e-3 if update == "sign" else 0.5
    at_base = loss()
    initialize(model, data, eta=eta, update=update)
    assert loss() < at_base - 0.01


@pytest.mark.parametrize("checkpointing", [False, True], ids=["non-reentrant", "reentrant"])
def test_gradient_checkpointing_changes_nothing(checkpointing):
    base = tiny.llama(attention_dropout=0.2)
    expected = everything(initialize(get_peft_model(copy.deepcopy(base), config("lora_sb")), batches(6)))
    checkpoint_activations(base, {"use_reentrant": checkpointing})
    base.enable_input_require_grads()
    model = get_peft_model(base, config("lora_sb")).train()
    tiny.assert_same(everything(initialize(model, batches(6))), expected)


def test_a_bfloat16_model():
    base = tiny.llama().to(torch.bfloat16)
    expected = gradients(copy.deepcopy(base).float())
    model = initialize(get_peft_model(base, config("lora_sb")), update="gradient")
    for name, layer in adapters(model).items():
        assert {f.dtype for f in factors(layer)} == {torch.float32}
        best = truncation(-ETA * expected[name], 4)
        assert (delta(layer) - best).norm() < 0.1 * best.norm()


@pytest.mark.parametrize("bits", [4, 8])
def test_quantized_base(bits):
    pytest.importorskip("bitsandbytes")
    base = tiny.llama(hidden_size=64, intermediate_size=64)
    expected = gradients(tiny.quantize(base, bits))
    model = get_peft_model(base, config("lora_sb"))
    before = everything(model)
    initialize(model, update="gradient")
    after = everything(model)
    tiny.assert_same(*({n: t for n, t in values.items() if "lorasb" not in n} for values in (before, after)))
    for name, layer in adapters(model).items():
        best = truncation(-ETA * expected[name], 4)
        assert (delta(layer) - best).norm() < (1e-4 if bits == 4 else 0.1) * best.norm()


@pytest.mark.parametrize("shown", [True, False])
def test_progress_bar(shown, capsys):
    model = get_peft_model(tiny.llama(), config("lora_sb"))
    initialize(model, show_progress_bar=shown, passes=2)
    text = capsys.readouterr().err
    assert ("LoRA-SB initialization" in text) == shown
    assert ("100%" in text and "10/10" in text) == shown  # 2 passes over 3 batches and 4 layers


# Errors


class Unused(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.used, self.unused = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        return self.used(x)


def plain_loss(model, batch):
    return model(batch["x"]).square().mean(), len(batch["x"])


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"eta": 0.0}, "eta must be a positive number, the first learning rate above zero, got 0.0"),
        ({"eta": -1.0}, "eta must be a positive number"),
        ({"eta": float("nan")}, "eta must be a positive number"),
        ({"eta": float("inf")}, "eta must be a positive number"),
        ({"update": "adam"}, r"update must be one of \('sign', 'gradient'\), got 'adam'"),
        ({"passes": 0}, "passes must be at least 1, got 0"),
        ({"adapter_name": "x"}, "There is no adapter 'x'; the model has default"),
    ],
)
def test_wrong_arguments(changes, match):
    model = get_peft_model(tiny.llama(), config("lora_sb"))
    with pytest.raises(ValueError, match=match):
        initialize(model, **changes)


def test_a_model_without_adapters():
    with pytest.raises(TypeError, match="model must be a PeftModel, made by get_peft_model, got LlamaForCausalLM"):
        initialize(tiny.llama())


def wrong(name: str) -> nn.Module:
    def peft(base, config):
        return get_peft_model(base, config)

    if name == "merged":
        model = peft(tiny.llama(), config("lora"))
        model.merge_adapter()
        return model
    configs = {
        "lora_xs": config("lora_sb", init_weights="lora_xs"),
        "lora_sb true": config("lora_sb", init_weights=True),
        "lora_sb false": config("lora_sb", init_weights=False),
        "pissa": config("lora", init_lora_weights="pissa"),
        "lora false": config("lora", init_lora_weights=False),
        "vera": VeraConfig(r=2, target_modules=["q_proj"]),
        "dora": config("lora", use_dora=True),
        "embedding": config("lora", target_modules=["embed_tokens", "q_proj"]),
        "rank": config("lora", r=40, target_modules=["k_proj"]),
    }
    if name == "conv":
        return peft(nn.Sequential(nn.Conv2d(3, 8, 3)), LoraConfig(r=2, target_modules=["0"]))
    return peft(tiny.llama(), configs[name])


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("lora_xs", r"'default' has init_weights='lora_xs' and is initialized already\. Make it with LoraSbConfig"),
        ("lora_sb true", "has init_weights=True and is initialized already"),
        ("lora_sb false", "has init_weights=False and is initialized already"),
        ("pissa", "has init_lora_weights='pissa', another start. Make it with init_lora_weights=True"),
        ("lora false", "has init_lora_weights=False, another start"),
        ("vera", "'default' is a VeraConfig; LoRA-SB initializes LoraSbConfig, LoraConfig"),
        ("dora", "q_proj is a LoRA variant such as DoRA; LoRA-SB initializes plain adapters on linear layers"),
        ("embedding", "embed_tokens is on a Embedding; LoRA-SB initializes plain adapters"),
        ("conv", "0 is on a Conv2d; LoRA-SB initializes plain adapters on linear layers. Leave it out"),
        ("rank", r"k_proj is 16 x 32 and has no subspace of rank 40\. Give it a smaller rank by rank_pattern"),
        ("merged", r"q_proj is merged\. Call unmerge_adapter\(\) first"),
    ],
)
def test_wrong_adapters(name, match):
    model = wrong(name)
    before = everything(model)
    with pytest.raises(ValueError, match=match):
        initialize(model)
    tiny.assert_same(everything(model), before)


def test_merged_lora_sb():
    model = initialize(get_peft_model(tiny.llama(), config("lora_sb")))
    model.merge_adapter()
    with pytest.raises(ValueError, match="is merged"):
        initialize(model)


def test_lora_sb_clamps_the_rank():
    base = tiny.llama().double()
    expected = gradients(base)
    model = initialize(get_peft_model(base, config("lora_sb", r=40, target_modules=["k_proj"])))
    for name, layer in adapters(model).items():
        assert layer.r["default"] == 16
        torch.testing.assert_close(delta(layer), -ETA * expected[name].sign(), rtol=1e-4, atol=1e-4 * ETA)


NO_LABELS = {"input_ids": torch.full((1, 5), 7)}


@pytest.mark.parametrize(
    ("data", "match"),
    [
        ([], "The dataloader has no batches"),
        (
            [NO_LABELS],
            "must be a dictionary with labels, from which LlamaForCausalLM .* but it has input_ids.* give forward_fn",
        ),
        ([{**NO_LABELS, "labels": torch.full((1, 5), -100)}], "No gradient reached .*q_proj from these samples"),
        ([*batches(2), {**NO_LABELS}], "must be a dictionary with labels"),
    ],
)
@KINDS
def test_wrong_data(kind, data, match):
    model = get_peft_model(tiny.llama(), config(kind)).train()
    assert_fails_cleanly(model, data, match)


def assert_fails_cleanly(model, data, match, error=ValueError, **changes):
    """It raises, and the model is as before."""
    values, grads = everything(model), {n: p.requires_grad for n, p in model.named_parameters()}
    modes = {n: m.training for n, m in model.named_modules()}
    state = torch.get_rng_state()
    with pytest.raises(error, match=match):
        initialize(model, data, **changes)
    tiny.assert_same(everything(model), values)
    assert {n: p.requires_grad for n, p in model.named_parameters()} == grads
    assert {n: m.training for n, m in model.named_modules()} == modes
    assert not any(m._forward_hooks for m in model.modules())
    assert not any(layer.disable_adapters for layer in adapters(model).values())
    assert torch.equal(torch.get_rng_state(), state)
    assert not is_initialized(model, "default")


def test_a_model_without_a_loss():
    model = get_peft_model(tiny.llama().model, config("lora_sb"))

    class Silent(type(model.get_base_model())):
        def forward(self, input_ids, labels=None):
            return super().forward(input_ids)

    model.get_base_model().__class__ = Silent
    assert_fails_cleanly(
        model, [{**NO_LABELS, "labels": NO_LABELS["input_ids"]}], "Silent returned no loss for a batch of"
    )


@KINDS
@pytest.mark.parametrize("passes", [None, 1])
def test_a_layer_without_a_gradient(kind, passes):
    model = get_peft_model(Unused(), config(kind, r=2, target_modules=["used", "unused"]))
    match = r"No gradient reached base_model\.model\.unused from these samples, so they define no subspace for it"
    assert_fails_cleanly(model, [{"x": torch.ones(3, 6)}], match, forward_fn=plain_loss, passes=passes)


@pytest.mark.parametrize("passes", [None, 1])
def test_the_error_of_a_layer_without_a_gradient(passes):
    model = get_peft_model(Unused(), config("lora_sb", r=2, target_modules=["used", "unused"]))
    with pytest.raises(ValueError, match=r"No gradient reached .*unused .*enable_input_require_grads"):
        initialize(model, [{"x": torch.ones(3, 6)}], forward_fn=plain_loss, passes=passes)


@pytest.mark.parametrize("case", ["unused layer", "reentrant checkpointing"])
def test_no_graph_at_all(case):
    """The message tells what to do, not PyTorch's 'element 0 of tensors does not require grad'."""
    if case == "unused layer":
        model = get_peft_model(Unused(), config("lora_sb", r=2, target_modules=["unused"]))
        data, changes = [{"x": torch.ones(3, 6)}], {"forward_fn": plain_loss}
    else:
        model, data, changes = get_peft_model(tiny.llama(), config("lora_sb")).train(), batches(2), {}
        checkpoint_activations(model.get_base_model(), {"use_reentrant": True})
        model.get_base_model().disable_input_require_grads()
    with pytest.raises(ValueError, match="No gradient reached"):
        initialize(model, data, **changes)


@KINDS
def test_a_gradient_of_zeros(kind):
    """An input of zeros: sign(0) = 0 defines no subspace."""
    model = get_peft_model(Unused(), config(kind, r=2, target_modules=["used"]))
    assert_fails_cleanly(model, [{"x": torch.zeros(3, 6)}], "No gradient reached", forward_fn=plain_loss)


@KINDS
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite(kind, value):
    model = get_peft_model(Unused(), config(kind, r=2, target_modules=["used"]))
    x = torch.ones(3, 6)
    x[1, 2] = value
    match = r"The gradient of base_model\.model\.used is not finite"
    assert_fails_cleanly(model, [{"x": x}], match, forward_fn=plain_loss)


def test_is_initialized():
    for kind in ("lora_sb", "lora"):
        model = get_peft_model(tiny.llama(), config(kind))
        assert not is_initialized(model, "default")
        assert is_initialized(initialize(model), "default")
