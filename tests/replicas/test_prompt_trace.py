"""The trace of a conversation grows at its end only."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lfm_mlx.replicas import PromptTrace, trace_of
from lfm_mlx.replicas.prompt_trace import PIECE_CHARS

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
MESSAGE = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "tool"]), "content": st.text(min_size=1, max_size=3000)},
    optional={"reasoning_content": st.text(max_size=20), "tool_calls": st.lists(JSON, max_size=2)},
)
TOOLS = [{"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object"}}}]


def is_beginning(first: PromptTrace, second: PromptTrace) -> bool:
    """Whether a prompt's trace is the beginning of another's."""
    return list(second.hashes[: len(first.hashes)]) == list(first.hashes)


@given(st.lists(MESSAGE, min_size=2, max_size=5), st.sampled_from(["messages", "input"]))
@settings(max_examples=25, deadline=None)
def test_a_further_turn_only_adds_to_the_trace(messages: list[Any], name: str) -> None:
    system = {"role": "system", "content": "Be brief. " * 200}
    traces = [trace_of({name: [system, *messages[:count]], "tools": TOOLS}) for count in range(1, len(messages) + 1)]
    for first, second in itertools.pairwise(traces):
        assert is_beginning(first, second)
        assert second.num_chars > first.num_chars
        assert len(second.hashes) >= second.num_chars / PIECE_CHARS
    other = trace_of({name: [{**system, "content": "Be long."}, *messages], "tools": TOOLS})
    assert not set(other.hashes) & set(traces[-1].hashes), "what begins unlike has nothing in common"


@given(st.text(max_size=3000), st.text(min_size=1, max_size=2000))
@settings(max_examples=30, deadline=None)
def test_a_longer_text_shares_its_whole_pieces(text: str, more: str) -> None:
    first, second = trace_of({"prompt": text}), trace_of({"prompt": text + more})
    num_whole = len(text) // PIECE_CHARS
    assert list(first.hashes[:num_whole]) == list(second.hashes[:num_whole])
    if num_whole:
        assert first.hashes[0] != trace_of({"prompt": "x" + text}).hashes[0]


def test_what_clients_move_from_turn_to_turn_is_left_out() -> None:
    mark = {"cache_control": {"type": "ephemeral"}}
    first = {"system": "Be brief.", "messages": [{"role": "user", "content": [{"type": "text", "text": "Hi", **mark}]}]}
    answer = {"role": "assistant", "content": [{"type": "text", "text": "Hello."}]}
    last = {"role": "user", "content": [{"type": "text", "text": "More", **mark}]}
    second = {"system": "Be brief.", "messages": [{"role": "user", "content": "Hi"}, answer, last]}
    assert is_beginning(trace_of(first), trace_of(second))
    first["messages"][0]["content"][0]["text"] = "Ho"  # type: ignore[index]
    assert not is_beginning(trace_of(first), trace_of(second))


def test_tools_stand_behind_the_system_message() -> None:
    system = {"role": "system", "content": "Be brief."}
    bare, tooled = trace_of({"messages": [system]}), trace_of({"messages": [system], "tools": TOOLS})
    assert is_beginning(bare, tooled)
    assert len(tooled.hashes) == 2


@pytest.mark.parametrize("key", ["messages", "input", "prompt", "tools", "system", "previous_response_id"])
@given(value=JSON)
@settings(max_examples=20, deadline=None)
def test_any_value_has_a_trace(key: str, value: Any) -> None:
    assert trace_of(value) == trace_of(value)
    trace = trace_of({key: value})
    assert (trace.response is not None) == (key == "previous_response_id" and isinstance(value, str))
