"""Numbers of a record as text. Any of them may be missing, not finite, huge or tiny."""

import math
from collections.abc import Sequence
from typing import Any


def as_number(value: Any) -> int | float | None:
    """`value` as a number, None if it is none. In the file of a record a number that is not finite is a text."""
    try:
        number = float(value)
    except OverflowError:  # an integer of more digits than a float has exponents
        return math.inf if value > 0 else -math.inf
    except (TypeError, ValueError):
        return None
    return value if isinstance(value, int) else number


def counted(value: Any) -> str:
    """A count with separators of thousands, such as 1,024; what is no number as it is."""
    number = as_number(value)
    if number is None:
        return str(value)
    return f"{int(number):,}" if math.isfinite(number) and number == int(number) else f"{number:,}"


def rounded(value: Any) -> str | None:
    """Three digits of a number, None for what is none."""
    number = as_number(value)
    return None if number is None else f"{number:.3g}"


def alike(values: Sequence[float], decimals: int = 3) -> list[str]:
    """Numbers of one row with as many decimals as the smallest of them needs, and at least `decimals`."""
    sizes = [abs(value) for value in values if math.isfinite(value) and value]
    needed = max(decimals, -math.floor(math.log10(min(sizes)))) if sizes else decimals
    if needed > 8 or (sizes and max(sizes) >= 1e9):
        return [f"{value:.3g}" for value in values]
    return [f"{value:.{needed}f}" for value in values]


def change(before: float, after: float) -> float | None:
    """How much a score has changed, None where that is no finite number."""
    difference = after - before
    return difference if math.isfinite(difference) else None
