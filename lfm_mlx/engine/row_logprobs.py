"""Log-probabilities of drawn tokens, computed on the device beside the step that draws them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from lfm_mlx.engine.request import Row, TokenLogprob
from lfm_mlx.sampling import logprobs


class PendingLogprobs:
    """Those of one step's tokens, for the rows that ask for them.

    Args:
        rows: all rows of the step.
        logits: ``(B, V)``, as the model gave them.
        ids: ``(B,)``, what comes next in each row.
    """

    def __init__(self, rows: Sequence[Row], logits: mx.array, ids: mx.array) -> None:
        asking = [i for i, row in enumerate(rows) if row.request.top_logprobs is not None]
        self._rows = [rows[i] for i in asking]
        chosen = mx.array(asking, dtype=mx.int32)
        most = max(row.request.top_logprobs or 0 for row in self._rows)
        self._found = logprobs(logits[chosen], ids[chosen], most)
        self._ids = ids[chosen]

    @property
    def arrays(self) -> list[mx.array]:
        """What is to be evaluated."""
        return [*self._found, self._ids]

    def read(self) -> dict[Row, TokenLogprob]:
        """Each row's; waits for the device."""
        ids, chosen, top_ids, top_values = (_listed(array) for array in (self._ids, *self._found))
        return {
            row: TokenLogprob(
                token_id=ids[i],
                logprob=chosen[i],
                top=tuple(zip(top_ids[i], top_values[i], strict=True))[: row.request.top_logprobs],
            )
            for i, row in enumerate(self._rows)
        }


def _listed(array: mx.array) -> list[Any]:
    numbers = array.tolist()
    assert isinstance(numbers, list)
    return numbers


def ask_logprobs(rows: Sequence[Row], logits: mx.array, ids: mx.array) -> list[PendingLogprobs]:
    """None where no row asks."""
    is_asked = any(row.request.top_logprobs is not None for row in rows)
    return [PendingLogprobs(rows, logits, ids)] if is_asked else []
