"""Several ranks on this machine, over the ring, as `mlx.launch` would start them."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

PATIENCE_S = 60.0


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on now."""
    with contextlib.ExitStack() as stack:
        found = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in found:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in found]


@contextlib.contextmanager
def launched(folder: Path, *arguments: str, size: int = 2) -> Iterator[Sequence[subprocess.Popen[str]]]:
    """Python with these arguments as every rank; nothing of it is left behind the block.

    Args:
        folder: for the hostfile.
        *arguments: behind the interpreter.
        size: ranks.
    """
    hosts = folder / "hosts.json"
    hosts.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in free_ports(size)]))
    tests = Path(__file__).resolve().parent
    paths = [str(tests.parent), str(tests), os.environ.get("PYTHONPATH", "")]
    shared = {**os.environ, "MLX_HOSTFILE": str(hosts), "PYTHONPATH": os.pathsep.join(paths)}
    ranks = [
        subprocess.Popen(
            [sys.executable, *arguments],
            env={**shared, "MLX_RANK": str(rank)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]
    try:
        yield ranks
    finally:
        for rank in ranks:
            rank.kill()
        for rank in ranks:
            rank.communicate()


def outputs(ranks: Sequence[subprocess.Popen[str]]) -> list[tuple[int, str, str]]:
    """Exit code, standard output and standard error of every rank, when all have ended."""
    found = []
    for rank in ranks:
        out, err = rank.communicate(timeout=PATIENCE_S)
        found.append((rank.returncode, out, err))
    return found
