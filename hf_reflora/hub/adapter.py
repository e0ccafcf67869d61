"""Publishing an adapter: its folder is staged, its card made, the files are checked for secrets and uploaded."""

import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from huggingface_hub import CommitInfo
from transformers.utils import logging

from ..report.card import render, with_base
from ..report.front_matter import OwnEntries, check_front_matter, own_entries, read_front_matter
from ..report.ids import is_hub_id
from ..report.licenses import check_license, knows_license
from ..report.record import RunRecord
from ..report.snippet import read_own_tokenizer
from .eval_results import write_eval_results
from .present_card import HubCard, base_in_cards, choose_card, read_hub_card
from .reading import is_there
from .repository import Repo, create_missing, prepare
from .scan import check_files
from .staging import CARD_NAME, NATIVE_FOLDER, PLOT_NAME, read_card, read_record, stage
from .upload import check_card, upload


logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class Push:
    """What a push did."""

    commit: CommitInfo  # the newest one of the branch, if nothing had changed
    repo_id: str
    files: list[str]  # what the adapter's repository is made of, whether it had changed or not
    left_out: list[str]  # what is in the folder and is not published
    kept_card: bool  # somebody has edited the card on the Hub, so that it was kept
    notes: list[str] = field(default_factory=list)  # sentences about the card: what was changed in it and why


def push_adapter(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    token: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    base_model: str | None = None,
    other_base: bool = False,
    license: str | list[str] | None = None,
    language: str | list[str] | None = None,
    tags: Sequence[str] = (),
    replace_card: bool = False,
    message: str = "Upload adapter with hf_reflora",
) -> Push:
    """Pushes a saved adapter to the Hub in one commit: weights, tokenizer, card, run record and plot.

    A LoRA-SB adapter is pushed as the ordinary LoRA that it is equal to, which everybody can load, with its own form
    in `native/`. `folder` is not changed. A second call pushes only what is different, and nothing if everything is
    there. A card that somebody has edited is kept, the one in the folder before the one on the Hub, unless that has
    lines which would be lost; see `hf_reflora.hub.present_card.choose_card`.

    Args:
        folder: Folder of the adapter, such as a trainer's `output_dir` or a checkpoint.
        repo_id, token, private, revision, create_pr, other_base: See `hf_reflora.hub.repository.prepare`.
        base_model: Id of the base model on the Hub, where the files name a local path. Default: what the files say,
            or an earlier push to the same repository of a run on the same local model.
        license, language, tags: For the card, also for one that somebody has edited. Default: what the present card
            or the record says, and the license of the base model. Tags are added to those of the present card.
        replace_card: Replace a card that somebody has edited on the Hub.
        message: Message of the commit, and title of the pull request.

    Raises:
        PushError: with the reason, if it could not be pushed.
        ValueError: no adapter in the folder, broken weights, a record of other weights, a wrong card, or a secret in
            a file (`scan.SecretFound`).
    """
    folder = Path(folder)
    if base_model is not None and not is_hub_id(base_model):
        raise ValueError(f"base_model must be an id on the Hub such as org/model, got {base_model!r}.")
    check_license(license)
    record = read_record(folder, base_model)
    repo = prepare(
        repo_id,
        token=token,
        private=private,
        revision=revision,
        create_pr=create_pr,
        base_model=record.base_model,
        other_base=other_base,
        create=False,  # not before the files have been checked
    )
    record, notes = _with_ids_that_are_there(record, repo, has_base=base_model is not None)
    hub_card = read_hub_card(repo, record)
    if record.base_model is None and not notes and base_in_cards(record, read_card(folder), hub_card) is None:
        notes.append(
            "The adapter's files name no base model that is on the Hub, so that the card and the configuration name "
            "none either. Give its id with base_model (--base-model)."
        )
    done = push_folder(
        folder,
        repo,
        record=record,
        hub_card=hub_card,
        license=license,
        language=language,
        tags=tags,
        replace_card=replace_card,
        message=message,
    )
    return replace(done, notes=[*notes, *done.notes])


