"""Formats of strings. What llguidance's own rule for a format lets through in error is kept out by a pattern."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_YEAR = "(?:[0-9]{3}[1-9]|[0-9]{2}[1-9]0|[0-9][1-9]00|[1-9]000)"
_LEAP_YEAR = "(?:[0-9]{2}(?:0[48]|[2468][048]|[13579][26])|(?:0[48]|[2468][048]|[13579][26])00)"
_DATE = (
    f"(?:{_YEAR}-(?:(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])|(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)"
    f"|02-(?:0[1-9]|1[0-9]|2[0-8]))|{_LEAP_YEAR}-02-29)"
)
# Leap seconds are valid only at the end of some months in UTC, so none is written.
_TIME = r"(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](?:\.[0-9]{1,9})?(?:Z|[+-](?:[01][0-9]|2[0-3]):[0-5][0-9])"

PATTERNS: Mapping[str, str] = {"date": f"^{_DATE}$", "time": f"^{_TIME}$", "date-time": f"^{_DATE}T{_TIME}$"}
"""Formats written as patterns: llguidance allows 2023-02-29 and leap seconds at any time."""

NATIVE = ("duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri")
"""Formats that llguidance's own rules get right."""


def with_format_pattern(schema: Mapping[str, Any]) -> dict[str, Any]:
    """`schema` with `format` as a pattern where there is one; inner schemas are left as they are."""
    pattern = PATTERNS.get(schema.get("format", ""))
    if pattern is None:
        return dict(schema)
    rest = {key: value for key, value in schema.items() if key != "format"}
    if "pattern" in rest:
        rest["allOf"] = [*rest.get("allOf", []), {"pattern": pattern}]
    else:
        rest["pattern"] = pattern
    return rest
