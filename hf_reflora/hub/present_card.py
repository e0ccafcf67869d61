"""The cards that are there when an adapter is pushed, in its folder and on the Hub, and which of them stays."""

from dataclasses import dataclass, field

from ..report.edits import headings, is_edited, is_kept, lost_lines
from ..report.front_matter import OwnEntries, mended, own_entries, read_front_matter
from ..report.generated import library_of
from ..report.record import RunRecord
from .repository import Repo
from .staging import CARD_NAME
from .upload import license_of, read_text


@dataclass(frozen=True)
class HubCard:
    """The present card of a repository, as far as it matters for the next one."""

    text: str = ""  # "" if there is none
    # What a new card takes over: the entries that a person has written, and the license of the base model if the
    # card has none.
    entries: OwnEntries = field(default_factory=OwnEntries)


@dataclass(frozen=True)
class ChosenCard:
    """The card that stays."""

    text: str | None = None  # None: no person has written one, so that a card is rendered
    is_hubs: bool = False  # it is the one on the Hub
    is_changed: bool = False  # in its front matter
    notes: list[str] = field(default_factory=list)  # sentences for the user: what was changed, and what was not taken


def read_hub_card(repo: Repo, base_model: str | None) -> HubCard:
    """Reads from the Hub what a card for `repo` needs. Without a license there, it is the base model's.

    Raises:
        PushError: the repository could not be read.
    """
    text = read_text(repo, CARD_NAME) or ""
    try:
        entries = own_entries(text)
    except ValueError:  # then it counts as edited and stays as it is
        return HubCard(text)
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


def base_in_cards(record: RunRecord, own: str, hub_card: HubCard) -> str | None:
    """The base model that a person has named in the cards, if the record knows none on the Hub."""
    named = own_entries(own).over(hub_card.entries).more.get("base_model")
    # PEFT, too, writes a name into the card: the one by which the model was loaded.
    return named if record.base_model is None and isinstance(named, str) and named != record.model else None
