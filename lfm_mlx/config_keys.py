"""Typed look-ups in config.json; each refuses a wrong value by key."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from lfm_mlx.errors import ConfigError

LARGEST = 2**31 - 1
"""MLX counts the elements of an axis in 32 bits."""


class ConfigKeys:
    """Typed look-ups in config.json; each refuses a wrong value by key."""

    def __init__(self, raw: Mapping[str, Any]) -> None:
        self.raw = raw

    def first(self, *names: str) -> tuple[str, Any]:
        """The first of `names` that is present and not null, with its value."""
        for name in names:
            if self.raw.get(name) is not None:
                return name, self.raw[name]
        return names[0], None

    def integer(self, *names: str, default: int | None = None, minimum: int = 1, maximum: int = LARGEST) -> int:
        """A whole number in the range; the default where no name is present."""
        name, value = self.first(*names)
        if value is None and default is not None:
            return default
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if not isinstance(value, int) or isinstance(value, bool) or not minimum <= value <= maximum:
            raise ConfigError(f"{name} is {shown(value)}, expected a whole number from {minimum} to {maximum}")
        return value

    def number(self, *names: str, default: float) -> float:
        """A finite number above 0."""
        name, value = self.first(*names)
        if value is None:
            return default
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value <= sys.float_info.max:
            raise ConfigError(f"{name} is {shown(value)}, expected a number above 0")
        return float(value)

    def boolean(self, *names: str, default: bool) -> bool:
        """True or false."""
        name, value = self.first(*names)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise ConfigError(f"{name} is {shown(value)}, expected true or false")
        return value

    def token_id(self, name: str) -> int | None:
        """A token id, or None where it is absent, null or -1."""
        value = self.raw.get(name)
        return None if value is None or value == -1 else self.integer(name, minimum=0)

    def token_id_list(self, name: str) -> list[int]:
        """One or several token ids."""
        value = self.raw[name]
        ids = value if isinstance(value, list) else [value]
        if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids):
            raise ConfigError(f"{name} is {shown(value)}, expected a token id or a list of them")
        return ids


def shown(value: object) -> str:
    """`value` for a message, in 80 characters at most."""
    try:
        text = "missing" if value is None else repr(value)
    except (RecursionError, ValueError):  # nested too deeply, or an integer of too many digits
        text = f"a {type(value).__name__} too large to show"
    return text if len(text) <= 80 else text[:77] + "..."
