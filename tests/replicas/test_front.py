"""A front of two servers answers as one of them would, where most of the prompt was computed before."""

from __future__ import annotations

import contextlib
import functools
import json
import re
import socket
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from running_front import Fronted, fronting
from running_server import Running, new_service, running, wait_until

from lfm_mlx.errors import OptionError

Pair = tuple[Running, Running]

LONG = {"guided_regex": "[a-z ]{3000}", "temperature": 2}
"""Fields of a question whose answer takes seconds."""

CHANGING = re.compile(r'"(id|item_id|created|created_at)": ?("[^"]*"|\d+)|[0-9a-f]{32}')
"""What differs between two answers to the same question."""

SYSTEM = {"role": "system", "content": "You are a helpful assistant. " * 8}

REQUESTS: dict[str, tuple[str, dict[str, Any]]] = {
    "chat": ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Say hello."}], "max_tokens": 1}),
    "completions": ("/v1/completions", {"prompt": "Paris is", "max_tokens": 1}),
    "responses": ("/v1/responses", {"input": "Say hello.", "max_output_tokens": 1}),
    "messages": ("/v1/messages", {"messages": [{"role": "user", "content": "Say hello."}], "max_tokens": 1}),
}
STREAMS = {f"{name} as a stream": (path, {**body, "stream": True}) for name, (path, body) in REQUESTS.items()}
OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "count_tokens": ("/v1/messages/count_tokens", {"messages": [{"role": "user", "content": "Say hello."}]}),
    "tokenize": ("/tokenize", {"prompt": "Paris"}),
    "detokenize": ("/detokenize", {"tokens": [5, 6]}),
    "an unknown model": ("/v1/completions", {"prompt": "x", "model": "other"}),
}


def told(response: httpx.Response) -> tuple[int, str, str]:
    """What an answer says, without what differs each time."""
    return response.status_code, response.headers["content-type"], CHANGING.sub("-", response.text)


@pytest.mark.parametrize("name", [*REQUESTS, *STREAMS, *OTHERS])
def test_answers_are_those_of_a_server_byte_for_byte(fronted: Fronted, pair: Pair, name: str) -> None:
    path, body = {**REQUESTS, **STREAMS, **OTHERS}[name]
    if name.split()[0] in REQUESTS:
        body = {**body, "temperature": 0}
    for one in pair:  # Both hold the prompt then, and `usage` is the same.
        one.http.post(path, json=body)
    direct = pair[0].http.post(path, json=body)
    headers = {"x-request-id": "mine"}
    passed = fronted.http.post(path, json=body, headers=headers)
    assert told(passed) == told(direct)
    for name in ("x-request-id", "request-id"):
        assert passed.headers.get_list(name) == ["mine"]
    other = fronted.http.post(path, json={**body, "model": "none"})
    assert told(other) != told(direct), "another question has another answer"


@pytest.mark.parametrize("path", ["/v1/models/tiny", "/v1/models/none", "/openapi.json", "/", "/static/none", "/none"])
def test_what_can_be_read_is_the_same(fronted: Fronted, pair: Pair, path: str) -> None:
    assert told(fronted.http.get(path)) == told(pair[0].http.get(path))


def ask(fronted: Fronted, *messages: dict[str, Any]) -> tuple[dict[str, Any], int, int]:
    """The answer, tokens of its prompt, and how many of them were computed before."""
    body = {"messages": [SYSTEM, *messages], "temperature": 0, "max_tokens": 4}
    answer = fronted.http.post("/v1/chat/completions", json=body).json()
    usage = answer["usage"]
    return answer["choices"][0]["message"], usage["prompt_tokens"], usage["prompt_tokens_details"]["cached_tokens"]


def test_a_next_turn_finds_what_the_turns_before_have_computed(fronted: Fronted) -> None:
    for user in ("Ann", "Bob"):
        messages = [{"role": "user", "content": f"I am {user}. " * 4}]
        for _ in range(3):
            first, before, _ = ask(fronted, *messages)
            messages += [first, {"role": "user", "content": "Go on."}]
            _, _, cached = ask(fronted, *messages)
            assert cached > before - 20
    _, num_tokens, cached = ask(fronted, {"role": "user", "content": "I am nobody yet. " * 10})
    assert cached < num_tokens - 20, "a new conversation shares the system message at most"


@contextlib.contextmanager
def streaming(http: httpx.Client, **fields: Any) -> Iterator[Iterator[str]]:
    """A long answer that has begun: its further lines."""
    body = {"messages": [{"role": "user", "content": "Write."}], "stream": True, **LONG, **fields}
    with http.stream("POST", "/v1/chat/completions", json=body) as response:
        assert response.status_code == 200
        lines = response.iter_lines()
        for line in lines:
            if '"content":"' in line and '"content":""' not in line:
                break
        yield lines


def num_cancelled(pair: Pair) -> int:
    """Answers that were ended because nobody wanted them any more."""
    return sum(one.service.engine.counters.num_cancelled for one in pair)


def test_a_stream_comes_while_it_is_written_and_ends_when_nobody_listens(fronted: Fronted, pair: Pair) -> None:
    before = num_cancelled(pair)
    with streaming(fronted.http):
        assert sum(one.service.num_open for one in pair) == 1, "the answer is far from done"
        assert fronted.http.get("/health").json()["num_requests_open"] == 1
    wait_until(lambda: all(one.is_idle() for one in pair) and fronted.front.num_open == 0)
    assert num_cancelled(pair) == before + 1


