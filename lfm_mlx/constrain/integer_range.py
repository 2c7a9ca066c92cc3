"""A regular expression for the integers between two bounds."""

from __future__ import annotations

from functools import lru_cache

MAX_DIGITS = 19
_LIMIT = 10**MAX_DIGITS - 1


@lru_cache(maxsize=1024)
def integer_range(low: int | None, high: int | None) -> str | None:
    """A regular expression for the decimal integers from `low` to `high`, None when there are none.

    An open side ends at 19 digits, which holds every int64: a number that never ends is a known way for a model to lose
    itself.
    """
    low = -_LIMIT if low is None else low
    high = _LIMIT if high is None else high
    if low > high:
        return None
    parts = []
    if low < 0:
        parts += [f"-{part}" for part in _natural_range(max(1, -high), -low)]
    if high >= 0:
        parts += _natural_range(max(0, low), high)
    return f"({'|'.join(parts)})"


def _natural_range(low: int, high: int) -> list[str]:
    """Alternatives for the integers from `low` to `high`, both at least 0."""
    parts = []
    if low == 0:
        parts.append("0")
        low = 1
    while low <= high:
        num_digits, full_digits = len(str(low)), len(str(high + 1)) - 1
        if low == 10 ** (num_digits - 1) and full_digits >= num_digits:
            parts.append(f"[1-9][0-9]{{{num_digits - 1},{full_digits - 1}}}")
            low = 10**full_digits
            continue
        # One run of free last digits: 1300 to 1999 is 1[3-9][0-9]{2}.
        num_free = 0
        while low % 10 ** (num_free + 1) == 0 and low + 10 ** (num_free + 1) - 1 <= high:
            num_free += 1
        unit = 10**num_free
        head, first = divmod(low // unit, 10)
        last = min(9, first + (high - low + 1) // unit - 1)
        parts.append(f"{head or ''}[{first}-{last}][0-9]{{{num_free}}}")
        low += (last - first + 1) * unit
    return parts
