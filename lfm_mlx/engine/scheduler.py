"""Who is computed next: a policy over whole numbers, without arrays and without a clock.

Requests are known by their number; a smaller one arrived earlier. Each waits, then its prompt is computed chunk by
chunk, then it is decoded with all others that are. Five rules:

- *Groups.* Rows that are decoded together share buffers that are as long as the longest of them, and what a short one
  is padded with is held and read for nothing. So a row joins a group only where that costs little.
- *Memory.* A group holds its number of rows times the bytes of its longest. A request is admitted while all together
  stay within the budget, with room to grow. When the rows outgrow the budget all the same, the youngest goes back to
  the queue, and what it had is computed again later.
- *Order.* Requests are admitted as they came; one that does not fit yet may be overtaken a few times, and no more.
- *Prompts.* Of the tokens computed, half go to the oldest prompt and half to the one that is done soonest: a short
  prompt does not wait for a long one, and no stream of short ones keeps a long one from its end.
- *Progress.* The oldest row is never sent back, and a request that could not even run alone is refused at the start; so
  every request ends.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from lfm_mlx.errors import MemoryPlanError

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
        group: the group it is decoded in; None before.
    """

    number: int
    num_tokens: int
    num_computed: int = 0
    num_overtaken: int = 0
    group: int | None = None

    @property
    def num_missing(self) -> int:
        """Tokens to be computed before it can be decoded."""
        return self.num_tokens - self.num_computed


@dataclass(frozen=True, kw_only=True)
class Places:
    """Who loses a place and what it holds, who then gets one, and two groups of which the second joins the first."""

    sent_back: tuple[int, ...] = ()
    admitted: tuple[int, ...] = ()
    joined: tuple[int, int] | None = None


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
        padding_bytes: what rows of a group may be padded with, all of them together; None sets no limit.
    """

    def __init__(
        self,
        *,
        max_rows: int,
        budget_bytes: int | None,
        bytes_of: Callable[[int], int],
        padding_bytes: int | None = None,
    ) -> None:
        self.padding_bytes = padding_bytes
        self.max_rows = max_rows
        self.budget_bytes = budget_bytes
        self.bytes_of = bytes_of
        self._rows: dict[int, Job] = {}
        self._waiting: dict[int, Job] = {}
        self._lead = 0  # Tokens that the oldest prompt was given more than half.

    def fits_alone(self, num_tokens: int) -> bool:
        """Whether a row of so many tokens fits the budget with nothing beside it."""
        return self.budget_bytes is None or self.bytes_of(num_tokens) <= self.budget_bytes

    def check_fits(self, num_tokens: int) -> None:
        """Raise MemoryPlanError if a row of so many tokens could never run."""
        if not self.fits_alone(num_tokens):
            raise MemoryPlanError(
                f"{num_tokens:,} tokens need {self.bytes_of(num_tokens) / 1e9:.3f} GB, expected at most "
                f"{(self.budget_bytes or 0) / 1e9:.3f} GB, which is what the engine's rows may hold; ask for fewer "
                "tokens, or start with more memory or --kv-bits"
            )

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
        """So many more tokens of a prompt were computed; with the last one the row is decoded, in its `group_of`."""
        job = self._rows[number]
        job.num_computed += num_tokens
        if not job.num_missing:
            job.group = self._group_for(job)

    def group_of(self, number: int) -> int | None:
        """The group that a row with a place is decoded in; None while its prompt is computed."""
        return self._rows[number].group

    def note_generated(self, number: int, num_tokens: int) -> None:
        """A decoded row has grown to so many tokens."""
        job = self._rows[number]
        job.num_tokens = job.num_computed = num_tokens

    def send_back(self, number: int) -> None:
        """Take a row's place away; all its tokens are to be computed again."""
        job = self._rows.pop(number)
        job.num_computed, job.group = 0, None
        self._waiting[number] = job

    def assign(self) -> Places:
        """Decide who has a place, before each step; it counts as done."""
        sent_back = tuple(self._make_room())
        joined = self._join_groups()
        return Places(sent_back=sent_back, admitted=() if sent_back else tuple(self._admit()), joined=joined)

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
        rows = [*self._rows.values(), *more]
        alone = [[job] for job in rows if job.group is None]
        return sum(len(group) * self._longest_bytes(group, growth) for group in [*alone, *self._groups().values()])

    def _longest_bytes(self, jobs: list[Job], growth: int = 0) -> int:
        return self.bytes_of(max(job.num_tokens for job in jobs) + growth)

    def _groups(self) -> dict[int, list[Job]]:
        """The rows that are decoded, by their group."""
        found: dict[int, list[Job]] = {}
        for job in self._rows.values():
            if job.group is not None:
                found.setdefault(job.group, []).append(job)
        return found

    def _padding(self, jobs: list[Job]) -> int:
        """Bytes that these rows would be padded with in one group."""
        return len(jobs) * self._longest_bytes(jobs) - sum(self.bytes_of(job.num_tokens) for job in jobs)

    def _fit_together(self, first: list[Job], second: list[Job], padding_bytes: int | None) -> bool:
        both = [*first, *second]
        if padding_bytes is not None and self._padding(both) > padding_bytes:
            return False
        if self.budget_bytes is None:
            return True
        apart = sum(len(jobs) * self._longest_bytes(jobs, 1) for jobs in (first, second))
        return self.held_bytes - apart + len(both) * self._longest_bytes(both, 1) <= self.budget_bytes

    def _group_for(self, job: Job) -> int:
        """The group where a row that is to be decoded costs the least padding, or a new one."""
        groups = self._groups()
        fitting = [group for group, jobs in groups.items() if self._fit_together(jobs, [job], self.padding_bytes)]
        if fitting:
            return min(fitting, key=lambda group: (self._padding([*groups[group], job]), group))
        return max(groups, default=-1) + 1

    def _join_groups(self) -> tuple[int, int] | None:
        """Two groups that have come to fit together well; their rows are one group then."""
        limit = self.padding_bytes // 2 if self.padding_bytes is not None else None
        groups = self._groups()
        for first, second in itertools.combinations(groups, 2):
            if self._fit_together(groups[first], groups[second], limit):
                for job in groups[second]:
                    job.group = first
                return first, second
        return None

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
