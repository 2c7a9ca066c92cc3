"""The one generation core: prompts are taken in chunk by chunk, and all rows that have theirs are decoded together."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from functools import partial

import mlx.core as mx

from lfm_mlx.cache import PrefixCache, State
from lfm_mlx.engine.batch import Batch
from lfm_mlx.engine.lockstep import Lockstep, lockstep_of
from lfm_mlx.engine.prompt_run import PromptRun
from lfm_mlx.engine.request import Request, Row
from lfm_mlx.engine.scheduler import Chunk, Scheduler
from lfm_mlx.errors import OptionError
from lfm_mlx.memory import prefill_chunk_tokens, row_bytes, row_capacity, step_bytes
from lfm_mlx.model import Model
from lfm_mlx.step import stepper_of

_log = logging.getLogger(__name__)

MAX_FAILURES = 3
"""Times that a row may be computed again because a step of several rows failed."""


class Engine:
    """Runs requests on one model; call `step` until nothing is left.

    An exception ends the row it belongs to with the reason "error" and is kept in `Row.error`. Where a step of several
    rows fails, they are computed again, each alone at first: so the one it belongs to is found.

    Args:
        model: the model.
        max_rows: rows decoded together; further requests wait.
        kv_bits: 8 or 4 to quantise keys and values; None takes the model's setting.
        memory_bytes: what the rows may hold together; None sets no limit.
        prefix_cache: what earlier rows have computed; of the same model and `kv_bits`.
        lockstep: how this rank keeps step with others, for one that follows; None finds out.

    Attributes:
        num_sent_back: rows that lost their place because memory ran short.
        num_restarted: rows that were computed again because a step failed.

    An engine belongs to one thread; several engines may share a model.
    """

    def __init__(
        self,
        model: Model,
        *,
        max_rows: int = 1,
        kv_bits: int | None = None,
        memory_bytes: int | None = None,
        prefix_cache: PrefixCache | None = None,
        lockstep: Lockstep | None = None,
    ) -> None:
        self.model = model
        self.max_rows = max_rows
        self.kv_bits = kv_bits if kv_bits is not None else model.kv_bits
        self.prefix_cache = prefix_cache
        self.num_sent_back = 0
        self.num_restarted = 0
        self._stepper = stepper_of(model)
        # Not a method: an engine that refers to itself would be freed late, and its caches with it.
        bytes_of = partial(row_bytes, model.config, kv_bits=self.kv_bits, dtype=model.dtype)
        self._scheduler = Scheduler(
            max_rows=max_rows,
            budget_bytes=memory_bytes,
            bytes_of=bytes_of,
            padding_bytes=step_bytes(model.shared_bytes),
        )
        self.lockstep = lockstep or lockstep_of(self, model, max_rows, self.kv_bits, prefix_cache)
        self._pace = self.lockstep.pace(prefill_chunk_tokens(model.config, model.dtype))
        self._rows: dict[int, Row] = {}
        self._numbers: dict[Row, int] = {}
        self._prompts: dict[int, PromptRun] = {}
        self._chunk: Chunk | None = None
        self._failures: dict[int, int] = {}
        self._num_submitted = 0
        self._batches: dict[int, Batch] = {}
        self._checkpoints: dict[Row, dict[int, mx.array]] = {}

    @property
    def memory_bytes(self) -> int | None:
        """What the rows may hold together; it may be changed while they run. None sets no limit."""
        return self._scheduler.budget_bytes

    @memory_bytes.setter
    def memory_bytes(self, memory_bytes: int | None) -> None:
        self._scheduler.budget_bytes = memory_bytes

    def bytes_of(self, num_tokens: int) -> int:
        """Bytes that a row of so many tokens holds."""
        return self._scheduler.bytes_of(num_tokens)

    def submit(self, request: Request, on_progress: Callable[[], None] | None = None) -> Row:
        """Queue a request; the row that is returned shows how far it has come.

        Raises:
            OptionError: prompt or sampling do not fit the model, or a transcript is to share a batch.
            ContextLengthError: the prompt leaves no room.
            MemoryPlanError: the row would hold more than `memory_bytes`.
        """
        if request.transcript is not None and self.max_rows > 1:
            raise OptionError(
                f"transcript was given and max_rows is {self.max_rows}, expected 1: rows of a batch share one state; "
                "use an engine of its own for this request"
            )
        self._scheduler.check_fits(len(self.model.checked_prompt(request.prompt)) + request.max_tokens)
        row = Row(request, self.model.config.vocab_size, on_progress)
        self.add(row)
        return row

    def add(self, row: Row) -> None:
        """Queue a row that was made in whatever thread, and that could run alone."""
        row.is_led = self.lockstep.is_shared
        number = self._num_submitted
        self._num_submitted += 1
        self._rows[number] = row
        self._numbers[row] = number
        self._scheduler.add(number, len(row.request.prompt))

    @property
    def rows(self) -> Mapping[int, Row]:
        """The rows that are left, by the number of their arrival."""
        return self._rows

    @property
    def is_idle(self) -> bool:
        """Whether no request is left."""
        return not self._rows

    @property
    def num_running(self) -> int:
        """Rows that have a place: their prompt is being computed, or they are decoded."""
        return self._scheduler.num_admitted

    @property
    def num_waiting(self) -> int:
        """Requests that wait for a place."""
        return self._scheduler.num_waiting

    @property
    def held_bytes(self) -> int:
        """Bytes of keys, values and convolution rows that are held for rows."""
        # Another thread may ask.
        states = [run.state for run in list(self._prompts.values())]
        states += [batch.state for batch in list(self._batches.values())]
        return sum(state.num_bytes for state in states)

    def step(self) -> None:
        """One token of every row that is decoded, and before it as much of a prompt as they can wait for."""
        with self._stepper.lock:
            self.lockstep.begin_step(self)
            self.drop_ended()
            places = self._scheduler.assign()
            for number in places.sent_back:
                self.num_sent_back += 1
                self._take_place(number)
            if places.joined is not None:
                into, other = places.joined
                self._join(into, self._batches.pop(other))
            for number in places.admitted:
                self._guarded(number, self._begin)
            self._pace.begin_step()
            if not self._batches:
                self._pace.rest()
                self._work_on_prompts()
            else:
                self._step_batches()
            self.lockstep.end_step()

    def _step_batches(self) -> None:
        started_s = time.perf_counter()
        prompts_s = 0.0
        if self._prompts:
            for batch in list(self._batches.values()):
                self._wait(batch)
            prompts_s = time.perf_counter()
            self._work_on_prompts()
            prompts_s = time.perf_counter() - prompts_s
        for batch in list(self._batches.values()):
            self._decode(batch)
        self._pace.end_step(time.perf_counter() - started_s - prompts_s)

    def _wait(self, batch: Batch) -> None:
        """Wait for the step that is queued: neither its time nor its errors are a prompt's."""
        try:
            mx.eval(batch.ids)
        except Exception as error:  # noqa: BLE001
            self._restart(batch.rows, error)

    def drop_ended(self) -> None:
        """Let go of rows that were cancelled, or whose time is over; decoded ones end with the token drawn already."""
        decoded = [row for batch in self._batches.values() for row in batch.rows]
        for row in self._rows.values():
            if row not in decoded:
                row.check()
        for batch in list(self._batches.values()):
            self._release(batch)
        for number in [number for number, row in self._rows.items() if row.finish_reason is not None]:
            if (run := self._prompts.get(number)) is not None:
                self._store(run.keep_prefix)
            self._forget(number)

    def _guarded(self, number: int, action: Callable[[int], None]) -> None:
        """What concerns one row alone, and ends it where it fails."""
        try:
            action(number)
        except Exception as error:  # noqa: BLE001  # Whatever it is, the other rows have nothing to do with it.
            self.lockstep.fail(error)
            self._rows[number].end("error", error)
            self._forget(number)

    def _begin(self, number: int) -> None:
        """Give a row its state, with what an earlier one has computed."""
        row = self._rows[number]
        capacity = row_capacity(row.num_tokens + 1)
        run = PromptRun(row, self.new_state(), capacity, self.prefix_cache)
        self._prompts[number] = run
        self._scheduler.note_reused(number, run.num_computed)

    def _work_on_prompts(self) -> None:
        """One chunk of one prompt; while rows are decoded, only as far as these can wait."""
        is_decoding = bool(self._batches)
        while True:
            chunk = self._chunk
            layer = self._prompts[chunk.number].next_layer if chunk is not None else 0
            num_tokens = chunk.num_tokens if chunk is not None else self._pace.chunk_tokens
            if is_decoding and not self._pace.allows(layer, num_tokens):
                return
            if chunk is None:
                chunk = self._scheduler.next_chunk(num_tokens if is_decoding else self._pace.full_chunk)
                if chunk is None:
                    return
                self._chunk = chunk
            self._guarded(chunk.number, self._compute)
            if self._chunk is None:
                return

    def _compute(self, number: int) -> None:
        """Go on with the chunk: through all layers, or through the next one where rows are decoded meanwhile."""
        run, chunk = self._prompts[number], self._chunk
        assert chunk is not None
        started_s, layer = time.perf_counter(), run.next_layer
        if layer == 0:
            run.begin_chunk(self._stepper, chunk.num_tokens)
        is_decoding = bool(self._batches)
        num_tokens = run.compute(1 if is_decoding else self.model.config.num_layers)
        if is_decoding:
            self._pace.note_layer(layer, chunk.num_tokens, time.perf_counter() - started_s)
        if not num_tokens:
            return
        self._chunk = None
        self._scheduler.note_computed(number, num_tokens)
        if is_decoding:
            self._pace.end_chunk(num_tokens)
        if not run.is_done:
            return
        self._store(run.keep_prefix)
        ready = run.finish(self._stepper)
        del self._prompts[number]
        row = run.row
        if number in self._failures:  # It was there when a step failed: does it fail alone?
            ready.step(self._stepper)
            self._scheduler.note_generated(number, row.num_tokens)
        self._checkpoints[row] = {}
        if row.finish_reason is not None and not row.is_led:
            self._finish(row, ready, 0)
            return
        group = self._scheduler.group_of(number)
        assert group is not None
        self._join(group, ready)

    def _join(self, group: int, ready: Batch) -> None:
        batch = self._batches.setdefault(group, ready)
        if batch is ready:
            return
        try:
            batch.join(ready)
        except Exception as error:  # noqa: BLE001
            self._restart([*batch.rows, *(row for row in ready.rows if row not in batch.rows)], error)

    def _decode(self, batch: Batch) -> None:
        try:
            self._make_room(batch)
            batch.step(self._stepper)
            self._note_steps(batch)
        except Exception as error:  # noqa: BLE001
            self._restart(batch.rows, error)
        else:
            self._release(batch)

    def _make_room(self, batch: Batch) -> None:
        """Grow buffers to what the scheduler counts with, instead of by half."""
        needed = max(batch.state.lengths) + 1
        if needed > batch.state.capacity and batch.rows[0].request.transcript is None:
            capacity = row_capacity(needed)
            batch.state.reserve(capacity, planned_len=capacity)

    def _note_steps(self, batch: Batch) -> None:
        made: list[mx.array] = []
        for i, row in enumerate(batch.rows):
            self._scheduler.note_generated(self._numbers[row], row.num_tokens)
            if row.request.transcript is not None:
                if row.has_called:
                    row.request.transcript.mark_answer()
            elif self.prefix_cache is not None and row.generated:
                length = batch.state.lengths[i]
                if length % self.prefix_cache.block_tokens == 0 or row.generated[-1] in row.request.call_ids:
                    self._checkpoints[row][length] = batch.state.checkpoint(i)
                    made.append(self._checkpoints[row][length])
        mx.async_eval(made)

    def _release(self, batch: Batch) -> None:
        """Let go of the rows of a batch that ended, with the room that only they needed."""
        going_on = [i for i, row in enumerate(batch.rows) if row.finish_reason is None]
        for i, row in enumerate(batch.rows):
            if i not in going_on:
                self._finish(row, batch, i)
        self._keep(batch, going_on)

    def _keep(self, batch: Batch, rows: list[int]) -> None:
        if not rows:
            self._remove(batch)
        elif len(rows) < len(batch.rows):
            batch.keep(rows, row_capacity(max(batch.state.lengths[i] for i in rows) + 1))

    def _remove(self, batch: Batch) -> None:
        self._batches = {group: other for group, other in self._batches.items() if other is not batch}

    def _finish(self, row: Row, batch: Batch, index: int) -> None:
        """Keep what an ended row has computed, for those who asked for it, and forget it."""
        num_consumed = batch.state.lengths[index]
        consumed = row.ids[:num_consumed]
        transcript = row.request.transcript
        if transcript is not None:
            transcript.record(consumed[len(transcript.ids) :])
        elif self.prefix_cache is not None and row.error is None:
            checkpoints = self._checkpoints[row] | {num_consumed: batch.state.checkpoint(index)}
            self._store(lambda cache: cache.insert(consumed, batch.state, index, checkpoints))
        self._forget(self._numbers[row])

    def _store(self, action: Callable[[PrefixCache], None]) -> None:
        """Keep something for later rows; where that fails, the present ones have nothing to do with it."""
        if self.prefix_cache is None:
            return
        try:
            action(self.prefix_cache)
        except Exception as error:  # noqa: BLE001
            self.lockstep.fail(error)
            self.prefix_cache.clear()
            _log.warning("the prefix cache was emptied: storing a row failed: %r", error)

    def _forget(self, number: int) -> None:
        row = self._rows.pop(number)
        del self._numbers[row]
        self._leave_prompt(number)
        self._failures.pop(number, None)
        self._checkpoints.pop(row, None)
        self._scheduler.remove(number)

    def _leave_prompt(self, number: int) -> None:
        self._prompts.pop(number, None)
        if self._chunk is not None and self._chunk.number == number:
            self._chunk = None

    def _take_place(self, number: int) -> None:
        """Drop what a row holds; it waits, and is computed again later."""
        row = self._rows[number]
        self._leave_prompt(number)
        self._checkpoints.pop(row, None)
        for batch in list(self._batches.values()):
            if row in batch.rows:
                self._keep(batch, [i for i, other in enumerate(batch.rows) if other is not row])

    def _restart(self, rows: list[Row], error: Exception) -> None:
        """A step of these rows failed, and nobody knows what their state is: they are computed again, or end."""
        self.lockstep.fail(error)
        for batch in list(self._batches.values()):
            if rows[0] in batch.rows:
                self._remove(batch)
        for row in rows:
            number = self._numbers[row]
            count = self._failures[number] = self._failures.get(number, 0) + 1
            if row.finish_reason is None and len(rows) > 1 and count <= MAX_FAILURES:
                self.num_restarted += 1
                self._leave_prompt(number)
                self._checkpoints.pop(row, None)
                self._scheduler.send_back(number)
                continue
            row.end("error", error)
            self._forget(number)

    def new_state(self) -> State:
        """A state of one row that has seen nothing."""
        return self.model.new_state(kv_bits=self.kv_bits)
