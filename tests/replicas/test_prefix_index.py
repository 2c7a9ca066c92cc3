"""What was sent is found again by its beginning, within a number of pieces."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from lfm_mlx.replicas import PrefixIndex, PromptTrace, trace_of


def trace(*texts: str) -> PromptTrace:
    """Of a conversation."""
    return trace_of({"messages": [{"role": "user", "content": text} for text in texts]})


@given(st.lists(st.lists(st.sampled_from("abcd"), min_size=1, max_size=5), min_size=1, max_size=12))
@settings(max_examples=25, deadline=None)
def test_the_longest_beginning_that_was_sent_is_found(conversations: list[list[str]]) -> None:
    index = PrefixIndex()
    for number, conversation in enumerate(conversations):
        shared = max(
            (
                next(
                    (i for i, (a, b) in enumerate(zip(one, conversation, strict=False)) if a != b),
                    min(len(one), len(conversation)),
                )
                for one in conversations[:number]
            ),
            default=0,
        )
        found = index.match(trace(*conversation))
        assert found == trace(*conversation[:shared]).num_chars
        index.add(trace(*conversation))


def test_the_number_of_pieces_is_bounded_and_beginnings_stay_longest() -> None:
    index = PrefixIndex(max_pieces=3)
    index.add(trace("a", "b", "c"))
    index.add(trace("x"))
    assert len(index) == 3
    assert index.match(trace("a", "b", "c")) == trace("a", "b").num_chars
    index.add(trace("y"))
    index.add(trace("z"))
    assert len(index) == 3
    assert index.match(trace("a")) == 0
    assert index.match(trace("z")) > 0
    index.clear()
    assert index.match(trace("z")) == 0
