"""What must not kill the server: after each, it answers as before and holds no more memory."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import random
import resource
import socket
import struct
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from running_server import PATIENCE_S, WEATHER_TOOL, Running, wait_until

from lfm_mlx.server.access import CLIENT_GONE
from lfm_mlx.server.app import ENDPOINTS
from lfm_mlx.server.field_types import Fields
from lfm_mlx.server.request_body import MAX_DEPTH, UNCOUNTED_BYTES
from lfm_mlx.step import Stepper

MEMORY_SLACK_BYTES = 4_000_000
"""Less than one row of the tiny model holds: compiled graphs and the like may stay."""

MEGABYTES = "a rainy day in 1999, " * 80_000

JUNK = [True, 5, -1, 1.5, 10**30, 1e308, "", "x", [], [[]], ["x"], {}, {"x": 1}, {"type": 5}]


@pytest.fixture(autouse=True)
def _survives(served: Running) -> Iterator[None]:
    """The check around every test."""
    wait_until(served.is_idle)
    before = held_bytes(served)
    yield
    served.check_alive()
    assert held_bytes(served) < before + MEMORY_SLACK_BYTES


def held_bytes(served: Running) -> int:
    """What is held on the device, without what the prefix cache is there to hold."""
    cache = served.service.engine.prefix_cache
    assert cache is not None
    numbers = served.http.get("/health").json()
    assert numbers["prefix_cache_bytes"] <= cache.max_bytes
    return int(numbers["device_memory_bytes"] - numbers["prefix_cache_bytes"])


def connect(served: Running, *, receive_bytes: int | None = None) -> socket.socket:
    """A bare connection."""
    raw = socket.socket()
    if receive_bytes is not None:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
    raw.settimeout(PATIENCE_S)
    raw.connect(("127.0.0.1", served.port))
    return raw


def post_bytes(body: bytes, path: str = "/v1/chat/completions") -> bytes:
    """A request as it goes over the wire."""
    head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    return head.encode() + body


def endless(served: Running, **fields: Any) -> bytes:
    """A request whose answer goes on as long as it may."""
    never = {str(token_id): -100 for token_id in served.service.tokenizer.stop_ids}
    messages = [{"role": "user", "content": "Say hello."}]
    body = {"messages": messages, "temperature": 2.0, "seed": 3, "stream": True, "logit_bias": never, **fields}
    return post_bytes(json.dumps(body).encode())


def reset(raw: socket.socket) -> None:
    """Close a connection the hard way."""
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    raw.close()


def test_a_prompt_equal_to_one_before(served: Running) -> None:
    def answer(content: str) -> str:
        response = served.chat(content, tools=[WEATHER_TOOL], max_tokens=12)
        assert response.status_code == 200
        return json.dumps(response.json()["choices"][0]["message"])

    first = answer("What is the capital of France?")
    assert answer("What is the capital of France?") == first
    assert answer("What is the capital of France? And of Italy?") != ""
    assert answer("What is the capital of France?") == first


def test_an_unknown_model(served: Running) -> None:
    for path, more in (("chat/completions", {}), ("messages", {"max_tokens": 3}), ("responses", {"input": "x"})):
        body = {"model": "gpt-9", **({"messages": [{"role": "user", "content": "x"}]} if "input" not in more else {})}
        response = served.http.post(f"/v1/{path}", json={**body, **more})
        assert response.status_code == 404
        assert "gpt-9" in response.text


WHOLE = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1},
    "/v1/completions": {"prompt": "x", "max_tokens": 1},
    "/v1/responses": {"input": "x", "max_output_tokens": 1, "store": False},
    "/v1/messages": {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1},
    "/v1/messages/count_tokens": {"messages": [{"role": "user", "content": "x"}]},
    "/tokenize": {"prompt": "x"},
    "/detokenize": {"tokens": [5]},
}


@pytest.mark.parametrize("endpoint", [one for one in ENDPOINTS if one.fields is not None], ids=lambda one: one.path)
def test_a_wrong_type_in_every_field(served: Running, endpoint: Any) -> None:
    fields = endpoint.fields
    assert isinstance(fields, Fields)
    for name, field in fields.fields.items():
        value = next(value for value in (True, [], 5, {"x": 1}) if not field.is_kind(value))
        response = served.http.post(endpoint.path, json={**WHOLE[endpoint.path], name: value})
        assert response.status_code == 400, (name, value, response.text)
        assert name in response.json()["error"]["message"]
    for body in JUNK:
        assert served.http.post(endpoint.path, json=body).status_code == 400


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"null",
        b"{",
        b"[" * 100_000,
        b"[" * 1000 + b"]" * 1000,
        b'{"a":' * 300_000,
        b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
        b'{"messages": [{"role": "user", "content": "x"}], "temperature": NaN}',
        b'{"messages": [{"role": "user", "content": "x"}], "temperature": 1e999}',
        b'{"messages": [{"role": "user", "content": "x"}], "seed": ' + b"9" * 10_000 + b"}",
        b'{"messages": [{"role": "user", "content": "x"}], "temperature": 1' + b"0" * 400 + b"}",
        b'{"messages": [{"role": "user", "content": "\xff"}]}',
        b"\x00" * 1000,
    ],
    ids=lambda body: repr(body[:12]) + str(len(body)),
)
def test_a_body_that_is_no_proper_json(served: Running, body: bytes) -> None:
    response = served.http.post("/v1/chat/completions", content=body)
    assert response.status_code == 400
    assert response.json()["error"]["message"]


def test_a_schema_as_deep_as_may_be(served: Running) -> None:
    def nested(depth: int) -> dict[str, Any]:
        schema: dict[str, Any] = {"type": "integer"}
        for _ in range(depth):
            schema = {"type": "object", "properties": {"a": schema}}
        return schema

    for depth, statuses in ((MAX_DEPTH // 2 - 4, (200, 400)), (MAX_DEPTH, (400,))):
        tool = {"type": "function", "function": {"name": "f", "parameters": nested(depth)}}
        form = {"type": "json_schema", "json_schema": {"schema": nested(depth)}}
        for fields in ({"tools": [tool]}, {"response_format": form}):
            assert served.chat(**fields, max_tokens=2).status_code in statuses


@pytest.mark.parametrize("is_announced", [True, False])
def test_a_body_of_100_megabytes(served: Running, is_announced: bool) -> None:
    part, count = b"x" * 1_000_000, 100

    def parts() -> Iterator[bytes]:
        for _ in range(count):
            yield part

    headers = {"content-length": str(len(part) * count)} if is_announced else {}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    response = served.http.post("/v1/chat/completions", content=parts(), headers=headers)
    assert response.status_code == 413
    assert "2,000,000" in response.json()["error"]["message"]
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown * (1024 if os.uname().sysname == "Linux" else 1) < 30_000_000


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages"])
@pytest.mark.parametrize("is_announced", [True, False])
def test_a_body_that_is_too_large_is_refused_before_it_has_come(served: Running, path: str, is_announced: bool) -> None:
    size = "content-length: 100000000" if is_announced else "transfer-encoding: chunked"
    with connect(served) as raw:
        raw.sendall(f"POST {path} HTTP/1.1\r\nhost: x\r\n{size}\r\n\r\n".encode())
        raw.sendall(b"x" * 1000 if is_announced else b"1e8480\r\n" + b"x" * 2_000_000 + b"\r\n5\r\nx")
        received = b""
        while part := raw.recv(1 << 16):  # To the end of the connection, though the client leaves it open.
            received += part
    head, _, body = received.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 413")
    assert b"connection: close" in head
    assert json.loads(body)["error"]["type"] == ("request_too_large" if "messages" in path else "invalid_request_error")


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": MEGABYTES}]}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "<|im_end|>" * 30_000}]}),
        ("/v1/completions", {"prompt": MEGABYTES}),
        ("/tokenize", {"prompt": MEGABYTES}),
        ("/tokenize", {"messages": [{"role": "user", "content": MEGABYTES}]}),
    ],
)
def test_a_prompt_of_megabytes_is_refused_by_its_beginning(served: Running, path: str, fields: dict[str, Any]) -> None:
    found = served.http.post(path, json=fields)
    assert found.status_code == 400
    error = found.json()["error"]
    assert "in the first" in error["message"]
    assert error["code"] == "context_length_exceeded"


def test_more_large_bodies_at_once_than_there_is_room_for(served: Running) -> None:
    room = served.service.bodies
    part, counted = b"x" * 1_990_000, 1_990_000 - UNCOUNTED_BYTES
    raws = [connect(served) for _ in range(10)]
    try:
        for number, raw in enumerate(raws):
            raw.sendall(b"POST /tokenize HTTP/1.1\r\nhost: x\r\ncontent-length: 2000000\r\n\r\n" + part)
            wait_until(lambda number=number: number == 9 or room.num_bytes == counted * (number + 1))  # type: ignore[misc]
        answer = raws[9].recv(1 << 16)
        assert answer.startswith(b"HTTP/1.1 503")
        assert b"retry-after" in answer
        assert room.num_bytes <= room.max_bytes == 16_000_000
        assert served.http.post("/tokenize", json={"prompt": "x" * 1000}).status_code == 200
    finally:
        for raw in raws:
            reset(raw)
    wait_until(lambda: room.num_bytes == 0)


def test_a_client_that_goes_away_before_its_body_has_come_is_no_failure_of_the_server(
    served: Running, caplog: pytest.LogCaptureFixture
) -> None:
    logger = logging.getLogger("lfm_mlx.server")
    logger.addHandler(caplog.handler)
    caplog.set_level(logging.DEBUG, logger.name)
    raw = connect(served)
    raw.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 500\r\n\r\n{")
    served.check_alive()
    reset(raw)
    wait_until(lambda: any(getattr(record, "fields", {}).get("status") == CLIENT_GONE for record in caplog.records))
    logger.removeHandler(caplog.handler)
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


def test_a_body_that_never_ends_or_never_comes(served: Running) -> None:
    raws = [connect(served) for _ in range(5)]
    for raw in raws:
        raw.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 500\r\n\r\n{")
    served.check_alive()
    for raw in raws:
        reset(raw)


def test_a_client_that_does_not_read(served: Running) -> None:
    raw = connect(served, receive_bytes=2048)
    raw.sendall(endless(served, n=8))
    wait_until(lambda: served.service.num_open > 0)
    # The server drops the connection when its time to read is over, and then the answers.
    wait_until(served.is_idle)
    with raw, contextlib.suppress(ConnectionError):
        while raw.recv(1 << 16):
            pass


def test_a_client_that_goes_away_in_prefill(served: Running) -> None:
    long = "one two " * (700 // len(served.service.tokenizer.encode("one two ", add_bos=False)))
    for _ in range(3):
        raw = connect(served)
        raw.sendall(endless(served, messages=[{"role": "user", "content": long}]))
        wait_until(lambda: served.service.num_open > 0)
        reset(raw)
    wait_until(served.is_idle)


@pytest.mark.parametrize("is_streamed", [True, False])
def test_a_client_that_goes_away_in_decode(served: Running, is_streamed: bool) -> None:
    raw = connect(served)
    raw.sendall(endless(served, stream=is_streamed, max_tokens=4000))
    if is_streamed:
        received = b""
        while received.count(b"data: ") < 10:
            received += raw.recv(1 << 16)
    else:
        wait_until(lambda: served.service.num_open > 0)
    reset(raw)
    wait_until(served.is_idle)


def test_200_clients_at_once(served: Running) -> None:
    async def ask(client: httpx.AsyncClient, number: int) -> int:
        body = {"max_tokens": 1, "stream": number % 2 == 0}
        if number < 20:
            chat = {"messages": [{"role": "user", "content": f"Say {number}."}]}
            return (await client.post("/v1/chat/completions", json=body | chat)).status_code
        return (await client.post("/v1/completions", json=body | {"prompt": f"{number}"})).status_code

    async def ask_all() -> list[int]:
        limits = httpx.Limits(max_connections=200)
        async with httpx.AsyncClient(base_url=served.url, limits=limits, timeout=300) as client:
            return await asyncio.gather(*(ask(client, number) for number in range(200)))

    assert set(asyncio.run(ask_all())) == {200}


@pytest.mark.parametrize(
    "garbage",
    [
        random.Random(0).randbytes(5000),
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"GET /nothing HTTP/9.9\r\n\r\n",
        b"POST /v1/chat/completions HTTP/1.1\r\ncontent-length: -5\r\n\r\n",
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
        b"GET /" + b"a" * 200_000 + b" HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + b"x: " + b"y" * 200_000 + b"\r\n\r\n",
        b"\r\n" * 1000,
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    ],
    ids=lambda garbage: repr(garbage[:12]),
)
def test_bytes_that_are_no_request(served: Running, garbage: bytes) -> None:
    with connect(served) as raw, contextlib.suppress(OSError):
        raw.sendall(garbage)
        raw.shutdown(socket.SHUT_WR)
        answer = raw.recv(1000)
        assert answer == b"" or answer.startswith((b"HTTP/1.1 4", b"HTTP/1.1 5"))
        assert not answer.startswith(b"HTTP/1.1 5")


@pytest.mark.parametrize("name", ["../../etc/passwd", "%00", "a" * 5000, "ü", "..%2f..%2fx"])
def test_odd_paths(served: Running, name: str) -> None:
    assert served.http.get(f"/v1/models/{name}").status_code == 404


@pytest.mark.parametrize("stage", ["passage", "decode_and_sample", "decode"])
@pytest.mark.parametrize("is_streamed", [True, False])
def test_an_exception_in_the_engine(
    served: Running, monkeypatch: pytest.MonkeyPatch, stage: str, is_streamed: bool
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise RuntimeError("a secret of the inside")

    monkeypatch.setattr(Stepper, stage, fail)
    form = {"response_format": {"type": "regex", "regex": "[ab]{8}"}} if stage == "decode" else {}
    response = served.chat(f"Say {stage} {is_streamed}.", stream=is_streamed, max_tokens=8, **form)
    monkeypatch.undo()
    assert response.status_code == (200 if is_streamed else 500)
    assert "internal_error" in response.text
    assert "secret" not in response.text
