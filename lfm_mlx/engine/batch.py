"""The rows that are being decoded together."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from lfm_mlx.cache import State
from lfm_mlx.engine.masks import batch_mask
from lfm_mlx.engine.request import Row
from lfm_mlx.sampling import Sampler
from lfm_mlx.sampling.sampler import State as SamplerState
from lfm_mlx.step import Stepper


class Batch:
    """Rows, their state and sampler, and the token of each that has been drawn and not yet been looked at.

    Args:
        row: the first row.
        state: its state after the prompt.
        sampler: its sampler.
        sampler_state: the state that `ids` was drawn with.
        ids: its first token, ``(1,)``, unevaluated.
    """

    def __init__(self, row: Row, state: State, sampler: Sampler, sampler_state: SamplerState, ids: mx.array) -> None:
        self.rows = [row]
        self.state = state
        self.sampler = sampler
        self.sampler_state = sampler_state
        self.ids = ids

    def join(self, other: Batch) -> None:
        """Append the rows of another batch."""
        self.rows += other.rows
        self.state.join(other.state)
        self.sampler, self.sampler_state = self.sampler.join(self.sampler_state, other.sampler, other.sampler_state)
        self.ids = mx.concatenate([self.ids, other.ids])

    def keep(self, rows: Sequence[int]) -> None:
        """Keep only these rows, at least one."""
        if len(rows) == len(self.rows):
            return
        self.rows = [self.rows[row] for row in rows]
        self.state.keep(rows)
        self.sampler, self.sampler_state = self.sampler.keep(self.sampler_state, rows)
        self.ids = self.ids[mx.array(list(rows), dtype=mx.int32)]

    def step(self, stepper: Stepper) -> None:
        """Queue the next step on the device, then look at the tokens drawn before and hand them to their rows."""
        if all(row.is_at_last_token for row in self.rows):
            self._hand_out()
        elif any(row.request.control is not None for row in self.rows):
            self._step_controlled(stepper)
        else:
            step = stepper.decode_and_sample(self.state, self.ids, self.sampler, self.sampler_state)
            mx.async_eval(step.ids, step.sampler_state, self.state.arrays)
            self._hand_out()
            self.ids, self.sampler_state = step.ids, step.sampler_state

    def _step_controlled(self, stepper: Stepper) -> None:
        """As `step`, but what is drawn next depends on the tokens: masks are made while the device computes logits."""
        logits = stepper.decode(self.state, self.ids)
        self.sampler_state = self.sampler.advance(self.sampler_state, self.ids)
        mx.async_eval(logits, self.sampler_state, self.state.arrays)
        self._hand_out()
        if len(self.rows) == 1:
            logits = self._fast_forward(stepper, logits)
            self._mark_call()
        self.ids = draw(self.rows, logits, self.sampler, self.sampler_state)
        mx.async_eval(self.ids, self.sampler_state)

    def _fast_forward(self, stepper: Stepper, logits: mx.array) -> mx.array:
        """Take several forced tokens of the only row in one pass; returns the logits after them."""
        (row,) = self.rows
        control = row.request.control
        forced = control.forced() if control is not None and row.finish_reason is None else ()
        if len(forced) < 2:
            return logits
        taken: list[int] = []
        for token_id in forced:
            row.take(token_id)
            taken.append(token_id)
            self.sampler_state = self.sampler.advance(self.sampler_state, mx.array([token_id], dtype=mx.uint32))
            if row.finish_reason is not None:
                break
        return stepper.model.head(stepper.extend(self.state, mx.array([taken], dtype=mx.int32)))

    def _mark_call(self) -> None:
        (row,) = self.rows
        if row.has_called and row.request.transcript is not None:
            row.request.transcript.mark_answer()

    def _hand_out(self) -> None:
        tokens = self.ids.tolist()
        assert isinstance(tokens, list)
        for row, token_id in zip(self.rows, tokens, strict=True):
            row.take(int(token_id))  # type: ignore[arg-type]


def draw(rows: Sequence[Row], logits: mx.array, sampler: Sampler, sampler_state: SamplerState) -> mx.array:
    """The next token of each row, ``(B,)``, under the rows' masks and with forced tokens in place of drawn ones."""
    controls = [row.request.control if row.finish_reason is None else None for row in rows]
    forced = [next(iter(control.forced()), None) if control is not None else None for control in controls]
    masks = [
        control.mask() if control is not None and token_id is None else None
        for control, token_id in zip(controls, forced, strict=True)
    ]
    ids = sampler.choose(logits, sampler_state, batch_mask(masks, logits.shape[-1]))
    if all(token_id is None for token_id in forced):
        return ids
    replaced = mx.array([token_id is not None for token_id in forced])
    return mx.where(replaced, mx.array([token_id or 0 for token_id in forced], dtype=ids.dtype), ids)
