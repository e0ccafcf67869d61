"""Checkpoints that a kill at any moment cannot spoil: which of them are complete, and which of them to keep.

A checkpoint is complete when its trainer_state.json is. `AdapterTrainerMixin` writes that file when every process has
written everything else, and removes it before a folder is written a second time; `rotate` removes it before a folder
is deleted. So whatever a kill leaves of a checkpoint is not taken for a complete one.

Made for killed processes (SIGKILL, out of memory, preemption). A power failure can take what the operating system had
not yet put on the disk.
"""

import json
import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object
from peft import PeftConfig
from peft.utils import CONFIG_NAME
from torch import nn
from transformers import TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging


logger = logging.get_logger(__name__)

# The settings of an adapter that decide which parameters it has, and of which shapes.
DECISIVE = (
    *("peft_type", "r", "rank_pattern", "target_modules", "target_parameters", "exclude_modules", "modules_to_save"),
    *("layers_to_transform", "trainable_token_indices", "use_dora"),
)
NAME = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)")


def is_complete(folder: str | os.PathLike) -> bool:
    """Whether everything of a checkpoint was written, which its trainer_state.json tells, because it comes last."""
    try:
        state = json.loads((Path(folder) / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(state, dict) and "global_step" in state


def last_checkpoint(output_dir: str | os.PathLike) -> str | None:
    """The complete checkpoint of the highest step in a Trainer's `output_dir`; None if there is none, or no folder.

    Example:
        >>> trainer.train(resume_from_checkpoint=last_checkpoint("runs/capybara"))
    """
    folders = _checkpoints(output_dir)
    return next((str(folders[step]) for step in sorted(folders, reverse=True) if is_complete(folders[step])), None)


def checkpoint_to_resume(
    asked: str | os.PathLike | bool | None, args: TrainingArguments
) -> str | os.PathLike | bool | None:
    """What `Trainer.train` is to resume from, for the `resume_from_checkpoint` that a user asks for.

    All processes must call it. True, or "true" as a command line says it, becomes the last checkpoint in
    `args.output_dir` that is complete for every process, or None if there is none.

    Raises:
        ValueError: the checkpoint is not complete; or some processes see complete checkpoints where others do not.
    """
    if isinstance(asked, str) and asked.lower() in ("true", "false"):
        asked = asked.lower() == "true"
    if asked is True:
        return last_common_checkpoint(args)
    if isinstance(asked, str | os.PathLike) and not is_complete(asked):
        raise ValueError(_why_incomplete(Path(asked)))
    return asked


def check_adapter(checkpoint: str | os.PathLike, model: nn.Module) -> None:
    """Raises a ValueError if a checkpoint is of another adapter than the model's, by their configurations.

    Otherwise torch would raise of parameter groups and sizes, or load what fits and train on in silence.
    """
    config = getattr(model, "active_peft_config", None)
    folders = [Path(checkpoint), *(Path(checkpoint) / name for name in getattr(model, "active_adapters", []))]
    folder = next((folder for folder in folders if (folder / CONFIG_NAME).is_file()), None)
    if config is None or folder is None:  # FSDP may save the adapter's parameters without a configuration
        return
    saved = PeftConfig.from_pretrained(str(folder))
    for name in DECISIVE:
        there, here = _text(getattr(saved, name, None)), _text(getattr(config, name, None))
        if there != here:
            raise ValueError(
                f"{checkpoint} is of another adapter than the model's: {name} is {there} there and {here} here. Give "
                "this run an output_dir of its own, or the adapter the settings of the checkpoint."
            )


def check_state(checkpoint: str | os.PathLike) -> None:
    """Raises a ValueError if a checkpoint has the adapter only, because it was saved with `save_only_model=True`.

    A Trainer would go on with moments of 0 and a learning rate from the start of the schedule, and say nothing.
    """
    # The random states are what every backend saves under this name; the optimizer's state has many.
    if not any(Path(checkpoint).glob("rng_state*.pth")):
        raise ValueError(
            f"{checkpoint} has the adapter, but neither the optimizer's state nor random states: it was saved with "
            "save_only_model=True, and training cannot go on from there. Load the adapter with "
            "PeftModel.from_pretrained(..., is_trainable=True) and start a new training, in another output_dir."
        )


def _text(value: Any) -> str:
    # A configuration has sets where its file has lists, its file has the keys sorted, and the type is an Enum.
    if isinstance(value, dict):
        value = list(value.items())
    return str(sorted(value, key=str) if isinstance(value, set | list | tuple) else getattr(value, "value", value))


def last_common_checkpoint(args: TrainingArguments) -> str | None:
    """The last checkpoint that is complete for every process, the same on all of them; all must call it.

    Says what it passes over, and that training starts from the beginning where there is none.
    """
    folders = _checkpoints(args.output_dir)
    complete = gather_object([[step for step, folder in folders.items() if is_complete(folder)]])
    common = set.intersection(*map(set, complete))
    if not common and any(complete) and not args.save_on_each_node:
        blind = [rank for rank, steps in enumerate(complete) if not steps]
        raise ValueError(
            f"There are complete checkpoints in {args.output_dir}, but the processes {blind} do not see them. Put "
            "output_dir on a file system that all nodes share, or copy the checkpoint to every node and give its path."
        )
    last = max(common, default=None)
    if args.process_index == 0:
        later = [str(folders[step]) for step in sorted(folders) if step not in common and step > (last or 0)]
        if later:
            logger.warning(f"Passed over, because they were not written to the end: {', '.join(later)}.")
        if last is None:
            logger.warning(f"No complete checkpoint in {args.output_dir}: training starts from the beginning.")
    return None if last is None else str(folders[last])


def begin_checkpoint(folder: Path) -> None:
    """Marks a folder that is about to be written, perhaps for the second time, as not complete."""
    (folder / TRAINER_STATE_NAME).unlink(missing_ok=True)


def rotate(run_dir: Path, limit: int, keep: Iterable[str | os.PathLike | None]) -> None:
    """Removes incomplete checkpoints, and the oldest of the complete ones until `limit` are left; none in `keep`.

    Instead of transformers' `rotate_checkpoints`, which counts half-written checkpoints as well, and deletes a
    folder's files in any order, so that what a kill leaves of it could pass for a complete checkpoint.
    """
    keep = {Path(folder).resolve() for folder in keep if folder is not None}
    folders = _oldest_first(_checkpoints(run_dir))
    complete = [folder for folder in folders if is_complete(folder)]
    removable = [folder for folder in complete if folder.resolve() not in keep]
    surplus = max(len(complete) - limit, 0)
    for folder in [*(folder for folder in folders if folder not in complete), *removable[:surplus]]:
        begin_checkpoint(folder)
        shutil.rmtree(folder, ignore_errors=True)


def _checkpoints(output_dir: str | os.PathLike) -> dict[int, Path]:
    """The checkpoints' folders by their steps, complete or not."""
    names = ((NAME.fullmatch(folder.name), folder) for folder in Path(output_dir).glob("*") if folder.is_dir())
    return {int(name[1]): folder for name, folder in names if name}


def _oldest_first(checkpoints: dict[int, Path]) -> list[Path]:
    """The folders by the time of their last change; after a resume the highest step need not be the newest.

    By their steps where the file system does not keep such times, as transformers does it: no two checkpoints are
    written within the same second.
    """
    by_step = [checkpoints[step] for step in sorted(checkpoints)]
    times = {folder: folder.stat().st_mtime for folder in by_step}
    if max(times.values(), default=0) - min(times.values(), default=0) < 1:
        return by_step
    return sorted(by_step, key=times.__getitem__)


def _why_incomplete(folder: Path) -> str:
    if not folder.is_dir():
        reason = "there is no such folder"
    elif not (folder / TRAINER_STATE_NAME).is_file():
        reason = f"it has no {TRAINER_STATE_NAME}, which is written last"
    else:
        reason = f"its {TRAINER_STATE_NAME}, which is written last, is cut short"
    last = last_checkpoint(folder.parent)
    advice = f"The last complete one, which resume_from_checkpoint=True takes, is {last}."
    advice = advice if last else f"There is no complete one in {folder.parent}."
    return f"{folder} is not a complete checkpoint: {reason}. {advice}"
