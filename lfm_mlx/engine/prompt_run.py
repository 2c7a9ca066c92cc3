"""One row's prompt on its way through the model, chunk by chunk."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from lfm_mlx.cache import PrefixCache, State, Transcript
from lfm_mlx.distributed import ranks_of
from lfm_mlx.engine.batch import Batch
from lfm_mlx.engine.request import Row
from lfm_mlx.model import Passage
from lfm_mlx.sampling import Sampler
from lfm_mlx.step import Stepper


class PromptRun:
    """Takes in what a row has to have seen before its next token: its prompt, and its answer where it goes on.

    Args:
        row: the row.
        state: one row that has seen nothing; not used where the request has a transcript.
        capacity: tokens to make room for at once.
        prefix_cache: what earlier rows have computed.

    Attributes:
        num_computed: tokens that need not be computed any more.
    """

    def __init__(self, row: Row, state: State, capacity: int, prefix_cache: PrefixCache | None = None) -> None:
        self.row = row
        self.ids: Sequence[int] = row.ids
        self._piece: list[int] = []
        self._passage: Passage | None = None
        self._transcript: Transcript | None = row.request.transcript
        self._borders: list[int] = []
        if self._transcript is not None:
            self.state = self._transcript.state
            self.num_computed = self._transcript.reuse(self.ids)
            planned_len = len(row.request.prompt) + row.request.max_tokens
            self.state.reserve(len(self.ids) + 1, planned_len=planned_len)
            ids, start = self.ids, self.num_computed + 1
            self._borders = [i for i in range(start, len(ids)) if ids[i] in row.request.border_ids]
        else:
            self.state = state
            state.reserve(capacity, planned_len=capacity)
            self.num_computed = 0
            if prefix_cache is not None:
                self.num_computed = prefix_cache.restore(self.ids, state)
                state.ask(prefix_cache.places(self.ids, self.num_computed, row.request.border_ids))
        if not row.generated:
            row.cached_tokens = self.num_computed

    def begin_chunk(self, stepper: Stepper, num_tokens: int) -> None:
        """Start to take in at most so many further tokens, at least one."""
        start = self.num_computed
        stop = min([start + num_tokens, len(self.ids), *(border for border in self._borders if border > start)])
        self._piece = list(self.ids[start:stop])
        self._passage = stepper.passage(self.state, mx.array([self._piece], dtype=mx.int32))

    @property
    def next_layer(self) -> int:
        """The layer that the chunk comes to next; 0 where none was begun."""
        return self._passage.num_run if self._passage is not None else 0

    def compute(self, num_layers: int) -> int:
        """Go on with the chunk through at most so many layers, evaluated.

        Returns:
            How many tokens were taken in: all of the chunk's with its last layer, and 0 before.
        """
        passage = self._passage
        assert passage is not None
        passage.run(num_layers)
        mx.eval(passage.arrays)
        if not passage.is_done:
            return 0
        mx.eval(self.state.arrays)
        self._hidden, self._passage = passage.normed[:, 0], None
        if self._transcript is not None:
            self._transcript.record(self._piece)
            self._transcript.mark()
        self.num_computed += len(self._piece)
        return len(self._piece)

    @property
    def is_done(self) -> bool:
        """Whether the next token can be drawn."""
        return self.num_computed == len(self.ids)

    def finish(self, stepper: Stepper) -> Batch:
        """The row as a batch of its own, its next token drawn."""
        row = self.row
        sampler = Sampler([row.sampling], stepper.model.config.vocab_size)
        sampler_state = sampler.start([row.request.prompt], [row.generated])
        logits = stepper.model.head(self._hidden)
        return Batch(row, self.state, sampler, sampler_state, logits, ranks_of(stepper.model))

    def keep_prefix(self, prefix_cache: PrefixCache) -> None:
        """Let later rows go on from what was computed so far."""
        if self._transcript is None:
            prefix_cache.insert(self.ids[: self.num_computed], self.state, 0, self.state.take_checkpoints())
