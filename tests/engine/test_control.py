"""The rules of one row, token by token, without a model."""

from __future__ import annotations

import pytest

from lfm_mlx.engine.control import Control, ReasoningTokens
from lfm_mlx.parsing.loop_guard import LoopGuard
from lfm_mlx.types import FinishReason

OPEN, CLOSE, WORD = 1, 2, 3
REASONING = ReasoningTokens(open_id=OPEN, close_id=CLOSE)


def written(control: Control, wishes: list[int]) -> list[int]:
    """What comes of a model that wishes these tokens: forced ones come first."""
    ids = []
    for wish in wishes:
        forced = control.forced()
        ids.append(forced[0] if forced else wish)
        assert control.observe(ids[-1]) is None
    return ids


@pytest.mark.parametrize("budget", [0, 1, 3])
def test_reasoning_is_closed_after_the_budget_and_reopening_it_does_not_help(budget: int) -> None:
    control = Control(reasoning=REASONING, thinking_budget=budget)
    ids = written(control, [OPEN, *[WORD] * (budget + 1), WORD, OPEN, WORD, WORD])
    assert ids == [OPEN, *[WORD] * budget, CLOSE, WORD, OPEN, CLOSE, WORD]
    assert control.was_reasoning_cut
    assert not control.is_in_reasoning


def test_reasoning_that_the_prompt_opened_is_closed_likewise() -> None:
    assert written(Control(reasoning=REASONING, is_in_reasoning=True, thinking_budget=0), [WORD] * 2) == [CLOSE, WORD]
    assert written(Control(reasoning=REASONING, thinking_budget=0), [WORD] * 2) == [WORD] * 2


def test_reasoning_within_the_budget_is_left_alone() -> None:
    control = Control(reasoning=REASONING, thinking_budget=3)
    assert written(control, [OPEN, WORD, CLOSE, *[WORD] * 5]) == [OPEN, WORD, CLOSE, *[WORD] * 5]
    assert not control.was_reasoning_cut
    assert control.num_reasoning_tokens == 2


def reason_to_end(control: Control, ids: list[int]) -> tuple[int, FinishReason | None]:
    for count, token_id in enumerate(ids, 1):
        if end := control.observe(token_id):
            return count, end
    return len(ids), None


def guard() -> LoopGuard:
    return LoopGuard(min_tokens=32)


def test_a_loop_ends_an_answer_and_closes_reasoning() -> None:
    count, end = reason_to_end(Control(reasoning=REASONING, guard=guard()), [WORD] * 200)
    assert end == "repetition"
    assert count < 100
    thinking = Control(reasoning=REASONING, is_in_reasoning=True, guard=guard())
    assert reason_to_end(thinking, [WORD] * count) == (count, None)
    assert list(thinking.forced()) == [CLOSE]
    assert thinking.observe(CLOSE) is None
    assert list(thinking.forced()) == []
    assert reason_to_end(thinking, [WORD] * 200)[1] == "repetition"


def test_without_a_guard_nothing_ends_a_loop() -> None:
    assert reason_to_end(Control(reasoning=REASONING), [WORD] * 500) == (500, None)


def test_a_row_without_markers_and_grammar_has_no_rules() -> None:
    control = Control(is_in_reasoning=True)
    assert control.mask() is None
    assert list(control.forced()) == []
    assert reason_to_end(control, [OPEN, WORD, CLOSE]) == (3, None)
    assert (control.num_reasoning_tokens, control.is_in_reasoning, control.is_cut) == (0, False, False)
