"""Runs the Python of a card."""

import re
from pathlib import Path


def snippet_of(card: str) -> str:
    [snippet] = re.findall(r"^```python\n(.*?)\n```$", card, re.S | re.M)
    return snippet


def run_snippet(card: str, base: Path, folder: Path, monkeypatch) -> list:
    """What the card's Python prints in the base model's folder, with real paths for that and for the adapter."""
    snippet = snippet_of(card).replace('"path/to/this/adapter"', repr(str(folder)))
    for name in ("org/base", "path/to/the/base/model"):
        snippet = snippet.replace(f'"{name}"', repr(str(base)))
    printed = []
    monkeypatch.chdir(base)
    exec(compile(snippet, "snippet", "exec"), {"print": printed.append})
    return printed
