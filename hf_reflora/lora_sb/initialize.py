"""LoRA-SB's initialization: the first step of full fine-tuning, approximated in a subspace of rank r."""

import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from accelerate.utils import send_to_device
from peft import PeftModel
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ..distributed.parameters import has_sharded_parameters, reshard, write_parameter_
from .collective import pad_batches, raise_on_every_process, share_factors
from .gradients import GradientSums, frozen, preserve_random_states, weight_gradients
from .layer import LoraSbLayer
from .passes import plan_passes
from .subspace import UPDATES, balanced_factors, first_update, sb_factors, truncated_svd
from .targets import AdapterLayer, adapter_layers


LossFunction = Callable[[nn.Module, dict[str, Any]], tuple[Tensor, Tensor | int]]


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
            sums of gradients (4 · out · in bytes a layer) are in memory together; 1 is fastest. Default: 1 for a
            single batch in a single process, where each gradient is used and freed within the backward pass; otherwise
            as many as keep the sums and the new factors within what training a LoRA of the same rank takes for its
            gradients and Adam's moments, 12 · r · (out + in) bytes a layer.
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
    # The sum over several batches or processes is complete only after the last backward pass.
    within_backward = len(batches) == 1 and processes == 1 and passes is None
    groups = [list(layers)] if within_backward else plan_passes(layers, adapter_name, passes)
    progress = tqdm(
        total=len(groups) * len(batches) + len(layers),
        desc="LoRA-SB initialization",
        disable=not show_progress_bar or (processes > 1 and dist.get_rank() != 0),
    )
    task = _Initialization(model, layers, adapter_name, eta, update, forward_fn or mean_loss, is_sharded, progress)
    # In this order: PEFT 0.18 lets the originals of modules_to_save be trained while the adapter is disabled.
    with progress, model.disable_adapter(), frozen(model):
        for group in groups:
            task.run_pass(group, batches, weights, within_backward)
    reshard(model)  # FSDP2 would throw away what is written to a module that the last pass left unsharded
    for name, (U, S, V) in task.results.items():
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


