"""Whether an adapter's file of weights is one: readable, complete and finite."""

import os
from pathlib import Path

import torch
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME, load_peft_weights
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file


LFS_POINTER = b"version https://git-lfs.github.com/spec/"
AGAIN = "Save the adapter again with save_pretrained (trainer.save_model)."
PAIRS = ((".lora_A.", ".lora_B."), (".lora_embedding_A", ".lora_embedding_B"))


def check_weights(folder: Path) -> None:
    """Reads every tensor of the adapter in `folder`.

    Raises:
        ValueError: the file is no safetensors file, has no tensors, one that is not finite, half of a LoRA pair, or
            keys with the name of an adapter, which PEFT would not find.
    """
    path = folder / SAFETENSORS_WEIGHTS_NAME
    with path.open("rb") as file:
        begin = file.read(len(LFS_POINTER))
    if begin == LFS_POINTER:
        raise ValueError(f"{path} is a pointer of git-lfs, not the weights. Run `git lfs pull` in its repository.")
    try:
        with safe_open(path, framework="pt") as tensors:
            names = list(tensors.keys())
            broken = [name for name in names if not _is_finite(tensors.get_tensor(name))]
    except SafetensorError as error:
        size = path.stat().st_size
        raise ValueError(f"{path} ({size:,} bytes) cannot be read as safetensors: {error}. {AGAIN}") from error
    if not names:
        raise ValueError(f"{path} has no tensors. {AGAIN}")
    if broken:
        raise ValueError(
            f"{path} has values that are not finite, in {_some(broken)}. The training diverged: publish an earlier "
            "checkpoint, or train again with a smaller learning rate."
        )
    if named := [name for name in names if ".default." in name]:
        raise ValueError(
            f"{path} has the adapter's name in its keys, such as {named[0]}, where PEFT looks for "
            f"{named[0].replace('.default.', '.')}. It was written by state_dict(); use save_pretrained."
        )
    known = set(names)
    halves = [
        name
        for a, b in PAIRS
        for one, other in ((a, b), (b, a))
        for name in names
        # With lora_bias=True B alone has a bias.
        if one in name and not name.endswith(".bias") and name.replace(one, other) not in known
    ]
    if halves:
        raise ValueError(f"{path} has only one factor of a LoRA pair: {_some(halves)}. {AGAIN}")


def convert_weights(folder: Path) -> None:
    """Writes the weights of an older adapter, `adapter_model.bin`, as safetensors, and removes the old file.

    Raises:
        ValueError: the file cannot be read, or has more than tensors.
    """
    path = folder / WEIGHTS_NAME
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
        # Clones, because safetensors takes no tensors that share memory.
        tensors = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
    except Exception as error:  # UnpicklingError, RuntimeError, EOFError, AttributeError …
        raise ValueError(f"{path} cannot be read as weights: {str(error).splitlines()[0]}. {AGAIN}") from error
    save_file(tensors, folder / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
    path.unlink()


def read_weights(folder: str | os.PathLike) -> dict[str, torch.Tensor]:
    """The tensors of the adapter in `folder`, or of one on the Hub, on the CPU, in either form.

    Raises:
        ValueError: the file cannot be read.
    """
    try:
        return load_peft_weights(str(folder), device="cpu")
    except Exception as error:  # what torch and safetensors raise is of many kinds
        raise ValueError(f"The weights in {folder} cannot be read: {str(error).splitlines()[0]}. {AGAIN}") from error


def _is_finite(tensor: torch.Tensor) -> bool:
    # torch has no isfinite for the smallest floating-point types.
    return not tensor.is_floating_point() or bool(tensor.float().isfinite().all())


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} others" if len(names) > 3 else "")
