"""The masks of a batch's rows as one array on the device, computed while the device runs the step before."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import mlx.core as mx
import numpy as np

from lfm_mlx.constrain.grammar_tokenizer import Mask
from lfm_mlx.constrain.matcher import Matcher
from lfm_mlx.errors import OptionError
from lfm_mlx.sampling import unpack

_ALL = np.uint32(0xFFFFFFFF)
# From here on a second thread is worth its start: a row takes some 20 us.
_ROWS_PER_TASK = 8


class BatchMasks:
    """Computes masks in threads of its own. Use it as a context manager, or `close` it.

    Args:
        vocab_size: V, the width of the model's logits.
        num_threads: how many rows are computed at the same time; the GIL is released meanwhile.
    """

    def __init__(self, vocab_size: int, *, num_threads: int = 2) -> None:
        self.vocab_size = vocab_size
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="lfm-mask")

    def start(self, rows: Sequence[Matcher | None]) -> PendingMask:
        """Begin to compute the masks of the rows' next tokens; None is a row without a constraint.

        The matchers must be left alone until `PendingMask.result` has returned.

        Raises:
            OptionError: a matcher has another vocabulary.
        """
        for matcher in rows:
            if matcher is not None and matcher.vocab_size != self.vocab_size:
                raise OptionError(
                    f"a matcher has a vocabulary of {matcher.vocab_size}, expected {self.vocab_size}; give the model's "
                    "vocab_size to grammar_tokenizer"
                )
        constrained = [index for index, matcher in enumerate(rows) if matcher is not None]
        packed = np.full((len(rows), (self.vocab_size + 31) // 32), _ALL, dtype=np.uint32)
        tasks = [
            self._pool.submit(_fill_rows, rows, constrained[first : first + _ROWS_PER_TASK], packed)
            for first in range(0, len(constrained), _ROWS_PER_TASK)
        ]
        return PendingMask(packed, tasks, self.vocab_size)

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown()

    def __enter__(self) -> BatchMasks:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class PendingMask:
    """A mask that is being computed."""

    def __init__(self, packed: Mask, tasks: Sequence[Future[None]], vocab_size: int) -> None:
        self._packed = packed
        self._tasks = tasks
        self._vocab_size = vocab_size

    def result(self) -> mx.array | None:
        """The tokens that may be drawn, (B, V) bool, not yet evaluated; None when no row has a constraint.

        Raises:
            LfmError: a row's grammar became too complex to follow.
        """
        for task in self._tasks:
            task.result()
        return unpack(mx.array(self._packed), self._vocab_size) if self._tasks else None


def _fill_rows(rows: Sequence[Matcher | None], indices: Sequence[int], packed: Mask) -> None:
    for index in indices:
        matcher = rows[index]
        if matcher is not None:
            matcher.fill(packed[index])
