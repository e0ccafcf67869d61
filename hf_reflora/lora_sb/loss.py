"""The loss whose gradient LoRA-SB's initialization takes, and the samples it is the mean over."""

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from accelerate.utils import send_to_device
from peft import PeftModel
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from tqdm.auto import tqdm
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from .gradients import GradientSums


# From model and batch to the mean loss, (), and the number of labels it is the mean of.
LossFunction = Callable[[nn.Module, dict[str, Any]], tuple[Tensor, Tensor | int]]


@dataclass
class Samples:
    """This process's samples, and what takes the gradient of their loss."""

    model: PeftModel
    batches: list[Any]
    weights: list[int]  # 0 for a batch that only keeps step with other processes, otherwise 1
    forward_fn: LossFunction
    is_sharded: bool  # FSDP2 or ZeRO-3: all processes must make the same forward and backward passes
    progress: tqdm

    def __post_init__(self):
        self.device = next(self.model.parameters()).device
        self.processes = dist.get_world_size() if dist.is_initialized() else 1
        self.label_count = torch.zeros((), device=self.device)  # of the last backward_each

    def backward_each(self, sums: GradientSums) -> Iterator[None]:
        """Makes a backward pass through each batch, weighted by the number of its labels, and yields after each."""
        self.label_count = torch.zeros((), device=self.device)
        for batch, weight in zip(self.batches, self.weights, strict=True):
            loss, count = self.forward_fn(self.model, send_to_device(batch, self.device))
            self.label_count += weight * count
            sums.counting = bool(weight * count > 0)  # the mean loss of a batch without labels is NaN
            # With a sharded model every process makes the backward pass, whether its batch counts or not.
            if (sums.counting or self.is_sharded) and loss.requires_grad:
                (loss * count).backward()
            del loss  # and its graph, before the next batch's is made
            self.progress.update()
            yield
        sums.counting = True

    def share_label_count(self) -> None:
        """Sums the number of labels over the processes."""
        if self.processes > 1:
            dist.all_reduce(self.label_count)

    def ratios_to_first(self) -> list[float]:
        """How large this process's batches are compared with its first one, by their numbers of elements."""
        sizes = [sum(leaf.numel() for leaf in tree_leaves(batch) if torch.is_tensor(leaf)) for batch in self.batches]
        return [size / sizes[0] if sizes[0] else 1.0 for size in sizes]


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
