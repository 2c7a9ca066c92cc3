"""How much of a prompt to compute between two tokens of running rows, so that these keep their pace.

A chunk of a prompt need not run through all layers at once: between two decode steps it goes through as many of them
as take about as long as a decode step. So a chunk may be long, which is what makes it cheap (weights are read once for
all of its tokens), and yet no running row waits for the whole of it.
"""

from __future__ import annotations

import statistics
from collections import deque

SHARE = 0.55
"""Prompts may take so much of the time that decoding takes. Decoding is slower beside them too, by up to a third: its
next step cannot be built while the one before is computed. So running rows keep about half of their speed."""

LONGEST_LAYER = 0.9
"""What the slowest layer of a chunk is to take of the time that prompts have in a step."""

SMOOTHING = 0.2
"""Weight of the latest decode step among earlier ones, where it is the longer one."""

REMEMBERED = 3
"""Times of a layer whose median counts: a machine that stood still for a moment says nothing about the layer."""

OVERDRAFT = 1.25
"""A layer may take so much of its time before later steps have to make up for it."""

FIRST_CHUNK = 16.0

CHUNKS = 5
"""Chunks, and pairs of them, whose medians tell what a layer's start and a token cost."""

LEAST_TOKEN = 6.0
"""A token costs at least its even part of a layer's time divided by this, whatever pairs of chunks seem to say."""


class Pace:
    """Finds, from the times of layers and decode steps, how long a chunk is and how many layers of it run in a step.

    The time of a layer is taken to be a start and so much a token. Where the start alone takes long, a layer may take
    up to twice as much, or as long as decoding; it is paid for: the next one waits until decoding has had its time.

    In each step, call `begin_step`, then `note_layer` after every layer that `allows` lets through, and `end_step`.

    Args:
        full_chunk: tokens of a chunk while no row is decoded.

    Attributes:
        decode_s: seconds that a step's decoding takes; None before the first.
    """

    def __init__(self, full_chunk: int) -> None:
        self.full_chunk = full_chunk
        self.decode_s: float | None = None
        self._size = max(min(FIRST_CHUNK, full_chunk), 2.0)
        self._spent_s = self._owed_s = 0.0
        self._debt_s = 0.0
        self._layers: dict[int, deque[tuple[int, float]]] = {}  # Tokens and seconds of each layer as last seen.
        self._longest_s = 0.0
        self._num_chunks = 0
        self._chunks: deque[tuple[int, float]] = deque(maxlen=CHUNKS)  # Tokens, and seconds of the slowest layer.
        self._slopes: deque[float] = deque(maxlen=CHUNKS)

    @property
    def chunk_tokens(self) -> int:
        """Most tokens of a chunk that begins while rows are decoded."""
        # Every third one is shorter: one size alone would not show what a token costs.
        return int(self._size if self._num_chunks % 3 else 0.5 * self._size)

    def begin_step(self) -> None:
        """A step begins; nothing of a prompt was computed in it."""
        self._spent_s = self._owed_s = 0.0

    def allows(self, layer: int, num_tokens: int) -> bool:
        """Whether a chunk of so many tokens may go through this layer before rows are decoded again."""
        if self.decode_s is None or self._debt_s > 0:
            return False
        if self._spent_s == 0.0:
            return True
        return layer in self._layers and self._spent_s + self._expected_s(layer, num_tokens) <= SHARE * self.decode_s

    def _expected_s(self, layer: int, num_tokens: int) -> float:
        return statistics.median(seconds * max(num_tokens / seen, 1.0) for seen, seconds in self._layers[layer])

    def note_layer(self, layer: int, num_tokens: int, seconds: float) -> None:
        """A chunk has gone through a layer."""
        self._layers.setdefault(layer, deque(maxlen=REMEMBERED)).append((num_tokens, seconds))
        expected_s = self._expected_s(layer, num_tokens)
        self._spent_s += seconds
        self._owed_s += min(seconds, expected_s)
        self._longest_s = max(self._longest_s, seconds)

    def end_chunk(self, num_tokens: int) -> None:
        """A chunk has gone through all layers while rows were decoded: the next one may be longer or shorter."""
        longest_s, self._longest_s = self._longest_s, 0.0
        self._num_chunks += 1
        if self.decode_s is None or longest_s == 0.0:
            return
        start_s, token_s = self._line(num_tokens, longest_s)
        wanted_s = max(LONGEST_LAYER * SHARE * self.decode_s, min(2 * start_s, self.decode_s), 1.5 * start_s)
        ideal = (wanted_s - start_s) / token_s
        most = self._size * 1.5 if longest_s < wanted_s else self._size
        self._size = max(min(max(ideal, self._size / 2), most, float(self.full_chunk)), 2.0)

    def end_step(self, decode_s: float) -> None:
        """A step has ended, and its decoding took so long."""
        if self.decode_s is None:
            self.decode_s = decode_s
        # The first steps compile, and should not be believed for long.
        weight = SMOOTHING if decode_s > self.decode_s else 0.5
        self.decode_s += weight * (decode_s - self.decode_s)
        target_s = SHARE * self.decode_s
        if self._spent_s:
            self._debt_s = max(self._owed_s - OVERDRAFT * target_s, 0.0)
        else:
            self._debt_s = max(self._debt_s - target_s, 0.0)

    def rest(self) -> None:
        """No row is decoded: nothing has to be made up for."""
        self._debt_s = self._longest_s = 0.0

    def _line(self, num_tokens: int, seconds: float) -> tuple[float, float]:
        """Seconds of a layer's start and of a token, from chunks that followed each other."""
        # Medians of pairs, not a line through all: the machine may have been slower, or stood still, for some of them.
        if self._chunks and self._chunks[-1][0] != num_tokens:
            seen_tokens, seen_s = self._chunks[-1]
            self._slopes.append((seconds - seen_s) / (num_tokens - seen_tokens))
        self._chunks.append((num_tokens, seconds))
        average_s = statistics.median(seconds / count for count, seconds in self._chunks)
        token_s = statistics.median(self._slopes) if self._slopes else average_s
        token_s = min(max(token_s, average_s / LEAST_TOKEN), average_s)
        return statistics.median(seconds - token_s * count for count, seconds in self._chunks), token_s
