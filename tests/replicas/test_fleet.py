"""Which server a request goes to: the one that has its beginning, unless that has clearly more to do."""

from __future__ import annotations

import functools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lfm_mlx.errors import OptionError
from lfm_mlx.replicas import Fleet, PrefixIndex, PromptTrace, Replica, trace_of
from lfm_mlx.replicas.fleet import MOST_AHEAD

SYSTEM = "You are a helpful assistant. " * 400


@pytest.fixture(scope="module")
def servers() -> list[Replica]:
    """Three that nobody connects to."""
    return [Replica(f"http://127.0.0.1:{port}") for port in (1, 2, 3)]


def new_fleet(servers: list[Replica]) -> Fleet:
    """All of them ready, and nothing sent yet."""
    for one in servers:
        one.is_ready, one.num_open, one.turn, one.prefixes = True, 0, 0, PrefixIndex()
    return Fleet(servers)


@functools.cache
def conversation(user: int, num_turns: int, system: str = SYSTEM) -> PromptTrace:
    """The prompt of a user's turn."""
    turns = [{"role": "user", "content": f"user {user}, turn {turn}"} for turn in range(num_turns)]
    return trace_of({"messages": [{"role": "system", "content": system}, *turns]})


def moves(fleet: Fleet, num_users: int = 12, *, forgets: bool = False) -> int:
    """How often a user's next turn went to another server; users take turns, and each has its own system prompt."""
    places: dict[int, Replica] = {}
    num_moves = 0
    for turn in range(1, 5):
        for user in range(num_users):
            chosen = fleet.choose(conversation(user, turn, system=f"For user {user}. {SYSTEM}"))
            assert chosen is not None
            num_moves += places.setdefault(user, chosen) is not chosen
            places[user] = chosen
            if forgets:
                chosen.prefixes.clear()
    return num_moves


def test_a_next_turn_goes_where_the_conversation_was(servers: list[Replica]) -> None:
    fleet = new_fleet(servers)
    assert moves(fleet, num_users=10) == 0
    assert all(one.turn for one in servers), "none starved"
    assert moves(new_fleet(servers), num_users=10, forgets=True) > 0, "without memory of what was sent they would move"


@given(st.lists(st.tuples(st.integers(0, 9), st.booleans()), min_size=1, max_size=120))
@settings(max_examples=25, deadline=None)
def test_users_of_one_system_prompt_spread_when_a_server_is_busy(
    servers: list[Replica], requests: list[tuple[int, bool]]
) -> None:
    fleet = new_fleet(servers)
    for user, ends in requests:
        chosen = fleet.choose(conversation(user, 1))
        assert chosen is not None
        chosen.num_open += 1
        least = min(one.num_open for one in servers)
        assert chosen.num_open <= least + MOST_AHEAD + 1
        if ends:
            max(servers, key=lambda one: one.num_open).num_open -= 1


def test_all_servers_work_on_many_requests_at_once(servers: list[Replica]) -> None:
    fleet = new_fleet(servers)
    for user in range(60):
        chosen = fleet.choose(conversation(user, 1))
        assert chosen is not None
        chosen.num_open += 1
    assert max(one.num_open for one in servers) - min(one.num_open for one in servers) <= 1


def test_idle_servers_take_turns(servers: list[Replica]) -> None:
    fleet = new_fleet(servers)
    chosen = [fleet.choose(PromptTrace()) for _ in range(9)]
    assert all(chosen.count(one) == 3 for one in servers)


def test_servers_that_are_not_ready_or_were_tried_are_left_out(servers: list[Replica]) -> None:
    fleet = new_fleet(servers)
    first, second, third = servers
    first.prefixes.add(conversation(1, 1))
    assert fleet.choose(conversation(1, 1)) is first
    assert fleet.choose(conversation(1, 1), [first]) is not first
    first.is_ready = False
    assert fleet.choose(conversation(1, 1)) is not first
    assert fleet.choose(conversation(1, 1), [second, third]) is None
    assert fleet.num_ready == 2


def test_a_stored_response_is_asked_of_its_server(servers: list[Replica]) -> None:
    fleet = new_fleet(servers)
    fleet.remember("resp_1", servers[2])
    servers[2].num_open = 50
    continued = trace_of({"previous_response_id": "resp_1", "input": "More."})
    assert fleet.choose(continued) is servers[2]
    assert fleet.choose(trace_of({"previous_response_id": "resp_2", "input": "More."})) is not servers[2]
    assert fleet.choose(continued, [servers[2]]) is not servers[2]


@pytest.mark.parametrize("url", ["mac1:8080", "ftp://mac1", "http://", "", "http://mac1:99999", "http://a/?b=c"])
def test_what_is_no_url_of_a_server_is_refused(url: str) -> None:
    with pytest.raises(OptionError, match="expected one like http://mac1:8080"):
        Replica(url)
