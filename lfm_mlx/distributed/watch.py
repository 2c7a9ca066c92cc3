"""Ends a process that stands still from outside.

While MLX waits for another rank, it may hold the lock of Python's interpreter, and then no thread of this process can
find out that this rank is gone. So a small process of its own waits for signs of life, as the other ranks do.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys

STILL_S = 8
"""A process whose threads do nothing for so long is ended."""

FAREWELL_S = 6
"""A process that has said that it ends has so long to do so."""

_PROGRAM = """
import os, select, signal, sys
limit_s, farewell_s, process, message = float(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3]), sys.argv[4].encode()
while True:
    if not select.select([0], [], [], limit_s)[0]:
        os.kill(process, signal.SIGKILL)
        os.write(2, message)  # Last: nobody may be there to read it.
        break
    signs = os.read(0, 64)
    if not signs:
        break
    if b"!" in signs:
        limit_s, message = farewell_s, b""
"""


class Watch:
    """A process that ends this one when no `sign` comes for `STILL_S` seconds, and itself with this one.

    Args:
        message: what it then writes to standard error; "" for nothing.
    """

    def __init__(self, message: str) -> None:
        options = [str(STILL_S), str(FAREWELL_S), str(os.getpid()), message]
        command = [sys.executable, "-I", "-S", "-c", _PROGRAM, *options]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, bufsize=0, start_new_session=True)

    def sign(self, *, is_last: bool = False) -> None:
        """This process lives; or it is about to end, and is to be helped where it does not."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):  # Somebody has ended the watch.
            self._process.stdin.write(b"!" if is_last else b".")

    def close(self) -> None:
        """End the watch."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()
