"""How many prompt tokens to compute between two tokens of running rows, so that these keep their pace."""

from __future__ import annotations

MIN_CHUNK = 4
"""No chunk is smaller, unless the prompt's rest is."""

SHARE = 1.0
"""Prompts may take so much of the time that decoding takes: 1 leaves running rows half their speed."""

SMOOTHING = 0.2
"""Weight of the latest step in the time a decode step takes."""

MEMORY = 0.9
"""Weight of all earlier chunks against the latest one in the line through their times."""

MEASURE_EVERY = 8
"""One step in so many computes no prompt, to see how long decoding alone takes."""


class Pace:
    """Finds the chunk that takes about as long as a decode step, from the times of steps.

    A chunk's time is taken to be a start and so much a token. Where the start alone takes as long as a decode step, a
    chunk is as long as its start, and is paid for: the next one waits until decoding has had its time.

    Args:
        full_chunk: tokens of a chunk while no row is decoded.

    Attributes:
        decode_s: seconds of a step that only decodes; None before the first.
    """

    def __init__(self, full_chunk: int) -> None:
        self.full_chunk = full_chunk
        self.decode_s: float | None = None
        self._size = 4.0 * MIN_CHUNK
        self._debt_s = 0.0
        self._num_chunks = 0
        self._sums = [0.0] * 5  # Of 1, n, n * n, t and n * t over chunks of n tokens that took t.

    def max_chunk(self, *, is_decoding: bool) -> int:
        """Most prompt tokens to compute in the next step."""
        if not is_decoding:
            self._debt_s = 0.0
            return self.full_chunk
        if self._debt_s > 0 or self._num_chunks >= MEASURE_EVERY:
            return 0
        # Every second one is smaller: one size alone would not show what a token costs.
        size = self._size if self._num_chunks % 2 else 0.75 * self._size
        return min(max(int(size), MIN_CHUNK), self.full_chunk)

    def note(self, seconds: float, num_tokens: int) -> None:
        """A step with running rows took so long, with so many prompt tokens in it.

        Args:
            seconds: the whole step.
            num_tokens: of its chunk; 0 if it had none.
        """
        if num_tokens == 0:
            self._num_chunks = 0
            known = self.decode_s
            self.decode_s = seconds if known is None else known + SMOOTHING * (seconds - known)
            self._debt_s = max(0.0, self._debt_s - SHARE * self.decode_s)
            return
        self._num_chunks += 1
        if self.decode_s is None:
            self._num_chunks = MEASURE_EVERY
            return
        target_s = SHARE * self.decode_s
        chunk_s = max(seconds - self.decode_s, target_s / 8)
        self._debt_s = max(0.0, chunk_s - 1.25 * target_s)
        start_s, token_s = self._line(num_tokens, chunk_s)
        ideal = (target_s - start_s) / token_s if start_s < 0.75 * target_s else start_s / token_s
        self._size = min(max(ideal, self._size / 2, MIN_CHUNK), self._size * 1.5, float(self.full_chunk))

    def _line(self, num_tokens: int, chunk_s: float) -> tuple[float, float]:
        """Seconds of a chunk's start and of a token, by least squares; the latest chunks count most."""
        new = (1.0, num_tokens, num_tokens**2, chunk_s, num_tokens * chunk_s)
        self._sums = [MEMORY * total + value for total, value in zip(self._sums, new, strict=True)]
        count, n, nn, t, nt = self._sums
        spread = count * nn - n * n
        average_s = t / max(n, 1.0)
        token_s = (count * nt - n * t) / spread if spread > 1e-6 * nn * count else average_s
        token_s = min(max(token_s, average_s / 20), average_s)
        return max((t - token_s * n) / count, 0.0), token_s
