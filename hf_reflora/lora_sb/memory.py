"""What LoRA-SB's initialization and the training after it take in memory."""

import itertools
from collections.abc import Callable

from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_leaves

from .gradients import preserve_random_states
from .targets import AdapterLayer


FLOAT32_BYTES = 4
# What a LoRA's training keeps for each number of its factors, in float32: the gradient and Adam's two moments.
LORA_TRAINING_BYTES = 3 * FLOAT32_BYTES


def gradient_bytes(layers: dict[str, AdapterLayer]) -> dict[str, int]:
    """Of each layer's sum of gradients, (out, in) in float32."""
    return {name: FLOAT32_BYTES * layer.out_features * layer.in_features for name, layer in layers.items()}


def factor_count(layers: dict[str, AdapterLayer], adapter_name: str) -> int:
    """How many numbers LoRA factors of the adapter's ranks have."""
    return sum(layer.r[adapter_name] * (layer.out_features + layer.in_features) for layer in layers.values())


class UsageMeter:
    """Counts the bytes that one batch takes in the blocks of a model.

    Attributes:
        inputs: Of all blocks' inputs.
        activations: Of all blocks together: what a training step without activation checkpointing keeps.
        largest_activations: Of the block that has the most.
    """

    def __init__(self, model: nn.Module):
        self.inputs = self.activations = self.largest_activations = 0
        self._by_class: dict[type, int] = {}
        self._weights = {_address(tensor) for tensor in itertools.chain(model.parameters(), model.buffers())}
        self._seen: set[int] = set()  # addresses; all inputs of a batch stay in memory, so that they differ

    def count(self, block: nn.Module, inputs: list, run: Callable) -> None:
        """Counts a block's inputs, and its activations by running it: once for each class of block."""
        for address, size in _storages(inputs):
            if address not in self._seen | self._weights:
                self._seen.add(address)
                self.inputs += size
        if type(block) not in self._by_class:
            devices = {leaf.device.index for leaf in inputs if isinstance(leaf, Tensor) and leaf.is_cuda}
            # A block that draws numbers shall have those that it would have without this.
            with preserve_random_states(sorted(devices)):
                self._by_class[type(block)] = self._activation_bytes(run)
        self.activations += self._by_class[type(block)]
        self.largest_activations = max(self._by_class.values())

    def _activation_bytes(self, run: Callable) -> int:
        saved: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            saved.update(_storages([tensor]))
            return tensor

        with saved_tensors_hooks(pack, lambda tensor: tensor):
            output = run()  # which keeps the graph alive, and with it what was saved, so that the addresses differ
        size = sum(size for address, size in saved.items() if address not in self._weights)
        del output
        return size

    def training(
        self, layers: dict[str, AdapterLayer], adapter_name: str, largest: float, is_checkpointed: bool
    ) -> float:
        """What training a LoRA of the adapter's ranks takes beside the head's logits.

        Args:
            layers: The adapter's layers by name.
            adapter_name: Whose ranks count.
            largest: The size of its batches, as a multiple of the batch that was counted.
            is_checkpointed: Whether it checkpoints its activations.
        """
        activations = self.inputs + self.largest_activations if is_checkpointed else self.activations
        return largest * activations + LORA_TRAINING_BYTES * factor_count(layers, adapter_name)

    def block_by_block(
        self,
        layers: dict[str, AdapterLayer],
        adapter_name: str,
        groups: dict[str | None, list[str]],
        kept: float,
        largest: float,
    ) -> float:
        """What one pass block by block takes beside the head's logits.

        Args:
            layers: The adapter's layers by name.
            adapter_name: Whose ranks count.
            groups: The layers by block, None for those outside all blocks, whose gradients are in memory all the time.
            kept: The size of the batches whose blocks' inputs stay on the model's device, as a multiple of the batch
                that was counted.
            largest: The size of the largest batch, likewise.
        """
        sizes = gradient_bytes(layers)
        by_block = {block: sum(sizes[name] for name in names) for block, names in groups.items()}
        gradients = by_block.pop(None, 0) + max(by_block.values(), default=0)
        update = max(sizes.values())  # ΔW, of which the SVD is taken
        results = FLOAT32_BYTES * factor_count(layers, adapter_name)
        return kept * self.inputs + largest * self.largest_activations + gradients + update + results


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _storages(values: list) -> list[tuple[int, int]]:
    """Address and bytes of the tensors among some values."""
    tensors = [value for value in tree_leaves(values) if isinstance(value, Tensor)]
    return [(_address(tensor), tensor.untyped_storage().nbytes()) for tensor in tensors]
