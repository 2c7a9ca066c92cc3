"""A worker process: tasks come in through standard input, results go out through standard output, both pickled.

A program of its own rather than `multiprocessing`, which would import the caller's main module again.
"""

from __future__ import annotations

import os
import pickle
import signal
import sys
from pathlib import Path
from typing import BinaryIO

import mlx.core as mx

from lfm_mlx.errors import LfmError

from .piecework import OrphanedError, perform
from .tasks import Task

_PARENT = os.getppid()

CACHE_BYTES = 64 << 20
"""What MLX may keep of freed memory."""


def serve(tasks: BinaryIO, results: BinaryIO) -> None:
    """Do tasks until the input ends: first the folder as a `Path`, then `Task` after `Task`.

    Each is answered by its number and its digest, or by the error that it ended with.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides what ends.
    mx.set_cache_limit(CACHE_BYTES)
    folder = _next(tasks)
    assert isinstance(folder, Path)
    while isinstance(task := _next(tasks), Task):
        result: tuple[int, str | Exception]
        try:
            result = task.number, perform(task, folder, _has_parent)
        except OrphanedError:
            return
        except (LfmError, OSError, MemoryError) as error:
            result = task.number, error
        except Exception as error:  # noqa: BLE001  whatever it is, the parent tells it
            result = task.number, RuntimeError(f"{type(error).__name__}: {error}")
        try:
            results.write(pickle.dumps(result))
            results.flush()
        except BrokenPipeError:
            return


def _has_parent() -> bool:
    return os.getppid() == _PARENT


def _next(stream: BinaryIO) -> object:
    try:
        return pickle.load(stream)
    except EOFError:
        return None


if __name__ == "__main__":
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # Whatever prints must not end up among the results.
    serve(sys.stdin.buffer, answers)
