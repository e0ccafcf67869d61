"""RefLoRA's settings: the one place where they are declared, explained and checked."""

import inspect
from collections.abc import Callable
from dataclasses import Field, dataclass, field, fields
from typing import Any, TypeVar

import torch


METHODS = ("reflora", "reflora_s")
FORMS = ("precondition", "rescale")
DTYPES = {"float32": torch.float32, "float64": torch.float64}

F = TypeVar("F", bound=Callable)


@dataclass(frozen=True)
class RefLora:
    """The settings of RefLoRA (https://huggingface.co/papers/2505.18877).

    Related methods, which are not part of this package, are BaLoRA (https://huggingface.co/papers/2605.31484), which
    projects LoRA's factors onto balanced pairs, and PoLoRA (https://huggingface.co/papers/2607.17620), an optimizer
    for LoRA's factors.

    `RefLoraCallback` and `create_reflora_optimizer` take every field as an argument of the same name, recipes as an
    option `--reflora_…`.

    Args:
        method: "reflora" (Theorem 3) or "reflora_s" (Theorem 5, S = s I).
        form: "precondition" multiplies the gradients before the optimizer's step and leaves the factors as they are;
            "rescale" balances the factors after the step and moves the optimizer's moments along, for "reflora_s"
            only. Default: "precondition" for "reflora", "rescale" for "reflora_s" (as the authors' code does). See
            `hf_reflora.reflora.precondition.rescale_` for how they differ.
        eps: Shrinkage ε in (0, 1] of the Gram matrices; 1 turns "reflora" into "reflora_s". Default: the smallest safe
            one, max(1e-5, 4 r 2⁻²⁴) in float32 and 1e-12 in float64. Not used by "reflora_s".
        dtype: "float32" (default) or "float64", the least dtype of the Gram matrices.
        warmup_steps: Number of first optimizer steps that are left plain. Default 0; the paper uses 100 or 200. The
            demo leaves a tenth of its steps plain, because S changes most while B grows from 0.
        interval: Refactor only at every interval-th step. Default 1. With "precondition" and Adam the plain steps
            between share the same moments, which mixes two kinds of gradients: prefer 1.
        smoothness: L, the smoothness constant of the loss with respect to the weight, for the small-step branch of
            Theorems 3 and 5 (η is the optimizer's current learning rate; a step with η = 0 has no such branch).
            Default: no such branch.
        diagnostics: Whether `RefLoraCallback.metrics` computes what a Trainer logs as "reflora/…" (balance, condition
            numbers, norms). Default: yes. That costs about as much as a refactoring, at steps that are logged; the
            others compute none of it. `create_reflora_optimizer` logs nothing, with or without.

    Raises:
        ValueError: at construction, for a value out of range.
    """

    method: str = field(default="reflora", metadata={"help": "'reflora' (Theorem 3) or 'reflora_s' (Theorem 5)."})
    form: str | None = field(
        default=None,
        metadata={
            "help": "How S acts: 'precondition' the gradients (Theorems 3 and 5), or 'rescale' the factors and the "
            "optimizer's moments (RefLoRA-S only, the authors' code). Default: precondition for reflora, rescale for "
            "reflora_s."
        },
    )
    eps: float | None = field(
        default=None,
        metadata={
            "help": "Shrinkage ε in (0, 1] of P = AAᵀ and Q = BᵀB towards multiples of I; 1 is RefLoRA-S. Default: "
            "the smallest safe one, max(1e-5, 4r·2⁻²⁴) in float32, 1e-12 in float64."
        },
    )
    dtype: str = field(
        default="float32", metadata={"help": "Least dtype of P, Q and S: float32 or float64 (Theorem 6 to rounding)."}
    )
    warmup_steps: int = field(
        default=0,
        metadata={"help": "First optimizer steps without refactoring. The paper uses 100 (GLUE, LLaMA2/3) or 200."},
    )
    interval: int = field(default=1, metadata={"help": "Refactor at every interval-th optimizer step (the paper: 1)."})
    smoothness: float | None = field(
        default=None,
        metadata={
            "help": "L, smoothness constant of the loss in W: below the learning rate η = 1/(2L‖BA‖_*) S is scaled as "
            "Theorems 3 and 5 say. Default: not used."
        },
    )
    diagnostics: bool = field(
        default=True,
        metadata={"help": "Log reflora/… (balance, condition numbers, norms) whenever the Trainer logs."},
    )

    def __post_init__(self):
        if self.method not in METHODS:
            raise ValueError(f"RefLoRA: method must be one of {METHODS}, got {self.method!r}.")
        if self.form is not None and self.form not in FORMS:
            raise ValueError(f"RefLoRA: form must be one of {FORMS} or None, got {self.form!r}.")
        if self.form == "rescale" and self.method == "reflora":
            raise ValueError(
                "RefLoRA: form='rescale' needs method='reflora_s': a full S would mix entries of Adam's second "
                "moment. Use form='precondition'."
            )
        # Written so that NaN fails every comparison and is refused.
        if self.eps is not None and not 0 < self.eps <= 1:
            raise ValueError(f"RefLoRA: eps must lie in (0, 1], got {self.eps}.")
        if self.dtype not in DTYPES:
            raise ValueError(f"RefLoRA: dtype must be one of {tuple(DTYPES)}, got {self.dtype!r}.")
        if self.warmup_steps < 0:
            raise ValueError(f"RefLoRA: warmup_steps must be at least 0, got {self.warmup_steps}.")
        if self.interval < 1:
            raise ValueError(f"RefLoRA: interval must be at least 1, got {self.interval}.")
        if self.smoothness is not None and not self.smoothness > 0:
            raise ValueError(f"RefLoRA: smoothness must be positive, got {self.smoothness}.")

    @property
    def rescales(self) -> bool:
        """Whether a step rescales the factors after the optimizer; otherwise it preconditions gradients before it."""
        return self.method == "reflora_s" and self.form != "precondition"

    def due(self, step: int) -> bool:
        """Whether optimizer step number `step`, counted from 0, is refactored."""
        return step >= self.warmup_steps and (step - self.warmup_steps) % self.interval == 0

    @property
    def torch_dtype(self) -> torch.dtype:
        """`dtype` as torch's."""
        return DTYPES[self.dtype]


def optional_settings() -> list[Field]:
    """The fields of `RefLora` beside `method`."""
    return [setting for setting in fields(RefLora) if setting.name != "method"]


def shows_settings(function: F) -> F:
    """Shows all settings in the signature of a function that hands them to `RefLora`: in help() and in editors.

    They take the place of `**settings`. `**kwargs`, which takes more than settings, stays behind them.
    """
    signature = inspect.signature(function)
    parameters = {name: parameter for name, parameter in signature.parameters.items() if name != "settings"}
    more = [parameters.pop(name) for name in ("kwargs",) if name in parameters]
    shown = [
        inspect.Parameter(s.name, inspect.Parameter.KEYWORD_ONLY, default=s.default, annotation=s.type)
        for s in optional_settings()
    ]
    wrapped: Any = function  # a type checker does not know the attribute
    wrapped.__signature__ = signature.replace(parameters=[*parameters.values(), *shown, *more])
    return function
