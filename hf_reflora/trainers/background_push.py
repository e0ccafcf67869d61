"""Pushes while training goes on: one at a time, of snapshots that training cannot change, none of them forgotten."""

import shlex
import shutil
import tempfile
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo
from transformers.trainer_utils import HubStrategy
from transformers.utils import logging

from ..hub.adapter import HubCard, push_folder, read_hub_card
from ..hub.repository import Repo
from ..hub.retry import PushError
from ..hub.staging import CARD_NAME, NEVER, link
from ..report.record import RECORD_NAME, RunRecord


logger = logging.get_logger(__name__)


class BackgroundPushes:
    """The pushes of one trainer, on its main process, with an account of what has not arrived.

    Args:
        output_dir: The trainer's.
    """

    def __init__(self, output_dir: str):
        self.output_dir = Path(output_dir)
        self.error: PushError | None = None  # of the last push, None once a later one has brought what was missing
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="push")
        self._job: Future | None = None
        self._unpushed: dict[str, Path] = {}  # snapshots of checkpoints that are not on the Hub, by their name there
        self._snapshots: tempfile.TemporaryDirectory | None = None

    @property
    def busy(self) -> bool:
        """Whether a push is running in the background."""
        return self._job is not None and not self._job.done()

    def wait(self) -> None:
        """Waits for the push in the background, whether it succeeds or fails; `error` tells."""
        if self._job is not None:
            self._job.exception()
            self._job = None

    def submit(self, push: Callable[[], Any]) -> Future:
        """Runs `push` in the background, after the push that runs there now."""
        self._job = self._pool.submit(push)
        return self._job

    def push(
        self,
        repo: Repo,
        folder: Path,
        message: str,
        *,
        checkpoints: dict[str, Path] | None = None,
        hub_card: HubCard | None = None,
        card_is_current: bool = False,
    ) -> CommitInfo:
        """Pushes a saved adapter, its card, and the checkpoints that earlier pushes did not bring.

        Args:
            repo, folder, message, card_is_current: See `push_folder`.
            checkpoints: Snapshots by their names on the Hub. Default: all that are not there yet.
            hub_card: Default: it is read from the Hub.

        Raises:
            PushError: with the reason and the command that finishes the push.
        """
        checkpoints = dict(self._unpushed) if checkpoints is None else checkpoints
        try:
            record = RunRecord.load(folder / RECORD_NAME)
            done = push_folder(
                folder,
                repo,
                record=record,
                hub_card=hub_card or read_hub_card(repo, record),
                card_is_current=card_is_current,
                checkpoints=checkpoints,
                message=message,
            )
        except Exception as error:
            self.error = PushError(f"{error} Nothing is lost; this finishes it: {self._command(repo)}")
            raise self.error from None
        self.error = None
        for note in done.notes:
            logger.warning(note)
        for name, snapshot in checkpoints.items():
            if self._unpushed.get(name) == snapshot:  # else a newer snapshot has taken its place
                del self._unpushed[name]
        return done.commit

    def push_checkpoint(self, repo: Repo, checkpoint: Path, strategy: HubStrategy, message: str) -> None:
        """Pushes a checkpoint's adapter in the background, and the checkpoint itself if `strategy` says so.

        A failure is logged and does not stop the training: the next push brings what is missing.
        """
        snapshot = self._snapshot(checkpoint)
        if strategy == HubStrategy.CHECKPOINT:
            self._unpushed = {"last-checkpoint": snapshot}
        elif strategy == HubStrategy.ALL_CHECKPOINTS:
            self._unpushed[snapshot.name] = snapshot
        # The snapshots of this moment, also if the push has to wait for its turn while training adds others.
        checkpoints = dict(self._unpushed)
        self.submit(lambda: self._push_snapshot(repo, snapshot, message, checkpoints))

    def _snapshot(self, checkpoint: Path) -> Path:
        """A copy of the checkpoint by hard links, which stays when the checkpoint is rotated away."""
        if self._snapshots is None:  # beside the checkpoints, because links do not cross file systems
            self._snapshots = tempfile.TemporaryDirectory(prefix=".push-", dir=self.output_dir)
        snapshot = Path(self._snapshots.name) / checkpoint.name
        shutil.copytree(checkpoint, snapshot, copy_function=link, ignore=shutil.ignore_patterns(*NEVER))
        return snapshot

    def _push_snapshot(self, repo: Repo, snapshot: Path, message: str, checkpoints: dict[str, Path]) -> None:
        try:
            self.push(repo, snapshot, message, checkpoints=checkpoints)
        except PushError as error:
            logger.error(f"{message}: {error} Training goes on; the next push brings what is missing.")
        for folder in {snapshot, *checkpoints.values()} - set(self._unpushed.values()):
            shutil.rmtree(folder, ignore_errors=True)

    def _command(self, repo: Repo) -> str:
        """The commands that push what has not arrived: the adapter, and the checkpoints that the strategy pushes."""
        options = ["--revision", repo.revision] if repo.revision != "main" else []
        options += ["--create-pr"] if repo.create_pr else []
        commands = [["hf-reflora", "push", self.output_dir.as_posix(), repo.id, *options]]
        for name, snapshot in self._unpushed.items():
            checkpoint = (self.output_dir / snapshot.name).as_posix()
            # As in our own pushes: no pickle, and not PEFT's card, whose front matter the Hub may refuse.
            left_out = ["--exclude", "training_args.bin", "--exclude", CARD_NAME]
            commands.append(["hf", "upload", repo.id, checkpoint, name, *options, *left_out])
        return " && ".join(shlex.join(command) for command in commands)
