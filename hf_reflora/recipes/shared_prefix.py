"""The beginning that the rows of a batch have in common, such as a long system prompt, is computed only once.

A batch of n rows with a common beginning becomes one row: the beginning, then what follows it in each row, without
padding. Each token attends to the beginning and to its own row, and has the position that it had there. Attention is
all that connects tokens, so loss and gradients are those of the n rows up to rounding, also through the beginning.
"""

import copy
import math
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle
from transformers import DynamicCache, PreTrainedModel
from trl import SFTConfig, SFTTrainer

from ..distributed.parameters import is_zero3_partitioned


# The tensors of a batch that is packed. One with others, such as images or positions of its own, stays as it is.
BATCH = {"input_ids", "attention_mask", "labels"}


def check_options(training: SFTConfig) -> None:
    """Raises a ValueError, before a model is loaded, for options that pack rows in another way."""
    given = [name for name in ("packing", "eval_packing", "padding_free") if getattr(training, name)]
    if given:
        raise ValueError(
            f"share_prefix packs the rows of a batch that begin alike, and {given[0]} packs rows in another way. Give "
            "one of the two."
        )


def share_prefix(trainer: SFTTrainer) -> list[RemovableHandle]:
    """Packs the batches that the trainer's model is called with, until the handles are removed.

    Raises:
        ValueError: A packed batch would not give what its rows give: the model does not connect tokens by attention
            alone (Mamba), its attention takes no mask of its own (FlashAttention) or looks less far back than
            `max_length`; it has a loss over all its tokens (mixtures of experts), or is partitioned by ZeRO-3.
    """
    model, config = trainer.model, trainer.model.config.get_text_config()
    if getattr(trainer, "aux_loss_enabled", False):
        raise ValueError(
            "share_prefix would change the auxiliary loss of the experts, which counts every token. Leave one of them "
            "out (router_aux_loss_coef: 0)."
        )
    if any(is_zero3_partitioned(parameter) for parameter in model.parameters()):
        raise ValueError("share_prefix does not work under DeepSpeed's ZeRO-3. Use ZeRO-2, or leave it out.")
    windows = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")]
    window = min((value for value in windows if value), default=math.inf)
    if window < (trainer.args.max_length or math.inf):
        raise ValueError(
            f"share_prefix needs rows within the model's attention window of {window} tokens, and max_length is "
            f"{trainer.args.max_length}. Give max_length: {window}, or leave share_prefix out."
        )
    _check(model)
    return attach(model)


def attach(model: PreTrainedModel) -> list[RemovableHandle]:
    """`share_prefix` without the checks."""
    layout: Layout | None = None  # of the batch that the model is working on

    def before(model, args, kwargs):
        nonlocal layout
        layout = None
        tensors = {name for name, value in kwargs.items() if isinstance(value, Tensor)} - {"num_items_in_batch"}
        if not args and tensors == BATCH:
            layout = Layout.of(kwargs["input_ids"], kwargs["attention_mask"], kwargs["labels"])
        if layout is None:
            return None
        return args, kwargs | {"labels": layout.pack(kwargs["labels"])} | _packed(model, layout, kwargs["input_ids"])

    def after(model, args, output):
        # Older versions of TRL (1.8) compute metrics from the logits and the labels of the batch.
        if layout is not None and getattr(output, "logits", None) is not None:
            output.logits = layout.unpack(output.logits)

    return [model.register_forward_pre_hook(before, with_kwargs=True), model.register_forward_hook(after)]


@dataclass(frozen=True)
class Layout:
    """Where the tokens of a batch are in the packed row: the beginning, then what follows it in each row."""

    shared: int  # tokens of the beginning
    kept: Tensor  # (n, length - shared) bool, without the padding

    @classmethod
    def of(
        cls,
        input_ids: Tensor,  # (n, length), padded on the right
        attention_mask: Tensor,  # (n, length), 1 or 0
        labels: Tensor,  # (n, length), -100 where there is none
    ) -> "Layout | None":
        """The layout of a batch; None where its rows do not begin alike."""
        common = (input_ids == input_ids[0]).all(0) & attention_mask.bool().all(0) & (labels == -100).all(0)
        # The last common token stays in every row, because it predicts the token where the rows part.
        shared = int(common.long().cumprod(0).sum()) - 1
        return cls(shared, attention_mask[:, shared:].bool()) if len(input_ids) > 1 and shared > 0 else None

    def pack(self, tensor: Tensor) -> Tensor:
        """(n, length) → (1, tokens)."""
        return torch.cat([tensor[0, : self.shared], tensor[:, self.shared :][self.kept]])[None]

    def unpack(self, tensor: Tensor) -> Tensor:
        """(1, tokens, …) → (n, length, …), 0 at the padding."""
        n, own = self.kept.shape
        batch = tensor.new_zeros(n, self.shared + own, *tensor.shape[2:])
        batch[:, : self.shared] = tensor[0, : self.shared]
        batch[:, self.shared :][self.kept] = tensor[0, self.shared :]
        return batch

    def positions(self) -> Tensor:
        """(1, tokens): the positions that the tokens have in their rows."""
        n, own = self.kept.shape
        return self.pack(torch.arange(self.shared + own, device=self.kept.device).expand(n, -1))

    def attends(self) -> Tensor:
        """(tokens, tokens) bool: each token attends to the beginning and to its own row, as far as itself."""
        rows = self.kept.nonzero()[:, 0]
        rows = torch.cat([rows.new_full((self.shared,), -1), rows])
        return ((rows == -1) | (rows == rows[:, None])).tril()


