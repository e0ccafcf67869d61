"""What makes a Trainer publish well: a run record, a card made of it, pushes that arrive or say that they did not."""

import os
import shlex
import shutil
import tempfile
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo
from transformers.trainer_utils import HubStrategy, SaveStrategy
from transformers.utils import logging

from ..distributed.backend import check_saving
from ..distributed.parameters import without_checkpoint_wrappers
from ..hub.adapter import CARD_NAME, NEVER, PLOT_NAME, Push, link, push_prepared
from ..hub.repository import Repo, prepare
from ..hub.retry import PushError
from ..report.card import render
from ..report.edits import is_edited
from ..report.environment import write_text
from ..report.front_matter import check_license
from ..report.ids import hub_id
from ..report.plot import plot
from ..report.recorder import RunRecordCallback, dataset_facts


logger = logging.get_logger(__name__)


class PublishingMixin:
    """For a `Trainer` of adapters, before it in the list of bases: run record, model card and `push_to_hub`.

    The trainers of hf_reflora have it. It changes of a Trainer:

    - a `RunRecordCallback` is added, unless one is in `callbacks`;
    - `create_model_card` renders `hf_reflora.report.card` from the record, with a plot beside it;
    - everything that goes to the Hub goes by `hf_reflora.hub.adapter`: in one commit, tried again, once, without
      `training_args.bin`; a LoRA-SB adapter as an ordinary LoRA. With `push_to_hub=True` token, name and permission
      are checked when the trainer is made. Pushes in the background follow `hub_strategy`; what failed of them is
      pushed again when training ends, and `train` raises `PushError` if that fails, too, after saving;
    - `hub_token` is not in the `training_args.bin` that it saves.

    Example:
        >>> class MyTrainer(PublishingMixin, DPOTrainer): ...
    """

    _tag_names: list[str] = []

    def __init__(self, *args, callbacks: list | None = None, **kwargs):
        callbacks = [c() if c is RunRecordCallback else c for c in callbacks or []]
        self.run_record = next((c for c in callbacks if isinstance(c, RunRecordCallback)), None)
        if self.run_record is None:
            self.run_record = RunRecordCallback()
            callbacks.append(self.run_record)
        known = {**dataset_facts(kwargs.get("train_dataset")), **self._record_facts(callbacks)}
        self.run_record.facts = {"tags": list(self._tag_names), **known, **self.run_record.facts}
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="push")
        self._push_job: Future | None = None
        self._push_error: PushError | None = None
        self._unpushed: dict[str, Path] = {}  # checkpoints that are not on the Hub yet, by their name there
        self._snapshots: tempfile.TemporaryDirectory | None = None
        self._repo: Repo | None = None
        super().__init__(*args, callbacks=callbacks, **kwargs)
        check_saving(self.accelerator.state)

    def _record_facts(self, callbacks: list) -> dict[str, str]:
        """The method, as far as it is not told by the adapter's type."""
        return {}

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs):
        if isinstance(resume_from_checkpoint, str | os.PathLike):
            self.run_record.resumed_from = resume_from_checkpoint
        output = super().train(resume_from_checkpoint, *args, **kwargs)
        if self._push_error is not None:
            self.push_to_hub(commit_message="Training finished")
        return output

    def _save_checkpoint(self, model, trial) -> None:
        self.run_record.on_save(self.args, self.state, self.control)  # before trainer_state.json ends the checkpoint
        super()._save_checkpoint(model, trial)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        super().save_model(output_dir, _internal_call=True)
        if output_dir is None or Path(output_dir).resolve() == Path(self.args.output_dir).resolve():
            self.create_model_card()  # last: PEFT has rewritten README.md
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save")

    def create_model_card(
        self,
        model_name: str | None = None,
        dataset_name: str | None = None,
        tags: str | Sequence[str] | None = None,
        *,
        license: str | None = None,
        language: str | list[str] | None = None,
    ) -> None:
        """Writes run record, plot and model card into `output_dir`, on the main process.

        Args:
            model_name: The card's title before it is on the Hub. Default: the base model and the method.
            dataset_name: Id of the dataset on the Hub. Default: what the dataset knows of itself.
            tags: Further tags; those of `model.add_model_tags` are added, too.
            license: Hub license id. Default: none here; the base model's when it is pushed.
            language: Language code or codes.

        Raises:
            ValueError: for a license that the Hub does not know.
        """
        if not self.is_world_process_zero():
            return
        if dataset_name is not None:
            self.run_record.update(dataset=dataset_name, dataset_id=hub_id(dataset_name))
        check_license(license)
        tags = [tags] if isinstance(tags, str) else list(tags or [])
        tags += [tag for tag in getattr(self.model, "model_tags", None) or [] if tag not in self._tag_names]
        if model_name == Path(self.args.hub_model_id or self.args.output_dir).name:
            model_name = None  # TRL names the folder at every checkpoint
        card = self.run_record.record.card
        wishes = {"title": model_name, "license": license, "language": language}
        wishes["tags"] = list(dict.fromkeys([*card.get("tags", []), *tags]))
        self.run_record.update(card={name: value for name, value in wishes.items() if value})
        folder = Path(self.args.output_dir)
        record = self.run_record.write(folder)
        drawn = plot(record, folder / PLOT_NAME)
        path = folder / CARD_NAME
        if path.exists() and is_edited(path.read_text(encoding="utf-8")):
            logger.warning(f"{path} was edited by hand and is kept. Remove it to get a new one.")
            return
        text = render(record, repo_id=self.hub_model_id, plot=PLOT_NAME if drawn else None)
        write_text(path, text)

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Checks token, name and permission, and makes the repository if there is none; see `prepare`.

        Raises:
            PushError: with the reason.
        """
        self.push_in_progress = None  # transformers' own; here it stays so
        if self.is_world_process_zero():
            self._repo = self._prepare(token=token, private=private)
            self.hub_model_id = self._repo.id

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        *,
        create_pr: bool = False,
        other_base: bool = False,
        **card: Any,
    ) -> CommitInfo | Future | None:
        """Saves the adapter with its card and pushes it in one commit; what the Hub has already is not sent again.

        Args:
            commit_message: Message of the commit.
            blocking: Wait for it; otherwise a `Future` is returned.
            token, revision, private: Default: `hub_token`, `hub_revision` and `hub_private_repo`.
            create_pr: Propose a pull request instead of a commit to the branch.
            other_base: Accept a repository that holds an adapter of another base model.
            card: Arguments of `create_model_card`, such as `license` and `dataset_name`.

        Returns:
            The commit (on the main process), the newest one if nothing had changed.

        Raises:
            PushError: with the reason and the command that finishes the push.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        self.create_model_card(**card)
        self._finish_current_push()

        def push() -> CommitInfo:
            repo = self._prepare(token, revision, private, create_pr=create_pr, other_base=other_base)
            self.hub_model_id = repo.id
            return self._pushed(repo, Path(self.args.output_dir), dict(self._unpushed), commit_message).commit

        if blocking:
            return push()
        self._push_job = self._pool.submit(push)
        return self._push_job

    def _prepare(self, token=None, revision=None, private=None, **options) -> Repo:
        args, config = self.args, getattr(self.model, "active_peft_config", None)
        known = self.run_record.facts.get("base_model", hub_id(getattr(config, "base_model_name_or_path", None)))
        return prepare(
            args.hub_model_id or Path(args.output_dir).absolute().name,
            token=token or args.hub_token,
            private=args.hub_private_repo if private is None else private,
            revision=revision or args.hub_revision,
            base_model=known,
            **options,
        )

    def _pushed(self, repo: Repo, folder: Path, checkpoints: dict[str, Path], message: str) -> Push:
        """Pushes and keeps account of what failed."""
        try:
            done = push_prepared(folder, repo, checkpoints=checkpoints, message=message)
        except Exception as error:
            options = ["--revision", repo.revision] if repo.revision != "main" else []
            options += ["--create-pr"] if repo.create_pr else []
            command = shlex.join(["hf-reflora", "push", Path(self.args.output_dir).as_posix(), repo.id, *options])
            self._push_error = PushError(f"{error} Nothing is lost; this finishes it: {command}")
            raise self._push_error from None
        self._push_error = None
        for name, checkpoint in checkpoints.items():
            if self._unpushed.get(name) == checkpoint:
                del self._unpushed[name]
        return done

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Pushes a checkpoint's adapter in the background; the checkpoint itself, too, if `hub_strategy` says so."""
        args = self.args
        if not self.is_world_process_zero() or args.hub_strategy == HubStrategy.END:
            return
        busy = self._push_job is not None and not self._push_job.done()
        if busy and not args.hub_always_push:
            return
        self.callback_handler.on_push_begin(args, self.state, self.control)
        self.run_record.write(checkpoint_folder)
        if self._snapshots is None:  # beside the checkpoints, so that hard links do
            self._snapshots = tempfile.TemporaryDirectory(prefix=".push-", dir=args.output_dir)
        snapshot = Path(self._snapshots.name) / Path(checkpoint_folder).name
        shutil.copytree(checkpoint_folder, snapshot, copy_function=link, ignore=shutil.ignore_patterns(*NEVER))
        if args.hub_strategy == HubStrategy.CHECKPOINT:
            self._unpushed = {"last-checkpoint": snapshot}
        elif args.hub_strategy == HubStrategy.ALL_CHECKPOINTS:
            self._unpushed[snapshot.name] = snapshot
        steps = args.save_strategy == SaveStrategy.STEPS
        at = f"step {self.state.global_step}" if steps else f"epoch {int(self.state.epoch)}"
        message = f"Training in progress, {at}"
        self._push_job = self._pool.submit(self._push_snapshot, snapshot, dict(self._unpushed), message)

    def _push_snapshot(self, snapshot: Path, checkpoints: dict[str, Path], message: str) -> None:
        try:
            self._pushed(self._repo, snapshot, checkpoints, message)
        except PushError as error:
            logger.error(f"{message}: {error} Training goes on; the next push brings what is missing.")
        for pushed in {snapshot, *checkpoints.values()} - set(self._unpushed.values()):
            shutil.rmtree(pushed, ignore_errors=True)

    def _finish_current_push(self) -> None:
        """Waits for the push in the background."""
        if self._push_job is not None:
            self._push_job.exception()  # _pushed has kept it
            self._push_job = None

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        token, self.args.hub_token = self.args.hub_token, None
        try:
            with without_checkpoint_wrappers(self.model):
                super()._save(output_dir, state_dict)
        finally:
            self.args.hub_token = token
