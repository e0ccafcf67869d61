"""Filters for a card's template, through which text of users stays text.

Prompts, answers, names and arguments may contain anything. None of them may end the front matter, a table or a code
block of the card, or become HTML or a link in it.
"""

import html
import json
import re
from typing import Any


def line(value: Any) -> str:
    """The value on one line, so that it can end neither a front matter, nor a table, nor a code block."""
    return " ".join(str(value).split())


def text(value: Any) -> str:
    """The value on one line, as text that is neither HTML nor Markdown."""
    return re.sub(r"([\\`*_{}\[\]|#~$])", r"\\\1", html.escape(line(value), quote=False))


def cell(value: Any, length: int = 160) -> str:
    """The value for the cell of a table, cut to `length` characters."""
    value = line(value)
    return text(value if len(value) <= length else value[: length - 2] + " …")


def code(value: Any) -> str:
    """The value as inline code, with a fence of more backticks than it has itself."""
    value = line(value)
    fence = "`" * (max([0, *map(len, re.findall("`+", value))]) + 1)
    return f"{fence} {value} {fence}" if len(fence) > 1 else f"`{value}`"


def literal(value: Any) -> str:
    """The value as the literal of a Python string, on one line.

    JSON's strings are Python's. U+2028 and other separators, which JSON leaves as they are, are escaped, too: when
    PEFT rewrites a card, it splits the lines at them.
    """
    quoted = json.dumps(str(value), ensure_ascii=False)
    return re.sub(r"[\x7f-\x9f\u2028\u2029]", lambda match: f"\\u{ord(match[0]):04x}", quoted)
