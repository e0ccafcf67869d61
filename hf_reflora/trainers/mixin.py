"""`AdapterTrainerMixin`: what makes a Trainer resume safely after a kill, record its run and publish it well."""

import functools
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate.utils import gather_object
from huggingface_hub import CommitInfo
from peft import PeftModel
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy, SaveStrategy
from transformers.utils import logging

from ..distributed.backend import check_saving
from ..distributed.parameters import without_checkpoint_wrappers
from ..hub.adapter import HubCard, read_hub_card
from ..hub.repository import Repo, prepare
from ..hub.retry import PushError
from ..hub.staging import CARD_NAME, PLOT_NAME
from ..report.card import render
from ..report.edits import is_edited
from ..report.environment import write_text
from ..report.failures import log_errors
from ..report.front_matter import OwnEntries, own_entries
from ..report.ids import hub_id
from ..report.plot import plot
from ..report.record import RunRecord
from ..report.recorder import RunRecordCallback, dataset_facts
from ..report.snippet import read_own_tokenizer
from .background_push import BackgroundPushes
from .card_arguments import record_entries
from .checkpoints import begin_checkpoint, check_adapter, check_state, checkpoint_to_resume, rotate


# A type checker must know whose methods the mixin calls; at run time the Trainer comes from the list of bases.
if TYPE_CHECKING:
    from transformers import Trainer as _Base
else:
    _Base = object

logger = logging.get_logger(__name__)


