"""Follows an answer in the thread that generates it: from tokens to events, up to the first stop string."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence

from lfm_mlx.engine import PackedMask
from lfm_mlx.engine.control import Control
from lfm_mlx.parsing import OutputStream, StopStrings
from lfm_mlx.tokenizer import StreamingDetokenizer
from lfm_mlx.types import ContentDelta, FinishReason, OutputEvent


class AnswerReader:
    """Reads what a row writes, and ends the row with the token that completes a stop string.

    Events wait here until somebody takes them; the engine's thread adds while another one takes.

    Args:
        control: the rules of the row.
        detokenizer: of the answer's tokens.
        output: routes the text.
        stops: ends the content; reasoning is not searched.
        stop_ids: tokens that end the answer and are no part of it.
    """

    def __init__(
        self,
        control: Control,
        detokenizer: StreamingDetokenizer,
        output: OutputStream,
        stops: StopStrings,
        stop_ids: frozenset[int],
    ) -> None:
        self.control = control
        self._detokenizer = detokenizer
        self._output = output
        self._stops = stops
        self._stop_ids = stop_ids
        self._events: deque[OutputEvent] = deque()
        self._widths: list[int] = []  # Characters that became final with each token.

    def mask(self) -> PackedMask | None:
        """The tokens the grammar allows next; None allows all."""
        return self.control.mask()

    def forced(self) -> Sequence[int]:
        """The tokens that have to come next."""
        return self.control.forced()

    @property
    def has_mask(self) -> bool:
        """Whether there is a grammar."""
        return self.control.has_mask

    def observe(self, token_id: int) -> FinishReason | None:
        """Read a token; returns why the row has to end with it, or None."""
        wish = self.control.observe(token_id)
        if token_id not in self._stop_ids:
            text = self._detokenizer.add(token_id)
            self._widths.append(len(text))
            self._events.extend(self._passed(self._output.feed(text, token_id)))
        return "stop" if self._stops.is_found else wish

    def take(self) -> list[OutputEvent]:
        """The events that have come since the last time."""
        return [self._events.popleft() for _ in range(len(self._events))]

    def finish(self) -> list[OutputEvent]:
        """What was held back until the row ended."""
        held = [*self._passed(self._output.feed(self._detokenizer.finish())), *self._passed(self._output.finish())]
        if rest := self._stops.finish():
            held.append(ContentDelta(text=rest))
        return held

    @property
    def stop_string(self) -> str | None:
        """The stop string that was found."""
        return self._stops.found

    @property
    def num_shown(self) -> int:
        """Tokens of the text so far: without a stop token, and without those that lie behind its end altogether."""
        widths = self._widths
        count, dropped = len(widths), self._stops.num_dropped
        while dropped and count and widths[count - 1] <= dropped:
            dropped -= widths[count - 1]
            count -= 1
        return count

    @property
    def is_reasoning(self) -> bool:
        """Whether the text so far ends inside reasoning."""
        return self._output.is_reasoning

    def _passed(self, events: Sequence[OutputEvent]) -> Iterator[OutputEvent]:
        """Events with the content searched for stop strings; what follows one is dropped."""
        for event in events:
            if self._stops.is_found:
                return
            if not isinstance(event, ContentDelta):
                if held := self._stops.finish():
                    yield ContentDelta(text=held)
                yield event
            elif text := self._stops.add(event.text):
                yield ContentDelta(text=text)
