"""What rules one row on the host: its grammar, how long it may think, and whether it goes round in circles."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lfm_mlx.parsing.loop_guard import LoopGuard
from lfm_mlx.types import FinishReason

if TYPE_CHECKING:
    from lfm_mlx.constrain import Mask, Matcher


@dataclass(frozen=True, kw_only=True)
class ReasoningTokens:
    """The ids that open and close reasoning in a model's vocabulary."""

    open_id: int
    close_id: int


class Control:
    """Follows a row token by token; see `lfm_mlx.engine.request.RowControl`.

    Args:
        matcher: the grammar of the answer, or None.
        reasoning: how the model opens and closes reasoning; None where it cannot reason.
        is_in_reasoning: whether the prompt has opened reasoning.
        thinking_budget: most tokens of reasoning, after which it is closed and the answer begins; None sets no limit.
        guard: notices loops; the first in the reasoning closes it, any other ends the row. None lets it loop.
    """

    def __init__(
        self,
        *,
        matcher: Matcher | None = None,
        reasoning: ReasoningTokens | None = None,
        is_in_reasoning: bool = False,
        thinking_budget: int | None = None,
        guard: LoopGuard | None = None,
    ) -> None:
        self.matcher = matcher
        self.is_in_reasoning = is_in_reasoning and reasoning is not None
        self.num_reasoning_tokens = 0
        self.was_reasoning_cut = False
        self._reasoning = reasoning
        self._budget = thinking_budget
        self._guard = guard
        self._queue: deque[int] = deque()
        self._close_if_spent()

    def mask(self) -> Mask | None:
        """The tokens the grammar allows next; None allows all."""
        return self.matcher.mask() if self.matcher is not None else None

    def forced(self) -> Sequence[int]:
        """The tokens that have to come next, in order; none where there is a choice."""
        if self._queue:
            return list(self._queue)
        return self.matcher.forced() if self.matcher is not None else ()

    def observe(self, token_id: int) -> FinishReason | None:
        """Take note of the token that came; returns why the row has to end with it, or None."""
        if self._queue and self._queue[0] == token_id:
            self._queue.popleft()
        if self.matcher is not None:
            self.matcher.accept(token_id)
        self._follow_reasoning(token_id)
        if self._guard is not None and self._guard.observe(token_id):
            if not self.is_in_reasoning or self._queue:
                return "repetition"
            self._close_reasoning()
            self._guard.reset()
        self._close_if_spent()
        if self.matcher is not None and self.matcher.is_stopped:
            return "stop"
        return None

    @property
    def has_mask(self) -> bool:
        """Whether there is a grammar."""
        return self.matcher is not None

    @property
    def is_cut(self) -> bool:
        """Whether an answer that ends now would be cut off inside a structure."""
        return self.matcher is not None and not self.matcher.is_complete

    def _follow_reasoning(self, token_id: int) -> None:
        if self._reasoning is None:
            return
        if self.is_in_reasoning:
            self.num_reasoning_tokens += 1
            self.is_in_reasoning = token_id != self._reasoning.close_id
        elif token_id == self._reasoning.open_id:
            self.is_in_reasoning = True

    def _close_if_spent(self) -> None:
        is_spent = self._budget is not None and self.num_reasoning_tokens >= self._budget
        if self.is_in_reasoning and is_spent and not self._queue:
            self._close_reasoning()

    def _close_reasoning(self) -> None:
        assert self._reasoning is not None
        self._queue.append(self._reasoning.close_id)
        self.was_reasoning_cut = True
