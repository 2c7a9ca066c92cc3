"""What Ctrl-C does while a turn is written: it ends the turn, and never the program."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


class Interrupts:
    """Turns SIGINT into a call of `cancel` during a turn; in the main thread only."""

    def __init__(self) -> None:
        self._cancel: Callable[[], None] | None = None
        self._is_breaking = False
        self._is_interrupted = False

    @property
    def is_interrupted(self) -> bool:
        """Whether Ctrl-C came in the latest turn."""
        return self._is_interrupted

    @contextmanager
    def cancelling(self, cancel: Callable[[], None]) -> Iterator[None]:
        """Inside, Ctrl-C calls `cancel` and raises nothing: a step of the model is not left halfway."""
        self._cancel, self._is_interrupted = cancel, False
        before = signal.signal(signal.SIGINT, self._handle)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)
            self._cancel = None

    @contextmanager
    def breaking(self) -> Iterator[None]:
        """Inside, Ctrl-C also raises KeyboardInterrupt: for tools and questions, which look at no cancellation.

        One that came earlier in the turn raises at once.
        """
        self._is_breaking = True
        try:
            if self._is_interrupted:
                raise KeyboardInterrupt
            yield
        finally:
            self._is_breaking = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._is_interrupted = True
        if self._cancel is not None:
            self._cancel()
        if self._is_breaking:
            raise KeyboardInterrupt
