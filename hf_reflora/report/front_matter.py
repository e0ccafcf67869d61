"""The front matter of a model card: what the Hub accepts in it, and which entries are the user's own."""

from dataclasses import dataclass, field
from typing import Any

import yaml
from huggingface_hub import ModelCard

from .ids import is_hub_id
from .methods import METHODS


# The licenses that the Hub knows, by its documentation ("Licenses").
LICENSES = frozenset(
    """apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0 bigcode-openrail-m
    afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0 cc-by-2.5
    cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0
    cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0 cdla-permissive-1.0
    cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0
    lgpl lgpl-2.1 lgpl-3.0 isc h-research intel-research lppl-1.3c ms-pl apple-ascl apple-amlr mpl-2.0 odc-by odbl
    openmdw-1.0 openrail++ osl-3.0 postgresql ofl-1.1 ncsa unlicense zlib pddl lgpl-lr deepfloyd-if-license
    fair-noncommercial-research-license llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 grok2-community gemma unknown
    other""".split()
)
# Tags that a library adds. With those of the methods they are not the user's.
LIBRARY_TAGS = {"sft", "trl", "transformers", "generated_from_trainer", "peft"}


@dataclass(frozen=True)
class OwnEntries:
    """The entries of a card's front matter that no run record knows, because a user has written them."""

    license: str | None = None
    language: str | list[str] | None = None
    tags: list[str] = field(default_factory=list)


def read_front_matter(card: str) -> dict[str, Any]:
    """The front matter of a card as a dictionary, {} if it has none.

    Raises:
        ValueError: it is not YAML.
    """
    if not card.startswith("---\n"):
        return {}
    try:
        data = yaml.safe_load(f"{card}\n".split("---\n", 2)[1])
    except (yaml.YAMLError, IndexError) as error:
        raise ValueError(f"The card has no front matter that can be read: {error}") from error
    return data if isinstance(data, dict) else {}


def own_entries(card: str) -> OwnEntries:
    """The license, the language and the tags of a card, without the tags that a library or this package has added.

    A license that the Hub does not know is left out.

    Raises:
        ValueError: the front matter is not YAML.
    """
    data = read_front_matter(card)
    tags = data.get("tags")
    tags = tags if isinstance(tags, list) else []
    added = LIBRARY_TAGS | {tag for method in METHODS.values() for tag in method.tags}
    license = data.get("license")
    return OwnEntries(
        license=license if license in LICENSES else None,
        language=data.get("language"),
        tags=[t for t in tags if isinstance(t, str) and t not in added and not t.startswith("base_model:")],
    )


def check_front_matter(card: str) -> None:
    """Raises a ValueError that lists everything in a card's front matter which the Hub would refuse or misread.

    Those are ids that are paths or empty, unknown licenses, lists that are strings, and a malformed model-index. The
    Hub has a check of its own, which needs the network; this one does not.
    """
    try:
        data = ModelCard(card, ignore_metadata_errors=False).data.to_dict()
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"The card has no front matter that can be read: {error}") from error
    # ModelCard changes some entries when it reads them, so they are looked at as they are written.
    raw = read_front_matter(card)
    wrong = []
    if "base_model" in raw and not is_hub_id(raw["base_model"]):
        wrong.append(f"base_model must be an id on the Hub, got {raw['base_model']!r}")
    for key in ("datasets", "tags"):
        value = raw.get(key, [])
        if not isinstance(value, list) or not all(isinstance(entry, str) and entry for entry in value):
            wrong.append(f"{key} must be a list of names, got {value!r}")
        elif key == "datasets":
            wrong += [f"datasets must be ids on the Hub, got {entry!r}" for entry in value if not is_hub_id(entry)]
    if "license" in raw and raw["license"] not in LICENSES:
        wrong.append(_wrong_license(raw["license"]))
    if "library_name" not in raw:
        wrong.append("library_name is missing")
    # ModelCard drops a model-index that it does not understand.
    if "model-index" in raw and not data.get("model-index"):
        wrong.append("model-index must be a list of models with results")
    if wrong:
        raise ValueError("The card's front matter is wrong: " + "; ".join(wrong) + ".")


def check_license(license: str | None) -> None:
    """Raises a ValueError for a license that the Hub does not know; None, for no license, is fine."""
    if license is not None and license not in LICENSES:
        raise ValueError(f"The card's front matter is wrong: {_wrong_license(license)}.")


def _wrong_license(license: Any) -> str:
    return f"license {license!r} is not one of the Hub's, such as apache-2.0, mit, cc-by-4.0, llama3.2"