class AdapterTrainerMixin(_Base):
    """For a `Trainer` of adapters, before it in the list of bases. The trainers of hf_reflora have it.

    Checkpoints. A run that was killed at any moment goes on where it was:

    - `train(resume_from_checkpoint=True)` (or "true", as a command line says it) takes the last checkpoint in
      `output_dir` that is complete, on several processes the last that is complete for all of them. Where there is
      none yet, training starts from the beginning, and says so. See `hf_reflora.trainers.checkpoints`;
    - a run that was killed after its last step takes no further step;
    - a stream that ended and was read again goes on in the right pass of it;
    - an adapter in 16 bits stays so, where PEFT would load it in float32;
    - `save_total_limit` counts complete checkpoints only, and incomplete ones are removed with the surplus.

    Publishing:

    - a `RunRecordCallback` is added, unless one is in `callbacks`. Each save of the model writes its record beside it,
      one into `output_dir` also a plot and a card;
    - everything is pushed by `hf_reflora.hub.adapter`: in one commit, tried again until it is there, without
      `training_args.bin`, a LoRA-SB adapter as an ordinary LoRA. With `push_to_hub=True` token, name and permission
      are checked when the trainer is made. Pushes in the background follow `hub_strategy`; what failed of them is
      pushed again when training ends, and if that fails, too, `train` raises a `PushError`, after saving;
    - `hub_token` is not in the `training_args.bin` that it saves.

    Raises:
        ValueError: by `train`, for the path of a checkpoint that is not complete, for a checkpoint of another adapter
            than the model's or of `save_only_model=True`; or where other processes see the complete checkpoints in
            `output_dir` and this one does not.

    Example:
        >>> class MyTrainer(AdapterTrainerMixin, DPOTrainer): ...
    """

    _tag_names: list[str] = []

    def __init__(self, *args, callbacks: list | None = None, **kwargs):
        callbacks = [c() if c is RunRecordCallback else c for c in callbacks or []]
        if not any(isinstance(c, RunRecordCallback) for c in callbacks):
            callbacks.append(RunRecordCallback())
        self.run_record: RunRecordCallback = next(c for c in callbacks if isinstance(c, RunRecordCallback))
        # The rows as the user gave them: TRL tokenizes and packs its train_dataset.
        known = {**dataset_facts(kwargs.get("train_dataset")), **self._record_facts(callbacks)}
        self.run_record.facts = {"tags": list(self._tag_names), **known, **self.run_record.facts}
        self._repo: Repo | None = None
        self._hub_card = HubCard()
        self._save_limit: int | None = None  # save_total_limit while a checkpoint is saved
        self._saving_checkpoint = False
        super().__init__(*args, callbacks=callbacks, **kwargs)
        self._pushes = BackgroundPushes(self.args.output_dir)
        check_saving(self.accelerator.state)

    def _record_facts(self, callbacks: list) -> dict[str, str]:
        """The fields of the run record that the kind of trainer tells, such as the method."""
        return {}

    # Checkpoints

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs):
        checkpoint = checkpoint_to_resume(resume_from_checkpoint, self.args)
        if isinstance(checkpoint, str | os.PathLike):
            self._check_adapter(checkpoint)
            check_state(checkpoint)
            self.run_record.resumed_from = checkpoint
        output = super().train(checkpoint, *args, **kwargs)
        # Only the main process pushes, and all processes have to save before it can push again.
        if any(gather_object([self._pushes.error is not None])):
            self.push_to_hub(commit_message="Training finished")
        return output

    def _check_adapter(self, checkpoint: str | os.PathLike) -> None:
        check_adapter(checkpoint, self.model)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None) -> None:
        # PEFT makes adapters in 16 bits float32 when it loads them. TRL's for quantized models are bfloat16, and a
        # resumed run has to go on in the dtype of the unbroken one.
        dtypes = {name: p.dtype for name, p in self.model.named_parameters() if p.requires_grad}
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        for name, parameter in self.model.named_parameters():
            if parameter.dtype != dtypes.get(name, parameter.dtype):
                parameter.data = parameter.data.to(dtypes[name])

    def _init_training_state(self, max_steps, steps_in_epoch, num_train_epochs, *args, **kwargs) -> tuple[int, int]:
        epochs, batches = super()._init_training_state(max_steps, steps_in_epoch, num_train_epochs, *args, **kwargs)
        # A stream has no length. transformers then takes all steps for one epoch of many, and skips as many batches
        # as were trained. A stream that ends earlier was read several times, and the checkpoint's epoch says how far:
        # n.25 is a quarter of all batches into pass n.
        if num_train_epochs == sys.maxsize and batches and self.state.epoch:
            epochs = int(self.state.epoch)
            batches = round((self.state.epoch - epochs) * max_steps * self.args.gradient_accumulation_steps)
        return epochs, batches

    def _run_epoch(self, *args, **kwargs) -> None:
        # Resumed from the checkpoint of its last step, a Trainer would take one step more.
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        # As in _run_epoch, which transformers has since 5.3: before, its only door to the epoch is this method.
        if not hasattr(super(), "_run_epoch") and self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return [], None
        return super().get_batch_samples(epoch_iterator, num_batches, device)

    def _save_checkpoint(self, model, trial) -> None:
        args, run_dir = self.args, Path(self._get_output_dir(trial=trial))
        folder = run_dir / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if args.should_save:
            begin_checkpoint(folder)
        self.accelerator.wait_for_everyone()  # no process overwrites anything before the folder counts as incomplete
        self._saving_checkpoint, self._save_limit = True, args.save_total_limit
        try:
            with _changed(args, save_total_limit=None):  # so that transformers does not rotate, which is done below
                super()._save_checkpoint(model, trial)
        finally:
            self._saving_checkpoint, self._save_limit = False, None
        if args.should_save and args.save_total_limit is not None and args.save_total_limit > 0:
            rotate(run_dir, args.save_total_limit, keep=[folder, self.state.best_model_checkpoint])

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()  # the main process writes trainer_state.json next, which must be the last

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        # For training_args.bin: with the limit that the user has set, without the token. PEFT does not recognize the
        # adapter's parameters by their names inside the wrappers of FSDP's activation checkpointing.
        limit = self.args.save_total_limit or self._save_limit
        with _changed(self.args, save_total_limit=limit, hub_token=None), without_checkpoint_wrappers(self.model):
            super()._save(output_dir, state_dict)

    # Record, plot and card

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        pushes = self.args.push_to_hub and not _internal_call
        is_output_dir = output_dir is None or Path(output_dir).resolve() == Path(self.args.output_dir).resolve()
        if pushes and is_output_dir:
            self.push_to_hub(commit_message="Model save")  # saves, too, when it knows what the Hub adds to the card
            return
        super().save_model(output_dir, _internal_call=True)
        # The weights come first: what describes them can fail, and a failure is only logged.
        folder = output_dir or self.args.output_dir
        is_adapter = isinstance(self.model, PeftModel)  # and not a merged model that somebody has put into the trainer
        if self._saving_checkpoint:
            # Before trainer_state.json, by which the checkpoint counts as complete.
            self.run_record.write_checkpoint(folder)
        elif is_adapter and is_output_dir:
            # After super(), because PEFT rewrites README.md when it saves the adapter.
            self._describe_output_dir(self.run_record.write_together)
        elif is_adapter:
            with log_errors(f"The run record of {folder} could not be written"):
                self.run_record.write_together(folder)
        if pushes:
            self.push_to_hub(commit_message="Model save")

    def call_model_init(self, trial=None):
        # `model_init` makes a model for each training; what the user has tagged is the first one.
        model = super().call_model_init(trial)
        tags = getattr(getattr(self, "model", None), "model_tags", None)
        if tags and hasattr(model, "add_model_tags"):
            model.add_model_tags(list(tags))
        return model

    def create_model_card(
        self,
        model_name: str | None = None,
        dataset_name: str | None = None,
        tags: str | Sequence[str] | None = None,
        **more: Any,
    ) -> None:
        """Writes run record, plot and model card into `output_dir`, on the main process.

        It takes the arguments of `create_model_card` of TRL's trainers and, by name, those of transformers'. What is
        given here also holds for all later cards of this run. A failure to write is logged.

        Args:
            model_name: The card's title before it is on the Hub. Default: the base model and the method.
            dataset_name: Id of the dataset on the Hub. Default: what the dataset knows of itself.
            tags: Further tags; those of `model.add_model_tags` are added, too.
            license: Hub license id. Default: none here; the base model's when it is pushed.
            language: Language code or codes.
            finetuned_from: Name of the base model. Default: what the adapter's configuration names.
            tasks: The Hub's pipeline tag, of a list the first. Default: what the adapter's task type tells.
            dataset: Name of the training data for people. Default: `dataset_name`.
            dataset_tags: Id or ids of the training data on the Hub. Default: `dataset_name`.
            dataset_args: Configuration of the training data. Default: what the dataset knows of itself.

        Raises:
            TypeError: for another argument.
            ValueError: for a license that is neither an id nor a list of ids.
        """
        # TRL's trainers call it at every checkpoint, with the folder's name as the title. But output_dir has no
        # adapter at that time, or an older one, which a record would not describe.
        if self._saving_checkpoint or not self.is_world_process_zero():
            return
        self._note_for_card(model_name, dataset_name, tags, **more)
        self._describe_output_dir(self.run_record.write)

    def _note_for_card(self, *args: Any, **more: Any) -> None:
        """Notes in the record what the user wants in the card; see `create_model_card`."""
        facts, card = record_entries(*args, **more)
        self.run_record.facts |= facts  # they also hold when training starts with another model (model_init)
        self.run_record.update(**facts)
        noted = self.run_record.record.card.get("tags", [])
        of_model = [tag for tag in getattr(self.model, "model_tags", None) or [] if tag not in self._tag_names]
        tags = list(dict.fromkeys([*noted, *of_model, *card.get("tags", [])]))
        self.run_record.update(card=card | ({"tags": tags} if tags else {}))

    def _describe_output_dir(self, write: Callable[[str], RunRecord]) -> None:
        """Writes record, plot and card into `output_dir`. An error is logged: the weights are there already."""
        folder, record, has_plot = Path(self.args.output_dir), None, False
        with log_errors(f"The run record in {folder} could not be written"):
            record = write(self.args.output_dir)
        if record is None or not self.is_world_process_zero():
            return
        with log_errors(f"The plot {folder / PLOT_NAME} could not be drawn"):
            has_plot = plot(record, folder / PLOT_NAME)
        with log_errors(f"The model card {folder / CARD_NAME} could not be written"):
            self._write_card(record, has_plot)

    def _write_card(self, record: RunRecord, has_plot: bool) -> None:
        """Writes the card of the record that is in `output_dir`."""
        path = Path(self.args.output_dir) / CARD_NAME
        present = path.read_text(encoding="utf-8") if path.exists() else ""
        if is_edited(present):
            logger.warning(f"{path} was edited by hand and is kept. Remove it to get a new one.")
            return
        wishes = OwnEntries(record.card.get("license"), record.card.get("language"), record.card.get("tags", []))
        # What a person has written into the front matter of the card that is there stays.
        entries = wishes.over(own_entries(present)).over(self._hub_card.entries)
        text = render(
            record,
            repo_id=self.hub_model_id,
            plot=PLOT_NAME if has_plot else None,
            tokenizer=read_own_tokenizer(path.parent),
            **vars(entries),
        )
        write_text(path, text)

    # Pushes

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Checks token, name and permission, and creates the repository if there is none; see `prepare`.

        Raises:
            PushError: with the reason.
        """
        self.push_in_progress = None  # transformers' own pushes, of which there are none
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
            blocking: Wait for the upload; otherwise a `Future` of it is returned.
            token, revision, private: Default: `hub_token`, `hub_revision` and `hub_private_repo`.
            create_pr: Propose a pull request instead of a commit to the branch.
            other_base: Accept a repository that holds an adapter of another base model.
            card: Arguments of `create_model_card`, such as `license` and `dataset_name`.

        Returns:
            The commit (on the main process), the newest one if nothing had changed.

        Raises:
            PushError: with the reason, and the command that finishes the push if the upload failed.
            TypeError, ValueError: for wrong arguments of `create_model_card`.

        The adapter is saved in any case.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        repo: Repo | None = None
        error: Exception | None = None
        # What goes wrong before saving is raised after it: a script that ends with push_to_hub has saved nothing yet.
        try:
            self._note_for_card(**card)
        except (TypeError, ValueError) as failure:
            error = failure
        if error is None and self.is_world_process_zero():
            self._finish_current_push()
            # Before saving, because the card needs the repository's name and what the Hub knows: a license, tags.
            try:
                repo = self._prepare(token, revision, private, create_pr=create_pr, other_base=other_base)
                self.hub_model_id = repo.id
                self._hub_card = read_hub_card(repo, self.run_record.record)
            except PushError as failure:
                error = failure  # the other processes are waiting in save_model
        self.save_model(_internal_call=True)
        if error is not None:
            raise error
        if repo is None:
            return None
        push = functools.partial(
            self._pushes.push,
            repo,
            Path(self.args.output_dir),
            commit_message or "End of training",  # the Hub refuses a commit without a message
            hub_card=self._hub_card,
            card_is_current=True,
        )
        return push() if blocking else self._pushes.submit(push)

    def _prepare(self, token=None, revision=None, private=None, **options) -> Repo:
        args, config = self.args, getattr(self.model, "active_peft_config", None)
        # PEFT saves an adapter of another name in a folder of that name, and whoever loads the repository would get
        # the one called "default", or none.
        name = next(iter(getattr(self.model, "active_adapters", [])), "default")
        if name != "default":
            command = ["hf-reflora", "push", Path(args.output_dir, name).as_posix(), args.hub_model_id or name]
            raise PushError(
                f"The trained adapter is called {name!r}, and a repository shows the one called 'default'. Push the "
                f"folder of that name when it is saved: {shlex.join(command)}"
            )
        # Not from the record, which knows it only when the trainer is made.
        base_model = self.run_record.facts.get("base_model", hub_id(getattr(config, "base_model_name_or_path", None)))
        return prepare(
            args.hub_model_id or Path(args.output_dir).absolute().name,
            token=token or args.hub_token,
            private=args.hub_private_repo if private is None else private,
            revision=revision or args.hub_revision,
            base_model=base_model,
            **options,
        )

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Called by a Trainer with `push_to_hub=True` when it has saved a checkpoint."""
        args = self.args
        # `init_hf_repo` has prepared the repository, on the main process only.
        if self._repo is None or args.hub_strategy == HubStrategy.END:
            return
        if self._pushes.busy and not args.hub_always_push:
            return
        self.callback_handler.on_push_begin(args, self.state, self.control)
        steps = args.save_strategy == SaveStrategy.STEPS
        at = f"step {self.state.global_step}" if steps else f"epoch {int(self.state.epoch)}"
        message = f"Training in progress, {at}"
        self._pushes.push_checkpoint(self._repo, Path(checkpoint_folder), args.hub_strategy, message)

    def _finish_current_push(self) -> None:
        """Called by a Trainer when training ends: waits for the push in the background."""
        self._pushes.wait()


@contextmanager
def _changed(args: Any, **values: Any) -> Iterator[None]:
    """Within it the attributes of `args` have other values."""
    original = {name: getattr(args, name) for name in values}
    for name, value in values.items():
        setattr(args, name, value)
    try:
        yield
    finally:
        for name, value in original.items():
            setattr(args, name, value)
