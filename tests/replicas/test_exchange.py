"""A stream is passed on in whole events, however it was cut on the way."""

from __future__ import annotations

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st

from lfm_mlx.replicas.exchange import WholeEvents, response_id
from lfm_mlx.server.sse import KEEP_ALIVE, event

EVENTS = [
    event({"type": "response.created", "response": {"id": "resp_1a", "text": "a\n\nb"}}, "response.created"),
    KEEP_ALIVE,
    event({"type": "x", "text": "event: y"}, "x"),
    event("[DONE]"),
]


@given(st.lists(st.integers(0, sum(map(len, EVENTS))), max_size=8))
@settings(max_examples=30, deadline=None)
def test_events_stay_whole_and_in_order(cuts: list[int]) -> None:
    text = b"".join(EVENTS)
    borders = [0, *sorted(cuts), len(text)]
    events, passed = WholeEvents(), b""
    for start, end in itertools.pairwise(borders):
        passed += events.feed(text[start:end])
        assert passed == b"" or passed.endswith(b"\n\n")
        assert text[:end].startswith(passed)
        assert len(text[:end]) - len(passed) < max(map(len, EVENTS))
    assert passed == text
    assert events.num_events == 2
    assert events.first_data["response"]["id"] == "resp_1a"
    assert response_id(events.first) == "resp_1a"


def test_half_an_event_is_held_back() -> None:
    events = WholeEvents()
    assert events.feed(EVENTS[0] + EVENTS[2][:-1]) == EVENTS[0]
    assert events.feed(b"") == b""
    assert events.feed(b"\n") == EVENTS[2]


def test_other_answers_have_no_id_of_a_response() -> None:
    assert response_id(b'{"id":"chatcmpl-1","object":"chat.completion"}') is None
    assert response_id(b'{"id": "resp_9f","object":"response"}') == "resp_9f"
    assert WholeEvents().first_data == {}
