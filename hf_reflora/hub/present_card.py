"""The cards that are there when an adapter is pushed, in its folder and on the Hub, and which of them stays."""

import json
from dataclasses import dataclass, field

from ..report.edits import headings, is_edited, is_kept, lost_lines
from ..report.front_matter import OwnEntries, mended, own_entries, read_front_matter
from ..report.generated import library_of
from ..report.ids import is_hub_id
from ..report.record import RECORD_NAME, RunRecord
from .reading import license_of, read_text
from .repository import Repo
from .staging import CARD_NAME


@dataclass(frozen=True)
class HubCard:
    """The present card of a repository, as far as it matters for the next one."""

    text: str = ""  # "" if there is none
    # What a new card takes over: the entries that a person has written, the license of the base model if the card has
    # none, and the base model that an earlier push has named for the same local copy.
    entries: OwnEntries = field(default_factory=OwnEntries)


@dataclass(frozen=True)
class ChosenCard:
    """The card that stays."""

    text: str | None = None  # None: no person has written one, so that a card is rendered
    is_hubs: bool = False  # it is the one on the Hub
    is_changed: bool = False  # in its front matter
    notes: list[str] = field(default_factory=list)  # sentences for the user: what was changed, and what was not taken


def read_hub_card(repo: Repo, record: RunRecord) -> HubCard:
    """Reads from the Hub what a card of `record` for `repo` needs. Without a license there, it is the base model's.

    Raises:
        PushError: the repository could not be read.
    """
    text, base_model = read_text(repo, CARD_NAME) or "", record.base_model
    try:
        entries = own_entries(text)
    except ValueError:  # then it counts as edited and stays as it is
        return HubCard(text)
    if base_model is None and (base_model := _base_of_earlier_push(repo, record, text)):
        entries = entries.over(OwnEntries(more={"base_model": base_model}))
    if entries.license is None and base_model is not None and not is_edited(text):
        entries = entries.over(license_of(repo, base_model))
    return HubCard(text, entries)


def choose_card(
    own: str, hub_card: HubCard, record: RunRecord, wishes: OwnEntries, *, replace_card: bool = False
) -> ChosenCard:
    """Which card stays: the folder's before the Hub's, but no text that a person has written on the Hub is lost.

    Args:
        own: The folder's card, "" if it has none.
        hub_card: The card on the Hub.
        record: The adapter's record.
        wishes: License, language and tags that the user has given. They are written into a card that stays, too.
        replace_card: The card on the Hub does not count.

    Raises:
        ValueError: the front matter of a card that stays cannot be read.
    """
    hubs = "" if replace_card else hub_card.text
    keeps_own, keeps_hub = (is_kept(text, has_record=record.is_of_run) for text in (own, hubs))
    notes = []
    if keeps_own and is_edited(hubs) and (lost := lost_lines(hubs, own)):
        keeps_own = False
        if is_edited(own):
            notes.append(
                f"{CARD_NAME} on the Hub is kept, and the one in the folder is not pushed, because it lacks "
                f"lines that somebody has written there, under {headings(lost, hubs)}. Copy them, or replace the card "
                "on the Hub with replace_card=True (--replace-card)."
            )
    if not keeps_own and not keeps_hub:
        return ChosenCard()
    text = own if keeps_own else hubs
    present = read_front_matter(text)
    wanted, changes = mended(
        text,
        base_model=record.base_model,
        is_librarys=library_of(text) is not None,
        license=wishes.license or (record.card.get("license") if "license" not in present else None),
        language=wishes.language or (record.card.get("language") if "language" not in present else None),
        tags=wishes.tags,
    )
    notes += [f"In {CARD_NAME}, {change}." for change in changes]
    return ChosenCard(wanted, not keeps_own, wanted != text, notes)


def _base_of_earlier_push(repo: Repo, record: RunRecord, card: str) -> str | None:
    """The base model in the present card, if the record beside it is of a run on the same local model.

    A run on a local copy does not know the copy's id, which its first push was told by `base_model`.
    """
    base_model = read_front_matter(card).get("base_model")
    if not is_hub_id(base_model):
        return None
    try:
        present = RunRecord.from_dict(json.loads(read_text(repo, RECORD_NAME) or "null"))
    except ValueError:  # none, or not ours
        return None
    return base_model if present.model == record.without_secrets().model else None


def base_in_cards(record: RunRecord, own: str, hub_card: HubCard) -> str | None:
    """The base model that a person has named in the cards or at an earlier push, if the record knows none."""
    named = own_entries(own).over(hub_card.entries).more.get("base_model")
    # PEFT, too, writes a name into the card: the one by which the model was loaded.
    return named if record.base_model is None and isinstance(named, str) and named != record.model else None
