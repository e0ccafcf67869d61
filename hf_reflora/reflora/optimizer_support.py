"""What RefLoRA must know of optimizers: which of them it works with, and how their state follows a rescaling."""

import inspect
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer


# State that torch's optimizers keep for each entry of a parameter, by the degree in which the gradient enters it.
MOMENT_DEGREES = {
    "exp_avg": 1,
    "momentum_buffer": 1,
    "grad_avg": 1,
    "exp_avg_sq": 2,
    "max_exp_avg_sq": 2,
    "square_avg": 2,
    "sum": 2,
}

INSTEAD = (
    "Use AdamW or SGD, or let S act on the gradients: form='precondition', in a YAML file reflora_form: precondition."
)


def check_optimizer(optimizer_cls: type[Optimizer]) -> None:
    """Raises a ValueError if the optimizer's step would not use gradients that were changed before it."""
    # LOMO's `fused_backward` and the layer-wise optimizers of transformers step inside the backward pass.
    if hasattr(optimizer_cls, "fused_backward") or optimizer_cls.__name__ == "LayerWiseDummyOptimizer":
        _raise_steps_inside_backward(optimizer_cls.__name__)
    # torch's own optimizers have `closure=None`; LBFGS requires one.
    closure = inspect.signature(optimizer_cls.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise ValueError(
            f"RefLoRA changes gradients before the step, but {optimizer_cls.__name__}.step needs a closure that "
            "computes them again inside the step. Use an optimizer whose closure is optional, such as AdamW or SGD."
        )


def check_optim(optim: str) -> None:
    """`check_optimizer` for the name in `TrainingArguments.optim`, before there is an optimizer."""
    if optim in ("lomo", "adalomo") or optim.endswith("layerwise"):
        _raise_steps_inside_backward(f"optim={optim}")


def check_rescaling(optimizer_cls: type[Optimizer], arguments: dict[str, Any], device: torch.device) -> None:
    """Raises a ValueError if RefLoRA-S as rescaling could not move the state of such an optimizer.

    What an optimizer keeps is there after its first step only, and by then a recipe has evaluated the base model.
    Therefore another one takes a step here, on a tensor of its own.

    Args:
        optimizer_cls: The optimizer's class.
        arguments: Of its constructor; those that it does not take are left out.
        device: Of the model: some optimizers need a GPU.
    """
    # 4096 numbers, from which on the 8-bit and 4-bit optimizers quantize.
    parameter = torch.nn.Parameter(torch.zeros(64, 64, device=device))
    parameter.grad = torch.ones_like(parameter)
    taken = inspect.signature(optimizer_cls).parameters
    try:
        probe = optimizer_cls([parameter], **{name: value for name, value in arguments.items() if name in taken})
        probe.step()
    except Exception:  # it needs more than a tensor: the first step of the training will tell
        return
    found = moments(probe, parameter)
    # By the names of the class and its parents, so that SGD under another library's name counts.
    is_sgd = any(cls.__name__ == "SGD" for cls in optimizer_cls.__mro__)
    if not found and not (is_sgd and probe.defaults.get("momentum", 0) == 0):
        raise ValueError(
            f"RefLoRA-S as rescaling moves the optimizer's moments along with the factors, but "
            f"{optimizer_cls.__name__} has none in its state: it may keep them elsewhere. {INSTEAD}"
        )


def _raise_steps_inside_backward(name: str) -> NoReturn:
    raise ValueError(
        f"RefLoRA changes gradients before the step, but {name} takes its step inside the backward pass (LOMO, "
        "AdaLOMO, layer-wise GaLore and APOLLO). Use optim=adamw_torch or another optimizer."
    )


def moments(optimizer: Optimizer, parameter: Tensor) -> list[tuple[Tensor, int]]:
    """The moments (tensor, degree) that `optimizer` keeps for `parameter`.

    Raises:
        ValueError: for state of an unknown name or a quantized one.
    """
    state = optimizer.state.get(parameter, {})
    degrees = [moment_degree(optimizer, name, value) for name, value in state.items()]
    return [(value, degree) for value, degree in zip(state.values(), degrees, strict=True) if degree]


def moment_degree(optimizer: Optimizer, name: str, value: Tensor | None) -> int:
    """The degree in which gradients enter the state `name`; 0 for state that does not follow the factors' size.

    Raises:
        ValueError: for a tensor with an unknown name.
    """
    if value is None or (name == "momentum_buffer" and isinstance(optimizer, torch.optim.RMSprop)):
        return 0  # RMSprop's momentum is a sum of normalized steps, which do not depend on the gradient's size
    if name not in MOMENT_DEGREES and torch.is_tensor(value) and value.numel() > 1:
        raise ValueError(
            f"RefLoRA-S as rescaling moves the optimizer's state along with the factors, but "
            f"{type(optimizer).__name__} keeps {name!r}, which it does not know (known: "
            f"{', '.join(MOMENT_DEGREES)}). {INSTEAD}"
        )
    degree = MOMENT_DEGREES.get(name, 0)
    if degree and type(value) not in (Tensor, torch.nn.Parameter, DTensor):
        raise ValueError(
            f"RefLoRA-S as rescaling moves the optimizer's state along with the factors, but "
            f"{type(optimizer).__name__} keeps {name!r} as a {type(value).__name__}, which is quantized. {INSTEAD}"
        )
    return degree
