"""The front matter of a model card: which entries are a person's own, what the Hub accepts, and how it is mended."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml
from huggingface_hub import ModelCard
from huggingface_hub.utils import yaml_dump

from .ids import is_hub_id
from .licenses import is_license
from .methods import METHODS
from .tasks import PIPELINE_TAGS


# A byte order mark and blank lines may stand before it, as the Hub and huggingface_hub allow.
BLOCK = re.compile(r"\A(\ufeff?\s*---[ \t]*\r?\n)(.*?)(?<=\n)(---[ \t]*(?:\r?\n|\Z))", re.S)
# Entries that a rendered card has, each with its own rule for what is taken over from the card before it.
RENDERED_ENTRIES = {
    *("base_model", "base_model_relation", "language", "library_name", "license", "model-index", "pipeline_tag"),
    "tags",
}
# What PEFT, transformers and TRL write of themselves; another value is a person's.
LIBRARY_ENTRIES = {"library_name": ("peft", "transformers"), "pipeline_tag": ("text-generation",)}
# Tags that a library adds. With those of the methods they are not the user's.
LIBRARY_TAGS = {"sft", "trl", "transformers", "generated_from_trainer", "peft"}
LICENSE_ENTRIES = ("license_name", "license_link")
MARKED = "<!-- rendered by hf_reflora"  # in a card of ours, see `hf_reflora.report.edits.signed`
OURS = (" (with the adapter)", " (base model)")  # how the names of our own results end


class _Loader(yaml.SafeLoader):
    """Reads YAML 1.2, as the Hub does: in 1.1 the language `no`, Norwegian, is a false, and a date no text."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in rules if not tag.endswith((":bool", ":timestamp"))]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile("true|True|TRUE|false|False|FALSE"), list("tTfF"))


@dataclass(frozen=True)
class OwnEntries:
    """The entries of a card's front matter that no run record knows, because a person has written them."""

    license: str | list[str] | None = None
    language: str | list[str] | None = None
    tags: list[str] = field(default_factory=list)
    more: dict[str, Any] = field(default_factory=dict)  # every further entry: datasets, license_link, widget, …

    def over(self, other: "OwnEntries") -> "OwnEntries":
        """These entries, and those of `other` that are missing here; tags and datasets of both."""
        theirs = dict(other.more)
        if self.license is not None:  # the name and the link of another license say nothing about this one
            theirs = {name: value for name, value in theirs.items() if name not in LICENSE_ENTRIES}
        more = {**theirs, **self.more}
        if datasets := _union(self.more.get("datasets", []), other.more.get("datasets", [])):
            more["datasets"] = datasets
        return OwnEntries(
            license=self.license or other.license,
            language=self.language or other.language,
            tags=_union(self.tags, other.tags),
            more=more,
        )


def split_card(card: str) -> tuple[str, str]:
    """The YAML of a card's front matter, "" if it has none, and the text below it."""
    block = BLOCK.match(card)
    return (block[2], card[block.end() :]) if block else ("", card)


def read_front_matter(card: str) -> dict[str, Any]:
    """The front matter of a card as a dictionary, {} if it has none.

    Raises:
        ValueError: it is not YAML.
    """
    try:
        data = yaml.load(split_card(card)[0], _Loader)
    except yaml.YAMLError as error:
        raise ValueError(
            "The card has no front matter that can be read, between the two lines `---` at the top of README.md: "
            + " ".join(str(error).split())
        ) from error
    return data if isinstance(data, dict) else {}


