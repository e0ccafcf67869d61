"""Publishing an adapter: its folder is staged, its card made, the files are checked for secrets and uploaded."""

import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from huggingface_hub import CommitInfo
from transformers.utils import logging

from ..report.card import render
from ..report.edits import is_edited
from ..report.front_matter import LICENSES, OwnEntries, check_front_matter, own_entries
from ..report.ids import is_hub_id
from ..report.record import RunRecord
from .repository import Repo, prepare
from .scan import check_files
from .staging import CARD_NAME, NATIVE_FOLDER, PLOT_NAME, read_card, read_record, stage
from .upload import license_of, read_text, upload


logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class Push:
    """What a push did."""

    commit: CommitInfo  # the newest one of the branch, if nothing had changed
    repo_id: str
    files: list[str]  # what the adapter's repository is made of, whether it had changed or not
    left_out: list[str]  # what is in the folder and is not published
    kept_card: bool  # somebody has edited the card on the Hub, so that it was kept


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
    license: str | None = None,
    language: str | list[str] | None = None,
    tags: Sequence[str] = (),
    message: str = "Upload adapter with hf_reflora",
) -> Push:
    """Pushes a saved adapter to the Hub in one commit: weights, tokenizer, card, run record and plot.

    A LoRA-SB adapter is pushed as the ordinary LoRA that it is equal to, which everybody can load, with its own form
    in `native/`. `folder` is not changed. A second call pushes only what is different, and nothing if everything is
    there. A card that somebody has edited is kept, the one in the folder before the one on the Hub.

    Args:
        folder: Folder of the adapter, such as a trainer's `output_dir` or a checkpoint.
        repo_id, token, private, revision, create_pr, other_base: See `hf_reflora.hub.repository.prepare`.
        base_model: Id of the base model on the Hub, where the files name a local path. Default: what the files say.
        license, language, tags: For the card. Default: what the present card or the record says, and the license of
            the base model. Tags are added to those of the present card.
        message: Message of the commit, and title of the pull request.

    Raises:
        PushError: with the reason, if it could not be pushed.
        ValueError: no adapter in the folder, broken weights, a record of other weights, a wrong card, or a secret in
            a file (`scan.SecretFound`).
    """
    folder = Path(folder)
    if base_model is not None and not is_hub_id(base_model):
        raise ValueError(f"base_model must be an id on the Hub such as org/model, got {base_model!r}.")
    record = read_record(folder, base_model)
    repo = prepare(
        repo_id,
        token=token,
        private=private,
        revision=revision,
        create_pr=create_pr,
        base_model=record.base_model,
        other_base=other_base,
    )
    return push_folder(
        folder,
        repo,
        record=record,
        hub_card=read_hub_card(repo, record.base_model),
        license=license,
        language=language,
        tags=tags,
        message=message,
    )


@dataclass(frozen=True)
class HubCard:
    """The present card of a repository, as far as it matters for the next one."""

    edited: bool = False  # somebody has edited it, so that it is kept
    # What a new card takes over: license (or else that of the base model), language, tags.
    entries: OwnEntries = field(default_factory=OwnEntries)


def read_hub_card(repo: Repo, base_model: str | None) -> HubCard:
    """Reads from the Hub what a card for `repo` needs. Without a license there, it is the base model's.

    Raises:
        PushError: the repository could not be read.
    """
    text = read_text(repo, CARD_NAME) or ""
    if is_edited(text):
        return HubCard(edited=True)
    entries = own_entries(text)
    if entries.license is None and base_model is not None:
        license = license_of(repo, base_model)
        entries = replace(entries, license=license if license in LICENSES else None)
    return HubCard(entries=entries)


def push_folder(
    folder: Path,
    repo: Repo,
    *,
    record: RunRecord,
    hub_card: HubCard,
    card_is_current: bool = False,
    checkpoints: dict[str, Path] | None = None,
    license: str | None = None,
    language: str | list[str] | None = None,
    tags: Sequence[str] = (),
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
        license, language, tags, message: As for `push_adapter`.

    Raises:
        PushError: with the reason, if it could not be pushed.
        ValueError: no adapter in the folder, a wrong card, or a secret in a file (`scan.SecretFound`).
    """
    own = read_card(folder)
    kept_card = hub_card.edited and not is_edited(own)
    with tempfile.TemporaryDirectory(prefix="hf_reflora-") as temporary:
        staged = Path(temporary) / "adapter"
        left_out = stage(folder, staged, record=record, checkpoints=checkpoints or {})
        if left_out:
            logger.warning(f"Not published, because it belongs to no adapter: {', '.join(left_out)}.")
        exported = (staged / NATIVE_FOLDER).exists()
        if is_edited(own):
            check_front_matter(own)
        elif not kept_card:
            here, there = own_entries(own), hub_card.entries
            text = (
                own
                if card_is_current and not exported
                else render(
                    record,
                    repo_id=repo.id,
                    plot=PLOT_NAME if (staged / PLOT_NAME).exists() else None,
                    exported=exported,
                    native_folder=NATIVE_FOLDER if exported else None,
                    license=license or here.license or record.card.get("license") or there.license,
                    language=language or here.language or record.card.get("language") or there.language,
                    tags=[*here.tags, *there.tags, *tags],
                )
            )
            (staged / CARD_NAME).write_text(text, encoding="utf-8", newline="\n")
        files = sorted(path for path in staged.rglob("*") if path.is_file())
        check_files(staged, files, {"the token in use": str(repo.api.token or "")})
        commit = upload(repo, staged, message)
        return Push(commit, repo.id, [f.relative_to(staged).as_posix() for f in files], left_out, kept_card)
