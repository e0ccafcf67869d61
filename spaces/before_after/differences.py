"""How two answers are shown: what only one of them has, their lengths and speeds, JSON on several lines."""

import difflib
import json
import re

from decoding import Answer


# Below this share of common words, marked words are no help to a reader.
LEAST_IN_COMMON = 0.35
Marked = list[tuple[str, str | None]]  # pieces of text, each marked "base", "adapter" or None, as Gradio shows them
# Shown until there are differences, as the empty box that Gradio would show is not accessible.
NO_DIFFERENCES_YET: Marked = [("They appear when both answers have ended.", None)]
STOPPED: Marked = [("Stopped before both answers had ended.", None)]


def differences(base: str, adapted: str) -> Marked:
    """The words of both answers in one text, marked "base" or "adapter" where only one of them has them."""
    base_words, adapted_words = (re.findall(r"\w+\s*|[^\w\s]\s*|\s+", text) for text in (base, adapted))
    if not base_words and not adapted_words:
        return [("Both are empty.", None)]
    matcher = difflib.SequenceMatcher(None, base_words, adapted_words)
    if matcher.quick_ratio() < LEAST_IN_COMMON:
        return [("The answers have next to nothing in common.", None)]
    parts: Marked = []
    for kind, a, b, c, d in matcher.get_opcodes():
        if kind == "equal":
            parts.append(("".join(base_words[a:b]), None))
            continue
        changes = ("".join(base_words[a:b]), "base"), ("".join(adapted_words[c:d]), "adapter")
        parts += [(text, side) for text, side in changes if text]
    return parts


def describe(answer: Answer) -> str:
    """An answer's length, speed and end, in a line."""
    facts = [f"{answer.tokens} token" + "s" * (answer.tokens != 1)]
    if answer.tokens_per_second:
        facts.append(f"{answer.tokens_per_second:.1f} tokens/s")
    if answer.first_token_seconds and (answer.tokens or answer.ended):
        facts.append(f"first after {answer.first_token_seconds:.1f} s")
    return ", ".join(facts) + (f" · {answer.ended}" if answer.ended else " …")


def readable(text: str) -> str:
    """JSON on several lines, and any other text as it is."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return json.dumps(value, indent=2, ensure_ascii=False) if isinstance(value, dict | list) else text
