"""LoRA-SB's initialization: the first step of full fine-tuning, approximated in a subspace of rank r."""

import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from peft import PeftModel
from torch import Tensor
from tqdm.auto import tqdm

from ..distributed.parameters import has_sharded_parameters, reshard, write_parameter_
from .collective import pad_batches
from .first_step import FirstSteps
from .gradients import preserve_random_states
from .layer import LoraSbLayer
from .loss import LossFunction, Samples, mean_loss
from .subspace import UPDATES, balanced_factors, sb_factors
from .targets import AdapterLayer, adapter_layers


def initialize_lora_sb_weights(
    model: PeftModel,
    dataloader: Iterable[dict[str, Any]],
    *,
    eta: float,
    update: str = "sign",
    forward_fn: LossFunction | None = None,
    adapter_name: str = "default",
    start_at_base: bool = False,
    passes: int | None = None,
    show_progress_bar: bool = True,
) -> None:
    """Initializes an adapter with LoRA-SB (https://huggingface.co/papers/2411.19557, Equations 5 to 8).

    ΔW is what the optimizer's first step would be in full fine-tuning on these samples, and U S Vᵀ its best
    approximation of rank r. A LoRA-SB adapter gets B = U, R = diag(S)/s and A = Vᵀ. An ordinary LoRA adapter gets
    B = U √S/√s and A = √S Vᵀ/√s, which have full rank and are balanced, so that RefLoRA works from the first step.
    Both start at W0 + ΔW, as in the paper, and leave W0 untouched.

    The gradients are those of full fine-tuning (of the model without adapters), also where the weights are frozen or
    quantized. They are taken in evaluation mode, thus without dropout; the gradient checkpointing of
    `GradientCheckpointingLayer`s stays on. Random states are left as they were. For the memory it takes see `passes`.
    With several processes (DDP, FSDP2, DeepSpeed) each one brings its own batches, the gradients are summed before
    their sign is taken, and the factors are bit-identical on every process. If it raises, the adapter is unchanged.

    Args:
        model: A `PeftModel` with a `LoraSbConfig(init_weights="lora_sb")`, or with a `LoraConfig` that has
            `init_lora_weights=True` and no DoRA, on linear layers.
        dataloader: Batches as the model takes them, with labels. All of them are held in memory; a few dozen samples
            suffice.
        eta: η > 0, the learning rate of the optimizer's first step that has one above zero (with warm-up, the peak
            learning rate divided by the number of warm-up steps).
        update: `"sign"` for Adam and its relatives, ΔW = −η sign(G); `"gradient"` for SGD, ΔW = −η G. G is the
            gradient of the mean loss over all labels of all samples: a short batch or a short row counts by the number
            of its labels.
        forward_fn: From model and batch to the mean loss (a scalar) and the number of labels it is the mean of.
            Default: the model's own loss, over the labels other than -100, with TRL's fused LM head where the model
            has it.
        adapter_name: The adapter to initialize.
        start_at_base: Start exactly at W0 instead, in the same subspace: R = 0 in LoRA-SB, B = 0 in LoRA. (B = 0 is
            not balanced, so that RefLoRA's first step is then a plain one.)
        passes: Number of forward and backward passes over the samples. Each serves a part of the layers, whose float32
            sums of gradients (4 · out · in bytes a layer) are in memory together; 1 is fastest. Default: what is
            fastest within the memory that training a LoRA of the same rank takes, as the log says. That is one pass
            where the sums and the new factors take no more than its gradients and Adam's moments, 12 · r · (out + in)
            bytes a layer, and for a single batch in a single process, where each gradient is used and freed within
            the backward pass. Otherwise it is one pass block by block (decoder or encoder layers), with one block's
            sums in memory at a time; it computes activations twice, and a GPU may keep the blocks' inputs in the
            CPU's memory. Where neither is possible, because the model has no such blocks, or FSDP2 or ZeRO-3 shard
            it, or the blocks' inputs do not fit, it is several passes.
        show_progress_bar: Show one, on the main process.

    Raises:
        ValueError: for a wrong value, an adapter that cannot be initialized this way or is initialized already, no
            batches, or a layer whose gradient is missing or not finite.
        TypeError: if the model is not a PeftModel.

    Example:
        >>> model = get_peft_model(base_model, LoraSbConfig(r=64, target_modules="all-linear"))
        >>> initialize_lora_sb_weights(model, dataloader, eta=1e-6)
    """
    _check_arguments(model, eta, update, passes)
    layers = adapter_layers(model, adapter_name)
    _check_not_initialized(model, adapter_name)
    with preserve_random_states():  # a shuffling dataloader draws numbers
        batches = list(dataloader)
    processes = dist.get_world_size() if dist.is_initialized() else 1
    is_sharded = processes > 1 and has_sharded_parameters(model)
    weights = pad_batches(batches) if is_sharded else [1] * len(batches)
    if not batches and processes == 1:  # with several processes, another one may have batches
        raise ValueError("The dataloader has no batches. Give at least one sample.")
    progress = tqdm(
        desc="LoRA-SB initialization",
        disable=not show_progress_bar or (processes > 1 and dist.get_rank() != 0),
    )
    samples = Samples(model, batches, weights, forward_fn or mean_loss, is_sharded, progress)
    steps = FirstSteps(samples, layers, adapter_name, eta, update)
    # PEFT 0.18 lets the originals of modules_to_save be trained while the adapter is disabled: `compute` freezes them.
    with progress, model.disable_adapter():
        steps.compute(passes)
    reshard(model)  # FSDP2 would throw away what is written to a module that the last pass left unsharded
    for name, (U, S, V) in steps.results.items():
        _set_factors(layers[name], adapter_name, U, S, V, start_at_base)


def _check_arguments(model: PeftModel, eta: float, update: str, passes: int | None) -> None:
    if not isinstance(model, PeftModel):
        raise TypeError(f"model must be a PeftModel, made by get_peft_model, got {type(model).__name__}.")
    if not (math.isfinite(eta) and eta > 0):
        raise ValueError(f"eta must be a positive number, the first learning rate above zero, got {eta}.")
    if update not in UPDATES:
        raise ValueError(f"update must be one of {UPDATES}, got {update!r}.")
    if passes is not None and passes < 1:
        raise ValueError(f"passes must be at least 1, got {passes}.")


def _check_not_initialized(model: PeftModel, adapter_name: str) -> None:
    init_weights = getattr(model.peft_config[adapter_name], "init_weights", "lora_sb")  # LoraConfig has none
    if init_weights != "lora_sb":
        raise ValueError(
            f"The adapter {adapter_name!r} has init_weights={init_weights!r} and is initialized already. Make it with "
            'LoraSbConfig(init_weights="lora_sb").'
        )


@torch.no_grad()
def _set_factors(
    layer: AdapterLayer,
    adapter_name: str,
    U: Tensor,  # (out, r)
    S: Tensor,  # (r,)
    V: Tensor,  # (in, r)
    start_at_base: bool,
) -> None:
    s = layer.scaling[adapter_name]
    if isinstance(layer, LoraSbLayer):
        B, R, A = sb_factors(U, S, V, s)
        layer.set_factors(adapter_name, B, torch.zeros_like(R) if start_at_base else R, A)
    else:
        B, A = balanced_factors(U, S, V, s)
        write_parameter_(layer.lora_B[adapter_name].weight, torch.zeros_like(B) if start_at_base else B)
        write_parameter_(layer.lora_A[adapter_name].weight, A)