def _with_ids_that_are_there(record: RunRecord, repo: Repo, *, has_base: bool) -> tuple[RunRecord, list[str]]:
    """The record without names that look like an id and are none on the Hub, and sentences about them.

    A name without a slash, such as gpt2, may be an id or a path, and so may any name in an adapter's configuration.
    What a run has recorded with a slash is an id, because the run would have found a folder of that name.

    Args:
        has_base: The user has named the base model.
    """
    notes: list[str] = []
    entries: dict[str, None] = {}
    base, dataset = record.base_model, record.dataset_id
    if base and not has_base and not (record.is_of_run and "/" in base) and not is_there(repo, base, "model"):
        entries["base_model"] = None
        notes.append(
            f"{base} is no model on the Hub that you can see, so that the card and the configuration name no base "
            "model. If it is a local copy of one, name that with base_model (--base-model)."
        )
    if dataset and "/" not in dataset and not is_there(repo, dataset, "dataset"):
        entries["dataset_id"] = None
    return (RunRecord.from_dict({**record.to_dict(), **entries}) if entries else record), notes


def push_folder(
    folder: Path,
    repo: Repo,
    *,
    record: RunRecord,
    hub_card: HubCard,
    card_is_current: bool = False,
    checkpoints: dict[str, Path] | None = None,
    license: str | list[str] | None = None,
    language: str | list[str] | None = None,
    tags: Sequence[str] = (),
    replace_card: bool = False,
    message: str = "Upload adapter with hf_reflora",
) -> Push:
    """Pushes a saved adapter to a repository that `prepare` has checked. Every push of the package goes this way.

    Args:
        folder: Folder of the adapter.
        repo: See `hf_reflora.hub.repository.prepare`.
        record: The adapter's record.
        hub_card: See `read_hub_card`.
        card_is_current: The folder's card was rendered from this record for this repository. It is taken as it is,
            except for a LoRA-SB adapter, because on the Hub that is an ordinary LoRA.
        checkpoints: Folders of checkpoints that are pushed along, by their names on the Hub.
        license, language, tags, replace_card, message: As for `push_adapter`.

    Raises:
        PushError: with the reason, if it could not be pushed.
        ValueError: no adapter in the folder, a wrong card, or a secret in a file (`scan.SecretFound`).
    """
    own = read_card(folder)
    if base_model := base_in_cards(record, own, hub_card):
        record = with_base(record, base_model)
    with tempfile.TemporaryDirectory(prefix="hf_reflora-") as temporary:
        staged = Path(temporary) / "adapter"
        left_out = stage(folder, staged, record=record, checkpoints=checkpoints or {})
        if left_out:
            logger.warning(f"Not published, because it belongs to no adapter: {', '.join(left_out)}.")
        exported = (staged / NATIVE_FOLDER).exists()
        wishes = OwnEntries(license, list(language) if isinstance(language, tuple) else language, list(tags))
        card = choose_card(own, hub_card, record, wishes, replace_card=replace_card)
        if card.text is not None:
            text = card.text
        elif card_is_current and not exported:
            text = own
        else:
            entries = wishes.over(own_entries(own))
            text = _rendered(record, repo.id, folder, staged, hub_card, entries)
        check_front_matter(text)
        write_eval_results(staged, record)
        (staged / CARD_NAME).unlink(missing_ok=True)  # it may be a hard link, and writing would change the original
        if not card.is_hubs or card.is_changed:
            (staged / CARD_NAME).write_text(text, encoding="utf-8", newline="\n")
        files = sorted(path for path in staged.rglob("*") if path.is_file())
        check_files(staged, files, {"the token in use": str(repo.api.token or "")})
        if not knows_license(read_front_matter(text).get("license")):
            check_card(repo, text)
        commit = upload(create_missing(repo), staged, message)
        names = [f.relative_to(staged).as_posix() for f in files]
        return Push(commit, repo.id, names, left_out, card.is_hubs, card.notes)


def _rendered(
    record: RunRecord, repo_id: str, folder: Path, staged: Path, hub_card: HubCard, entries: OwnEntries
) -> str:
    """The card of the record for the files in `staged`, with a person's entries before the record's and the Hub's."""
    of_record = OwnEntries(record.card.get("license"), record.card.get("language"))
    exported = (staged / NATIVE_FOLDER).exists()
    return render(
        record,
        repo_id=repo_id,
        plot=PLOT_NAME if (staged / PLOT_NAME).exists() else None,
        exported=exported,
        native_folder=NATIVE_FOLDER if exported else None,
        tokenizer=read_own_tokenizer(folder),  # not of `staged`, which no longer names a base model in a folder
        **vars(entries.over(of_record).over(hub_card.entries)),
    )
