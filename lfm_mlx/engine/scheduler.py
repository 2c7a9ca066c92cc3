"""Who is computed next: a policy over whole numbers, without arrays and without a clock.

Requests are known by their number; a smaller one arrived earlier. Each waits, then its prompt is computed chunk by
chunk, then it is decoded with all others that are. Four rules:

- *Memory.* Rows share buffers that are as long as the longest of them, so what they hold is their number times its
  bytes. A request is admitted while that stays within the budget, with room to grow. When the rows outgrow the budget
  all the same, the youngest goes back to the queue, and what it had is computed again later.
- *Order.* Requests are admitted as they came; one that does not fit yet may be overtaken a few times, and no more.
- *Prompts.* Of the tokens computed, half go to the oldest prompt and half to the one that is done soonest: a short
  prompt does not wait for a long one, and no stream of short ones keeps a long one from its end.
- *Progress.* The oldest row is never sent back, and a request that could not even run alone is refused at the start; so
  every request ends.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

MAX_OVERTAKEN = 8
"""So many later requests may be admitted before one that does not fit yet."""

HEADROOM_TOKENS = 256
"""Tokens that every row has to have room to grow by when another one is admitted."""


@dataclass(kw_only=True)
class Job:
    """One request as the scheduler sees it.

    Args:
        number: place in the order of arrival.
        num_tokens: tokens the row has or is to have before it is decoded further: prompt and answer so far.
        num_computed: those of them that were computed; all of them where the row is decoded.
        num_overtaken: later requests that were admitted before it.
    """

    number: int
    num_tokens: int
    num_computed: int = 0
    num_overtaken: int = 0

    @property
    def num_missing(self) -> int:
        """Tokens to be computed before it can be decoded."""
        return self.num_tokens - self.num_computed


@dataclass(frozen=True, kw_only=True)
class Places:
    """Who loses a place and what it holds, and who then gets one."""

    sent_back: tuple[int, ...] = ()
    admitted: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """The row whose prompt is to go on, and by how many tokens."""

    number: int
    num_tokens: int


class Scheduler:
    """Decides who is admitted, sent back and computed.

    Args:
        max_rows: rows that have a place at the same time.
        budget_bytes: what they may hold together; None sets no limit.
        bytes_of: bytes of one row of so many tokens; it never falls with their number.
    """

    def __init__(self, *, max_rows: int, budget_bytes: int | None, bytes_of: Callable[[int], int]) -> None:
        self.max_rows = max_rows
        self.budget_bytes = budget_bytes
        self.bytes_of = bytes_of
        self._rows: dict[int, Job] = {}
        self._waiting: dict[int, Job] = {}
        self._lead = 0  # Tokens that the oldest prompt was given more than half.

    def fits_alone(self, num_tokens: int) -> bool:
        """Whether a row of so many tokens fits the budget with nothing beside it."""
        return self.budget_bytes is None or self.bytes_of(num_tokens) <= self.budget_bytes

    def add(self, number: int, num_tokens: int) -> None:
        """Queue a request with a prompt of so many tokens, at least one. Its whole length has to `fits_alone`."""
        self._waiting[number] = Job(number=number, num_tokens=num_tokens)

    def remove(self, number: int) -> None:
        """Forget a request that ended, wherever it was."""
        del (self._rows if number in self._rows else self._waiting)[number]

    def note_reused(self, number: int, num_tokens: int) -> None:
        """So many tokens of a row's prompt need not be computed."""
        self._rows[number].num_computed = num_tokens

    def note_computed(self, number: int, num_tokens: int) -> None:
        """So many more tokens of a prompt were computed; with the last one the row is decoded."""
        self._rows[number].num_computed += num_tokens

    def note_generated(self, number: int, num_tokens: int) -> None:
        """A decoded row has grown to so many tokens."""
        job = self._rows[number]
        job.num_tokens = job.num_computed = num_tokens

    def send_back(self, number: int) -> None:
        """Take a row's place away; all its tokens are to be computed again."""
        job = self._rows.pop(number)
        job.num_computed = 0
        self._waiting[number] = job

    def assign(self) -> Places:
        """Decide who has a place, before each step; it counts as done."""
        sent_back = tuple(self._make_room())
        return Places(sent_back=sent_back, admitted=() if sent_back else tuple(self._admit()))

    def next_chunk(self, max_tokens: int) -> Chunk | None:
        """The prompt to compute next, at most so many tokens of it; None where there is none. `note_computed` it."""
        prompts = [job for job in self._rows.values() if job.num_missing]
        if not prompts or max_tokens < 1:
            return None
        oldest = min(prompts, key=lambda job: job.number)
        soonest = min(prompts, key=lambda job: (job.num_missing, job.number))
        chosen = oldest if self._lead <= 0 else soonest
        count = min(chosen.num_missing, max_tokens)
        if oldest is soonest:
            self._lead = 0
        else:
            self._lead += count if chosen is oldest else -count
        return Chunk(number=chosen.number, num_tokens=count)

    @property
    def held_bytes(self) -> int:
        """Bytes of the rows that have a place, with room for one token more."""
        return self._bytes_with([], 1)

    @property
    def num_admitted(self) -> int:
        """Rows that have a place."""
        return len(self._rows)

    @property
    def num_waiting(self) -> int:
        """Requests that have none."""
        return len(self._waiting)

    def _bytes_with(self, more: list[Job], growth: int) -> int:
        sizes = [job.num_tokens + growth for job in [*self._rows.values(), *more]]
        return len(sizes) * self.bytes_of(max(sizes)) if sizes else 0

    def _make_room(self) -> Iterator[int]:
        while self.budget_bytes is not None and len(self._rows) > 1 and self.held_bytes > self.budget_bytes:
            youngest = max(self._rows)
            self.send_back(youngest)
            yield youngest

    def _admit(self) -> Iterator[int]:
        passed: list[Job] = []
        if len(self._rows) >= self.max_rows:
            return
        for number in sorted(self._waiting):
            job = self._waiting[number]
            if self._has_room(job):
                self._rows[number] = self._waiting.pop(number)
                for waiting in passed:
                    waiting.num_overtaken += 1
                yield number
                if len(self._rows) >= self.max_rows:
                    return
            elif job.num_overtaken >= MAX_OVERTAKEN:
                return
            else:
                passed.append(job)

    def _has_room(self, job: Job) -> bool:
        if self.budget_bytes is None or not self._rows:
            return True
        return self._bytes_with([job], HEADROOM_TOKENS) <= self.budget_bytes
