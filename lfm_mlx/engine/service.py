"""One thread that runs one engine: requests come from any thread, and none of them can end it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from lfm_mlx.engine.engine import Engine
from lfm_mlx.engine.request import Request, Row
from lfm_mlx.errors import EngineClosedError, MemoryPlanError, OptionError, QueueFullError
from lfm_mlx.memory import room_for_answer
from lfm_mlx.model import Model

ASSUMED_SERVICE_S = 2.0
"""How long a request is taken to last while none has ended yet."""


@dataclass(frozen=True, kw_only=True)
class EngineCounters:
    """What an engine has done since it was started, and what it does now.

    Args:
        num_running: rows with a prompt that is being computed, or that are decoded.
        num_waiting: requests that have not begun.
        num_requests, num_finished, num_failed, num_cancelled, num_refused: requests since the start.
        prompt_tokens: tokens of the prompts of finished requests.
        cached_tokens: those of them that did not have to be computed.
        generated_tokens: tokens of the answers of finished requests.
    """

    num_running: int = 0
    num_waiting: int = 0
    num_requests: int = 0
    num_finished: int = 0
    num_failed: int = 0
    num_cancelled: int = 0
    num_refused: int = 0
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
    """

    def __init__(self, model: Model, *, max_rows: int = 16, max_waiting: int = 128, kv_bits: int | None = None) -> None:
        self.model = model
        self.max_rows = max_rows
        self.max_waiting = max_waiting
        self._engine = Engine(model, max_rows=max_rows, kv_bits=kv_bits)
        self._changed = threading.Condition()
        self._arrived: list[Row] = []
        self._rows: list[Row] = []
        self._is_closing = False
        self._num_requests = 0
        self._num_refused = 0
        self._ended = {"finished": 0, "failed": 0, "cancelled": 0}
        self._tokens = {"prompt_tokens": 0, "cached_tokens": 0, "generated_tokens": 0}
        self._service_s = ASSUMED_SERVICE_S
        self._thread = threading.Thread(target=self._run, name="lfm-engine", daemon=True)
        self._thread.start()

    @property
    def kv_bits(self) -> int | None:
        """Bits of keys and values; None: as computed."""
        return self._engine.kv_bits

    def room_for_answer(self, prompt_len: int, max_tokens: int | None) -> int:
        """Tokens an answer may have; see `lfm_mlx.memory.room_for_answer`."""
        return room_for_answer(self.model, prompt_len, max_tokens, kv_bits=self.kv_bits)

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
        num_rows = len(self._rows)
        num_running = min(num_rows, self.max_rows)
        return EngineCounters(
            num_running=num_running,
            num_waiting=num_rows - num_running,
            num_requests=self._num_requests,
            num_refused=self._num_refused,
            **{f"num_{name}": count for name, count in self._ended.items()},
            **self._tokens,
        )

    @property
    def is_alive(self) -> bool:
        """Whether the thread runs and takes requests."""
        return self._thread.is_alive() and not self._is_closing

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
        while True:
            with self._changed:
                while not self._arrived and self._engine.is_idle:
                    if self._is_closing:
                        return
                    self._changed.wait()
                arrived, self._arrived = self._arrived, []
            for row in arrived:
                self._engine.add(row)
            self._engine.step()
            self._tell()

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
                    row.cancel()
                    row.error = error

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
