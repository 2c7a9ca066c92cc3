"""The rows that are being decoded together."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from lfm_mlx.cache import State
from lfm_mlx.distributed import Ranks
from lfm_mlx.engine.masks import batch_mask
from lfm_mlx.engine.request import PackedMask, Row, TokenLogprob
from lfm_mlx.engine.row_logprobs import PendingLogprobs, ask_logprobs
from lfm_mlx.sampling import Sampler
from lfm_mlx.sampling.sampler import State as SamplerState
from lfm_mlx.step import Stepper


class Batch:
    """Rows, their state and sampler, and the token of each that has been drawn and not yet been looked at.

    Args:
        row: the first row.
        state: its state after the prompt.
        sampler: its sampler.
        sampler_state: the state to draw the next token with.
        logits: ``(1, V)`` after the prompt, from which it is drawn here.
        ranks: those that compute the rows together; None where it is this process alone.
    """

    def __init__(
        self,
        row: Row,
        state: State,
        sampler: Sampler,
        sampler_state: SamplerState,
        logits: mx.array,
        ranks: Ranks | None = None,
    ) -> None:
        self.rows = [row]
        self.state = state
        self.sampler = sampler
        self.sampler_state = sampler_state
        self.ids = mx.array([])
        self._ranks = ranks
        self._logprobs: list[PendingLogprobs] = []
        self._settle(logits, None)

    def join(self, other: Batch) -> None:
        """Append the rows of another batch."""
        self.state.join(other.state)
        self.sampler, self.sampler_state = self.sampler.join(self.sampler_state, other.sampler, other.sampler_state)
        self.ids = mx.concatenate([self.ids, other.ids])
        self.rows = self.rows + other.rows
        self._logprobs += other._logprobs

    def keep(self, rows: Sequence[int], capacity: int | None = None) -> None:
        """Keep only these rows, at least one; with less room for tokens, where `capacity` says so."""
        if len(rows) == len(self.rows):
            return
        self.rows = [self.rows[row] for row in rows]
        self.state.keep(rows, capacity)
        self.sampler, self.sampler_state = self.sampler.keep(self.sampler_state, rows)
        self.ids = self.ids[mx.array(list(rows), dtype=mx.int32)]

    def step(self, stepper: Stepper) -> None:
        """Queue the next step on the device, then look at the tokens drawn before and hand them to their rows."""
        if all(row.is_at_last_token for row in self.rows):
            self._hand_out()
        elif any(row.is_masked for row in self.rows):
            self._step_masked(stepper)
        else:
            step = stepper.decode_and_sample(self.state, self.ids, self.sampler, self.sampler_state)
            mx.async_eval(step.ids, step.sampler_state, self.state.arrays)
            self._hand_out()
            self.sampler_state = step.sampler_state
            self._settle(self._fast_forward(stepper, step.logits), step.ids, step.logits)

    def _step_masked(self, stepper: Stepper) -> None:
        """As `step`, but what is drawn next depends on the tokens: masks are made while the device computes logits."""
        logits = stepper.decode(self.state, self.ids)
        self.sampler_state = self.sampler.advance(self.sampler_state, self.ids)
        mx.async_eval(logits, self.sampler_state, self.state.arrays)
        self._hand_out()
        self._settle(self._fast_forward(stepper, logits), None)

    def _settle(self, logits: mx.array, drawn: mx.array | None, drawn_from: mx.array | None = None) -> None:
        """Decide what comes next: what was drawn already, unless it was drawn from other logits, or forced tokens."""
        ids = drawn if drawn is not None and logits is drawn_from else None
        ids = draw(self.rows, logits, self.sampler, self.sampler_state, ids)
        self.ids = self._ranks.share(ids) if self._ranks is not None else ids
        self._logprobs = ask_logprobs(self.rows, logits, self.ids)
        mx.async_eval(self.ids, self.sampler_state, [pending.arrays for pending in self._logprobs])

    def _fast_forward(self, stepper: Stepper, logits: mx.array) -> mx.array:
        """Take several forced tokens of an only row in one pass; returns the logits after them.

        Among others, a row takes them one a step: the steps are computed for the others anyway. So it does on several
        ranks, which could not know.
        """
        row, *others = self.rows
        control = row.request.control
        is_alone = not others and self._ranks is None
        if not is_alone or control is None or row.finish_reason is not None or row.request.top_logprobs is not None:
            return logits
        forced = control.forced()
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

    def _hand_out(self) -> None:
        tokens = self.ids.tolist()
        assert isinstance(tokens, list)
        logprobs: dict[Row, TokenLogprob] = {}
        for pending in self._logprobs:
            logprobs |= pending.read()
        self._logprobs = []
        for row, token_id in zip(self.rows, tokens, strict=True):
            row.take(int(token_id), logprobs.get(row))  # type: ignore[arg-type]


def draw(
    rows: Sequence[Row],
    logits: mx.array,
    sampler: Sampler,
    sampler_state: SamplerState,
    drawn: mx.array | None = None,
) -> mx.array:
    """The next token of each row, ``(B,)``, under the rows' masks and with forced tokens in place of drawn ones.

    A row whose control fails ends; what is drawn for it means nothing.

    Args:
        rows: the rows.
        logits: ``(B, V)``.
        sampler: of these rows.
        sampler_state: the state to draw with.
        drawn: what was drawn from these logits already, for rows without masks; None draws.
    """
    wishes = [_wish(row) for row in rows]
    forced = [token_id for token_id, _ in wishes]
    ids = drawn
    if ids is None:
        ids = sampler.choose(logits, sampler_state, batch_mask([mask for _, mask in wishes], logits.shape[-1]))
    if all(token_id is None for token_id in forced):
        return ids
    replaced = mx.array([token_id is not None for token_id in forced])
    return mx.where(replaced, mx.array([token_id or 0 for token_id in forced], dtype=ids.dtype), ids)


def _wish(row: Row) -> tuple[int | None, PackedMask | None]:
    """The token that has to come, or else the mask of those that may."""
    control = row.request.control
    if control is None or row.finish_reason is not None:
        return None, None
    try:
        token_id = next(iter(control.forced()), None)
        return token_id, control.mask() if token_id is None else None
    except Exception as error:  # noqa: BLE001  # Whatever it is, the other rows have nothing to do with it.
        row.end("error", error)
        return None, None