def own_entries(card: str) -> OwnEntries:
    """What a person may have written into the front matter of a card, without what a library or we have added.

    Datasets that are no ids, and results of the model index that we have rendered, are left out.

    Raises:
        ValueError: the front matter is not YAML.
    """
    data = read_front_matter(card)
    if data.get("licence") == "license":  # TRL's cards have this misspelt dummy, and their title as model_name
        data = {name: value for name, value in data.items() if name not in ("licence", "model_name")}
    added = LIBRARY_TAGS | {tag for method in METHODS.values() for tag in method.tags}
    more = {name: value for name, value in data.items() if name not in RENDERED_ENTRIES and value is not None}
    more |= {name: data[name] for name, usual in LIBRARY_ENTRIES.items() if data.get(name) not in (None, "", *usual)}
    # Our own text links the record's dataset and base model, and its task is ours, too. They need not be the next
    # record's.
    ours = split_card(card)[1] if MARKED in card else ""
    if ours and more.get("pipeline_tag") in PIPELINE_TAGS:
        del more["pipeline_tag"]
    if "datasets" in more:
        names = [name for name in _listed(more["datasets"]) if is_hub_id(name)]
        more["datasets"] = [name for name in names if f"(https://huggingface.co/datasets/{name})" not in ours]
    if names := [name for name in _listed(data.get("base_model")) if is_hub_id(name)]:
        if len(names) > 1 or f"(https://huggingface.co/{names[0]})" not in ours:
            more["base_model"] = data["base_model"] if len(names) > 1 else names[0]
    if results := _results_of_others(data.get("model-index")):
        more["model-index"] = results
    license = data.get("license")
    return OwnEntries(
        license=license if is_license(license) else None,
        language=data.get("language") or None,
        tags=[t for t in _listed(data.get("tags")) if t not in added and not t.startswith("base_model:")],
        more={name: value for name, value in more.items() if value not in ([], "")},
    )


def _results_of_others(models: Any) -> list[dict[str, Any]]:
    """The models of a model index with the results that are not ours: a person's, or of a leaderboard's bot."""
    others = []
    for model in models if isinstance(models, list) else []:
        results = model.get("results") if isinstance(model, dict) else None
        results = [result for result in results or [] if isinstance(result, dict) and not _is_ours(result)]
        if results:
            others.append({**model, "results": results})
    return others


def _is_ours(result: dict[str, Any]) -> bool:
    metrics = result.get("metrics")
    names = [metric.get("name") for metric in metrics or [] if isinstance(metric, dict)]
    return bool(names) and all(isinstance(name, str) and name.endswith(OURS) for name in names)


def check_front_matter(card: str) -> None:
    """Raises a ValueError that lists everything in a card's front matter which the Hub would refuse or misread.

    Those are ids that are paths or empty, lists that have something else than names, and a malformed model-index.
    Every entry is optional. The Hub has a check of its own, which needs the network; this one does not.
    """
    data = read_front_matter(card)
    wrong = []
    if not data and split_card(card)[0].strip():
        wrong.append("between the two lines `---` at the top are no entries such as `license: mit`")
    for key, what in (("base_model", "an id on the Hub"), ("datasets", "ids on the Hub"), ("tags", "names")):
        values = data.get(key, [])
        for value in values if isinstance(values, list) else [values]:
            if not (is_hub_id(value) if key != "tags" else isinstance(value, str) and value):
                wrong.append(f"{key} must be {what}, got {value!r}")
    if data.get("license") is not None and not is_license(data["license"]):
        wrong.append(f"license must be an id or a list of ids, got {data['license']!r}")
    if not _is_model_index(data.get("model-index", []), card):
        wrong.append("model-index must be a list of models with their results")
    if wrong:
        raise ValueError("The card's front matter is wrong: " + "; ".join(wrong) + ".")


def _is_model_index(models: Any, card: str) -> bool:
    if not models:
        return models == []
    if not isinstance(models, list):
        return False
    if not all(isinstance(model, dict) and isinstance(model.get("results"), list) for model in models):
        return False
    try:
        # huggingface_hub reads the results. It reads those of one model only, and refuses a model without a name.
        ModelCard(card.lstrip("\ufeff"), ignore_metadata_errors=not any(model["results"] for model in models))
    except (ValueError, KeyError, TypeError, yaml.YAMLError):
        return False
    return True


