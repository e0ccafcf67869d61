"""Looks for secrets in files that are about to be published."""

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path


PATTERNS = {
    "a Hugging Face token": rb"\bhf_[A-Za-z0-9]{30,}",
    "a GitHub token": rb"\b(ghp|gho|ghs|github_pat)_[A-Za-z0-9_]{30,}",
    "an OpenAI or Anthropic key": rb"\bsk-[A-Za-z0-9_-]{30,}",
    "an AWS key": rb"\bAKIA[0-9A-Z]{16}\b",
    "a private key": rb"-----BEGIN [A-Z ]*PRIVATE KEY-----",
}
NAMES = re.compile(r"TOKEN|SECRET|PASSWORD|PASSWD|API_?KEY|ACCESS_KEY|CREDENTIAL", re.IGNORECASE)
SHORTEST = 8  # characters; a shorter value, such as "true", stands in ordinary files, too
CHUNK = 1 << 24  # bytes that are read at a time: weights can be larger than the memory
OVERLAP = 1 << 10  # bytes of the chunk before that are searched again, because a secret may cross the border


class SecretFound(ValueError):
    """A file has a secret in it; the message tells which kind and where, not the secret."""


def check_files(folder: Path, files: Iterable[Path], secrets: Mapping[str, str | None] | None = None) -> None:
    """Looks for tokens and keys, and for the values of this process's environment variables that are named like one.

    Args:
        folder: The files' folder, for the message.
        files: Files to read, of any kind and size.
        secrets: Further values to look for, by what the message calls them, such as "the token in use". Values below
            8 characters are not looked for, because they stand in ordinary files, too.

    Raises:
        SecretFound: with all places.
    """
    # HF_TOKEN_PATH and the like name a file; its path is no secret.
    named = {name: value for name, value in os.environ.items() if NAMES.search(name) and not os.path.exists(value)}
    known = {**(secrets or {}), **{f"the value of ${name}": value for name, value in named.items()}}
    long = {what: value for what, value in known.items() if value and len(value) >= SHORTEST}
    patterns = PATTERNS | {what: re.escape(value.encode()) for what, value in long.items()}
    places = [f"{file.relative_to(folder).as_posix()} has {what}" for file in files for what in _kinds(file, patterns)]
    if places:
        raise SecretFound(
            f"Secrets were found and nothing was published: {'; '.join(places)}. Remove them from the files, and "
            "revoke them if the files have been anywhere else."
        )


def _kinds(file: Path, patterns: dict[str, bytes]) -> list[str]:
    """The kinds of secrets in a file."""
    kinds: list[str] = []
    tail = b""
    overlap = max(OVERLAP, *map(len, patterns.values()))
    with open(file, "rb") as stream:
        while block := stream.read(CHUNK):
            text = tail + block
            kinds += [what for what, pattern in patterns.items() if what not in kinds and re.search(pattern, text)]
            tail = text[-overlap:]
    return kinds
