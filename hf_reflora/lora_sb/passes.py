"""Plans the passes over the samples: which layers' gradients are summed in memory at the same time."""

from .memory import FLOAT32_BYTES, LORA_TRAINING_BYTES, factor_count, gradient_bytes
from .targets import AdapterLayer


def plan_passes(layers: dict[str, AdapterLayer], adapter_name: str, passes: int | None = None) -> list[list[str]]:
    """Groups the layers by the pass over the samples in which their gradients are summed.

    Each group needs the float32 sums of its layers' gradients in memory, 4 · out · in bytes a layer.

    Args:
        layers: The adapter's layers by name, in the order in which they shall be grouped.
        adapter_name: Whose ranks count.
        passes: The number of groups, of similar size in bytes, and no more than there are layers. Default: as few as
            keep the sums and the new factors within what training a LoRA of the same ranks takes anyway for gradients
            and Adam's moments, 12 · r · (out + in) bytes a layer; a layer that exceeds this alone has its own group.

    Returns:
        The names of the layers of each group; no group is empty.
    """
    sizes = gradient_bytes(layers)
    if passes is not None:
        return _split_evenly(sizes, min(passes, len(sizes)))
    # All new factors stay in memory until the end, so that an error in the last pass leaves the adapter as it was.
    return _split_by_budget(sizes, (LORA_TRAINING_BYTES - FLOAT32_BYTES) * factor_count(layers, adapter_name))


def _split_by_budget(
    sizes: dict[str, int],  # bytes by layer
    budget: int,  # bytes that a group may take
) -> list[list[str]]:
    groups: list[list[str]] = []
    room = 0
    for name, size in sizes.items():
        if size > room:
            groups.append([])
            room = max(budget, size)
        groups[-1].append(name)
        room -= size
    return groups


def _split_evenly(
    sizes: dict[str, int],  # bytes by layer
    number: int,  # of groups, at most len(sizes)
) -> list[list[str]]:
    groups: list[list[str]] = [[]]
    total, before = sum(sizes.values()), 0
    for i, (name, size) in enumerate(sizes.items()):
        has_its_share = before * number >= total * len(groups)
        must_leave_one_for_each = len(sizes) - i == number - len(groups)
        if groups[-1] and (has_its_share or must_leave_one_for_each):
            groups.append([])
        groups[-1].append(name)
        before += size
    return groups
