"""SHA-256 of files, whole or along with a conversion that reads them."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from lfm_mlx.errors import LfmError

CHUNK_BYTES = 4 << 20


def sha256_of(file: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with file.open("rb", buffering=0) as stream:
        while chunk := stream.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


class Hasher:
    """Hashes files in a thread, each as soon as it is allowed to, so that they are read only once from the disk.

    Args:
        on_file: called in the thread with each file, its bytes and its SHA-256; an error of ours that it raises ends
            the hashing and is raised by `finish`.
    """

    def __init__(self, on_file: Callable[[Path, int, str], None]) -> None:
        self._on_file = on_file
        self._files: list[Path] = []
        self._error: Exception | None = None
        self._is_closed = False
        self._is_stopped = False
        self._done_bytes = 0
        self._allowed_bytes = 0.0
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def add(self, files: Sequence[Path]) -> None:
        """Hash these files too."""
        with self._changed:
            self._files += files
            self._changed.notify_all()

    def allow(self, num_bytes: float) -> None:
        """Go on up to so many bytes of all files together: not so far ahead of others that they miss the page cache."""
        with self._changed:
            self._allowed_bytes = max(self._allowed_bytes, num_bytes)
            self._changed.notify_all()

    def finish(self) -> None:
        """Wait until all files are hashed.

        Raises:
            OSError: a file cannot be read.
            LfmError: what `on_file` raised.
        """
        self.allow(float("inf"))
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        self._thread.join()
        if self._error is not None:
            raise self._error

    def stop(self) -> None:
        """Give up what is not done yet."""
        with self._changed:
            self._is_stopped = self._is_closed = True
            self._changed.notify_all()
        self._thread.join()

    def _run(self) -> None:
        try:
            while (file := self._next()) is not None:
                self._hash(file)
        except (OSError, LfmError) as error:
            self._error = error

    def _next(self) -> Path | None:
        with self._changed:
            self._changed.wait_for(lambda: self._files or self._is_closed)
            return self._files.pop(0) if self._files and not self._is_stopped else None

    def _hash(self, file: Path) -> None:
        digest, size = hashlib.sha256(), 0
        with file.open("rb", buffering=0) as stream:
            while self._may_go_on() and (chunk := stream.read(CHUNK_BYTES)):
                digest.update(chunk)
                size += len(chunk)
                self._done_bytes += len(chunk)
        if self._is_stopped:
            return
        self._on_file(file, size, digest.hexdigest())

    def _may_go_on(self) -> bool:
        with self._changed:
            self._changed.wait_for(lambda: self._is_stopped or self._done_bytes < self._allowed_bytes)
            return not self._is_stopped
