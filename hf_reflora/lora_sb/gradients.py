"""Gradients of frozen weights, also quantized ones, from activations and output gradients: G = δᵀ x."""

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer


class _AddGradient(torch.autograd.Function):
    """Hands a linear layer's output through and, in the backward pass, adds δᵀ x to a sum.

    x is an autograd-saved tensor, so gradient checkpointing drops and recomputes it like any other.
    """

    @staticmethod
    def forward(ctx, anchor: Tensor, x: Tensor, output: Tensor, add: Callable[[Tensor, Tensor], None]) -> Tensor:
        ctx.save_for_backward(x)
        ctx.add = add
        return output.clone()  # models may change their layers' outputs in place

    @staticmethod
    def backward(ctx, delta: Tensor):
        (x,) = ctx.saved_tensors
        ctx.add(delta, x)
        return delta.new_zeros((), dtype=torch.float32), None, delta, None


class GradientSums(dict[str, Tensor]):
    """See `weight_gradients`."""

    counting = True


@contextmanager
def weight_gradients(
    modules: dict[str, nn.Module], complete: Callable[[str, Tensor], None] | None = None
) -> Iterator[GradientSums]:
    """Within it, backward passes sum the gradients of the modules' weights W (out, in), which need no `requires_grad`.

    Args:
        modules: Linear layers by name: x of shape (..., in) to y of shape (..., out).
        complete: If given, called with name and gradient inside the backward pass, as soon as the layer's gradient is
            whole; it is freed then, so that one gradient is alive at a time. For a single backward pass.

    Yields:
        The sums by name, (out, in), in float32 (float64 for float64 outputs). A layer no gradient reaches is absent.
        While its `counting` is False, backward passes add nothing.
    """
    sums = GradientSums()
    uses: dict[str, int] = dict.fromkeys(modules, 0)
    handles = []

    def add(name: str, delta: Tensor, x: Tensor) -> None:
        uses[name] -= 1
        if not sums.counting:
            return
        dtype = torch.promote_types(delta.dtype, torch.float32)
        delta, x = delta.flatten(0, -2).to(dtype), x.flatten(0, -2).to(dtype)
        if name not in sums:
            sums[name] = delta.T @ x
        else:
            sums[name].addmm_(delta.T, x)  # G = δᵀ x

    def watch(name: str, module: nn.Module) -> None:
        # A leaf that requires gradients: the graph begins at the first layer watched, whatever is frozen.
        anchor = torch.zeros((), device=next(module.parameters()).device, requires_grad=True)

        def hook(module, args, output):
            if torch._C._current_graph_task_id() == -1:  # not the second time, of gradient checkpointing
                uses[name] += 1
            return _AddGradient.apply(anchor, args[0], output, partial(add, name))

        handles.append(module.register_forward_hook(hook))
        if complete is not None:
            # Autograd accumulates into a leaf once, after all uses of it in the graph: of a shared layer, too. But
            # with reentrant checkpointing each checkpoint is a graph.
            anchor.register_post_accumulate_grad_hook(lambda _: finish(name))

    def finish(name: str) -> None:
        if uses[name] == 0:
            complete(name, sums.pop(name))

    try:
        for name, module in modules.items():
            watch(name, module)
        yield sums
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def random_states_kept(cuda_devices: Sequence[int] = ()) -> Iterator[None]:
    """Restores the random states of PyTorch (on the CPU and these devices), Python and NumPy afterwards."""
    random_state, numpy_state = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=cuda_devices):
            yield
    finally:
        random.setstate(random_state)
        np.random.set_state(numpy_state)


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Within it the model is in evaluation mode (no dropout) and frozen; gradient checkpointing goes on.

    Random states, `requires_grad`, training modes and the cache setting are as before afterwards.
    """
    requires_grad = [(p, p.requires_grad) for p in model.parameters()]
    training = [(m, m.training) for m in model.modules()]
    checkpointed = [
        m for m in model.modules() if isinstance(m, GradientCheckpointingLayer) and m.gradient_checkpointing
    ]
    forwards = [(layer, layer.__dict__.get("forward")) for layer in checkpointed]
    configs = [m.config for m in model.modules() if hasattr(getattr(m, "config", None), "use_cache")]
    use_cache = [(config, config.use_cache) for config in configs]
    devices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    try:
        with random_states_kept(devices), torch.enable_grad():
            model.eval()
            for module in model.modules():
                # In evaluation mode bitsandbytes repacks 4-bit weights on CPUs, for products without a backward pass.
                if any(cls.__name__ == "Linear4bit" for cls in type(module).__mro__):
                    module.train()
            for parameter, _ in requires_grad:
                parameter.requires_grad_(False)
            for config in configs:
                config.use_cache = False  # a checkpointed layer would fill the cache twice
            for layer in checkpointed:
                layer.forward = _checkpointing(layer)
            yield
    finally:
        for layer, forward in forwards:
            if forward is None:
                layer.__dict__.pop("forward", None)
            else:  # the layer's own, such as that of accelerate's hooks
                layer.forward = forward
        for config, value in use_cache:
            config.use_cache = value
        for parameter, value in requires_grad:
            parameter.requires_grad_(value)
        for module, value in training:
            module.training = value


def _checkpointing(layer: GradientCheckpointingLayer) -> Callable:
    # transformers checkpoints in training mode only, which would switch dropout on.
    forward = layer.forward
    return lambda *args, **kwargs: layer._gradient_checkpointing_func(partial(forward, **kwargs), *args)
