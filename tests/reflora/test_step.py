"""Settings of a step and their errors, when a step is due, and the moments of optimizers."""

import pytest
import tiny
import torch

from hf_reflora import RefLora, create_reflora_optimizer
from hf_reflora.reflora.factors import require_pairs
from hf_reflora.reflora.optimizer_support import check_optimizer, check_rescaling, moments
from hf_reflora.reflora.step_plain import PlainStep


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"method": "lora"}, r"method must be one of \('reflora', 'reflora_s'\), got 'lora'"),
        ({"form": "refactor"}, "form must be one of .* or None, got 'refactor'"),
        ({"form": "rescale"}, "form='rescale' needs method='reflora_s'"),
        ({"eps": 0.0}, r"eps must lie in \(0, 1\], got 0.0"),
        ({"eps": 1.1}, "eps must lie"),
        ({"eps": float("nan")}, "eps must lie"),
        ({"dtype": "bfloat16"}, "dtype must be one of .*'float32', 'float64'.*, got 'bfloat16'"),
        ({"warmup_steps": -1}, "warmup_steps must be at least 0, got -1"),
        ({"interval": 0}, "interval must be at least 1, got 0"),
        ({"smoothness": 0.0}, "smoothness must be positive, got 0.0"),
        ({"smoothness": float("nan")}, "smoothness must be positive"),
    ],
)
def test_wrong_settings_raise(settings, match):
    with pytest.raises(ValueError, match=match):
        RefLora(**settings)


@pytest.mark.parametrize(
    ("method", "form", "rescales"),
    [
        ("reflora", None, False),
        ("reflora", "precondition", False),
        ("reflora_s", None, True),
        ("reflora_s", "rescale", True),
        ("reflora_s", "precondition", False),
    ],
)
def test_form_by_method(method, form, rescales):
    assert RefLora(method, form).rescales is rescales


@pytest.mark.parametrize(
    ("warmup", "interval", "due"), [(0, 1, range(8)), (3, 1, range(3, 8)), (0, 3, [0, 3, 6]), (2, 3, [2, 5])]
)
def test_steps_that_are_due(warmup, interval, due):
    reflora = RefLora(warmup_steps=warmup, interval=interval)
    assert [step for step in range(8) if reflora.due(step)] == list(due)


STATEFUL = {
    "SGD": (torch.optim.SGD, {"momentum": 0.9}),
    "Adam amsgrad": (torch.optim.Adam, {"amsgrad": True, "eps": 1e-30}),
    "AdamW": (torch.optim.AdamW, {"eps": 1e-30}),
    "NAdam": (torch.optim.NAdam, {"eps": 1e-30}),
    "RAdam": (torch.optim.RAdam, {"eps": 1e-30}),
    "Adagrad": (torch.optim.Adagrad, {"eps": 1e-30}),
    "RMSprop": (torch.optim.RMSprop, {"eps": 1e-30}),
    "RMSprop centered momentum": (torch.optim.RMSprop, {"eps": 1e-30, "centered": True, "momentum": 0.9}),
    "Muon": (torch.optim.Muon, {"eps": 1e-30}),
}


def state_of(optimizer, parameter) -> dict[str, torch.Tensor]:
    state = optimizer.state[parameter].items()
    return {name: value.clone() for name, value in state if torch.is_tensor(value) and value.numel() > 1}


@pytest.mark.parametrize("name", STATEFUL)
def test_rescaling_moves_moments_as_the_gradient_enters_them(name):
    """Degree k of each state, measured on the optimizer: gradients of twice the size make it 2ᵏ times as large."""
    optimizer_cls, kwargs = STATEFUL[name]
    torch.manual_seed(0)
    grads, start, states = torch.randn(3, 4, 5, dtype=torch.float64), torch.randn(4, 5, dtype=torch.float64), []
    for scale in (1, 2):
        parameter = torch.nn.Parameter(start.clone())
        optimizer = optimizer_cls([parameter], lr=1e-3, **kwargs)
        for grad in grads:
            parameter.grad = scale * grad
            optimizer.step()
        states.append(state_of(optimizer, parameter))
    degrees = {key: (states[1][key] / value).log2().mean().round() for key, value in states[0].items()}
    assert degrees

    model = tiny.lora(tiny.mlp())
    optimizer = optimizer_cls([p for p in model.parameters() if p.requires_grad], lr=1e-3, **kwargs)
    for step in range(3):
        optimizer.zero_grad()
        tiny.mlp_loss(model, step).backward()
        optimizer.step()
    pairs = require_pairs(model)
    before = [(p, p.detach().clone(), state_of(optimizer, p)) for pair in pairs for p in (pair.A, pair.B)]
    PlainStep(RefLora("reflora_s"), {}).rescale(pairs, optimizer)
    for parameter, value, state in before:
        factor = parameter.norm() / value.norm()
        assert abs(factor.log2()) > 0.1
        for key, moment in state_of(optimizer, parameter).items():
            torch.testing.assert_close(moment, state[key] / factor ** degrees[key], msg=lambda m, k=key: f"{k}: {m}")


