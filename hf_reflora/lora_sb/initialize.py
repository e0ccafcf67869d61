"""LoRA-SB's initialization: the first step of full fine-tuning, approximated in a subspace of rank r."""

import inspect
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from accelerate.utils import send_to_device
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.pytorch_utils import Conv1D

from ..distributed.parameters import full_tensor, gather_parameters, has_sharded_parameters, reshard, write_parameter_
from .config import LoraSbConfig
from .gradients import frozen, random_states_kept, weight_gradients
from .layer import LoraSbLayer
from .subspace import UPDATES, balanced_factors, first_update, sb_factors, truncated_svd


def initialize_lora_sb_weights(
    model: PeftModel,
    dataloader: Iterable[dict[str, Any]],
    *,
    eta: float,
    update: str = "sign",
    forward_fn: Callable[[nn.Module, dict[str, Any]], tuple[Tensor, Tensor | int]] | None = None,
    adapter_name: str = "default",
    start_at_base: bool = False,
    passes: int | None = None,
    show_progress_bar: bool = True,
) -> None:
    """Initializes an adapter with LoRA-SB (https://huggingface.co/papers/2411.19557, Equations 5 to 8).

    ΔW is what the optimizer's first step would be in full fine-tuning on these samples, U S Vᵀ its best approximation
    of rank r. Of a LoRA-SB adapter B = U, R = diag(S)/s, A = Vᵀ; of an ordinary LoRA adapter B = U √S/√s and
    A = √S Vᵀ/√s, which is of full rank and balanced, so that RefLoRA works from the first step. Both start at W0 + ΔW,
    as in the paper, and leave W0 untouched.

    Gradients are those of full fine-tuning (of the model without adapters), also of frozen and quantized weights. They
    are taken without dropout, in evaluation mode; the checkpointing of `GradientCheckpointingLayer`s goes on. Random
    states are left as they were. Memory: see `passes`. With several processes (DDP, FSDP2, DeepSpeed) each brings its
    own batches, the gradients are summed before the sign, and the factors are the same to the bit on every process.

    Args:
        model: A `PeftModel` with a `LoraSbConfig(init_weights="lora_sb")`, or a `LoraConfig` with
            `init_lora_weights=True` and no DoRA, on linear layers.
        dataloader: Batches as the model takes them, with labels. They are kept in memory; some tens of samples do.
        eta: η > 0, the learning rate of the optimizer's first step with a learning rate above zero (with warm-up, the
            peak learning rate divided by the warm-up steps).
        update: `"sign"` for Adam and its kin, ΔW = −η sign(G); `"gradient"` for SGD, ΔW = −η G, with G the gradient of
            the mean loss over all the samples' labels: a short batch or a short row counts by its labels.
        forward_fn: From model and batch to the mean loss, and the number of labels it is the mean of. Default: the
            model's own loss, over the labels other than -100, with TRL's fused LM head where the model has it.
        adapter_name: The adapter to initialize.
        start_at_base: Start exactly at W0 instead: R = 0 in LoRA-SB, B = 0 in LoRA, in the same subspace. (B = 0 is
            not balanced: RefLoRA's first step is then a plain one.)
        passes: Forward and backward passes over the samples, each for a part of the layers whose float32 sums of
            gradients (4 · out · in bytes) are in memory together; 1 is fastest. Default: 1 for a single batch in a
            single process, where one layer's gradient is in memory at a time; otherwise so many that the sums and the
            new factors take no more than the gradients and Adam moments of a LoRA of the same rank would, which are
            12 · r · (out + in) bytes a layer: training that LoRA on these batches needs no less.
        show_progress_bar: On the main process.

    Raises:
        ValueError: for a wrong value, an adapter that cannot be initialized so, no batches, a gradient that is missing
            or not finite.
        TypeError: if the model is not a PeftModel.

    Example:
        >>> model = get_peft_model(base_model, LoraSbConfig(r=64, target_modules="all-linear"))
        >>> initialize_lora_sb_weights(model, dataloader, eta=1e-6)
    """
    if not isinstance(model, PeftModel):
        raise TypeError(f"model must be a PeftModel, made by get_peft_model, got {type(model).__name__}.")
    if not (math.isfinite(eta) and eta > 0):
        raise ValueError(f"eta must be a positive number, the first learning rate above zero, got {eta}.")
    if update not in UPDATES:
        raise ValueError(f"update must be one of {UPDATES}, got {update!r}.")
    if passes is not None and passes < 1:
        raise ValueError(f"passes must be at least 1, got {passes}.")
    layers = adapter_layers(model, adapter_name)
    init_weights = getattr(model.peft_config[adapter_name], "init_weights", "lora_sb")
    if init_weights != "lora_sb":
        raise ValueError(
            f"The adapter {adapter_name!r} has init_weights={init_weights!r} and is initialized already. Make it with "
            'LoraSbConfig(init_weights="lora_sb").'
        )
    with random_states_kept():
        batches = list(dataloader)
    processes = dist.get_world_size() if dist.is_initialized() else 1
    sharded = processes > 1 and has_sharded_parameters(model)
    weights = [1] * len(batches)
    if sharded:  # forward and backward passes are collective: every process makes as many
        _fill_up(batches, weights)
    if not batches and processes == 1:
        raise ValueError("The dataloader has no batches.")
    one_backward = len(batches) == 1 and processes == 1 and passes is None
    groups = [list(layers)] if one_backward else _split(layers, adapter_name, passes)
    progress = tqdm(
        total=len(groups) * len(batches) + len(layers),
        desc="LoRA-SB initialization",
        disable=not show_progress_bar or (processes > 1 and dist.get_rank() != 0),
    )

    def factors(name: str, G: Tensor | None, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if G is None or not G.any():
            raise ValueError(
                f"No gradient reached {name} from these samples, so they define no subspace for it. Take more, "
                "leave the layer out (exclude_modules), or, with reentrant gradient checkpointing, call "
                "model.enable_input_require_grads() first."
            )
        if not torch.isfinite(G).all():
            raise ValueError(f"The gradient of {name} is not finite. Look at the data, or use bfloat16 for float16.")
        return truncated_svd(first_update(G.div_(labels.to(G)), eta, update), layers[name].r[adapter_name])

    results: dict[str, tuple[Tensor, Tensor, Tensor]] = {}  # all or none are set

    def store(name: str, U: Tensor, S: Tensor, V: Tensor) -> None:
        results[name] = U, S, V
        progress.update()

    with progress, frozen(model), model.disable_adapter():
        device = next(model.parameters()).device
        for group in groups:
            bases = {name: layers[name].get_base_layer() for name in group}
            labels = torch.zeros((), device=device)
            waiting = set(group)

            def complete(name: str, G: Tensor) -> None:  # called within this turn of the loop
                waiting.remove(name)  # noqa: B023
                store(name, *factors(name, G, labels))  # noqa: B023

            error = None
            with weight_gradients(bases, complete if one_backward else None) as sums:
                try:
                    for batch, weight in zip(batches, weights, strict=True):
                        loss, count = (forward_fn or mean_loss)(model, send_to_device(batch, device))
                        labels += weight * count
                        sums.counting = bool(weight * count > 0)
                        if (sums.counting or sharded) and loss.requires_grad:
                            (loss * count).backward()
                        progress.update()
                except Exception as raised:
                    if processes == 1 or sharded:
                        raise  # sharded: the others wait in this pass, and the launcher ends them
                    error = raised
            if processes > 1:
                _raise_together(error)
                _share(bases, layers, adapter_name, sums, labels, factors, store)
            else:
                for name in sorted(waiting, key=group.index):
                    store(name, *factors(name, sums.pop(name, None), labels))
    reshard(model)
    for name, USV in results.items():
        _set_factors(layers[name], adapter_name, *USV, start_at_base)


def mean_loss(model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, Tensor | int]:
    """The model's own loss on a batch, a mean, and the number of labels it is the mean of."""
    base = model.get_base_model()
    # TRL's LM head, where it is: the same loss without the logits in memory. It hides behind functools.wraps.
    fused = "fused_lm_head" in inspect.signature(base.forward, follow_wrapped=False).parameters
    output = model(**inputs, **({"fused_lm_head": True} if fused else {}))
    labels = inputs.get("shift_labels", inputs.get("labels"))
    if labels is None or getattr(output, "loss", None) is None:
        raise ValueError(
            f"The batch must have labels and {type(base).__name__} must return a loss; the batch has "
            f"{', '.join(inputs)}. Give forward_fn, which returns the mean loss and the number of labels."
        )
    causal = LOSS_MAPPING.get(getattr(base, "loss_type", None)) is ForCausalLMLoss
    causal |= type(base).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()  # GPT-2 has no loss_type
    if "shift_labels" not in inputs and (fused or (causal and not base.config.is_encoder_decoder)):
        labels = labels[..., 1:]
    return output.loss, labels.ne(-100).sum()


def adapter_layers(model: PeftModel, adapter_name: str) -> dict[str, BaseTunerLayer]:
    """The layers of an adapter that LoRA-SB can initialize, by name; raises a ValueError if there is one it cannot."""
    if adapter_name not in model.peft_config:
        raise ValueError(f"There is no adapter {adapter_name!r}; the model has {', '.join(model.peft_config)}.")
    config = model.peft_config[adapter_name]
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, LoraSbLayer | LoraLayer) and adapter_name in module.r
    }
    if type(config) not in (LoraSbConfig, LoraConfig):
        raise ValueError(
            f"The adapter {adapter_name!r} is a {type(config).__name__}; LoRA-SB initializes LoraSbConfig, LoraConfig."
        )
    if isinstance(config, LoraConfig) and config.init_lora_weights is not True:
        raise ValueError(
            f"The adapter {adapter_name!r} has init_lora_weights={config.init_lora_weights!r}, another start. "
            "Make it with init_lora_weights=True."
        )
    for name, layer in layers.items():
        base = layer.get_base_layer()
        special = isinstance(layer, LoraLayer) and adapter_name in layer.lora_variant
        if special or not isinstance(base, nn.Linear | Conv1D):
            kind = "a LoRA variant such as DoRA" if special else f"on a {type(base).__name__}"
            raise ValueError(f"{name} is {kind}; LoRA-SB initializes plain adapters on linear layers. Leave it out.")
        if layer.r[adapter_name] > min(layer.in_features, layer.out_features):
            raise ValueError(
                f"{name} is {layer.out_features} x {layer.in_features} and has no subspace of rank "
                f"{layer.r[adapter_name]}. Give it a smaller rank by rank_pattern."
            )
        if layer.merged:
            raise ValueError(f"{name} is merged. Call unmerge_adapter() first.")
    return layers


