"""Paths of this machine, which tell about it and its owner, and of which a reader needs the last name at most."""

from collections.abc import Collection
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any


def is_local_path(text: str) -> bool:
    """Whether the whole text is an absolute path, of Unix or Windows, or one in a home folder.

    A relative path is none: it tells nothing about the machine. Neither is a text of one name, such as "/help".
    """
    if "\n" in text or "://" in text.removeprefix("file://"):
        return False
    if text.startswith(("~/", "~\\", "file://", "\\\\")) or PureWindowsPath(text).drive:
        return True
    return PurePosixPath(text).is_absolute() and len(PurePosixPath(text).parts) > 2


def shortened(text: str) -> str:
    """A local path with its last name only, "…/NAME"; any other text as it is."""
    option, equals, value = text.partition("=")
    if equals and option.startswith("--"):
        return f"{option}={shortened(value)}"
    if not is_local_path(text):
        return text
    return f"…/{PureWindowsPath(text).name}"  # splits at both kinds of slashes


def without_local_paths(value: Any, keep: Collection[str] = ()) -> Any:
    """A copy of JSON data in which local paths are `shortened`.

    Args:
        keep: Keys of the outermost object whose values stay as they are.
    """
    if isinstance(value, dict):
        return {name: entry if name in keep else without_local_paths(entry) for name, entry in value.items()}
    if isinstance(value, list):
        return [without_local_paths(entry) for entry in value]
    return shortened(value) if isinstance(value, str) else value
