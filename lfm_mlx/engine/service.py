"""One thread that runs one engine: requests come from any thread, and none of them can end it."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from lfm_mlx.cache import PrefixCache
from lfm_mlx.distributed import free_bytes, ranks_of
from lfm_mlx.engine.engine import Engine
from lfm_mlx.engine.request import Request, Row
from lfm_mlx.engine.shared_prefix import PendingReading
from lfm_mlx.errors import EngineClosedError, MemoryPlanError, OptionError, QueueFullError, RankError
from lfm_mlx.memory import release_freed, row_bytes, rows_budget_bytes
from lfm_mlx.model import Model
from lfm_mlx.types import check_integer

_log = logging.getLogger(__name__)

FAREWELL_S = 2.0
"""A process lives on so long when a rank of its model is gone, to say so to those who wait."""

ASSUMED_SERVICE_S = 2.0
"""How long a request is taken to last while none has ended yet."""

REST_S = 1.0
"""After so long without work, memory that is kept for the next request goes back to the system."""


@dataclass(frozen=True, kw_only=True)
class EngineCounters:
    """What an engine has done since it was started, and what it does now.

    Args:
        num_running: rows with a prompt that is being computed, or that are decoded.
        num_waiting: requests that have not begun.
        held_bytes: what these rows hold on the device.
        memory_bytes: what they may hold together now.
        num_requests, num_finished, num_failed, num_cancelled, num_refused: requests since the start.
        num_sent_back: times that a row lost its place because memory ran short, to be computed again.
        num_restarted: times that a row was computed again because a step failed.
        prompt_tokens: tokens of the prompts of finished requests.
        cached_tokens: those of them that did not have to be computed.
        generated_tokens: tokens of the answers of finished requests.
    """

    num_running: int = 0
    num_waiting: int = 0
    held_bytes: int = 0
    memory_bytes: int = 0
    num_requests: int = 0
    num_finished: int = 0
    num_failed: int = 0
    num_cancelled: int = 0
    num_refused: int = 0
    num_sent_back: int = 0
    num_restarted: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0


class EngineThread:
    """Runs requests of many threads in one engine. All methods may be called from any thread.

    Args:
        model: the model, its weights evaluated, as `load` returns it.
        max_rows: rows decoded together.
        max_waiting: requests that may wait; one more is refused.
        kv_bits: 8 or 4 to quantise keys and values; None takes the model's setting.
        memory_bytes: what the rows may hold together; None takes what is free now, less working memory and what the
            prefix cache may come to hold. Where less is free later, they hold less.
        prefix_cache: what earlier rows have computed; of the same model and `kv_bits`. It is the engine's from now on.
    """

    def __init__(
        self,
        model: Model,
        *,
        max_rows: int = 16,
        max_waiting: int = 128,
        kv_bits: int | None = None,
        memory_bytes: int | None = None,
        prefix_cache: PrefixCache | None = None,
    ) -> None:
        self.model = model
        self.max_rows = max_rows
        self.max_waiting = max_waiting
        self.kv_bits = kv_bits if kv_bits is not None else model.kv_bits
        self.prefix_cache = prefix_cache
        if memory_bytes is None:
            kept = prefix_cache.max_bytes if prefix_cache is not None else 0
            memory_bytes = self._budget_of(free_bytes(model) - kept)
        self.memory_bytes = memory_bytes
        self._engine = self._new_engine()
        self._changed = threading.Condition()
        self._arrived: list[Row] = []
        self._rows: list[Row] = []
        self._reading: dict[Row, PendingReading] = {}
        self._is_closing = False
        self._num_requests = 0
        self._num_refused = 0
        self._ended = {"finished": 0, "failed": 0, "cancelled": 0}
        self._tokens = {"prompt_tokens": 0, "cached_tokens": 0, "generated_tokens": 0}
        self._service_s = ASSUMED_SERVICE_S
        self._checked_s = time.monotonic()
        self._loss: RankError | None = None
        ranks = ranks_of(model)
        if ranks is not None:
            ranks.link.on_failure = self._give_up
        self._thread = threading.Thread(target=self._run, name="lfm-engine", daemon=True)
        self._thread.start()

    def _new_engine(self) -> Engine:
        return Engine(
            self.model,
            max_rows=self.max_rows,
            kv_bits=self.kv_bits,
            memory_bytes=self.memory_bytes,
            prefix_cache=self.prefix_cache,
        )

    def _budget_of(self, free_bytes: int) -> int:
        return rows_budget_bytes(self.model.config, free_bytes, dtype=self.model.dtype, max_rows=self.max_rows)

    def room_for_answer(self, prompt_len: int, max_tokens: int | None) -> int:
        """Tokens an answer may have: what was asked for, or else as many as context and memory hold.

        Raises:
            MemoryPlanError: what was asked for, or a single token, could not even run alone.
        """
        room = self.model.max_context - prompt_len
        wanted = min(max_tokens or room, room)
        if self._row_bytes(prompt_len + wanted) <= self.memory_bytes:
            return wanted
        low, high = 0, wanted
        while low < high and max_tokens is None:
            middle = (low + high + 1) // 2
            fits = self._row_bytes(prompt_len + middle) <= self.memory_bytes
            low, high = (middle, high) if fits else (low, middle - 1)
        if low:
            return low
        needed = prompt_len + (1 if max_tokens is None else wanted)
        raise MemoryPlanError(
            f"{needed:,} tokens need {self._row_bytes(needed) / 1e9:.3f} GB, expected at most "
            f"{self.memory_bytes / 1e9:.3f} GB, which is what the engine's rows may hold; ask for fewer tokens, or "
            "start with more memory or --kv-bits"
        )

    def _row_bytes(self, num_tokens: int) -> int:
        return row_bytes(self.model.config, num_tokens, kv_bits=self.kv_bits, dtype=self.model.dtype)

    def submit(self, request: Request, on_progress: Callable[[], None] | None = None) -> Row:
        """Queue a request; the row that is returned shows how far it has come.

        Args:
            request: without a transcript: its state would belong to another engine.
            on_progress: called in the engine's thread after every step that changed the row, its end included. It
                should return at once; an exception ends the row.

        Raises:
            OptionError: the request does not fit the model.
            ContextLengthError: the prompt leaves no room.
            MemoryPlanError: it needs more memory than there is.
            QueueFullError: too many requests wait.
            EngineClosedError: the engine was closed.
        """
        if request.transcript is not None:
            raise OptionError("transcript was given, expected none: rows of a shared engine have no state of their own")
        try:
            self.model.checked_prompt(request.prompt)
            check_integer("max_tokens", request.max_tokens, minimum=1)
            self.room_for_answer(len(request.prompt), request.max_tokens)
            row = Row(request, self.model.config.vocab_size, on_progress)
            with self._changed:
                self._check_open()
                self._rows.append(row)
                self._arrived.append(row)
                self._num_requests += 1
                self._changed.notify_all()
        except (MemoryPlanError, QueueFullError):
            self._num_refused += 1
            raise
        return row

    def _check_open(self) -> None:
        if self._loss is not None:
            raise EngineClosedError(str(self._loss))
        if self._is_closing:
            raise EngineClosedError("the engine is closed, expected it to run; start a new one")
        num_waiting = len(self._rows) - self.max_rows
        if num_waiting >= self.max_waiting:
            raise QueueFullError(
                f"{num_waiting} requests wait, expected fewer than {self.max_waiting}; try again later",
                retry_after_s=self.retry_after_s,
            )

    @property
    def retry_after_s(self) -> float:
        """Seconds after which a place in the queue is likely to be free, from how long requests have lasted."""
        return max(1.0, self._service_s / self.max_rows)

    @property
    def counters(self) -> EngineCounters:
        """Numbers for a monitor; they are consistent enough for that."""
        engine = self._engine
        num_running = engine.num_running
        return EngineCounters(
            num_running=num_running,
            num_waiting=max(len(self._rows) - num_running, 0),
            held_bytes=engine.held_bytes,
            memory_bytes=engine.memory_bytes or 0,
            num_sent_back=engine.num_sent_back,
            num_restarted=engine.num_restarted,
            num_requests=self._num_requests,
            num_refused=self._num_refused,
            **{f"num_{name}": count for name, count in self._ended.items()},
            **self._tokens,
        )

    @property
    def is_alive(self) -> bool:
        """Whether the thread runs and takes requests."""
        return self._thread.is_alive() and not self._is_closing and not self.is_lost

    @property
    def is_lost(self) -> bool:
        """Whether a rank of the model is gone, so that this process will end by itself."""
        return self._loss is not None

    def _give_up(self, loss: RankError) -> float:
        """Another rank of the model is gone: the engine's thread may wait for it for ever, so its rows are ended here.

        Returns:
            Seconds in which those who wait may read that.
        """
        self._loss = loss
        for row in list(self._rows):
            row.end("error", EngineClosedError(str(loss)))
            if row.on_progress is not None:
                row.on_progress()
        return FAREWELL_S

    def close(self, timeout_s: float = 0.0) -> None:
        """Take no more requests, let those that run finish for so many seconds, then cancel them; waits for the end."""
        with self._changed:
            self._is_closing = True
            self._changed.notify_all()
        if self._thread is not threading.current_thread():
            self._thread.join(max(timeout_s, 0.0))
            for row in list(self._rows):
                row.cancel()
            self._thread.join()

    def _run(self) -> None:
        if self._engine.lockstep.is_shared:
            self._work([])  # The other ranks make theirs too, and tell at once what they cannot do.
        self._serve()
        if self.prefix_cache is not None:
            self.prefix_cache.close()

    def _serve(self) -> None:
        while True:
            if self._engine.is_idle:
                self._rest()
            with self._changed:
                arrived, self._arrived = self._arrived, []
                if self._is_closing and not (arrived or self._reading) and self._engine.is_idle:
                    return
            self._work(arrived)
            self._tell()

    def _rest(self) -> None:
        """Wait for work, or the end; meanwhile, tidy up."""
        self._settle()
        if not self._wait_for_work(REST_S):
            self._settle()
            release_freed()
            self._wait_for_work(None)

    def _settle(self) -> None:
        if self.prefix_cache is not None:
            self._engine.lockstep.settle(self.prefix_cache)

    def _wait_for_work(self, timeout_s: float | None) -> bool:
        with self._changed:
            return self._changed.wait_for(self._has_work, timeout_s)

    def _has_work(self) -> bool:
        if self._arrived or (self._is_closing and not self._reading):
            return True
        return any(reading.is_done for reading in self._reading.values())

    def _work(self, arrived: list[Row]) -> None:
        try:
            for row in self._ready(arrived):
                self._engine.add(row)
            self._follow_memory()
            self._engine.step()
        except Exception as error:  # noqa: BLE001
            # The engine keeps failures to the rows they belong to; this one is nobody's, or its own.
            _log.exception("the engine failed and is started again")
            for row in self._rows:
                row.end("error", error)
            self._engine = self._new_engine()

    def _ready(self, arrived: list[Row]) -> list[Row]:
        """The rows that join the engine now; for others, what they begin with is still being read from the disk."""
        cache = self.prefix_cache
        if cache is None:
            return arrived
        ready = []
        for row in arrived:
            reading = self._engine.lockstep.begin_reading(cache, row.ids)
            if reading is None:
                ready.append(row)
            else:
                self._reading[row] = reading
                reading.call_when_done(self._notify)
        for row, reading in list(self._reading.items()):
            if reading.is_done:
                del self._reading[row]
                ready.append(row)
                self._engine.lockstep.finish_reading(cache, reading)
        return ready

    def _notify(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def _follow_memory(self) -> None:
        """Once a second, see how much memory other programs have left."""
        now_s = time.monotonic()
        if now_s - self._checked_s >= 1.0:
            self._checked_s = now_s
            cache = self.prefix_cache
            promised = max(cache.max_bytes - cache.num_bytes, 0) if cache is not None else 0
            free = self._engine.held_bytes + self._budget_of(free_bytes(self.model) - promised)
            self._engine.memory_bytes = min(self.memory_bytes, free)

    def _tell(self) -> None:
        """Call back for every row that changed, and let go of those that ended."""
        for row in [row for row in self._rows if row.has_news]:
            row.has_news = False
            if row.finish_reason is not None:
                self._count(row)
            if row.on_progress is not None:
                try:
                    row.on_progress()
                except Exception as error:  # noqa: BLE001  # The caller's fault must not end everybody's engine.
                    row.on_progress = None
                    row.end("error", error)

    def _count(self, row: Row) -> None:
        with self._changed:
            self._rows.remove(row)
        kind = {"error": "failed", "cancelled": "cancelled"}.get(str(row.finish_reason), "finished")
        self._ended[kind] += 1
        self._tokens["prompt_tokens"] += len(row.request.prompt)
        self._tokens["cached_tokens"] += row.cached_tokens
        self._tokens["generated_tokens"] += len(row.generated)
        if kind == "finished":
            self._service_s += 0.1 * (time.perf_counter() - row.started_s - self._service_s)
