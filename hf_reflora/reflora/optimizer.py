"""RefLoRA in a plain PyTorch loop: an ordinary optimizer with RefLoRA around its step."""

from typing import Any

from torch import nn
from torch.optim import Optimizer

from .factors import lora_layers, require_pairs
from .optimizer_support import check_optimizer, check_rescaling
from .settings import RefLora, optional_settings, shows_settings
from .step import choose_loop_step
from .step_plain import PlainStep


# Counts the optimizer's steps in its first parameter group, so that state_dict carries the count through a resume.
STEP_KEY = "reflora_step"


@shows_settings
def create_reflora_optimizer(
    model: nn.Module, optimizer_cls: type[Optimizer], *, lr: float, method: str = "reflora", **kwargs: Any
) -> Optimizer:
    """Creates an optimizer that refactors LoRA factors at each step (RefLoRA).

    RefLoRA: Refactored Low-Rank Adaptation for Efficient Fine-Tuning of Large Models:
    https://huggingface.co/papers/2505.18877

    The result is an `optimizer_cls` in every respect. Hooks around its `step` precondition the gradients of the LoRA
    pairs (Theorem 3) or rescale the pairs (Theorem 5). Other trainable parameters are updated as usual. The number of
    steps so far, which `warmup_steps` and `interval` count, is part of its `state_dict`. Clip gradients before `step`,
    as usual, and with a GradScaler call `scaler.step(optimizer)`. torch copies no hooks, so what `copy.deepcopy` and
    pickle make of the result is a plain `optimizer_cls`.

    With a Hugging Face Trainer use `RefLoraCallback`, which also follows the Trainer's step count and works under
    DeepSpeed. With FSDP2 create the optimizer after `fully_shard`, or let accelerate prepare both.

    Args:
        model: A PEFT model with trainable LoRA adapters. Its pairs are looked up at each step: adapters may switch.
        optimizer_cls: The optimizer, for example `torch.optim.AdamW`.
        lr: Learning rate of the optimizer.
        method: `"reflora"` or `"reflora_s"`.
        kwargs: The other settings of `hf_reflora.RefLora` by name (`form`, `eps`, `dtype`, `warmup_steps`, `interval`,
            `smoothness`), and further arguments of `optimizer_cls`, for example `weight_decay`. `eps` is RefLoRA's
            shrinkage ε; the optimizer's own `eps` is set in its `param_groups`.

    Returns:
        An instance of `optimizer_cls` over the trainable parameters of `model`.

    Raises:
        TypeError: `optimizer_cls` is not an optimizer class.
        ValueError: a value out of range, no trainable LoRA pair, or an optimizer whose step needs a closure or is
            taken inside the backward pass; at the first step, if the optimizer does not hold the model's factors
            (sharded after it was made, DeepSpeed).

    Example:
        >>> optimizer = create_reflora_optimizer(peft_model, torch.optim.AdamW, lr=2e-4)
        >>> loss.backward()
        >>> optimizer.step()
    """
    if not (isinstance(optimizer_cls, type) and issubclass(optimizer_cls, Optimizer)):
        raise TypeError(f"optimizer_cls must be a subclass of torch.optim.Optimizer, got {optimizer_cls!r}.")
    names = [setting.name for setting in optional_settings()]
    settings = RefLora(method, **{name: kwargs.pop(name) for name in names if name in kwargs})
    check_optimizer(optimizer_cls)
    if settings.rescales:
        check_rescaling(optimizer_cls, {"lr": lr, **kwargs}, next(model.parameters()).device)
    require_pairs(model)
    layers = lora_layers(model)
    # One parameter group, as PEFT's factories have it; the hooks do not depend on how groups are made.
    optimizer = optimizer_cls([p for p in model.parameters() if p.requires_grad], lr=lr, **kwargs)
    optimizer.param_groups[0][STEP_KEY] = 0
    chosen: list[PlainStep] = []

    def reflora_step() -> PlainStep:
        if not chosen:  # at the first step, because accelerate may shard the model after the optimizer was made
            chosen.append(choose_loop_step(settings, layers))
        return chosen[0]

    def before_step(optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
        # args[0] is the optimizer itself: torch hands the hook the arguments of the unbound step.
        if any(value is not None for value in (*args[1:], kwargs.get("closure"))):
            raise ValueError(
                "An optimizer of create_reflora_optimizer takes no closure: it would compute the gradients again "
                "after they were preconditioned. Call loss.backward() first and then optimizer.step()."
            )
        reflora_step().before_optimizer(optimizer.param_groups[0][STEP_KEY], optimizer)

    def after_step(optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
        reflora_step().after_optimizer(optimizer.param_groups[0][STEP_KEY], optimizer)
        optimizer.param_groups[0][STEP_KEY] += 1

    optimizer.register_step_pre_hook(before_step)
    optimizer.register_step_post_hook(after_step)
    return optimizer
