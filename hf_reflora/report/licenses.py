"""Licenses by their ids on the Hub."""

import difflib
from typing import Any

from transformers.utils import logging


logger = logging.get_logger(__name__)

# The ids that the Hub's documentation ("Licenses") listed in autumn 2026. huggingface_hub has no list, and the Hub's
# grows, so that an id that is missing here is a reason for a warning and never for a refusal: the Hub itself says
# what it does not take.
LICENSES = frozenset(
    """apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0 bigcode-openrail-m
    afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0 cc-by-2.5
    cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0
    cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0 cdla-permissive-1.0
    cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0
    lgpl lgpl-2.1 lgpl-3.0 isc h-research intel-research lppl-1.3c ms-pl apple-ascl apple-amlr mpl-2.0 odc-by odbl
    openmdw-1.0 openmdw-1.1 openrail++ osl-3.0 postgresql ofl-1.1 ncsa unlicense zlib pddl lgpl-lr
    deepfloyd-if-license fair-noncommercial-research-license llama2 llama3 llama3.1 llama3.2 llama3.3 llama4
    grok2-community gemma unknown other""".split()
)


def is_license(value: Any) -> bool:
    """Whether it has the form of a license in a card: an id, or a list of ids."""
    values = value if isinstance(value, list) else [value]
    return bool(values) and all(isinstance(entry, str) and entry.strip() for entry in values)


def knows_license(value: Any) -> bool:
    """Whether all ids of a license are in our list of the Hub's; None, for no license, is fine."""
    return value is None or set(value if isinstance(value, list) else [value]) <= LICENSES


def check_license(value: Any) -> None:
    """Warns of a license that is not in our list of the Hub's; None, for no license, is fine.

    Raises:
        ValueError: it is neither an id nor a list of ids.
    """
    if value is None:
        return
    if not is_license(value):
        raise ValueError(f"license must be an id of the Hub such as apache-2.0, or a list of ids, got {value!r}.")
    for name in value if isinstance(value, list) else [value]:
        if name not in LICENSES:
            near = difflib.get_close_matches(name, LICENSES, n=1)
            meant = f" Is {near[0]} meant?" if near else ""
            logger.warning(
                f"license {name!r} is not among the Hub's licenses that hf_reflora knows.{meant} The Hub refuses a "
                "card with one that it does not know; any other license is `license: other` with license_name and "
                "license_link."
            )
