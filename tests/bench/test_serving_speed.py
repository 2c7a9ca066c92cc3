"""Servers from outside: a small run of the whole question, and what it is made of."""

from __future__ import annotations

import json
import socket
import struct
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from lfm_mlx.bench.plot import plot_serving
from lfm_mlx.bench.served_prompts import Prompts, after_call
from lfm_mlx.bench.served_side import serve_both
from lfm_mlx.bench.served_stream import RETRY_S, Heard, ask
from lfm_mlx.bench.serving_speed import ask_serving
from lfm_mlx.bench.subject import Subject
from lfm_mlx.errors import LfmError
from lfm_mlx.tokenizer import load_tokenizer

TINY = Path(__file__).resolve().parents[2] / "examples" / "tiny"

CHUNKS = [
    {"choices": [{"delta": {"role": "assistant", "content": ""}}]},
    {"choices": [{"delta": {"reasoning": "Hm."}}]},
    {"choices": [{"delta": {"content": "It "}}]},
    {"choices": [{"delta": {"tool_calls": [{"id": "a", "function": {"name": "f", "arguments": ""}}]}}]},
    {"choices": [{"delta": {"tool_calls": [{"function": {"arguments": '{"x": 1}'}}]}}]},
    {
        "choices": [],
        "usage": {"prompt_tokens": 7, "completion_tokens": 5, "prompt_tokens_details": {"cached_tokens": 4}},
    },
]


@pytest.fixture(scope="module")
def peer() -> Iterator[int]:
    """A server of another kind, without chunked encoding; it refuses a request without messages."""

    resets = {"busy": 2, "never": 1000}

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
            name = asked["messages"][0] if asked["messages"] else None
            if resets.get(name, 0):
                resets[name] -= 1
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.connection.close()
                self.close_connection = True
                return
            self.send_response(200 if asked["messages"] else 400)
            self.end_headers()
            for chunk in CHUNKS if asked["messages"] != ["broken"] else [{"error": {"message": "no"}}]:
                self.wfile.write(b": sign of life\n\ndata: " + json.dumps(chunk).encode() + b"\n\n")
            self.wfile.write(b"data: [DONE]\n\n")

        def log_message(self, *arguments: Any) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_address[1]
        server.shutdown()


def test_a_stream_is_put_together_and_timed_by_its_pieces(peer: int) -> None:
    heard = ask(peer, {"messages": [1]})
    call = {"id": "a", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    assert heard.message == {"role": "assistant", "content": "It ", "reasoning": "Hm.", "tool_calls": [call]}
    assert (heard.prompt_tokens, heard.completion_tokens, heard.cached_tokens) == (7, 5, 4)
    assert len(heard.times_s) == 4
    assert heard.times_s == sorted(heard.times_s)
    assert 0 < heard.first_s < 60


@pytest.mark.parametrize(("messages", "told"), [([], "answered 400"), (["broken"], "broke a stream off")])
def test_a_refused_or_broken_stream_is_an_error(peer: int, messages: list[str], told: str) -> None:
    with pytest.raises(LfmError, match=told):
        ask(peer, {"messages": messages})


def test_a_connection_that_is_reset_before_its_answer_is_made_again(peer: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lfm_mlx.bench.served_stream.TRIES", 3)
    heard = ask(peer, {"messages": ["busy"]})
    assert heard.completion_tokens == 5
    assert heard.first_s >= 2 * RETRY_S
    with pytest.raises(LfmError, match="broke a stream off"):
        ask(peer, {"messages": ["never"]})


def test_gaps_are_between_pieces() -> None:
    heard = Heard(asked_s=1.0, times_s=[3.0, 4.0, 6.0], message={})
    assert heard.first_s == 2.0
    assert heard.gaps_s == [1.0, 2.0]
    with pytest.raises(LfmError, match="without a token"):
        _ = Heard(asked_s=1.0, times_s=[], message={}).first_s


def test_prompts_have_their_length_and_begin_differently() -> None:
    tokenizer = load_tokenizer(TINY)
    prompts = Prompts(tokenizer)
    texts = [prompts.text(200) for _ in range(3)]
    assert all(200 <= len(tokenizer.encode(text)) < 260 for text in texts)
    assert len({text[:8] for text in texts}) == 3
    assert Prompts(tokenizer).text(200) == texts[0] != Prompts(tokenizer, seed=1).text(200)


def test_a_call_is_made_up_where_the_model_made_none() -> None:
    first = Prompts(load_tokenizer(TINY)).tool_turn(20)
    following = after_call(first, {"role": "assistant", "content": "No."})
    assert following["messages"][: len(first["messages"])] == first["messages"]
    call, result = following["messages"][-2:]
    assert result["tool_call_id"] == call["tool_calls"][0]["id"]


def test_a_server_that_does_not_start_says_why(tmp_path: Path) -> None:
    with pytest.raises(LfmError, match=r"(?s)did not start.*config\.json"), serve_both(str(tmp_path), Subject()):
        pass


def test_a_small_run_answers_the_whole_question(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if not (TINY / "model.safetensors").exists():
        pytest.skip("examples/tiny has no weights; `make tiny` trains them")
    monkeypatch.setattr("lfm_mlx.bench.serving_speed.SETTLE_S", 1.0)
    report = ask_serving(
        Subject(model=str(TINY)),
        clients=(2,),
        rounds=1,
        prompt_tokens=16,
        answer_tokens=4,
        prefix_tokens=140,
        long_tokens=100,
    )
    (load,) = report.results["load"]
    assert load["lfm_mlx"]["completion_tokens"] == 8
    assert load["lfm_mlx"]["tokens_per_s"] > 0
    first = report.results["first_token_ms"]
    cached = {kind: found["lfm_mlx"]["cached_tokens"] for kind, found in first.items()}
    assert cached["cold"] < 64
    assert cached["shared system message"] >= 128
    assert cached["tools, second turn"] >= 128
    assert report.results["long_prompt"]["lfm_mlx"]["prompt_tokens"] >= 100
    assert {len(row) for row in report.rows} == {len(report.header)}
    pytest.importorskip("matplotlib")
    plot_serving(report, tmp_path / "serving.png")
    assert (tmp_path / "serving.png").read_bytes().startswith(b"\x89PNG")
