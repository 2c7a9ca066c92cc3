"""Notices that a generation goes round in circles.

The guard predicts every token by copying: it follows an earlier place in the text and expects what stood there next.
The distance back to that place is the *lag*; in a loop of period p, it is p. A wrong expectation is a *novelty* where
the last few tokens never stood together before. Otherwise it is a *jump*: another variant of the cycle, and the guard
goes on from the place where they stand. A few tokens later it returns to the lag of before if the text does.

Copying alone is no loop: who repeats a text once copies no more tokens than the lag. A loop copies many times the lag,
and how much it copies is the evidence, for three kinds of loop (`_Rule`):

- verbatim: nothing new at all. Jumps have a price, so that variants may alternate and noise of few symbols is no loop.
- worded: long cycles with little new, such as a counter or a changed word. Reports, forms and logs are so by nature,
  so it takes several times as many tokens.
- rows: short cycles with more new, such as a list that repeats one item under rising numbers. Tables are so by nature,
  so it takes hundreds of rows.
"""

from __future__ import annotations

from dataclasses import dataclass

from lfm_mlx.types import check_integer, check_number

_SHORT = 5
"""So many tokens that stood in the text before count as known."""

_LONG = 32
"""So many tokens single out one place, even in a text of few different tokens."""

_LOST_AFTER = 8
"""So many wrong expectations in a row end the copying."""

_CHECK_EVERY = 16
"""Tokens from one look at the evidence to the next."""

_NEVER = float("inf")


@dataclass(frozen=True, kw_only=True)
class _Loop:
    """A loop that is certain: the tokens in a cycle, and how many cycles were repeated."""

    period: int
    repeats: int


@dataclass(frozen=True, kw_only=True)
class _Rule:
    """What is a loop: a score of `tokens` + `repeats` * lag, where a copied token scores 1 and the rest costs."""

    tokens: int
    repeats: int
    jump_cost: float
    novelty_cost: float

    def required(self, lag: int) -> int:
        return self.tokens + self.repeats * lag


@dataclass(frozen=True, kw_only=True)
class _Mark:
    """The lag was `lag` up to the place where the score was `score`, and is less since."""

    lag: int
    score: float


