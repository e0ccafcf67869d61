"""Ids on the Hub, told from paths."""

from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id


def is_hub_id(name: Any) -> bool:
    """Whether it has the form of a Hub id with a namespace, such as org/model."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return isinstance(name, str) and name.count("/") <= 1


def hub_id(name: Any) -> str | None:
    """The name, if it has the form of a Hub id and is not a local folder that looks like one."""
    return name if is_hub_id(name) and not Path(name).exists() else None


def commit_in_cache(model_id: str, revision: str | None = None) -> str | None:
    """The commit that `from_pretrained(model_id, revision=…)` has loaded, None if that cannot be told."""
    path = try_to_load_from_cache(model_id, "config.json", revision=revision or "main")
    return Path(path).parent.name if isinstance(path, str) else None  # …/snapshots/COMMIT/config.json
