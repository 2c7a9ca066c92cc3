"""The one generation core: prompts are taken in chunk by chunk, and all rows that have theirs are decoded together."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

import mlx.core as mx

from lfm_mlx.cache import State, Transcript
from lfm_mlx.engine.batch import Batch, draw
from lfm_mlx.engine.request import Request, Row
from lfm_mlx.errors import OptionError
from lfm_mlx.memory import prefill_chunk_tokens
from lfm_mlx.model import Model
from lfm_mlx.sampling import Sampler
from lfm_mlx.step import stepper_of


class Engine:
    """Runs requests on one model; call `step` until nothing is left.

    Args:
        model: the model.
        max_rows: rows decoded together; further requests wait.
        kv_bits: 8 or 4 to quantise keys and values; None takes the model's setting.

    An engine belongs to one thread; several engines may share a model.
    """

    def __init__(self, model: Model, *, max_rows: int = 1, kv_bits: int | None = None) -> None:
        self.model = model
        self.max_rows = max_rows
        self.kv_bits = kv_bits if kv_bits is not None else model.kv_bits
        self._stepper = stepper_of(model)
        self._waiting: deque[Row] = deque()
        self._prefilling: tuple[Row, Iterator[Batch | None]] | None = None
        self._batch: Batch | None = None

    def submit(self, request: Request) -> Row:
        """Queue a request; the row that is returned shows how far it has come.

        Raises:
            OptionError: the sampling options do not fit the model, or a transcript is to share a batch.
        """
        if request.transcript is not None and self.max_rows > 1:
            raise OptionError(
                f"transcript was given and max_rows is {self.max_rows}, expected 1: rows of a batch share one state; "
                "use an engine of its own for this request"
            )
        row = Row(request, self.model.config.vocab_size)
        self.add(row)
        return row

    def add(self, row: Row) -> None:
        """Queue a row, made in whatever thread, of a request without transcript."""
        self._waiting.append(row)

    @property
    def is_idle(self) -> bool:
        """Whether no request is left."""
        return not self._waiting and self._prefilling is None and self._batch is None

    def step(self) -> None:
        """One chunk of one prompt, if one is waiting, and one token of every row that is decoded."""
        with self._stepper.lock:
            self._drop_cancelled()
            self._take_in_prompt()
            if self._batch is not None:
                self._batch.step(self._stepper)
                self._release_finished()

    def _take_in_prompt(self) -> None:
        num_rows = len(self._batch.rows) if self._batch is not None else 0
        if self._prefilling is None and self._waiting and num_rows < self.max_rows:
            row = self._waiting.popleft()
            self._prefilling = (row, self._prefill(row))
        if self._prefilling is None:
            return
        _, chunks = self._prefilling
        ready = next(chunks)
        if ready is None:
            return
        self._prefilling = None
        if self._batch is None:
            self._batch = ready
        else:
            self._batch.join(ready)

    def _prefill(self, row: Row) -> Iterator[Batch | None]:
        """Compute a row's prompt; None after each chunk but the last, then the row as a batch of its own."""
        request = row.request
        transcript = request.transcript or Transcript(self.new_state())
        state, row.cached_tokens = transcript.state, transcript.reuse(request.prompt)
        state.reserve(len(request.prompt) + 1, planned_len=len(request.prompt) + request.max_tokens)
        hidden = None
        for start, stop in self._pieces(request, row.cached_tokens):
            if hidden is not None:
                yield None
            piece = list(request.prompt[start:stop])
            hidden = self._stepper.extend(state, mx.array([piece], dtype=mx.int32))
            transcript.record(piece)
            if request.transcript is not None:
                transcript.mark()
        assert hidden is not None
        sampler = Sampler([row.sampling], self.model.config.vocab_size)
        sampler_state = sampler.start([request.prompt])
        ids = draw([row], self.model.head(hidden), sampler, sampler_state)
        mx.async_eval(ids, sampler_state)
        yield Batch(row, state, sampler, sampler_state, ids)

    def _pieces(self, request: Request, start: int) -> Iterator[tuple[int, int]]:
        """Ranges of prompt tokens to compute at once: chunks, cut at message borders where these are marked."""
        prompt, size = request.prompt, prefill_chunk_tokens(self.model.config, self.model.dtype)
        is_marked = request.transcript is not None
        borders = [i for i in range(start + 1, len(prompt)) if is_marked and prompt[i] in request.border_ids]
        for border in [*borders, len(prompt)]:
            while start < border:
                yield start, min(start + size, border)
                start = min(start + size, border)

    def new_state(self) -> State:
        """A state of one row that has seen nothing."""
        return self.model.new_state(kv_bits=self.kv_bits)

    def _release_finished(self) -> None:
        batch = self._batch
        assert batch is not None
        for i, row in enumerate(batch.rows):
            if row.finish_reason is not None:
                self._complete_transcript(row, batch.state.lengths[i])
        going_on = [i for i, row in enumerate(batch.rows) if row.finish_reason is None]
        if going_on:
            batch.keep(going_on)
        else:
            self._batch = None

    def _complete_transcript(self, row: Row, num_consumed: int) -> None:
        """Note the generated tokens that the row's state has consumed."""
        transcript = row.request.transcript
        if transcript is not None:
            written = [*row.request.prompt, *row.generated]
            transcript.record(written[len(transcript.ids) : num_consumed])

    def _drop_cancelled(self) -> None:
        for row in [row for row in self._waiting if row.is_cancelled]:
            row.end("cancelled")
            self._waiting.remove(row)
        if self._prefilling is not None and self._prefilling[0].is_cancelled:
            self._prefilling[0].end("cancelled")
            self._prefilling = None
