"""create_reflora_optimizer in hand-written loops, against loops in which RefLoRA is written out by hand."""

import warnings

import pytest
import tiny
import torch
from peft import LoraConfig, PeftModel
from torch.optim import SGD, Adagrad, Adam, AdamW, RMSprop

from hf_reflora import create_reflora_optimizer
from hf_reflora.reflora.optimizer import STEP_KEY


CLOSE = {"rtol": 1e-7, "atol": 1e-11}
OPTIMIZERS = {
    "AdamW": (AdamW, {"lr": 0.01, "weight_decay": 0.1}),
    "Adam amsgrad": (Adam, {"lr": 0.01, "amsgrad": True}),
    "SGD": (SGD, {"lr": 0.02, "weight_decay": 0.1}),
    "SGD momentum": (SGD, {"lr": 0.01, "momentum": 0.9, "nesterov": True}),
    "RMSprop": (RMSprop, {"lr": 0.005}),
    "RMSprop momentum": (RMSprop, {"lr": 0.005, "momentum": 0.5}),
    "Adagrad": (Adagrad, {"lr": 0.01}),
}
DEGREES = {"exp_avg": 1, "exp_avg_sq": 2, "max_exp_avg_sq": 2, "square_avg": 2, "sum": 2}
METHODS = [("reflora", "precondition"), ("reflora_s", "precondition"), ("reflora_s", "rescale")]


def run(model, optimizer, steps=5, scheduler=None, before=None, after=None):
    """A training loop; `before` and `after` are called around the step with its number."""
    for step in range(steps):
        optimizer.zero_grad()
        tiny.mlp_loss(model, step).backward()
        if before:
            before(step)
        optimizer.step()
        if after:
            after(step)
        if scheduler:
            scheduler.step()
    return tiny.trainable(model)


def run_by_hand(name, method, form, steps=5, due=lambda step: True, schedule=None, smoothness=None, **kwargs):
    """The same loop with RefLoRA written out around a plain optimizer."""
    optimizer_cls, defaults = OPTIMIZERS[name]
    model = tiny.lora(tiny.mlp())
    optimizer = optimizer_cls([p for p in model.parameters() if p.requires_grad], **{**defaults, **kwargs})
    pairs, group = tiny.linear_pairs(model), optimizer.param_groups[0]

    def inverse_step(scaling):
        return None if smoothness is None else 1 / (smoothness * scaling**2 * group["lr"])

    def moments(parameter):
        degrees = {**DEGREES, "momentum_buffer": 0 if optimizer_cls is RMSprop else 1}
        return [(v, degrees[k]) for k, v in optimizer.state[parameter].items() if k in degrees and v is not None]

    def before(step):
        if due(step) and form == "precondition":
            tiny.precondition_by_hand(pairs, method, inverse_step)

    def after(step):
        if due(step) and form == "rescale":
            tiny.rescale_by_hand(pairs, moments, inverse_step)

    return run(model, optimizer, steps, schedule and schedule(optimizer), before, after)


@pytest.mark.parametrize(("method", "form"), METHODS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_trajectory_is_the_one_by_hand(name, method, form):
    optimizer_cls, kwargs = OPTIMIZERS[name]
    model = tiny.lora(tiny.mlp())
    optimizer = create_reflora_optimizer(model, optimizer_cls, method=method, form=form, **kwargs)
    assert type(optimizer) is optimizer_cls
    result = run(model, optimizer)
    tiny.assert_same(result, run_by_hand(name, method, form), **CLOSE)
    plain = tiny.lora(tiny.mlp())
    plain = run(plain, optimizer_cls([p for p in plain.parameters() if p.requires_grad], **kwargs))
    assert not all(torch.allclose(value, plain[name]) for name, value in result.items())


@pytest.mark.parametrize(("method", "form"), METHODS)
def test_warmup_interval_and_scheduler(method, form):
    def schedule(optimizer):
        return torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, 1.0, total_iters=6)

    model = tiny.lora(tiny.mlp())
    optimizer = create_reflora_optimizer(
        model, AdamW, method=method, form=form, warmup_steps=2, interval=3, **OPTIMIZERS["AdamW"][1]
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # "lr_scheduler.step() before optimizer.step()"
        result = run(model, optimizer, 7, schedule(optimizer))
    expected = run_by_hand("AdamW", method, form, 7, due=lambda step: step in (2, 5), schedule=schedule)
    tiny.assert_same(result, expected, **CLOSE)
    assert optimizer.param_groups[0][STEP_KEY] == 7


@pytest.mark.parametrize(("method", "form"), METHODS)
def test_smoothness_follows_the_learning_rate_and_the_scaling(method, form):
    """L is such that some steps take the small-step branch and others do not."""

    def schedule(optimizer):
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 10.0 ** -(step % 3))

    results = []
    for smoothness in (None, 300.0):
        model = tiny.lora(tiny.mlp())
        optimizer = create_reflora_optimizer(
            model, SGD, method=method, form=form, smoothness=smoothness, **OPTIMIZERS["SGD"][1]
        )
        results.append(run(model, optimizer, scheduler=schedule(optimizer)))
        expected = run_by_hand("SGD", method, form, schedule=schedule, smoothness=smoothness)
        tiny.assert_same(results[-1], expected, **CLOSE)
    assert not all(torch.allclose(value, results[1][name]) for name, value in results[0].items())


