"""How many prompt tokens to compute between two tokens of running rows, so that these keep their pace."""

from __future__ import annotations

MIN_CHUNK = 16
"""Fewer tokens take hardly less time."""

SHARE = 1.0
"""Prompts may take so much of the time that decoding takes: 1 leaves running rows half their speed."""

SMOOTHING = 0.2
"""Weight of the latest step in the time a decode step takes."""

MEASURE_EVERY = 8
"""One step in so many computes no prompt, to see how long decoding alone takes."""


class Pace:
    """Finds the chunk that takes about as long as a decode step, from the times of steps.

    A chunk that takes longer, because no smaller one is worth its start, is paid for: the next one waits until decoding
    has had its time.

    Args:
        full_chunk: tokens of a chunk while no row is decoded.
    """

    def __init__(self, full_chunk: int) -> None:
        self.full_chunk = full_chunk
        self._decode_s: float | None = None
        self._size = float(MIN_CHUNK)
        self._debt_s = 0.0
        self._num_chunks = 0

    def max_chunk(self, *, is_decoding: bool) -> int:
        """Most prompt tokens to compute in the next step."""
        if not is_decoding:
            self._debt_s = 0.0
            return self.full_chunk
        if self._debt_s > 0 or self._num_chunks >= MEASURE_EVERY:
            return 0
        return min(max(int(self._size), MIN_CHUNK), self.full_chunk)

    def note(self, seconds: float, num_tokens: int) -> None:
        """A step with running rows took so long, with so many prompt tokens in it.

        Args:
            seconds: the whole step.
            num_tokens: of its chunk; 0 if it had none.
        """
        if num_tokens == 0:
            self._num_chunks = 0
            known = self._decode_s
            self._decode_s = seconds if known is None else known + SMOOTHING * (seconds - known)
            self._debt_s = max(0.0, self._debt_s - SHARE * self._decode_s)
            return
        self._num_chunks += 1
        if self._decode_s is None:
            self._num_chunks = MEASURE_EVERY
            return
        target_s = SHARE * self._decode_s
        chunk_s = max(seconds - self._decode_s, target_s / 4)
        self._debt_s = max(0.0, chunk_s - 1.25 * target_s)
        ideal = num_tokens * target_s / chunk_s
        self._size = min(max(ideal, self._size / 2, MIN_CHUNK), self._size * 1.5, float(self.full_chunk))

    @property
    def decode_s(self) -> float | None:
        """Seconds of a step that only decodes; None before the first."""
        return self._decode_s