@pytest.mark.parametrize(
    "optimizer_cls", [torch.optim.Adadelta, torch.optim.Adamax, torch.optim.Rprop, torch.optim.ASGD]
)
def test_unknown_moments_are_refused_by_name(optimizer_cls):
    model = tiny.lora(tiny.mlp())
    optimizer = optimizer_cls([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    tiny.mlp_loss(model, 0).backward()
    optimizer.step()
    before = tiny.trainable(model)
    with pytest.raises(
        ValueError, match=rf"{optimizer_cls.__name__} keeps '\w+', which .* Use AdamW or SGD, or let .*form="
    ):
        PlainStep(RefLora("reflora_s"), {}).rescale(require_pairs(model), optimizer)
    tiny.assert_same(tiny.trainable(model), before)  # refused before anything is written
    PlainStep(RefLora("reflora_s", form="precondition"), {}).precondition(require_pairs(model), optimizer)


class Elsewhere(torch.optim.Optimizer):
    """Adam's first moment, in the parameter group: as GrokAdamW keeps its moments."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                moment = group.setdefault("moments", {}).setdefault(p, torch.zeros_like(p))
                p.add_(moment.lerp_(p.grad, 0.1), alpha=-group["lr"])


CPU = torch.device("cpu")


def test_moments_elsewhere_than_in_the_state_are_refused():
    with pytest.raises(ValueError, match=r"Elsewhere has none in its state: it may keep them elsewhere. Use AdamW"):
        check_rescaling(Elsewhere, {"lr": 0.1}, CPU)
    model = tiny.lora(tiny.mlp())
    with pytest.raises(ValueError, match="Elsewhere has none in its state"):
        create_reflora_optimizer(model, Elsewhere, lr=0.1, method="reflora_s")
    create_reflora_optimizer(model, Elsewhere, lr=0.1, method="reflora_s", form="precondition")


@pytest.mark.parametrize("name", STATEFUL)
def test_optimizers_whose_moments_are_known_pass(name):
    optimizer_cls, kwargs = STATEFUL[name]
    check_rescaling(optimizer_cls, {"lr": 1e-3, "unknown": 1, **kwargs}, CPU)


@pytest.mark.parametrize("name", ["SGD", "MySGD"])
def test_sgd_without_momentum_has_no_moments(name):
    cls = torch.optim.SGD if name == "SGD" else type(name, (torch.optim.SGD,), {})
    check_rescaling(cls, {"lr": 1e-3}, CPU)


@pytest.mark.parametrize("kind", ["OptimState8bit", "OptimState4bit"])
def test_quantized_moments_are_refused(kind):
    optim = pytest.importorskip("torchao.optim")

    cls = {"OptimState8bit": optim.AdamW8bit, "OptimState4bit": optim.AdamW4bit}[kind]
    parameter = torch.nn.Parameter(torch.zeros(64, 64))
    optimizer = cls([parameter], lr=1e-3)
    optimizer.state[parameter]["exp_avg"] = optimizer._new_buffer(parameter, True)
    with pytest.raises(ValueError, match=f"{cls.__name__} keeps 'exp_avg' as a {kind}, which is quantized. Use AdamW"):
        moments(optimizer, parameter)


@pytest.mark.parametrize("optimizer_cls", [torch.optim.AdamW, torch.optim.SGD, torch.optim.RMSprop, torch.optim.Muon])
def test_optimizers_with_an_optional_closure_pass(optimizer_cls):
    check_optimizer(optimizer_cls)


def test_optimizers_that_need_a_closure_are_refused():
    with pytest.raises(ValueError, match=r"LBFGS\.step needs a closure .* such as AdamW or SGD"):
        check_optimizer(torch.optim.LBFGS)


def test_scalar_eps_one_is_reflora_s():
    """The two methods meet at ε = 1, through the whole step."""
    grads = []
    for settings in (RefLora(eps=1.0), RefLora("reflora_s", form="precondition")):
        model = tiny.lora(tiny.mlp())
        tiny.mlp_loss(model, 0).backward()
        PlainStep(settings, {}).precondition(require_pairs(model), torch.optim.SGD(model.parameters()))
        grads.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    tiny.assert_same(*grads, rtol=1e-9, atol=1e-12)


def test_dtype_float64_is_used_for_float32_factors():
    """In float64 the result is the exact one rounded once; in float32 it is not."""
    errors = {}
    for dtype in ("float32", "float64"):
        model = tiny.lora(tiny.mlp(dtype=torch.float32))
        tiny.mlp_loss(model, 0).backward()
        [A, B, _], *_ = tiny.linear_pairs(model)
        exact = torch.linalg.solve(tiny.hand_S(A, B, "reflora", eps=1e-5), A.grad.double())
        step = PlainStep(RefLora(eps=1e-5, dtype=dtype), {})
        step.precondition(require_pairs(model), torch.optim.SGD(model.parameters()))
        errors[dtype] = ((A.grad - exact).norm() / exact.norm()).item()
    assert errors["float64"] < 5e-8 < errors["float32"] < 1e-4