def is_initialized(model: PeftModel, adapter_name: str) -> bool:
    """Whether the adapter has been initialized, loaded or trained: B of a LoRA is 0 before."""
    layers = adapter_layers(model, adapter_name).values()
    ordinary = [layer.lora_B[adapter_name].weight for layer in layers if isinstance(layer, LoraLayer)]
    with gather_parameters(ordinary):
        return any(bool(full_tensor(B).any()) for B in ordinary) or any(
            adapter_name in layer.initialized for layer in layers if isinstance(layer, LoraSbLayer)
        )


def _split(layers: dict[str, BaseTunerLayer], adapter_name: str, passes: int | None) -> list[list[str]]:
    """Layers in groups of similar size: see `passes` above."""
    groups: list[list[str]]
    sums = {name: 4 * layer.out_features * layer.in_features for name, layer in layers.items()}
    if passes is None:
        ranks = ((layer.r[adapter_name], layer) for layer in layers.values())
        budget = sum(8 * r * (layer.out_features + layer.in_features) for r, layer in ranks)
        groups, room = [], 0
        for name, size in sums.items():
            if size > room:
                groups.append([])
                room = max(budget, size)
            groups[-1].append(name)
            room -= size
        return groups
    passes = min(passes, len(layers))
    groups, before = [[]], 0
    for i, (name, size) in enumerate(sums.items()):
        full = before * passes >= sum(sums.values()) * len(groups)
        if groups[-1] and (full or len(sums) - i == passes - len(groups)):
            groups.append([])
        groups[-1].append(name)
        before += size
    return groups


