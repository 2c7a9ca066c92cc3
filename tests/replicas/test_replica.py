"""Servers that go away and come back."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from launching import free_ports
from running_front import Fronted, fronting
from running_server import PATIENCE_S, TINY, Running, new_service, running, wait_until

from lfm_mlx.replicas import fleet, replica, trace_of
from lfm_mlx.server.model_service import closing_error
from lfm_mlx.step import Stepper

Pair = tuple[Running, Running]

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
LOST = "the server that wrote this answer is gone"


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten tokens a second."""
    decode: Callable[..., Any] = Stepper.decode

    def wait(*arguments: Any, **options: Any) -> Any:
        time.sleep(0.1)
        return decode(*arguments, **options)

    monkeypatch.setattr(Stepper, "decode", wait)


def break_off(served: Running) -> None:
    """Cut a server's connections, as the system does when a process is killed."""
    loop = served.server.servers[0].get_loop()
    for connection in list(served.server.server_state.connections):
        loop.call_soon_threadsafe(connection.transport.abort)


@contextlib.contextmanager
def replica_process(port: int) -> Iterator[subprocess.Popen[str]]:
    """A server in a process of its own."""
    command = [sys.executable, "-m", "lfm_mlx.server", "--model", str(TINY), "--alias", "alias"]
    process = subprocess.Popen(
        [*command, "--port", str(port)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    try:
        assert process.stdout is not None
        assert "at http" in process.stdout.readline()
        yield process
    finally:
        process.kill()
        process.communicate(timeout=PATIENCE_S)


def events_of(fronted: Fronted, path: str, fields: dict[str, Any], then: Callable[[], None]) -> list[str]:
    """The lines of a stream, at whose first tokens something happens."""
    body = {**fields, "temperature": 0, "stream": True}
    with fronted.http.stream("POST", path, json=body) as response:
        assert response.status_code == 200
        lines = []
        for line in response.iter_lines():
            lines.append(line)
            if "The" in line:
                then()
                then = lambda: None  # noqa: E731 - once only
        return [line for line in lines if line]


@pytest.mark.parametrize(
    ("path", "fields", "name", "where"),
    [
        ("/v1/chat/completions", {"messages": QUESTION}, None, ["error", "message"]),
        ("/v1/messages", {"messages": QUESTION, "max_tokens": 200}, "error", ["error", "message"]),
        ("/v1/responses", {"input": QUESTION}, "response.failed", ["response", "error", "message"]),
    ],
)
@pytest.mark.usefixtures("slow")
def test_a_stream_that_breaks_off_ends_with_the_error_of_its_interface(
    pair: Pair, path: str, fields: dict[str, Any], name: str | None, where: list[str]
) -> None:
    with fronting(pair[0].url) as fronted:
        lines = events_of(fronted, path, fields, lambda: break_off(pair[0]))
        told = json.loads(lines[-1].removeprefix("data: "))
        if name is not None:
            assert lines[-2] == f"event: {name}"
        if path == "/v1/responses":
            numbers = [json.loads(line[6:])["sequence_number"] for line in lines if line.startswith("data: ")]
            assert numbers == list(range(len(numbers)))
        for key in where:
            told = told[key]
        assert LOST in told
        assert 'router_lost_streams_total{replica="' in fronted.http.get("/metrics").text
        whole = events_of(fronted, path, fields, lambda: None)
        assert LOST not in whole[-1]


@pytest.mark.usefixtures("slow")
def test_an_answer_that_has_not_begun_is_given_by_another_server(fronted: Fronted, pair: Pair) -> None:
    answers: list[httpx.Response] = []
    asking = threading.Thread(target=lambda: answers.append(fronted.chat(QUESTION[0]["content"], max_tokens=6)))
    asking.start()
    wait_until(lambda: any(one.service.num_open for one in pair))
    first = next(one for one in pair if one.service.num_open)
    break_off(first)
    asking.join(PATIENCE_S)
    assert answers[0].status_code == 200
    assert f'router_retries_total{{replica="127.0.0.1:{first.port}"}} 1.0' in fronted.http.get("/metrics").text


def test_a_request_that_takes_servers_down_is_not_given_to_all(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    num_asked = 0

    async def go_down(one: Running) -> None:
        nonlocal num_asked
        num_asked += 1
        break_off(one)
        await asyncio.sleep(0.2)
        raise closing_error()

    with running(new_service()) as third, fronting(*(one.url for one in (*pair, third))) as fronted:
        for one in (*pair, third):
            monkeypatch.setattr(one.service, "ask", lambda *asks, one=one: go_down(one))
        refused = fronted.chat()
        assert num_asked == 2
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "no_replica")
        assert "2 of the 3 servers behind this one went away" in refused.text
        assert refused.headers["retry-after"]


def test_a_process_that_stands_still_or_is_killed_is_done_without(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleet, "CHECK_S", 0.1)
    monkeypatch.setattr(fleet, "SILENCE_S", 2.0)
    monkeypatch.setattr(replica, "CHECK_TIMEOUT_S", 1.0)
    port = free_ports(1)[0]
    with fronting(f"http://127.0.0.1:{port}", pair[0].url) as fronted:
        assert fronted.front.fleet.num_ready == 1, "one may come later"
        with replica_process(port) as process:
            for number in (signal.SIGSTOP, signal.SIGKILL):
                wait_until(lambda: fronted.front.fleet.num_ready == 2)
                fronted.replica(pair[0]).num_open += 9
                fields = {"messages": QUESTION, "guided_regex": "The [a-z ]{3000}"}
                last = events_of(fronted, "/v1/chat/completions", fields, lambda: process.send_signal(number))[-1]  # noqa: B023
                assert LOST in last
                fronted.replica(pair[0]).num_open -= 9
                assert fronted.chat(max_tokens=2).status_code == 200
                wait_until(lambda: fronted.front.fleet.num_ready == 1)
                process.send_signal(signal.SIGCONT)
        text = fronted.http.get("/metrics").text
        assert f'router_lost_streams_total{{replica="127.0.0.1:{port}"}} 2.0' in text


def test_a_server_that_comes_back_is_used_if_it_has_the_same_model(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleet, "CHECK_S", 0.1)
    port = free_ports(1)[0]
    trace = trace_of({"messages": QUESTION})
    with fronting(pair[0].url, f"http://127.0.0.1:{port}") as fronted:
        back = fronted.front.fleet.replicas[1]
        with running(new_service(), port=port):
            wait_until(lambda: back.is_ready)
            back.prefixes.add(trace)
            started_s = back.facts.created_s if back.facts else 0
        wait_until(lambda: not back.is_ready)
        with running(new_service(fingerprint="another"), port=port):
            wait_until(lambda: "its fingerprint is 'another'" in (back.problem or ""))
            assert fronted.chat(max_tokens=2).status_code == 200
            assert fronted.http.get("/health").json()["replicas_ready"] == 1
        wait_until(lambda: time.time() > started_s + 1)  # Servers are told apart by the second in which they started.
        with running(new_service(), port=port) as served:
            wait_until(lambda: back.is_ready)
            assert back.prefixes.match(trace) == 0, "its cache is empty"
            fronted.replica(pair[0]).num_open += 9
            assert fronted.chat(max_tokens=2).status_code == 200
            assert served.service.engine.counters.num_requests == 1


def test_without_any_server_clients_are_told_to_come_back() -> None:
    with fronting(*(f"http://127.0.0.1:{port}" for port in free_ports(2))) as fronted:
        refused = fronted.chat()
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "no_replica")
        assert refused.headers["retry-after"]
        assert fronted.http.get("/health").status_code == fronted.http.get("/health/ready").status_code == 503
        assert fronted.http.get("/health/live").status_code == 200
        anthropic = fronted.http.post("/v1/messages", json={"messages": QUESTION, "max_tokens": 1})
        assert anthropic.json()["error"]["type"] == "overloaded_error"