def _packed(model: PreTrainedModel, layout: Layout, input_ids: Tensor) -> dict[str, Tensor]:
    """What the model is called with for the packed row."""
    mask = layout.attends()[None, None]
    if model.config._attn_implementation != "sdpa":  # eager attention adds the mask to its weights
        mask = torch.zeros_like(mask, dtype=model.dtype).masked_fill(~mask, torch.finfo(model.dtype).min)
    return {"input_ids": layout.pack(input_ids), "position_ids": layout.positions(), "attention_mask": mask}


@torch.no_grad()
def _check(model: PreTrainedModel) -> None:
    """Raises a ValueError unless a packed batch, of two rows of made-up tokens, gives the logits of its rows."""
    name = type(model).__name__
    needs = (
        "It needs a model that connects tokens by attention alone, with attn_implementation eager or sdpa. Leave "
        "share_prefix out."
    )
    shared, own = 8, 4
    tokens = torch.arange(shared + 2 * own, device=model.device)
    input_ids = torch.stack([tokens[: shared + own], torch.cat([tokens[:shared], tokens[-own:]])])
    mask = torch.ones_like(input_ids)
    layout = Layout(shared, mask[:, shared:].bool())
    was_training = model.training
    model.eval()
    try:
        apart = model(input_ids=input_ids, attention_mask=mask).logits.float()
        packed = layout.unpack(model(**_packed(model, layout, input_ids)).logits.float())
        # At the second row's own tokens, which must not see those of the first row.
        error = (packed - apart)[1, shared:].norm() / apart[1, shared:].norm()
    except (RuntimeError, ValueError, TypeError) as failure:  # a mask of four dimensions, or positions
        raise ValueError(f"share_prefix packs a batch into one row, which {name} does not take. {needs}") from failure
    finally:
        model.train(was_training)
    # Rounding is below 0.02 in bfloat16 and 1e-5 in float32.
    if not error < (1e-3 if model.dtype == torch.float32 else 0.05):
        raise ValueError(
            f"share_prefix packs a batch into one row, but then the logits of {name} differ by {error:.0%}. {needs}"
        )


def common_beginning(prompts: list[list[int]]) -> list[int]:
    """The tokens that all prompts begin with; each prompt has at least one more."""
    alike = (len(set(tokens)) == 1 for tokens in zip(*prompts, strict=False))
    return prompts[0][: min(sum(takewhile(bool, alike)), min(map(len, prompts)) - 1)]


@torch.no_grad()
def read_prefix(model: PreTrainedModel, prefix: list[int]) -> DynamicCache:
    """The keys and values of `prefix`, for `after_prefix`."""
    cache = DynamicCache(config=model.config)
    model(input_ids=torch.tensor([prefix], device=model.device), past_key_values=cache, use_cache=True)
    return cache


def after_prefix(
    prefix: list[int],
    cache: DynamicCache,
    *,
    input_ids: Tensor,  # (n, length), what follows the prefix, padded on the left
    attention_mask: Tensor,  # (n, length)
) -> dict[str, Any]:
    """What `generate` takes for n prompts that begin with `prefix`. The padding comes after the prefix."""
    beginning = input_ids.new_tensor(prefix).expand(len(input_ids), -1)
    copied = copy.deepcopy(cache)  # generate() appends to it
    copied.batch_repeat_interleave(len(input_ids))
    return {
        "input_ids": torch.cat([beginning, input_ids], dim=1),
        "attention_mask": torch.cat([torch.ones_like(beginning), attention_mask], dim=1),
        "past_key_values": copied,
    }
