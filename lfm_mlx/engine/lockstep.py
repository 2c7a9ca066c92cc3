"""Steps that all ranks of a sharded model take alike.

Rank 0 decides what depends on users, clocks and drawn tokens, and sends it to the others as notes: before each step who
has come and who has ended, and during it how far a prompt may go. Everything else follows from these by the same code.
Drawn ids are rank 0's everywhere: the others draw nothing of their own, so grammars, logprobs and seeds stay with it.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

from lfm_mlx.cache import PrefixCache, Transcript
from lfm_mlx.distributed import Note, Ranks, ranks_of
from lfm_mlx.engine.pace import Pace
from lfm_mlx.engine.request import Request, Row, TokenLogprob
from lfm_mlx.engine.shared_prefix import (
    CacheUse,
    FollowedReadings,
    LeaderCompany,
    LoneCacheUse,
    PendingReading,
    SharedReading,
    described_cache,
)
from lfm_mlx.errors import OptionError, RankError
from lfm_mlx.model import Model
from lfm_mlx.step import stepper_of
from lfm_mlx.types import SamplingParams


class Stepped(Protocol):
    """What is used of an engine."""

    memory_bytes: int | None

    @property
    def rows(self) -> Mapping[int, Row]:
        """Its rows by number, in the order of arrival."""
        ...

    def add(self, row: Row) -> None:
        """Queue a row."""
        ...


class Lockstep(CacheUse, Protocol):
    """One rank's side of the steps of one engine."""

    is_shared: bool
    """Whether other ranks take the same steps."""

    def begin_step(self, engine: Stepped) -> None:
        """Exchange what is new since the last step, and bring it into the engine."""
        ...

    def end_step(self) -> None:
        """Exchange who has ended in the step."""
        ...

    def pace(self, full_chunk: int) -> Pace:
        """The engine's pace, the same on all ranks."""
        ...

    def fail(self, error: Exception) -> None:
        """A step failed here: where others take it too, nobody knows how far they came, and the run ends."""
        ...


class LoneStep(LoneCacheUse):
    """The `Lockstep` of a process that computes alone."""

    is_shared = False

    def begin_step(self, engine: Stepped) -> None:
        """As `Lockstep.begin_step`: nothing."""

    def end_step(self) -> None:
        """As `Lockstep.end_step`: nothing."""

    def pace(self, full_chunk: int) -> Pace:
        """As `Lockstep.pace`."""
        return Pace(full_chunk)

    def fail(self, error: Exception) -> None:
        """As `Lockstep.fail`: nothing."""


class SharedStep:
    """What rank 0 and the others have in common.

    Args:
        ranks: the ranks.
    """

    is_shared = True

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks

    def fail(self, error: Exception) -> None:
        """As `Lockstep.fail`: does not return."""
        self.ranks.link.fail(error)


class Numbers:
    """Numbers for objects of one kind, as long as they live."""

    def __init__(self) -> None:
        self._numbers: weakref.WeakKeyDictionary[object, int] = weakref.WeakKeyDictionary()
        self._num_given = 0
        self._gone: list[int] = []

    def __getitem__(self, one: object) -> int:
        """An object's number."""
        if one not in self._numbers:
            self._numbers[one] = number = self._num_given
            self._num_given += 1
            weakref.finalize(one, self._gone.append, number).atexit = False
        return self._numbers[one]

    def take_gone(self) -> list[int]:
        """The numbers of those that have gone since the last call."""
        gone = list(self._gone)
        del self._gone[: len(gone)]
        return gone


class Score:
    """What rank 0 knows of the engines that the others mirror; one for each model."""

    def __init__(self) -> None:
        self.num_readings = 0
        self.engines, self.transcripts, self.caches = Numbers(), Numbers(), Numbers()

    def take_gone(self) -> Note:
        """The numbers of what nobody refers to any more."""
        kinds = {"engines": self.engines, "transcripts": self.transcripts, "caches": self.caches}
        return {f"gone_{kind}": gone for kind, numbers in kinds.items() if (gone := numbers.take_gone())}


