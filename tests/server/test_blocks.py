"""Events to blocks."""

from __future__ import annotations

import pytest

from lfm_mlx.server.blocks import BlockWriter
from lfm_mlx.types import ContentDelta, OutputEvent, ReasoningDelta, ToolCall, ToolCallDone

CALL = ToolCallDone(call=ToolCall(id="call_1", name="f", arguments={"a": 1}))


def steps(*events: OutputEvent, at_once: bool = True) -> tuple[list[tuple[str, int, str]], list[tuple[str, str]]]:
    """What happens, and the blocks in the end."""
    writer = BlockWriter()
    batches = [list(events)] if at_once else [[event] for event in events]
    found = [step for batch in batches for step in writer.feed(batch)] + list(writer.finish())
    return [(one.step, one.block.index, one.text) for one in found], [(b.kind, b.text) for b in writer.blocks]


@pytest.mark.parametrize("at_once", [True, False])
def test_reasoning_text_and_calls_are_blocks_in_their_order(at_once: bool) -> None:
    events = (ReasoningDelta(text="a"), ReasoningDelta(text="b"), ContentDelta(text="c"), CALL, CALL)
    happened, blocks = steps(*events, at_once=at_once)
    assert blocks == [("reasoning", "ab"), ("text", "c"), ("call", '{"a": 1}'), ("call", '{"a": 1}')]
    assert [step for step, _, _ in happened].count("start") == [step for step, _, _ in happened].count("stop") == 4
    assert [index for _, index, _ in happened] == sorted(index for _, index, _ in happened)
    texts = ["".join(text for _, index, text in happened if index == number) for number in range(4)]
    assert texts == [text for _, text in blocks]


def test_white_space_alone_is_no_block_and_within_text_it_is_kept() -> None:
    events = (
        ReasoningDelta(text=""),
        ContentDelta(text="\n"),
        CALL,
        ContentDelta(text="\n "),
        ContentDelta(text="x\n"),
    )
    assert steps(*events)[1] == [("call", '{"a": 1}'), ("text", "\n x\n")]
    assert steps(ReasoningDelta(text=" "), ContentDelta(text="y"))[1] == [("text", "y")]
    assert steps() == ([], [])