class _Evidence:
    """The score of one rule: since the start, and since the lag fell below each value it had before."""

    def __init__(self, rule: _Rule) -> None:
        self._rule = rule
        self.restart()

    def restart(self) -> None:
        self._score = 0.0
        self._marks: list[_Mark] = []

    def add_copies(self, num_tokens: int) -> None:
        self._score += num_tokens

    def add_surprise(self, *, is_novel: bool) -> None:
        """A jump, or a few tokens in place of the expected ones."""
        self._score -= self._rule.novelty_cost if is_novel else self._rule.jump_cost
        if self._score <= 0:
            self.restart()

    def change_lag(self, lag: int, new_lag: int) -> None:
        if new_lag < lag and self._score:
            self._marks.append(_Mark(lag=lag, score=self._score))
        while self._marks and self._marks[-1].lag <= new_lag:
            self._marks.pop()

    def find_loop(self, lag: int) -> _Loop | None:
        """The loop of least period, `lag` or longer, that the score proves."""
        for mark in reversed(self._marks):
            if (score := self._score - mark.score) >= self._rule.required(lag):
                return _Loop(period=lag, repeats=int(score // lag))
            lag = mark.lag
        if self._score >= self._rule.required(lag):
            return _Loop(period=lag, repeats=int(self._score // lag))
        return None


class LoopGuard:
    """Tells, token by token, when a text has begun to repeat itself without end.

    It knows token ids only. Time per token is bounded, and so is memory, by `max_period`.

    Args:
        min_tokens: a verbatim loop is certain after this many repeated tokens beyond `min_repeats` cycles. What an
            answer may rightly repeat, such as a table of zeros, has to be shorter.
        min_repeats: cycles that a verbatim loop repeats beyond those tokens; near-verbatim ones repeat twice as many.
        tolerance: changes per token (a counter is one change) above which long cycles are no loop; for short ones, four
            times as many. The nearer to it, the later a loop is noticed; 0 notices verbatim loops only.
        max_period: the longest cycle in tokens.

    Raises:
        OptionError: a number is out of range.
    """

    def __init__(
        self,
        *,
        min_tokens: int = 1024,
        min_repeats: int = 2,
        tolerance: float = 1 / 16,
        max_period: int = 4096,
    ) -> None:
        check_integer("min_tokens", min_tokens, minimum=1)
        check_integer("min_repeats", min_repeats, minimum=1)
        check_number("tolerance", tolerance, minimum=0, maximum=0.25)
        check_integer("max_period", max_period, minimum=_LONG)
        self._max_period = max_period
        self._evidence = [_Evidence(rule) for rule in _rules(min_tokens, min_repeats, tolerance)]
        self._lag = 0  # where the next token is copied from; 0 is nowhere
        self._home = 0  # the lag to return to from a detour; without one, the same
        self._detour_len = 0
        self._home_run = 0  # tokens in a row, on the detour, that stand at the home lag too
        self._num_copied = 0  # since the last surprise
        self._num_uncounted = 0  # of the copied ones, those not in the evidence yet
        self._num_known = 0  # missed since the last copy, at the end of tokens that stood together before
        self._num_novel = 0  # likewise, at the end of tokens that never did
        self.reset()

    def reset(self) -> None:
        """Forget everything, as at the end of the reasoning: the answer may repeat what stands in it."""
        self._loop: _Loop | None = None
        self._tokens: list[int] = []
        self._places: dict[int, int] = {}  # hash of a run of tokens -> the place after it, from the start of the text
        self._num_forgotten = 0
        self._stop_copying()

    @property
    def period(self) -> int:
        """Tokens in a cycle; 0 while no loop is certain."""
        return self._loop.period if self._loop else 0

    @property
    def repeats(self) -> int:
        """Cycles repeated when the loop became certain, those with new tokens counted for less; 0 until then."""
        return self._loop.repeats if self._loop else 0

    def observe(self, token_id: int) -> bool:
        """Whether a loop is certain, now that `token_id` was generated; it stays so until `reset`."""
        if self._loop:
            return True
        self._return_home(token_id)
        is_expected = self._lag > 0 and self._tokens[-self._lag] == token_id
        self._tokens.append(token_id)
        short_lag, long_lag = self._remember(_SHORT), self._remember(_LONG)
        if is_expected:
            self._copy()
        elif long_lag and self._num_copied < _LONG:
            self._jump(long_lag)
        else:
            self._miss(short_lag)
        if len(self._tokens) % _CHECK_EVERY == 0:
            self._decide()
        if len(self._tokens) > 3 * self._max_period:
            self._forget()
        return self._loop is not None

    def _remember(self, length: int) -> int:
        """Note where the latest `length` tokens stand; the lag to where they stood before, 0 where they did not."""
        if len(self._tokens) < length:
            return 0
        key = hash(tuple(self._tokens[-length:]))
        place = self._num_forgotten + len(self._tokens)
        before = self._places.get(key, place - self._max_period - 1)
        self._places[key] = place
        return place - before if place - before <= self._max_period else 0

    def _copy(self) -> None:
        if self._num_known or self._num_novel:
            self._count_copies()
            for evidence in self._evidence:
                evidence.add_surprise(is_novel=self._num_novel > 0)
            self._num_copied = self._num_known = self._num_novel = 0
        self._num_copied += 1
        self._num_uncounted += 1

    def _count_copies(self) -> None:
        for evidence in self._evidence:
            evidence.add_copies(self._num_uncounted)
        self._num_uncounted = 0

    def _return_home(self, token_id: int) -> None:
        """End a detour: copy at the lag of before, where the text agrees with it again, and within one cycle."""
        if self._lag == self._home:
            return
        self._detour_len += 1
        self._home_run = self._home_run + 1 if self._tokens[-self._home] == token_id else 0
        if self._home_run >= _LOST_AFTER:
            self._lag = self._home
        elif self._detour_len > self._home + _LOST_AFTER:
            self._settle(self._lag)

    def _settle(self, lag: int) -> None:
        self._count_copies()
        for evidence in self._evidence:
            evidence.change_lag(self._home, lag)
        self._home = lag

    def _miss(self, lag: int) -> None:
        """Stay for a few tokens, as one of them may have been replaced; then jump to where they are known."""
        num_missed = self._num_known + self._num_novel + 1
        if lag and (not self._lag or num_missed >= _SHORT):
            self._jump(lag)
        elif num_missed >= _LOST_AFTER:
            self._stop_copying()
        elif lag:
            self._num_known += 1
        else:
            self._num_novel += 1

    def _jump(self, lag: int) -> None:
        """Copy from another place, on a detour if it is further back; the latest tokens stand there too."""
        if self._lag:
            self._num_uncounted += 1
            self._count_copies()
            for evidence in self._evidence:
                evidence.add_surprise(is_novel=self._num_novel >= _SHORT)
        if self._lag == self._home:
            self._detour_len = self._home_run = 0
        if lag <= self._home or not self._home:
            self._settle(lag)
        self._lag = lag
        self._num_copied = self._num_known = self._num_novel = 0

    def _stop_copying(self) -> None:
        self._lag = self._home = 0
        self._num_copied = self._num_uncounted = self._num_known = self._num_novel = 0
        for evidence in self._evidence:
            evidence.restart()

    def _decide(self) -> None:
        if self._lag:
            self._count_copies()
            self._loop = next((loop for e in self._evidence if (loop := e.find_loop(self._home))), None)

    def _forget(self) -> None:
        """Drop what lies further back than any cycle."""
        self._num_forgotten += len(self._tokens) - self._max_period - _LONG
        del self._tokens[: -self._max_period - _LONG]
        self._places = {key: place for key, place in self._places.items() if place > self._num_forgotten}


def _rules(min_tokens: int, min_repeats: int, tolerance: float) -> list[_Rule]:
    """Verbatim, worded and rows; the numbers are those at which a corpus of ordinary texts stays clear of all three."""
    verbatim = _Rule(tokens=min_tokens, repeats=min_repeats, jump_cost=16, novelty_cost=_NEVER)
    if not tolerance:
        return [verbatim]
    cost = 1 / tolerance
    worded = _Rule(tokens=4 * min_tokens, repeats=2 * min_repeats, jump_cost=cost, novelty_cost=cost)
    rows = _Rule(tokens=min_tokens, repeats=80 * min_repeats, jump_cost=cost / 4, novelty_cost=cost / 4)
    return [verbatim, worded, rows]
