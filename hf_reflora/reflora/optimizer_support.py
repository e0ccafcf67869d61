"""What RefLoRA must know of optimizers: which of them it works with, and how their state follows a rescaling."""

import inspect
from collections.abc import Callable
from typing import NoReturn

import torch
from torch import Tensor
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


def _raise_steps_inside_backward(name: str) -> NoReturn:
    raise ValueError(
        f"RefLoRA changes gradients before the step, but {name} takes its step inside the backward pass (LOMO, "
        "AdaLOMO, layer-wise GaLore and APOLLO). Use optim=adamw_torch or another optimizer."
    )


def moments(
    optimizer: Optimizer, parameter: Tensor, split: Callable[[Tensor], tuple[Tensor, ...]], blocks: int
) -> list[list[tuple[Tensor, int]]]:
    """The moments (tensor, degree) that `optimizer` keeps for each block of `parameter`.

    Args:
        split: Makes the blocks of a tensor of the parameter's shape, for example `LoraPair.split_A`.
        blocks: Their number.
    """
    by_block: list[list[tuple[Tensor, int]]] = [[] for _ in range(blocks)]
    for name, value in optimizer.state.get(parameter, {}).items():
        degree = moment_degree(optimizer, name, value)
        if degree:
            for block_moments, block in zip(by_block, split(value), strict=True):
                block_moments.append((block, degree))
    return by_block


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
            f"{', '.join(MOMENT_DEGREES)}). Use AdamW or SGD, or form='precondition'."
        )
    return MOMENT_DEGREES.get(name, 0)