def _share(bases, layers, adapter_name, sums, labels, factors, store) -> None:
    """Sums the gradients over the processes, spreads the SVDs over them, and gives every process all factors."""
    rank, processes = dist.get_rank(), dist.get_world_size()
    dist.all_reduce(labels)
    owners = {name: i % processes for i, name in enumerate(bases)}
    mine = {}
    for name, owner in owners.items():
        layer = layers[name]
        G = sums.pop(name, None)
        if G is None:
            G = torch.zeros(layer.out_features, layer.in_features, device=labels.device)
        G = G.float()  # of one dtype everywhere
        dist.reduce(G, dst=owner)
        if rank == owner:
            mine[name] = G
    error = None
    try:
        mine = {name: factors(name, mine.pop(name), labels) for name in list(mine)}
    except (ValueError, RuntimeError) as raised:  # of the SVD, too
        error = raised
    _raise_together(error)
    for name, owner in owners.items():
        layer, r = layers[name], layers[name].r[adapter_name]
        shapes = ((layer.out_features, r), (r,), (layer.in_features, r))
        USV = mine.pop(name) if rank == owner else (torch.empty(shape, device=labels.device) for shape in shapes)
        USV = [tensor.contiguous() for tensor in USV]
        for tensor in USV:
            dist.broadcast(tensor, src=owner)
        store(name, *USV)


def _fill_up(batches: list[Any], weights: list[int]) -> None:
    """Adds batches of weight 0 until every process has as many: its own first one, or one of another process."""
    counts: list[int] = [0] * dist.get_world_size()
    dist.all_gather_object(counts, len(batches))
    if max(counts) == 0:
        raise ValueError("The dataloader has no batches on any process.")
    lent = [batches[0] if batches else None]
    dist.broadcast_object_list(lent, src=counts.index(max(counts)))
    missing = max(counts) - len(batches)
    batches += [batches[0] if batches else lent[0]] * missing
    weights += [0] * missing


def _raise_together(error: Exception | None) -> None:
    """Raises what went wrong on this process or on another one, which would otherwise wait for ever."""
    errors: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(errors, None if error is None else str(error) or type(error).__name__)
    if error is not None:
        raise error
    for rank, message in enumerate(errors):
        if message is not None:
            raise ValueError(f"On process {rank}: {message}")


@torch.no_grad()
def _set_factors(layer: BaseTunerLayer, adapter_name: str, U: Tensor, S: Tensor, V: Tensor, at_base: bool) -> None:
    s = layer.scaling[adapter_name]
    if isinstance(layer, LoraSbLayer):
        B, R, A = sb_factors(U, S, V, s)
        layer.set_factors(adapter_name, B, torch.zeros_like(R) if at_base else R, A)
    else:
        B, A = balanced_factors(U, S, V, s)
        write_parameter_(layer.lora_B[adapter_name].weight, torch.zeros_like(B) if at_base else B)
        write_parameter_(layer.lora_A[adapter_name].weight, A)