@dataclass
class _Initialization:
    """One initialization: what it works on, and the singular triplets it has computed so far."""

    model: PeftModel
    layers: dict[str, AdapterLayer]
    adapter_name: str
    eta: float
    update: str
    forward_fn: LossFunction
    is_sharded: bool
    progress: tqdm
    # U (out, r), S (r,), V (in, r) by layer. They are written into the adapter together, after the last pass.
    results: dict[str, tuple[Tensor, Tensor, Tensor]] = field(default_factory=dict)
    label_count: Tensor = field(init=False)  # (), of the pass that runs

    def __post_init__(self):
        self.processes = dist.get_world_size() if dist.is_initialized() else 1
        self.device = next(self.model.parameters()).device

    def run_pass(self, names: list[str], batches: list, weights: list[int], within_backward: bool) -> None:
        """Sums the gradients of these layers over all batches and computes their singular triplets.

        With `within_backward` a layer's triplets are computed inside the backward pass, as soon as its gradient is
        complete, which is then freed; for a single batch.
        """
        self.label_count = torch.zeros((), device=self.device)
        layers = {name: self.layers[name] for name in names}
        bases = {name: layer.get_base_layer() for name, layer in layers.items()}
        error = None
        with weight_gradients(bases, self.finish_layer if within_backward else None) as sums:
            try:
                self.accumulate(sums, batches, weights)
            except Exception as raised:
                # With a sharded model the other processes wait inside this very pass, where no message reaches them:
                # let the launcher end them. With DDP they arrive at the next collective call, which tells them.
                if self.processes == 1 or self.is_sharded:
                    raise
                error = raised
        if self.processes > 1:
            raise_on_every_process(error)
            shared = share_factors(layers, self.adapter_name, sums, self.label_count, self.singular_triplets)
            for name, triplets in shared:
                self.store(name, triplets)
        else:
            for name in names:
                if name not in self.results:
                    self.finish_layer(name, sums.pop(name, None))

    def accumulate(self, sums: GradientSums, batches: list, weights: list[int]) -> None:
        """Backward passes through all batches, each weighted by the number of its labels."""
        for batch, weight in zip(batches, weights, strict=True):
            loss, count = self.forward_fn(self.model, send_to_device(batch, self.device))
            self.label_count += weight * count
            sums.counting = bool(weight * count > 0)  # the mean loss of a batch without labels is NaN
            # With a sharded model every process makes the backward pass, whether its batch counts or not.
            if (sums.counting or self.is_sharded) and loss.requires_grad:
                (loss * count).backward()
            self.progress.update()

    def finish_layer(self, name: str, G: Tensor | None) -> None:
        self.store(name, self.singular_triplets(name, G))

    def singular_triplets(
        self,
        name: str,
        G: Tensor | None,  # (out, in), summed over the labels; it is overwritten
    ) -> tuple[Tensor, Tensor, Tensor]:
        """U (out, r), S (r,) and V (in, r) of the layer's first step ΔW (Equations 5 to 7)."""
        if G is None or not G.any():
            raise ValueError(
                f"No gradient reached {name} from these samples, so they define no subspace for it. Take more, "
                "leave the layer out (exclude_modules), or, with reentrant gradient checkpointing, call "
                "model.enable_input_require_grads() first."
            )
        if not torch.isfinite(G).all():
            raise ValueError(f"The gradient of {name} is not finite. Look at the data, or use bfloat16 for float16.")
        mean = G.div_(self.label_count.to(G))
        return truncated_svd(first_update(mean, self.eta, self.update), self.layers[name].r[self.adapter_name])

    def store(self, name: str, triplets: tuple[Tensor, Tensor, Tensor]) -> None:
        self.results[name] = triplets
        self.progress.update()


def mean_loss(model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, Tensor | int]:
    """The model's own loss on a batch, which is a mean, and the number of labels it is the mean of.

    Raises:
        ValueError: if the batch has no labels or the model returns no loss.
    """
    base = model.get_base_model()
    labels = inputs.get("shift_labels", inputs.get("labels")) if isinstance(inputs, Mapping) else None
    if labels is None:  # said here, because the model's own error would print the model
        there = f"has {', '.join(inputs)}" if isinstance(inputs, Mapping) else f"is a {type(inputs).__name__}"
        raise ValueError(
            f"The batch must be a dictionary with labels, from which {type(base).__name__} computes its loss, but it "
            f"{there}. Where the trainer computes the loss itself (RLOO, GRPO, DPO, rewards), give forward_fn, which "
            "returns the mean loss and the number of labels."
        )
    # TRL replaces `forward` by one whose fused LM head computes the same loss without the logits in memory. As it is
    # wrapped by functools.wraps, its signature looks like the old one's unless wrappers are not followed.
    has_fused_head = "fused_lm_head" in inspect.signature(base.forward, follow_wrapped=False).parameters
    output = model(**inputs, **({"fused_lm_head": True} if has_fused_head else {}))
    if getattr(output, "loss", None) is None:
        raise ValueError(
            f"{type(base).__name__} returned no loss for a batch of {', '.join(inputs)}. Give forward_fn, which "
            "returns the mean loss and the number of labels."
        )
    is_causal = LOSS_MAPPING.get(getattr(base, "loss_type", None)) is ForCausalLMLoss
    is_causal |= type(base).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()  # GPT-2 has no loss_type
    # Causal models shift the labels by one, so that the first of a row predicts nothing. `shift_labels` are shifted
    # already, and encoder-decoder models shift their decoder's inputs instead.
    if "shift_labels" not in inputs and (has_fused_head or (is_causal and not base.config.is_encoder_decoder)):
        labels = labels[..., 1:]
    return output.loss, labels.ne(-100).sum()


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