def mended(
    card: str,
    *,
    base_model: str | None = None,
    is_librarys: bool = False,
    license: str | list[str] | None = None,
    language: str | Sequence[str] | None = None,
    tags: Sequence[str] = (),
) -> tuple[str, list[str]]:
    """A card that is kept, with the entries of its front matter changed that have to be; and what was changed.

    The text below stays as it is, and in the front matter all entries but those that are changed, with their comments.

    Args:
        card: The card.
        base_model: The base model's id on the Hub, for where the card names a path of this machine, as PEFT writes it.
        is_librarys: No person has written the card, so that the library's other mistakes are mended, too.
        license, language, tags: Entries to set; tags are added to those that are there.

    Raises:
        ValueError: the front matter is not YAML.
    """
    data, changes, notes = read_front_matter(card), {}, []
    for key, instead in (("base_model", base_model), ("datasets", None)):
        values = data.get(key)
        wrong = [value for value in (values if isinstance(values, list) else [values]) if not is_hub_id(value)]
        if key in data and wrong:
            good = [name for name in _listed(values) if is_hub_id(name)] or [name for name in [instead] if name]
            changes[key] = None if not good else good[0] if key == "base_model" and len(good) == 1 else good
            now = f"is now {changes[key]}" if good else "was removed"
            notes.append(f"{key} {now}, because {', '.join(map(repr, wrong))} is no id on the Hub")
    if is_librarys:
        changes |= _of_adapter(data, base_model)
        if data.get("licence") == "license":
            changes["licence"] = None
    present = _listed(data.get("tags"))
    wanted = [tag for tag in present if not (tag.startswith("base_model:") and not is_hub_id(tag.rsplit(":", 1)[-1]))]
    wanted = _union([*([f"base_model:adapter:{base_model}"] if is_librarys and base_model else []), *wanted], tags)
    if wanted != present:
        changes["tags"] = wanted or None
        if added := [tag for tag in tags if tag not in present]:
            notes.append(f"tags now have {', '.join(added)}")
    if license is not None and license != data.get("license"):
        changes |= {"license": license, **({} if license == "other" else dict.fromkeys(LICENSE_ENTRIES))}
        notes.append(f"license is now {license}")
    language = language if language is None or isinstance(language, str) else list(language)
    if language is not None and _listed(language) != _listed(data.get("language")):
        changes["language"] = language
        notes.append(f"language is now {', '.join(_listed(language))}")
    return _with_entries(card, changes), notes


def _of_adapter(data: dict[str, Any], base_model: str | None) -> dict[str, Any]:
    """What a library's card lacks to be an adapter's on the Hub."""
    changes = {"library_name": "peft"} if data.get("library_name") != "peft" else {}
    if base_model and not data.get("base_model"):
        changes["base_model"] = base_model
    return changes


def _with_entries(card: str, changes: dict[str, Any]) -> str:
    """The card with entries of its front matter replaced, added, or removed where the new value is None."""
    data = read_front_matter(card)
    changes = {name: value for name, value in changes.items() if value is not None or name in data}
    if not changes:
        return card
    # Entry by entry, because writing all of them again would lose comments, order and quotes of a person.
    entries = re.split(r"^(?=[^\s#\-}\]])", split_card(card)[0], flags=re.M)
    wanted = {name: value for name, value in {**data, **changes}.items() if value is not None}
    text = ""
    for entry in entries:
        named = [name for name in changes if re.match(rf"[\"']?{re.escape(name)}[\"']?\s*:", entry)]
        text += entry if not named else _entry(named[0], changes.pop(named[0]))
    text += "".join(_entry(name, value) for name, value in changes.items())
    try:
        is_right = (yaml.load(text, _Loader) or {}) == wanted
    except yaml.YAMLError:
        is_right = False
    if not is_right:  # a layout that cannot be changed in place, such as {a: 1, b: 2}
        text = yaml_dump(wanted, sort_keys=False)
    return f"---\n{text}---\n{split_card(card)[1]}"


def _entry(name: str, value: Any) -> str:
    return "" if value is None else yaml_dump({name: value}, sort_keys=False)


def _listed(value: Any) -> list[str]:
    """The texts in a list, or in the one text that stands for a list."""
    return [entry for entry in (value if isinstance(value, list) else [value]) if isinstance(entry, str) and entry]


def _union(first: Sequence[str], second: Sequence[str]) -> list[str]:
    return list(dict.fromkeys([*first, *second]))