@pytest.mark.parametrize(("method", "form"), METHODS)
@pytest.mark.parametrize(("warmup", "interval"), [(5, 1), (0, 3)])
def test_state_dict_carries_the_count_of_steps(method, form, warmup, interval, tmp_path):
    def make(model):
        settings = {"warmup_steps": warmup, "interval": interval, "method": method, "form": form}
        return create_reflora_optimizer(model, AdamW, lr=0.01, **settings)

    unbroken = tiny.lora(tiny.mlp())
    optimizer = make(unbroken)
    run(unbroken, optimizer, 4)
    torch.save({"model": unbroken.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "state.pt")
    run(unbroken, optimizer, 4)

    resumed = tiny.lora(tiny.mlp(), seed=9)
    state = torch.load(tmp_path / "state.pt")
    resumed.load_state_dict(state["model"])
    optimizer = make(resumed)
    optimizer.load_state_dict(state["optimizer"])
    assert optimizer.param_groups[0][STEP_KEY] == 4
    tiny.assert_same(run(resumed, optimizer, 4), tiny.trainable(unbroken))


@pytest.mark.parametrize("how", ["positional", "keyword"])
def test_closures_are_refused_at_step(how):
    model = tiny.lora(tiny.mlp())
    optimizer = create_reflora_optimizer(model, AdamW, lr=0.01)
    tiny.mlp_loss(model, 0).backward()
    before = tiny.trainable(model)

    def closure():
        return tiny.mlp_loss(model, 0)

    with pytest.raises(ValueError, match=r"takes no closure.*optimizer\.step\(\)"):
        optimizer.step(closure) if how == "positional" else optimizer.step(closure=closure)
    tiny.assert_same(tiny.trainable(model), before)
    optimizer.step(None)
    optimizer.step(closure=None)


@pytest.mark.parametrize(
    ("optimizer_cls", "settings", "error", "match"),
    [
        (torch.optim.LBFGS, {}, ValueError, "LBFGS.step needs a closure"),
        (torch.nn.Linear, {}, TypeError, "subclass of torch.optim.Optimizer, got .*Linear"),
        (lambda params, lr: AdamW(params, lr), {}, TypeError, "subclass of torch.optim.Optimizer"),
        (AdamW, {"method": "lora"}, ValueError, "method must be one of"),
        (AdamW, {"interval": 0}, ValueError, "interval must be at least 1"),
        (AdamW, {"betas2": 0.9}, TypeError, "betas2"),
    ],
)
def test_wrong_arguments_raise_at_construction(optimizer_cls, settings, error, match):
    with pytest.raises(error, match=match):
        create_reflora_optimizer(tiny.lora(tiny.mlp()), optimizer_cls, lr=0.1, **settings)


def test_a_model_without_pairs_raises_at_construction():
    with pytest.raises(ValueError, match="has no adapter"):
        create_reflora_optimizer(tiny.mlp(), AdamW, lr=0.1)


def test_frozen_parameters_stay_out_and_arguments_arrive():
    model = tiny.lora(tiny.mlp())
    optimizer = create_reflora_optimizer(model, AdamW, lr=0.1, weight_decay=0.03, betas=(0.8, 0.9))
    [group] = optimizer.param_groups
    assert (group["lr"], group["weight_decay"], group["betas"]) == (0.1, 0.03, (0.8, 0.9))
    assert [id(p) for p in group["params"]] == [id(p) for p in model.parameters() if p.requires_grad]


@pytest.mark.parametrize(("method", "form"), METHODS)
@pytest.mark.parametrize("smoothness", [None, 5.0])
def test_follows_set_adapter(method, form, smoothness):
    """An optimizer over both adapters refactors the one that is active and leaves the other bit for bit."""
    model = tiny.lora(tiny.mlp())
    model.add_adapter("other", LoraConfig(r=2, target_modules=["0", "4"]))
    tiny.fill_B(model, seed=5)
    model.base_model.set_adapter(["default", "other"])
    optimizer = create_reflora_optimizer(model, SGD, lr=0.1, method=method, form=form, smoothness=smoothness)
    for active, idle in (("default", "other"), ("other", "default")):
        model.set_adapter(active)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        run(model, optimizer, 1)
        changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
        assert changed == {name for name in before if active in name}
        assert any(idle in name for name in before)


@pytest.mark.parametrize(("method", "form"), METHODS)
def test_an_adapter_that_is_frozen_after_its_backward_pass(method, form):
    """A loss of two adapters is computed with `set_adapter` between them; the optimizer's step changes both."""
    names, results = ("default", "other"), []
    for by_hand in (False, True):
        model = tiny.lora(tiny.mlp())
        model.add_adapter("other", LoraConfig(r=2, target_modules=["0", "2"]))
        tiny.fill_B(model, seed=5)
        model.base_model.set_adapter(list(names))
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        pairs = [pair for name in names for pair in tiny.linear_pairs(model, name)]
        settings = {"method": method, "form": form}
        optimizer = SGD(trained.values(), 0.1) if by_hand else create_reflora_optimizer(model, SGD, lr=0.1, **settings)
        for step in range(3):
            optimizer.zero_grad()
            for name in names:
                model.set_adapter(name)
                tiny.mlp_loss(model, step).backward()
            if by_hand and form == "precondition":
                tiny.precondition_by_hand(pairs, method)
            optimizer.step()
            if by_hand and form == "rescale":
                tiny.rescale_by_hand(pairs, lambda parameter: [])
        results.append({name: p.detach() for name, p in trained.items()})
    assert len(pairs) == 4
    tiny.assert_same(*results, **CLOSE)


@pytest.mark.parametrize(("method", "form"), METHODS)
@pytest.mark.parametrize("smoothness", [None, 5.0])
def test_pairs_that_are_not_the_optimizers_are_left_alone(method, form, smoothness):
    """After a switch to an adapter that the optimizer does not hold, its step changes nothing."""
    model = tiny.lora(tiny.mlp())
    model.add_adapter("other", LoraConfig(r=2, target_modules=["0"]))
    tiny.fill_B(model, seed=5)
    optimizer = create_reflora_optimizer(model, SGD, lr=0.1, method=method, form=form, smoothness=smoothness)
    model.set_adapter("other")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    run(model, optimizer, 1)
    tiny.assert_same({name: p.detach() for name, p in model.named_parameters()}, before)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(("method", "form"), METHODS)
def test_grad_scaler_skips_an_overflow_and_unscales_a_step(method, form, fused):
    model = tiny.lora(tiny.mlp(dtype=torch.float32))
    optimizer = create_reflora_optimizer(model, AdamW, lr=0.01, method=method, form=form, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=100)
    x = tiny.batch(0, torch.float32)[0]
    before = model(x)

    scaler.scale(tiny.mlp_loss(model, 0) * 1e38).backward()
    assert not all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**9
    torch.testing.assert_close(model(x), before, rtol=1e-5, atol=1e-6)

    def scaled_step():
        optimizer.zero_grad()
        scaler.scale(tiny.mlp_loss(model, 0)).backward()
        scaler.step(optimizer)
        scaler.update()

    twin = tiny.lora(tiny.mlp(dtype=torch.float32))
    twin.load_state_dict(model.state_dict())
    scaled_step()
    run(twin, create_reflora_optimizer(twin, AdamW, lr=0.01, method=method, form=form), 1)
    tiny.assert_same(tiny.trainable(model), tiny.trainable(twin), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rescaling_itself_leaves_the_model_and_balances_it(dtype):
    model = tiny.lora(tiny.mlp(dtype=dtype))
    x = tiny.batch(0, dtype)[0]
    before = model(x)
    run(model, create_reflora_optimizer(model, AdamW, lr=0.0, weight_decay=0.0, method="reflora_s"), 1)
    tolerance = 1e-6 if dtype == torch.float32 else 0.02
    torch.testing.assert_close(model(x), before, rtol=tolerance, atol=tolerance)
    for A, B, _ in tiny.linear_pairs(model):
        assert A.norm().item() == pytest.approx(B.norm().item(), rel=tolerance)


@pytest.mark.parametrize(("method", "form"), METHODS)
def test_first_steps_from_peft_initialization(method, form):
    """B = 0: the first gradient of A vanishes and S is I; training goes on from there and stays finite."""
    torch.manual_seed(1)
    model = tiny.lora(tiny.mlp())
    with torch.no_grad():
        for _, B, _ in tiny.linear_pairs(model):
            B.zero_()
    first = tiny.mlp_loss(model, 0).item()
    optimizer = create_reflora_optimizer(model, AdamW, lr=0.02, method=method, form=form)
    for _ in range(30):
        run(model, optimizer, 1)
    assert tiny.mlp_loss(model, 0).item() < 0.7 * first


def test_merge_and_save_are_unaffected(tmp_path):
    model = tiny.lora(tiny.mlp())
    run(model, create_reflora_optimizer(model, AdamW, lr=0.01, method="reflora_s"))
    x = tiny.batch(0)[0]
    expected = model(x)
    model.save_pretrained(tmp_path)
    assert torch.equal(PeftModel.from_pretrained(tiny.mlp(), tmp_path)(x), expected)
    torch.testing.assert_close(model.merge_and_unload()(x), expected)


def test_gradients_are_left_to_the_caller():
    """Only the hooks around step act: backward, clipping and zero_grad see ordinary gradients."""
    model, twin = tiny.lora(tiny.mlp()), tiny.lora(tiny.mlp())
    create_reflora_optimizer(model, AdamW, lr=0.01)
    for m in (model, twin):
        tiny.mlp_loss(m, 0).backward()
    tiny.assert_same(*({n: p.grad for n, p in m.named_parameters() if p.requires_grad} for m in (model, twin)))
