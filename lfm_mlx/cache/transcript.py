"""One row's tokens with the state they left, and the places it can go back to."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from lfm_mlx.cache.state import Mark, State

MAX_MARKS = 256
"""Places remembered; of LFM2.5-8B-A1B each costs 147 kB."""

MAX_ANSWER_MARKS = 128
"""Places remembered inside the latest answer."""


class Transcript:
    """A state of one row that a later, partly equal prompt can continue from.

    Args:
        state: a state of one row that has seen nothing.
    """

    def __init__(self, state: State) -> None:
        self.state = state
        self.ids: list[int] = []
        self._marks: list[Mark] = []
        self._answer_marks: list[Mark] = []
        self._beginning = state.mark()
        # The thread that goes on from here may be another one, and MLX computes an array where it was made.
        mx.eval(state.arrays)

    def reuse(self, prompt: Sequence[int]) -> int:
        """Go back to the furthest place that `prompt` shares with what was seen.

        Returns:
            How many of the prompt's tokens need not be computed again; always fewer than all of them.
        """
        shared = min(_common_length(self.ids, prompt), len(prompt) - 1)
        # The state is ahead of the tokens noted where an answer was given up in the middle.
        if shared < max(len(self.ids), self.state.lengths[0]):
            self._go_back(shared)
        self._forget_answer_marks()
        return len(self.ids)

    def _go_back(self, length: int) -> None:
        """To the furthest place known that is not behind `length` tokens."""
        usable = [mark for mark in (*self._marks, *self._answer_marks) if mark.lengths[0] <= length]
        place = usable[-1] if usable else self._beginning
        self.state.rewind(place)
        self._marks = [mark for mark in self._marks if mark in usable]
        self._answer_marks = [mark for mark in self._answer_marks if mark in usable]
        self.ids = self.ids[: place.lengths[0]]

    def _forget_answer_marks(self) -> None:
        for mark in self._answer_marks:
            self.state.forget(mark)
        self._answer_marks = []

    def record(self, ids: Sequence[int]) -> None:
        """Note tokens that the state has taken in."""
        self.ids += ids

    def mark(self) -> None:
        """Make the present place one to go back to; of too many, every second one of the older half is dropped."""
        if self._marks and self._marks[-1].lengths == self.state.lengths:
            return
        self._marks.append(self.state.mark())
        if len(self._marks) > MAX_MARKS:
            older, newer = self._marks[: MAX_MARKS // 2], self._marks[MAX_MARKS // 2 :]
            for mark in older[::2]:
                self.state.forget(mark)
            self._marks = older[1::2] + newer

    def mark_answer(self) -> None:
        """Make the present place, inside an answer, one that the next prompt alone can go back to."""
        if len(self._answer_marks) < MAX_ANSWER_MARKS:
            self._answer_marks.append(self.state.mark())


def _common_length(first: Sequence[int], second: Sequence[int]) -> int:
    shorter = min(len(first), len(second))
    return next((i for i in range(shorter) if first[i] != second[i]), shorter)
