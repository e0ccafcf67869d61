"""RefLoRA in a plain PyTorch loop: an ordinary optimizer with RefLoRA around its step."""

from torch import nn
from torch.optim import Optimizer

from .factors import lora_layers, require_pairs, trainable_pairs
from .step import RefLora, check_optimizer


# Counts the optimizer's steps in its first parameter group, so that state_dict carries it through a resume.
STEP_KEY = "reflora_step"


def create_reflora_optimizer(
    model: nn.Module,
    optimizer_cls: type[Optimizer],
    *,
    lr: float,
    method: str = "reflora",
    form: str | None = None,
    eps: float | None = None,
    dtype: str = "float32",
    warmup_steps: int = 0,
    interval: int = 1,
    smoothness: float | None = None,
    **kwargs,
) -> Optimizer:
    """Creates an optimizer that refactors LoRA factors at each step (RefLoRA).

    RefLoRA: Refactored Low-Rank Adaptation for Efficient Fine-Tuning of Large Models:
    https://huggingface.co/papers/2505.18877

    The result is an `optimizer_cls` in every respect; hooks around its `step` precondition the gradients of the LoRA
    pairs (Theorem 3) or rescale the pairs (Theorem 5). Other trainable parameters are updated as usual. The count of
    steps, for `warmup_steps` and `interval`, is part of its `state_dict`. Clip gradients before `step`, as usual, and
    with a GradScaler call `scaler.step(optimizer)`.

    With a Hugging Face Trainer use `RefLoraCallback`, which also follows the Trainer's step count and works under
    DeepSpeed. With FSDP2 create the optimizer after `fully_shard`, or let accelerate prepare both.

    Args:
        model: A PEFT model with trainable LoRA adapters. Its pairs are looked up at each step: adapters may switch.
        optimizer_cls: The optimizer, for example `torch.optim.AdamW`.
        lr: Learning rate of the optimizer.
        method: `"reflora"` or `"reflora_s"`.
        form: `"precondition"` or `"rescale"`, see `hf_reflora.RefLora`; default by method.
        eps: Shrinkage ε, see `hf_reflora.RefLora`; default the smallest that is safe. Not the optimizer's `eps`, which
            is set in its `param_groups`.
        dtype: Least dtype of the Gram matrices, `"float32"` or `"float64"`.
        warmup_steps: First steps left plain.
        interval: Refactor at every interval-th step.
        smoothness: Smoothness constant L for the small-step branch; default none.
        kwargs: Further arguments of `optimizer_cls`, for example `weight_decay`.

    Returns:
        An instance of `optimizer_cls` over the trainable parameters of `model`.

    Raises:
        TypeError: `optimizer_cls` is not an optimizer class.
        ValueError: a value out of range, no trainable LoRA pair, or an optimizer whose step needs a closure or is
            taken inside the backward pass; at the first step, if the model's factors are not the optimizer's (sharded
            after it was made, DeepSpeed).

    Example:
        >>> optimizer = create_reflora_optimizer(peft_model, torch.optim.AdamW, lr=2e-4)
        >>> loss.backward()
        >>> optimizer.step()
    """
    if not (isinstance(optimizer_cls, type) and issubclass(optimizer_cls, Optimizer)):
        raise TypeError(f"optimizer_cls must be a subclass of torch.optim.Optimizer, got {optimizer_cls!r}.")
    reflora = RefLora(method, form, eps, dtype, warmup_steps, interval, smoothness)
    check_optimizer(optimizer_cls)
    require_pairs(model)
    layers = lora_layers(model)
    optimizer = optimizer_cls([p for p in model.parameters() if p.requires_grad], lr=lr, **kwargs)
    optimizer.param_groups[0][STEP_KEY] = 0

    def before_step(optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
        if any(value is not None for value in (*args[1:], kwargs.get("closure"))):
            raise ValueError(
                "An optimizer of create_reflora_optimizer takes no closure: it would compute the gradients anew after "
                "they were preconditioned. Call loss.backward() first and then optimizer.step()."
            )
        if not reflora.rescales and reflora.due(optimizer.param_groups[0][STEP_KEY]):
            reflora.before_optimizer(trainable_pairs(layers), optimizer)

    def after_step(optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
        group = optimizer.param_groups[0]
        if reflora.rescales and reflora.due(group[STEP_KEY]):
            reflora.after_optimizer(trainable_pairs(layers), optimizer)
        group[STEP_KEY] += 1

    optimizer.register_step_pre_hook(before_step)
    optimizer.register_step_post_hook(after_step)
    return optimizer
