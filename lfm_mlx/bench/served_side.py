"""A server in a process of its own: this one or mlx-lm's, on the same checkpoint."""

from __future__ import annotations

import contextlib
import http.client
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lfm_mlx.bench.subject import Subject
from lfm_mlx.errors import LfmError

START_S = 300.0
"""Within which a server has to have loaded its model."""


@dataclass(frozen=True, kw_only=True)
class ServedSide:
    """A server that runs.

    Args:
        name: what to call it.
        port: where it listens, on this machine.
        fields: what its requests need that others' do not: the model's name, and sampling without frills.
    """

    name: str
    port: int
    fields: Mapping[str, Any] = field(default_factory=dict)


PLAIN: Mapping[str, Any] = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}
"""Without the sampling of a model's card, which mlx-lm does not apply."""


@contextlib.contextmanager
def serve_both(model: str, subject: Subject, options: Sequence[str] = ()) -> Iterator[list[ServedSide]]:
    """This server, and mlx-lm's beside it where that is wanted; both end with the block.

    Args:
        model: folder or repo id of the checkpoint.
        subject: who serves it; of several ranks, this process is 0.
        options: further ones of this server.
    """
    with contextlib.ExitStack() as stack:
        ours = [sys.executable, "-m", "lfm_mlx.server", *_server_options(model, subject, options)]
        sides = [ServedSide(name="lfm_mlx", port=stack.enter_context(_running(ours)), fields=PLAIN)]
        if subject.peer:
            peer = [sys.executable, "-m", "mlx_lm", "server", "--model", model, "--log-level", "WARNING"]
            sides.append(ServedSide(name="mlx-lm", port=stack.enter_context(_running(peer)), fields={"model": model}))
        yield sides


def serve_as_rank(subject: Subject, options: Sequence[str] = ()) -> None:
    """On a rank other than 0: share the model with the server that rank 0 starts, until that ends."""
    from lfm_mlx.server.__main__ import command  # 14 MB that no other question needs

    command.main(_server_options(str(subject.model), subject, options), standalone_mode=False)


def _server_options(model: str, subject: Subject, options: Sequence[str]) -> list[str]:
    ranks = [f"--{subject.mode}-parallel", str(subject.num_ranks)] if subject.num_ranks > 1 else []
    return ["--model", model, "--log-level", "warning", *ranks, *options]


@contextlib.contextmanager
def _running(command: Sequence[str]) -> Iterator[int]:
    """The port of a server that is started and answers."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    environment = {**os.environ, "LFM_MLX_API_KEY": "", "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            [*command, "--port", str(port)], stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment
        )
        try:
            _wait(process, port, log)
            yield port
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _wait(process: subprocess.Popen[bytes], port: int, log: Any) -> None:
    deadline = time.monotonic() + START_S
    while not _answers(port):
        if process.poll() is not None or time.monotonic() > deadline:
            log.seek(0)
            said = log.read().decode(errors="replace").strip()[-500:]
            raise LfmError(f"a server did not start, expected it within {START_S:.0f} s; it said: {said}")
        time.sleep(0.1)


def _answers(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    with contextlib.closing(connection):
        try:
            connection.request("GET", "/v1/models")
            return connection.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            return False
