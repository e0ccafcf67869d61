"""One model in memory that answers as the base model, with an adapter, or as both in one batch."""

import contextlib
import enum
from typing import Any

import torch
from loading import Loaded
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from transformers import Cache


class Side(enum.Enum):
    """Who answers: the base model alone, or the base model with the adapter."""

    BASE = "base"
    ADAPTER = "adapter"


class SharedModel:
    """A base model with adapters, of which one is active.

    PEFT keeps the active adapter, and the rows of a mixed batch, in the layers themselves. So only one thread may use
    this at a time.

    Args:
        loaded: The models.
        device: Where they shall be.

    Attributes:
        model: PEFT's model.
        layers: The layers that PEFT has put into it, each with the hooks that belong there.
        vocabulary: Number of tokens of each side. They differ only where tokens were added for the training.
    """

    def __init__(self, loaded: Loaded, device: str):
        self.model = loaded.model.to(device).eval().requires_grad_(False)
        self.head = loaded.head
        self.vocabulary = {Side.BASE: loaded.vocabulary, Side.ADAPTER: loaded.trained_vocabulary}
        layers = [m for m in self.model.modules() if isinstance(m, BaseTunerLayer | AuxiliaryTrainingWrapper)]
        self.layers = {layer: set(layer._forward_pre_hooks) for layer in layers}

    @property
    def largest_vocabulary(self) -> int:
        return max(self.vocabulary.values())

    @torch.inference_mode()
    def logits(
        self,
        sides: list[Side],
        tokens: list[list[int]],  # the new tokens of each side, equally many
        cache: Cache,  # of the tokens before, with a row for each side
    ) -> list[torch.Tensor]:  # of each side: (vocabulary,), float32, on the CPU
        """The logits of what follows each side's tokens."""
        mixed: dict[str, Any] = {}
        if len(set(sides)) > 1:
            names = {Side.BASE: "__base__", Side.ADAPTER: self.model.active_adapter}
            mixed["adapter_names"] = [names[side] for side in sides]
        # What disable_adapter() does, which takes longer: it goes through the whole model at each token. In a mixed
        # batch the adapter must be enabled, or PEFT ignores adapter_names.
        for layer in self.layers:
            layer._disable_adapters = Side.ADAPTER not in sides
        ids = torch.tensor(tokens, device=self.model.device)
        try:
            with self._rows_of_the_head(max(self.vocabulary[side] for side in sides)):
                output = self.model(input_ids=ids, past_key_values=cache, logits_to_keep=1, **mixed)
        except BaseException:
            self._remove_hooks()
            raise
        logits = output.logits[:, -1].float().cpu()
        return [row[: self.vocabulary[side]] for side, row in zip(sides, logits, strict=True)]

    def _remove_hooks(self) -> None:
        """Removes the hooks of a mixed batch that failed.

        PEFT removes them only after a success (huggingface/peft issue 3475); the next answer would use them.
        """
        for layer, hooks_before in self.layers.items():
            for hook in set(layer._forward_pre_hooks) - hooks_before:
                del layer._forward_pre_hooks[hook]
                layer._forward_pre_hooks_with_kwargs.pop(hook, None)

    @contextlib.contextmanager
    def _rows_of_the_head(self, rows: int):
        """Only as many rows of the last layer are used: the base model's side must be what it is without new tokens.

        To leave out the others afterwards is not enough, as a layer of another size may be rounded differently.
        """
        if rows == self.largest_vocabulary:
            yield
            return
        weight = self.head._parameters["weight"]
        self.head._parameters["weight"] = weight.detach()[:rows]
        try:
            yield
        finally:
            self.head._parameters["weight"] = weight
