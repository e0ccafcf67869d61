"""Gradients of frozen weights, also of quantized ones, from what goes into a layer and the gradient of its output.

For y = x Wᵀ and δ the gradient of the loss with respect to y, the gradient with respect to W is G = δᵀ x. Neither
needs `requires_grad` on W, so nothing of the model has to be made trainable.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers.modeling_layers import GradientCheckpointingLayer


class _AddGradient(torch.autograd.Function):
    """Passes a linear layer's output on unchanged and, in the backward pass, calls `add` with δ and x.

    x is saved by autograd and not by a closure, so that gradient checkpointing drops and recomputes it.
    """

    @staticmethod
    def forward(ctx, anchor: Tensor, x: Tensor, output: Tensor, add: Callable[[Tensor, Tensor], None]) -> Tensor:
        ctx.save_for_backward(x)
        ctx.add = add
        # A copy: some models change their layers' outputs in place, which autograd forbids where the output is also
        # the function's input.
        return output.clone()

    @staticmethod
    def backward(ctx, delta: Tensor):
        (x,) = ctx.saved_tensors
        ctx.add(delta, x)
        # The 0 is the anchor's gradient, which sets off its hook; its value does not matter.
        return delta.new_zeros((), dtype=torch.float32), None, delta, None


class GradientSums(dict[str, Tensor]):
    """Sums of gradients (out, in) by layer name: see `weight_gradients`.

    While `counting` is False, backward passes add nothing to them.
    """

    def __init__(self, complete: Callable[[str, Tensor], None] | None = None):
        super().__init__()
        self.counting = True
        self._complete = complete
        self._open_uses: dict[str, int] = {}  # forward passes through a layer whose backward pass is still to come
        self._handles: list[RemovableHandle] = []

    def watch(self, name: str, layer: nn.Module) -> None:
        self._open_uses[name] = 0
        # With everything frozen autograd would record nothing. This leaf requires a gradient and enters each watched
        # layer's output, so that the graph begins at the first of these layers.
        anchor = torch.zeros((), device=next(layer.parameters()).device, requires_grad=True)

        def hook(layer, args, output):
            # Gradient checkpointing runs the forward pass again inside the backward pass: that is no further use.
            if torch._C._current_graph_task_id() == -1:
                self._open_uses[name] += 1
            return _AddGradient.apply(anchor, args[0], output, partial(self._add, name))

        self._handles.append(layer.register_forward_hook(hook))
        if self._complete is not None:
            # Autograd accumulates into a leaf once, after all its uses in the graph, which is right also for a layer
            # that is used several times. But with reentrant checkpointing each checkpoint is a graph of its own, and
            # this is called once for each: only the last call finds no open use.
            anchor.register_post_accumulate_grad_hook(lambda _: self._finish(name))

    def _add(
        self,
        name: str,
        delta: Tensor,  # (..., out)
        x: Tensor,  # (..., in)
    ) -> None:
        self._open_uses[name] -= 1
        if not self.counting:
            return
        # In bfloat16 a sum over many tokens soon stops growing: the next addend is below its rounding error.
        dtype = torch.promote_types(delta.dtype, torch.float32)
        delta, x = delta.flatten(0, -2).to(dtype), x.flatten(0, -2).to(dtype)
        # G = δᵀ x, where the rows are the tokens
        if name not in self:
            self[name] = delta.T @ x
        else:
            self[name].addmm_(delta.T, x)

    def _finish(self, name: str) -> None:
        if self._complete is not None and self._open_uses[name] == 0:
            self._complete(name, self.pop(name))

    def unwatch(self) -> None:
        for handle in self._handles:
            handle.remove()


@contextmanager
def weight_gradients(
    layers: dict[str, nn.Module], complete: Callable[[str, Tensor], None] | None = None
) -> Iterator[GradientSums]:
    """Within it, backward passes sum the gradients of the layers' weights W (out, in), which need no `requires_grad`.

    Args:
        layers: Linear layers by name, which take x (..., in) to y (..., out).
        complete: If given, it is called with a layer's name and gradient inside the backward pass, as soon as that
            gradient is complete, and the gradient is freed afterwards, so that one is in memory at a time. Only for a
            single backward pass: another one would add to a gradient that has been used already.

    Yields:
        The sums by name, (out, in), in float32, or in float64 if the layer's output is. A layer that no gradient
        reaches is absent.
    """
    sums = GradientSums(complete)
    try:
        for name, layer in layers.items():
            sums.watch(name, layer)
        yield sums
    finally:
        sums.unwatch()


@contextmanager
def preserve_random_states(cuda_devices: Sequence[int] = ()) -> Iterator[None]:
    """Restores the random states of PyTorch (CPU and the given CUDA devices), Python and NumPy at the end."""
    random_state, numpy_state = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=cuda_devices):
            yield
    finally:
        random.setstate(random_state)
        np.random.set_state(numpy_state)


@contextmanager
def replaced_forwards(
    layers: Sequence[nn.Module], replacement: Callable[[nn.Module, Callable], Callable]
) -> Iterator[None]:
    """Within it, each layer's `forward` is what `replacement` makes of the layer and that `forward`."""
    forwards = [(layer, layer.__dict__.get("forward")) for layer in layers]
    try:
        for layer in layers:
            layer.forward = replacement(layer, layer.forward)
        yield
    finally:
        for layer, forward in forwards:
            if forward is None:
                layer.__dict__.pop("forward", None)
            else:  # an attribute of the instance, as accelerate's hooks make it for a device map
                layer.forward = forward


@contextmanager
def frozen(model: nn.Module, checkpointing: bool = True) -> Iterator[None]:
    """Within it the model is frozen and in evaluation mode (no dropout).

    At the end, also after an error, random states, `requires_grad`, training modes and `use_cache` are restored.

    Args:
        model: Any model.
        checkpointing: Layers whose gradient checkpointing is on are checkpointed here, too. If False, none is.
    """
    requires_grad = [(p, p.requires_grad) for p in model.parameters()]
    training = [(m, m.training) for m in model.modules()]
    checkpointed = [
        m
        for m in model.modules()
        if checkpointing and isinstance(m, GradientCheckpointingLayer) and m.gradient_checkpointing
    ]
    configs = [m.config for m in model.modules() if hasattr(getattr(m, "config", None), "use_cache")]
    use_cache = [(config, config.use_cache) for config in configs]
    devices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    try:
        with preserve_random_states(devices), torch.enable_grad(), replaced_forwards(checkpointed, _checkpointing):
            model.eval()
            for module in model.modules():
                # In evaluation mode bitsandbytes repacks 4-bit weights on some CPUs for a product that has no backward
                # pass. By the class's name, so that bitsandbytes need not be installed.
                if any(cls.__name__ == "Linear4bit" for cls in type(module).__mro__):
                    module.train()
            for parameter, _ in requires_grad:
                parameter.requires_grad_(False)
            for config in configs:
                config.use_cache = False  # a checkpointed layer, which runs twice, would fill the cache twice
            yield
    finally:
        for config, value in use_cache:
            config.use_cache = value
        for parameter, value in requires_grad:
            parameter.requires_grad_(value)
        for module, value in training:
            module.training = value


def _checkpointing(layer: GradientCheckpointingLayer, forward: Callable) -> Callable:
    """The layer's forward under checkpointing: transformers checkpoints in training mode only, thus with dropout."""
    # Keyword arguments are bound first: reentrant checkpointing takes positional ones only.
    return lambda *args, **kwargs: layer._gradient_checkpointing_func(partial(forward, **kwargs), *args)