class LeaderStep(SharedStep):
    """Rank 0's `Lockstep`.

    Args:
        ranks: the ranks.
        score: what the others mirror.
        number: the engine's.
        options: how it was made, for the others to make it alike.
        lock: of the model's steps.
    """

    def __init__(
        self, ranks: Ranks, score: Score, number: int, options: Note, lock: AbstractContextManager[Any]
    ) -> None:
        super().__init__(ranks)
        self._score = score
        self._options: Note | None = options
        self._number = number
        self._lock = lock
        self._told: dict[int, Row] = {}
        self._num_told = 0
        self._memory_bytes: int | None = None

    def begin_step(self, engine: Stepped) -> None:
        """As `Lockstep.begin_step`: send it."""
        note: Note = {}
        if engine.memory_bytes != self._memory_bytes:
            note["memory_bytes"] = self._memory_bytes = engine.memory_bytes
        new = {number: row for number, row in engine.rows.items() if number >= self._num_told}
        if new:
            note["new"] = [self._described(row.request) for row in new.values()]
            self._num_told = max(new) + 1
            self._told |= new
        cancelled = [number for number, row in self._told.items() if row.take_wish()]
        if cancelled:
            note["cancelled"] = cancelled
        self._send(note | self._take_ended())

    def _send(self, note: Note) -> None:
        note = {"engine": self._number, **self._score.take_gone(), **note}
        if self._options is not None:
            note["options"], self._options = self._options, None
        self.ranks.link.send(note)

    def begin_reading(self, cache: PrefixCache, ids: Sequence[int]) -> PendingReading | None:
        """As `CacheUse.begin_reading`, on all ranks; rank 0 decides whether anything is read."""
        own = cache.begin_restore(ids)
        if own is None:
            return None
        with self._lock:
            reading = SharedReading(self._score.num_readings, own, self.ranks.link)
            self._score.num_readings += 1
            self._send({"cache": "read", "number": reading.number, "ids": [int(token_id) for token_id in ids]})
        return reading

    def finish_reading(self, cache: PrefixCache, reading: PendingReading) -> None:
        """As `CacheUse.finish_reading`, on all ranks."""
        assert isinstance(reading, SharedReading)
        with self._lock:
            self._send({"cache": "finish", "number": reading.number})
        cache.finish_reading(reading.own)

    def settle(self, cache: PrefixCache) -> None:
        """As `CacheUse.settle`, on all ranks."""
        if cache.disk is not None:
            with self._lock:
                self._send({"cache": "settle"})
        cache.settle()

    def end_step(self) -> None:
        """As `Lockstep.end_step`: send it."""
        if ended := self._take_ended():
            self.ranks.link.send({"engine": self._number, "is_over": True, **ended})

    def _take_ended(self) -> Note:
        ended = {number: row for number, row in self._told.items() if row.finish_reason is not None}
        self._told = {number: row for number, row in self._told.items() if number not in ended}
        return {"ended": [[n, row.error is not None] for n, row in ended.items()]} if ended else {}

    def pace(self, full_chunk: int) -> Pace:
        """As `Lockstep.pace`."""
        return _LeaderPace(full_chunk, self.ranks)

    def _described(self, request: Request) -> Note:
        transcript = request.transcript
        return {
            "prompt": [int(token_id) for token_id in request.prompt],
            "max_tokens": request.max_tokens,
            "border_ids": sorted(request.border_ids),
            "call_ids": sorted(request.call_ids),
            "transcript": self._score.transcripts[transcript] if transcript is not None else None,
        }


