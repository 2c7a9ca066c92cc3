"""How much of a prompt to compute between two tokens of running rows, so that these keep their pace.

A chunk of a prompt need not run through all layers at once: between two decode steps it goes through as many of them
as take about as long as a decode step. So a chunk may be long, which is what makes it cheap (weights are read once for
all of its tokens), and yet no running row waits for the whole of it.
"""

from __future__ import annotations

SHARE = 0.55
"""Prompts may take so much of the time that decoding takes. Decoding is slower beside them too, by up to a third: its
next step cannot be built while the one before is computed. So running rows keep about half of their speed."""

LONGEST_LAYER = 0.9
"""What the slowest layer of a chunk is to take of the time that prompts have in a step."""

SMOOTHING = 0.2
"""Weight of the latest time among earlier ones, where it is the shorter one; a longer one counts at once."""

OVERDRAFT = 1.25
"""A layer may take so much of its time before later steps have to make up for it."""

FIRST_CHUNK = 16.0

MEMORY = 0.9
"""Weight of all earlier chunks against the latest one in the line through the times of their slowest layers."""


class Pace:
    """Finds, from the times of layers and decode steps, how long a chunk is and how many layers of it run in a step.

    The time of a layer is taken to be a start and so much a token. Where the start alone takes too long, a chunk is as
    long as its start, and is paid for: the next layer waits until decoding has had its time.

    In each step, call `begin_step`, then `note_layer` after every layer that `allows` lets through, and `end_step`.

    Args:
        full_chunk: tokens of a chunk while no row is decoded.

    Attributes:
        decode_s: seconds that a step's decoding takes; None before the first.
    """

    def __init__(self, full_chunk: int) -> None:
        self.full_chunk = full_chunk
        self.decode_s: float | None = None
        self._size = min(FIRST_CHUNK, full_chunk)
        self._spent_s = 0.0
        self._debt_s = 0.0
        self._layers: dict[int, tuple[int, float]] = {}  # Tokens and seconds of each layer as last seen.
        self._longest_s = 0.0
        self._num_chunks = 0
        self._sums = [0.0] * 5  # Of 1, n, n * n, t and n * t over chunks of n tokens whose slowest layer took t.

    @property
    def chunk_tokens(self) -> int:
        """Most tokens of a chunk that begins while rows are decoded."""
        # Every second one is shorter: one size alone would not show what a token costs.
        return max(int(self._size if self._num_chunks % 2 else 0.75 * self._size), 1)

    def begin_step(self) -> None:
        """A step begins; nothing of a prompt was computed in it."""
        self._spent_s = 0.0

    def allows(self, layer: int, num_tokens: int) -> bool:
        """Whether a chunk of so many tokens may go through this layer before rows are decoded again."""
        if self.decode_s is None or self._debt_s > 0:
            return False
        if self._spent_s == 0.0:
            return True
        if layer not in self._layers:
            return False
        seen_tokens, seconds = self._layers[layer]
        return self._spent_s + seconds * max(num_tokens / seen_tokens, 1.0) <= SHARE * self.decode_s

    def note_layer(self, layer: int, num_tokens: int, seconds: float) -> None:
        """A chunk has gone through a layer."""
        self._spent_s += seconds
        self._longest_s = max(self._longest_s, seconds)
        seen_tokens, seen_s = self._layers.get(layer, (num_tokens, seconds))
        expected = seen_s * num_tokens / seen_tokens
        self._layers[layer] = num_tokens, max(seconds, expected + SMOOTHING * (seconds - expected))

    def end_chunk(self, num_tokens: int) -> None:
        """A chunk has gone through all layers while rows were decoded: the next one may be longer or shorter."""
        longest_s, self._longest_s = self._longest_s, 0.0
        self._num_chunks += 1
        if self.decode_s is None or longest_s == 0.0:
            return
        target_s = LONGEST_LAYER * SHARE * self.decode_s
        start_s, token_s = self._line(num_tokens, longest_s)
        ideal = (target_s - start_s) / token_s if start_s < 0.75 * target_s else start_s / token_s
        self._size = min(max(ideal, self._size / 2, 1.0), self._size * 1.5, float(self.full_chunk))

    def end_step(self, decode_s: float) -> None:
        """A step has ended, and its decoding took so long."""
        if self.decode_s is None:
            self.decode_s = decode_s
        # The first steps compile, and should not be believed for long.
        weight = SMOOTHING if decode_s > self.decode_s else 0.5
        self.decode_s += weight * (decode_s - self.decode_s)
        target_s = SHARE * self.decode_s
        if self._spent_s:
            self._debt_s = max(self._spent_s - OVERDRAFT * target_s, 0.0)
        else:
            self._debt_s = max(self._debt_s - target_s, 0.0)

    def rest(self) -> None:
        """No row is decoded: nothing has to be made up for."""
        self._debt_s = self._longest_s = 0.0

    def _line(self, num_tokens: int, seconds: float) -> tuple[float, float]:
        """Seconds of a layer's start and of a token, by least squares; the latest chunks count most."""
        new = (1.0, num_tokens, num_tokens**2, seconds, num_tokens * seconds)
        self._sums = [MEMORY * total + value for total, value in zip(self._sums, new, strict=True)]
        count, n, nn, t, nt = self._sums
        spread = count * nn - n * n
        average_s = t / n
        token_s = (count * nt - n * t) / spread if spread > 1e-6 * nn * count else average_s
        token_s = min(max(token_s, average_s / 20), average_s)
        return max((t - token_s * n) / count, 0.0), token_s
