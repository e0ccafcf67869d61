"""Checkpoints that a kill at any moment cannot spoil: which of them are whole, and a Trainer that uses only those."""

import json
import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path

from accelerate.utils import gather_object
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging


logger = logging.get_logger(__name__)

NAME = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)")


def is_whole(folder: str | os.PathLike) -> bool:
    """Whether everything of a checkpoint was written: its trainer_state.json, which is written last, is complete."""
    try:
        state = json.loads((Path(folder) / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(state, dict) and "global_step" in state


def last_checkpoint(output_dir: str | os.PathLike) -> str | None:
    """The whole checkpoint of the highest step in a Trainer's `output_dir`; None if there is none, or no such folder.

    Example:
        >>> trainer.train(resume_from_checkpoint=last_checkpoint("runs/capybara"))
    """
    found = _checkpoints(output_dir)
    return next((str(found[step]) for step in sorted(found, reverse=True) if is_whole(found[step])), None)


class WholeCheckpointsMixin:
    """For a `Trainer`, before it in the list of bases: a run killed at any moment, resumed, goes on where it was.

    The trainers of hf_reflora have it. It changes of a Trainer:

    - a checkpoint is whole when its trainer_state.json is, which is written when every process has written all else,
      and removed before a folder is written a second time and before it is deleted;
    - `train(resume_from_checkpoint=True)` (or "true", as a command line says it) takes the last whole checkpoint in
      `output_dir`, on several processes the last that is whole for all of them. Where there is none yet, training
      starts from the beginning, and says so;
    - a run that was killed after its last step takes no further one;
    - `save_total_limit` counts whole checkpoints only, and half-written ones are removed with the surplus.

    Made for killed processes (SIGKILL, out of memory, preemption); a power failure can take what the operating system
    had not yet put on the disk.

    Raises:
        ValueError: by `train`, for the path of a checkpoint that is not whole; or where other processes see the whole
            checkpoints in `output_dir` and this one does not.

    Example:
        >>> class MyTrainer(WholeCheckpointsMixin, DPOTrainer): ...
    """

    _limit: int | None = None  # save_total_limit during a save

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs):
        asked = resume_from_checkpoint
        if isinstance(asked, str) and asked.lower() in ("true", "false"):
            asked = asked.lower() == "true"
        if asked is True:
            asked = self._last_checkpoint()
        elif isinstance(asked, str | os.PathLike) and not is_whole(asked):
            raise ValueError(_not_whole(Path(asked)))
        return super().train(asked, *args, **kwargs)

    def _last_checkpoint(self) -> str | None:
        """The last checkpoint that is whole for every process, the same on all of them."""
        found = _checkpoints(self.args.output_dir)
        whole = gather_object([[step for step, folder in found.items() if is_whole(folder)]])
        common = set.intersection(*map(set, whole))
        if not common and any(whole) and not self.args.save_on_each_node:
            blind = [rank for rank, steps in enumerate(whole) if not steps]
            raise ValueError(
                f"There are whole checkpoints in {self.args.output_dir}, but the processes {blind} do not see them. "
                "Put output_dir on a file system that all nodes share, or copy the checkpoint to every node and give "
                "its path."
            )
        last = max(common, default=None)
        if self.is_world_process_zero():
            half = [str(found[step]) for step in sorted(found) if step not in common and step > (last or 0)]
            if half:
                logger.warning(f"Passed over, because they were not written to the end: {', '.join(half)}.")
            if last is None:
                logger.warning(f"No whole checkpoint in {self.args.output_dir}: training starts from the beginning.")
        return None if last is None else str(found[last])

    def _save_checkpoint(self, model, trial) -> None:
        args, run_dir = self.args, Path(self._get_output_dir(trial=trial))
        folder = run_dir / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if args.should_save:
            (folder / TRAINER_STATE_NAME).unlink(missing_ok=True)
        self.accelerator.wait_for_everyone()  # nobody overwrites anything before it is gone
        self._limit, args.save_total_limit = args.save_total_limit, None  # transformers does not rotate, this does
        try:
            super()._save_checkpoint(model, trial)
        finally:
            args.save_total_limit, self._limit = self._limit, None
        if args.should_save and args.save_total_limit is not None and args.save_total_limit > 0:
            _rotate(run_dir, args.save_total_limit, [folder, self.state.best_model_checkpoint])

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        given = self.args.save_total_limit
        self.args.save_total_limit = given or self._limit  # training_args.bin says what was asked for
        try:
            super()._save(output_dir, state_dict)
        finally:
            self.args.save_total_limit = given

    def _run_epoch(self, *args, **kwargs) -> None:
        if self.state.global_step >= self.state.max_steps:  # killed after the last step; there would be one more
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        # As in _run_epoch, which transformers has since 5.3: before, its only door to the epoch is this method.
        if not hasattr(super(), "_run_epoch") and self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return [], None
        return super().get_batch_samples(epoch_iterator, num_batches, device)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()  # trainer_state.json is next


def _checkpoints(output_dir: str | os.PathLike) -> dict[int, Path]:
    """The checkpoints' folders by their steps, whole or not."""
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


def _rotate(run_dir: Path, limit: int, keep: Iterable[str | os.PathLike | None]) -> None:
    """Removes what is not whole and the oldest of what is, until `limit` are left; never those in `keep`.

    As transformers' `rotate_checkpoints`, which would count half-written checkpoints and delete a folder's files in
    any order: what a kill leaves of it could pass for whole.
    """
    keep = {Path(folder).resolve() for folder in keep if folder is not None}
    folders = _oldest_first(_checkpoints(run_dir))
    whole = [folder for folder in folders if is_whole(folder)]
    free = [folder for folder in whole if folder.resolve() not in keep]
    surplus = max(len(whole) - limit, 0)
    for folder in [*(folder for folder in folders if folder not in whole), *free[:surplus]]:
        (folder / TRAINER_STATE_NAME).unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)


def _not_whole(folder: Path) -> str:
    if not folder.is_dir():
        found = "there is no such folder"
    elif not (folder / TRAINER_STATE_NAME).is_file():
        found = f"it has no {TRAINER_STATE_NAME}, which is written last"
    else:
        found = f"its {TRAINER_STATE_NAME}, which is written last, is cut short"
    last = last_checkpoint(folder.parent)
    known = f"The last whole one, which resume_from_checkpoint=True takes, is {last}."
    known = known if last else f"There is no whole one in {folder.parent}."
    return f"{folder} is not a whole checkpoint: {found}. {known}"