class FollowerStep(SharedStep, LoneCacheUse):
    """Another rank's `Lockstep`.

    Args:
        ranks: the ranks.
        transcripts: by rank 0's numbers; those that are not there yet are made.
        model: whose they are.

    Attributes:
        note: what rank 0 sent for the next step; set before each.
        readings: what rank 0 wants to be read.
    """

    def __init__(self, ranks: Ranks, transcripts: dict[int, Transcript], model: Model) -> None:
        super().__init__(ranks)
        self.note: Note = {}
        self.readings = FollowedReadings(ranks.link)
        self._transcripts = transcripts
        self._model = model

    def begin_step(self, engine: Stepped) -> None:
        """As `Lockstep.begin_step`: do what `note` says."""
        note = self.note
        if "memory_bytes" in note:
            engine.memory_bytes = note["memory_bytes"]
        for described in note.get("new", ()):
            engine.add(FollowedRow(self._request(described), self._model.config.vocab_size))
        for number in note.get("cancelled", ()):
            engine.rows[number].cancel()
            engine.rows[number].take_wish()
        self.end_rows(engine, note)

    def end_step(self) -> None:
        """As `Lockstep.end_step`: nothing, for rank 0's note of it comes by itself."""

    def end_rows(self, engine: Stepped, note: Note) -> None:
        """End the rows that have ended on rank 0."""
        for number, is_error in note.get("ended", ()):
            row = engine.rows.get(number)  # One that was cancelled before it was decoded has ended here too.
            if row is not None:
                row.end("error" if is_error else "stop", RankError("ended by rank 0") if is_error else None)

    def pace(self, full_chunk: int) -> Pace:
        """As `Lockstep.pace`."""
        return _FollowerPace(full_chunk, self.ranks)

    def _request(self, described: Note) -> Request:
        number = described["transcript"]
        if number is not None and number not in self._transcripts:
            self._transcripts[number] = Transcript(self._model.new_state())
        return Request(
            prompt=described["prompt"],
            sampling=SamplingParams(temperature=0.0, seed=0),
            max_tokens=described["max_tokens"],
            border_ids=frozenset(described["border_ids"]),
            call_ids=frozenset(described["call_ids"]),
            transcript=self._transcripts[number] if number is not None else None,
        )


class FollowedRow(Row):
    """A row that ends when rank 0 says so."""

    def take(self, token_id: int, logprob: TokenLogprob | None = None) -> None:
        """Note a generated token."""
        self.note_token(token_id, logprob)


class _LeaderPace(Pace):
    """Tells the other ranks what it decides."""

    def __init__(self, full_chunk: int, ranks: Ranks) -> None:
        super().__init__(full_chunk)
        self._ranks = ranks

    @property
    def chunk_tokens(self) -> int:
        """As in `Pace`."""
        decided = super().chunk_tokens
        self._ranks.link.send({"pace": decided})
        return decided

    def allows(self, layer: int, num_tokens: int) -> bool:
        """As in `Pace`."""
        decided = super().allows(layer, num_tokens)
        self._ranks.link.send({"pace": decided})
        return decided


class _FollowerPace(Pace):
    """Decides what rank 0 has decided."""

    def __init__(self, full_chunk: int, ranks: Ranks) -> None:
        super().__init__(full_chunk)
        self._ranks = ranks

    @property
    def chunk_tokens(self) -> int:
        """As in `Pace`."""
        return int(self._next())

    def allows(self, layer: int, num_tokens: int) -> bool:
        """As in `Pace`."""
        return bool(self._next())

    def _next(self) -> Any:
        return self._ranks.link.expect("pace")


def lockstep_of(
    engine: object, model: Model, max_rows: int, kv_bits: int | None, prefix_cache: PrefixCache | None
) -> Lockstep:
    """How a new engine of a model steps alike on all ranks, which may be this one alone.

    On a rank that follows, `FollowerStep` is given to its engines instead.

    Raises:
        OptionError: this is a rank that follows, or the prefix cache's disk is for another part of a model.
    """
    ranks = ranks_of(model)
    if ranks is None:
        return LoneStep()
    if not ranks.is_leader:
        raise OptionError("an engine was made on a rank that is not 0, expected `lfm_mlx.engine.follow` there")
    score = vars(ranks).setdefault("_score", Score())
    options: Note = {"max_rows": max_rows, "kv_bits": kv_bits, "cache_number": None}
    if prefix_cache is not None:
        options["prefix_cache"] = described_cache(prefix_cache, model)
        options["cache_number"] = score.caches[prefix_cache]
        if prefix_cache.disk is not None:
            prefix_cache.company = LeaderCompany(ranks.link)
    return LeaderStep(ranks, score, score.engines[engine], options, stepper_of(model).lock)
