"""Stop strings found in a stream of text, wherever token borders fall."""

from __future__ import annotations

from collections.abc import Sequence

from lfm_mlx.errors import OptionError


class StopStrings:
    """Passes text through up to the first stop string; holds back only what may be the beginning of one.

    Args:
        stops: the strings, none empty.

    Raises:
        OptionError: a stop is not a string, or is empty.

    Attributes:
        found: the stop string that came, or None.
        num_dropped: characters from its beginning on, to the end of the text that was added last.
    """

    def __init__(self, stops: Sequence[str] = ()) -> None:
        listed = [stops] if isinstance(stops, str) else list(stops)
        for stop in listed:
            if not isinstance(stop, str) or not stop:
                raise OptionError(f"stop holds {stop!r}, expected strings of at least one character")
        self._stops = tuple(listed)
        self._held = ""
        self.found: str | None = None
        self.num_dropped = 0

    @property
    def is_found(self) -> bool:
        """Whether the text has reached a stop string: `found`."""
        return self.found is not None

    def add(self, text: str) -> str:
        """The text that may be shown now; "" once a stop string was found."""
        if self.is_found:
            return ""
        text = self._held + text
        # The one that is complete first wins, of those the longest: the same one however the text was cut.
        found = min(((at + len(stop), at) for stop in self._stops if (at := text.find(stop)) >= 0), default=None)
        if found is not None:
            end, at = found
            self.found = text[at:end]
            self.num_dropped = len(text) - at
            self._held = ""
            return text[:at]
        keep = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def finish(self) -> str:
        """What was still held back when the text ended."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a proper beginning of `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
