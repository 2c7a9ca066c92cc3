"""The server as a process: starting, signals, certificates, the log, a graceful end."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from click.testing import CliRunner
from running_server import PATIENCE_S, TINY, Running, new_service, running, wait_until

from lfm_mlx.errors import OptionError
from lfm_mlx.server import bind
from lfm_mlx.server.__main__ import command, model_names
from lfm_mlx.server.access import read_keys
from lfm_mlx.server.request_log import JsonLines, set_up_log

SECRET = "What is the capital of Wonderland?"


class Stream:
    """A stream that is read in a thread until its end."""

    def __init__(self, served: Running, **fields: Any) -> None:
        never = {str(token_id): -100 for token_id in served.service.tokenizer.stop_ids}
        messages = [{"role": "user", "content": "Say hello."}]
        self._body = {"messages": messages, "stream": True, "temperature": 2.0, "logit_bias": never, **fields}
        self._url = f"{served.url}/v1/chat/completions"
        self.lines: list[str] = []
        self.thread = threading.Thread(target=self._read)
        self.thread.start()
        wait_until(lambda: len(self.lines) > 3)

    def _read(self) -> None:
        with (
            httpx.Client(timeout=PATIENCE_S) as client,
            client.stream("POST", self._url, json=self._body) as response,
        ):
            self.lines.extend(line for line in response.iter_lines() if line.startswith("data: "))


def test_answers_are_finished_before_the_end() -> None:
    with running(new_service(), shutdown_timeout_s=PATIENCE_S) as one:
        stream = Stream(one, max_tokens=30)
        one.server.should_exit = True
        stream.thread.join(PATIENCE_S)
        assert stream.lines[-1] == "data: [DONE]"
        assert '"finish_reason":"length"' in stream.lines[-2]


def test_answers_that_take_too_long_are_told_so_in_the_end() -> None:
    with running(new_service(), shutdown_timeout_s=0.1) as one:
        stream = Stream(one, max_tokens=4000)
        one.server.should_exit = True
        stream.thread.join(PATIENCE_S)
        assert "shutting_down" in stream.lines[-1]
        wait_until(lambda: not one.service.engine.is_alive)


def test_who_waits_for_a_prompt_is_told_so_before_the_step_ends() -> None:
    with running(new_service(), shutdown_timeout_s=0.1) as one:
        step, is_held, may_go_on = one.service.engine._engine.step, threading.Event(), threading.Event()

        def held_step() -> None:
            is_held.set()
            may_go_on.wait(PATIENCE_S)
            step()

        one.service.engine._engine.step = held_step  # type: ignore[method-assign]
        with socket.create_connection(("127.0.0.1", one.port), timeout=PATIENCE_S) as raw:
            body = json.dumps({"messages": [{"role": "user", "content": "Say hello."}]}).encode()
            raw.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(body))
            raw.sendall(body)
            assert is_held.wait(PATIENCE_S)
            one.server.should_exit = True
            try:
                answer = raw.makefile("rb").read()
            finally:
                may_go_on.set()
        assert answer.startswith(b"HTTP/1.1 503")
        assert b"shutting_down" in answer


def test_a_request_that_never_came_whole_is_answered_in_the_end(caplog: pytest.LogCaptureFixture) -> None:
    with running(new_service(), shutdown_timeout_s=0.0) as one:
        one.server.config.timeout_graceful_shutdown = 1
        with socket.create_connection(("127.0.0.1", one.port), timeout=PATIENCE_S) as raw:
            raw.sendall(b"POST /tokenize HTTP/1.1\r\nhost: x\r\ncontent-length: 50\r\n\r\n{")
            wait_until(lambda: bool(one.server.server_state.tasks))
            one.server.should_exit = True
            answer = raw.makefile("rb").read()
        assert answer.startswith(b"HTTP/1.1 503")
        assert b"shutting_down" in answer
    assert not [record for record in caplog.records if record.exc_info]


def test_pieces_of_an_answer_do_not_wait_for_each_other() -> None:
    # asyncio turns Nagle's algorithm off for the connections of a socket that names its protocol.
    with bind("127.0.0.1", 0) as listening:
        assert listening.proto == socket.IPPROTO_TCP


def test_a_port_that_is_taken_is_named() -> None:
    with bind("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(OptionError, match=f"127.0.0.1:{port} cannot be listened on"):
            bind("127.0.0.1", port)


def test_names_of_folders_and_repos() -> None:
    assert model_names(str(TINY), ["mine", "mine"]) == ("tiny", str(TINY), "mine")
    assert model_names("LiquidAI/LFM2.5-8B-A1B") == ("LiquidAI/LFM2.5-8B-A1B",)


def test_keys_are_lines() -> None:
    assert read_keys(["a\n\n # b\n c \n", "", "d"]) == ("a", "c", "d")


@pytest.mark.parametrize("logs_prompts", [True, False])
def test_the_log_has_prompts_only_where_asked(logs_prompts: bool, caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("lfm_mlx.server")
    logger.addHandler(caplog.handler)
    caplog.set_level(logging.DEBUG, logger.name)
    try:
        with running(new_service(logs_prompts=logs_prompts)) as one:
            answer = one.chat(SECRET, max_tokens=2)
            one.chat(SECRET, max_tokens="x")
    finally:
        logger.removeHandler(caplog.handler)
    lines = [json.loads(JsonLines().format(record)) for record in caplog.records]
    assert any(SECRET in json.dumps(line) for line in lines) == logs_prompts
    logged = next(line for line in lines if line.get("id") == answer.headers["x-request-id"])
    assert (logged["method"], logged["path"], logged["status"]) == ("POST", "/v1/chat/completions", 200)


def test_whatever_is_logged_is_a_line_of_json(capsys: pytest.CaptureFixture[str]) -> None:
    names = ["lfm_mlx.server", "lfm_mlx.cache.disk", "lfm_mlx.engine.service", "uvicorn.error", "asyncio"]
    before = {name: logging.getLogger(name) for name in ("lfm_mlx", "uvicorn.error", "asyncio")}
    handlers = {name: logger.handlers for name, logger in before.items()}
    set_up_log("info")
    try:
        for name in names:
            logging.getLogger(name).warning("from %s", name)
    finally:
        for name, logger in before.items():
            logger.handlers = handlers[name]
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [line["event"] for line in lines] == [f"from {name}" for name in names]


@contextlib.contextmanager
def process(*options: str, **variables: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server in a process of its own, and where it says that it is."""
    arguments = [sys.executable, "-m", "lfm_mlx.server", "--model", str(TINY), "--port", "0", *options]
    with subprocess.Popen(
        arguments, env={**os.environ, **variables}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as started:
        try:
            assert started.stdout is not None
            yield started, started.stdout.readline().split()[-1]
        finally:
            started.kill()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_process_well(number: signal.Signals, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("# ours\nsesame\n")
    with process("--api-key-file", str(keys), "--alias", "mine", LFM_MLX_API_KEY="other") as (started, url):
        for key in ("sesame", "other"):
            names = httpx.get(f"{url}/v1/models", headers={"x-api-key": key}, timeout=PATIENCE_S).json()["data"]
            assert [name["id"] for name in names] == ["tiny", str(TINY), "mine"]
        assert httpx.get(f"{url}/v1/models", timeout=PATIENCE_S).status_code == 401
        started.send_signal(number)
        _, log = started.communicate(timeout=PATIENCE_S)
        assert started.returncode == 0
    events = [json.loads(line) for line in log.splitlines()]
    assert [line["status"] for line in events if line["event"] == "request"] == [200, 200, 401]
    assert events[-1]["event"] == "closing"
    assert "sesame" not in log


def test_a_second_interruption_ends_answers_at_once_and_the_process_well() -> None:
    body = {"messages": [{"role": "user", "content": "Say hello."}], "stream": True}
    with process("--shutdown-timeout", "1000") as (started, url):
        log = started.stderr
        assert log is not None
        with httpx.Client(timeout=PATIENCE_S) as client:
            asked = {**body, "ignore_eos": True, "loop_guard": False}
            with client.stream("POST", f"{url}/v1/chat/completions", json=asked) as response:
                lines = response.iter_lines()
                next(lines)
                started.send_signal(signal.SIGINT)
                while '"closing"' not in log.readline():
                    assert started.poll() is None
                started.send_signal(signal.SIGINT)
                with contextlib.suppress(httpx.RemoteProtocolError):
                    for _ in lines:
                        pass
        _, rest = started.communicate(timeout=PATIENCE_S)
        assert started.returncode == 0
        assert "Traceback" not in rest


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the metrics do not show resident memory")
def test_memory_goes_back_to_the_system_after_long_prompts() -> None:
    with process("--prefix-cache-gb", "0.001") as (_, url), httpx.Client(base_url=url, timeout=PATIENCE_S) as http:

        def resident() -> float:
            lines = http.get("/metrics").text.splitlines()
            return float(next(line for line in lines if line.startswith("process_resident_memory_bytes")).split()[1])

        def ask(content: str) -> None:
            body = {"messages": [{"role": "user", "content": content}], "max_tokens": 2}
            assert http.post("/v1/chat/completions", json=body).status_code == 200

        ask("Say hello.")
        before = resident()
        for number in range(2):
            ask(f"{number} one two " * 100)
        high = resident()
        assert high > before + 8e6
        wait_until(lambda: resident() < (before + high) / 2)
        ask("Say hello.")


def test_a_certificate_is_served(tmp_path: Path) -> None:
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("openssl is not here to make a certificate")
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    made = ["req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", str(key), "-out", str(cert), "-days", "2"]
    names = ["-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"]
    subprocess.run([openssl, *made, *names], check=True, capture_output=True)
    with process("--tls-cert", str(cert), "--tls-key", str(key)) as (_, url):
        assert url.startswith("https://")
        context = ssl.create_default_context(cafile=str(cert))
        assert httpx.get(f"{url}/health", verify=context, timeout=PATIENCE_S).status_code == 200


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tls-key", str(TINY / "config.json")], "expected both"),
        (["--api-key-file", str(TINY / "nothing")], "cannot be read"),
        (["--max-rows", "0"], "max-rows"),
        (["--host", "256.0.0.1"], "cannot be listened on"),
        (["--tls-cert", str(TINY / "config.json"), "--tls-key", str(TINY / "config.json")], "cannot be used for TLS"),
        (["--prefix-cache-gb", "nan"], "no finite number"),
        (["--shutdown-timeout", "inf"], "no finite number"),
        (["--prefix-cache-gb", "1e6"], "GB that are free"),
        (["--cors-origin", "https://app.example/"], "expected * or an origin"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: list[str], message: str) -> None:
    done = CliRunner().invoke(command, ["--model", str(TINY), "--port", "0", *options])
    assert message in f"{done.output} {done.exception}"
    assert done.exit_code in (1, 2)


def test_a_client_that_says_nothing_and_one_that_does_not_finish_are_sent_away() -> None:
    with running(new_service(body_timeout_s=0.2), header_timeout_s=0.2) as one:
        for begun in (b"", b"POST /tokenize HTTP/1.1\r\nhost"):
            with socket.create_connection(("127.0.0.1", one.port), timeout=PATIENCE_S) as raw:
                raw.sendall(begun)
                with contextlib.suppress(ConnectionResetError):
                    assert raw.recv(100) == b""
        with socket.create_connection(("127.0.0.1", one.port), timeout=PATIENCE_S) as raw:
            raw.sendall(b"POST /tokenize HTTP/1.1\r\nhost: x\r\ncontent-length: 50\r\n\r\n{")
            answer = raw.makefile("rb").read()  # To the end: head and body may come apart.
        assert answer.startswith(b"HTTP/1.1 408")
        assert b'"timeout"' in answer
        for later in (b"GET / HT", b"POST /nothing HTTP/1.1\r\nhost: x\r\ncontent-length: 50\r\n\r\n{"):
            with socket.create_connection(("127.0.0.1", one.port), timeout=PATIENCE_S) as raw:
                raw.sendall(b"GET /health/live HTTP/1.1\r\nhost: x\r\n\r\n")
                received = raw.recv(1000)
                assert received.startswith(b"HTTP/1.1 200")
                while not received.endswith(b"}"):
                    received += raw.recv(1000)
                raw.sendall(later)
                with contextlib.suppress(ConnectionResetError):
                    while raw.recv(1000):
                        pass
        one.check_alive()