def test_a_whole_answer_that_nobody_waits_for_ends(fronted: Fronted, pair: Pair) -> None:
    before = num_cancelled(pair)
    with pytest.raises(httpx.ReadTimeout):
        fronted.http.post("/v1/chat/completions", json={"messages": [SYSTEM], **LONG}, timeout=0.5)
    wait_until(lambda: num_cancelled(pair) == before + 1 and fronted.front.num_open == 0)


def test_a_client_that_does_not_read_is_dropped_and_its_answer_with_it(pair: Pair) -> None:
    before = pair[0].service.engine.counters.num_cancelled
    with fronting(pair[0].url, limits={"read_timeout_s": 0.5, "send_buffer_bytes": 4096}) as fronted:
        body = {"messages": [SYSTEM], "stream": True, "logprobs": True, "top_logprobs": 20, "max_tokens": 2000, **LONG}
        text = json.dumps(body)
        with socket.socket() as raw:
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            raw.connect(("127.0.0.1", int(fronted.http.base_url.port or 0)))
            raw.sendall(
                f"POST /v1/chat/completions HTTP/1.1\r\nhost: a\r\ncontent-length: {len(text)}\r\n\r\n{text}".encode()
            )
            wait_until(lambda: pair[0].service.num_open == 1)
            wait_until(pair[0].is_idle)
            wait_until(lambda: fronted.front.num_open == 0)
    assert pair[0].service.engine.counters.num_cancelled == before + 1


def has_open(one: Running, count: int) -> bool:
    """Whether so many answers run or wait."""
    return one.service.num_open == count


def test_a_server_without_room_passes_a_request_on(fronted: Fronted, pair: Pair) -> None:
    def fill(one: Running, stack: contextlib.ExitStack) -> None:
        for count in (1, 2):  # One is written, and one waits: more does not go into this server.
            body = {"messages": [SYSTEM], "stream": True, **LONG}
            stack.enter_context(one.http.stream("POST", "/v1/chat/completions", json=body))
            wait_until(functools.partial(has_open, one, count))

    with contextlib.ExitStack() as stack:
        fill(pair[0], stack)
        fronted.replica(pair[1]).num_open += 3  # So that the full one comes first.
        try:
            answer = fronted.chat(max_tokens=2)
        finally:
            fronted.replica(pair[1]).num_open -= 3
        assert answer.status_code == 200, answer.text
        assert 'router_retries_total{replica="' in fronted.http.get("/metrics").text
        fill(pair[1], stack)
        refused = fronted.chat(max_tokens=2)
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "queue_full"
        assert "retry-after" in refused.headers
    wait_until(lambda: all(one.is_idle() for one in pair) and fronted.front.num_open == 0)


def test_a_stored_response_is_found_wherever_it_is(fronted: Fronted, pair: Pair) -> None:
    names = [
        one.http.post("/v1/responses", json={"input": "Say hello.", "max_output_tokens": 3}).json()["id"]
        for one in pair
    ]
    made = fronted.http.post("/v1/responses", json={"input": "Say hello.", "max_output_tokens": 3}).json()["id"]
    for name in [*names, made]:
        assert fronted.http.get(f"/v1/responses/{name}").json()["id"] == name
        body = {"input": "And now?", "previous_response_id": name, "max_output_tokens": 3}
        assert fronted.http.post("/v1/responses", json=body).json()["previous_response_id"] == name
        assert fronted.http.delete(f"/v1/responses/{name}").json()["deleted"] is True
        gone = fronted.http.get(f"/v1/responses/{name}")
        assert gone.status_code == 404
        assert gone.json()["error"]["code"] == "response_not_found"


def test_metrics_hold_those_of_all_servers(fronted: Fronted, pair: Pair) -> None:
    fronted.chat(max_tokens=2)
    text = fronted.http.get("/metrics").text
    for one in pair:
        assert f'lfm_mlx:num_requests_running{{model_name="tiny",replica="127.0.0.1:{one.port}"}} 0.0' in text
        assert f'lfm_mlx:router_replica_ready{{replica="127.0.0.1:{one.port}"}} 1.0' in text
    assert "lfm_mlx:router_prompt_chars_matched_total" in text
    assert 'http_requests_total{handler="/v1/chat/completions",method="POST",status="200"}' in text


def test_bodies_are_refused_before_a_server_sees_them(pair: Pair) -> None:
    with fronting(pair[0].url, max_body_bytes=1000) as fronted:
        assert fronted.chat("x" * 2000).status_code == 413
        bad = fronted.http.post("/v1/completions", content=b'{"prompt": ')
        assert (bad.status_code, bad.json()["error"]["code"]) == (400, "invalid_json")
        assert fronted.http.get("/health").json() == {
            "status": "ready",
            "replicas": 1,
            "replicas_ready": 1,
            "num_requests_open": 0,
        }


def test_clients_and_servers_have_keys_of_their_own(pair: Pair) -> None:
    with running(new_service(api_keys=("inner",))) as served:
        with fronting(served.url, key="inner", api_keys=("outer",)) as fronted:
            headers = {"authorization": "Bearer outer"}
            body = REQUESTS["chat"][1]
            assert fronted.http.post("/v1/chat/completions", json=body, headers=headers).status_code == 200
            assert fronted.http.post("/v1/chat/completions", json=body).status_code == 401
            assert served.http.post("/v1/chat/completions", json=body, headers=headers).status_code == 401
        with pytest.raises(OptionError, match="refuses the key"), fronting(served.url, key="outer"):
            pass


def test_a_server_of_another_model_is_refused(pair: Pair) -> None:
    with running(new_service(fingerprint="another")) as other:
        with (
            pytest.raises(OptionError, match="its fingerprint is 'another', expected '"),
            fronting(pair[0].url, other.url),
        ):
            pass
        with fronting(other.url) as fronted:
            assert fronted.chat(max_tokens=2).status_code == 200
