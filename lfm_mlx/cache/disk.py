"""Blocks of the prefix cache in a folder, for more prefixes than memory holds, and for the time after a restart.

The folder has one folder inside for each model, precision and layout that used it, and in these a file a block. All
methods belong to the thread of the cache; files are written and deleted by a thread of their own, in the order asked.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import re
import stat
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from lfm_mlx.cache.block_file import (
    SUFFIX,
    BlockFileError,
    BlockHeader,
    StoredBlock,
    Tensors,
    block_views,
    read_block,
    read_block_header,
    write_block,
)
from lfm_mlx.cache.prefix_block import Block
from lfm_mlx.errors import OptionError

_LOG = logging.getLogger(__name__)
_KEY = re.compile(r"[0-9a-f]{40}")
_READERS = 4
RETRY_S = 60.0
"""After a failure, seconds until a block is written again."""

_ABANDONED_S = 3600.0
"""After this time a file that was not renamed into place belongs to no living process."""


@dataclass(eq=False, kw_only=True)
class Writing:
    """A block on its way to its file.

    Attributes:
        block: its arrays, alive until it is written.
        is_cancelled: whether it is not to be written after all.
    """

    header: BlockHeader
    block: Block
    is_cancelled: bool = False
    num_file_bytes: int | None = field(default=None)


class DiskStore:
    """Files of blocks by key, within a limit.

    Args:
        folder: made if it does not exist; several processes may share one.
        max_bytes: most that all files of the folder take; those of other models go first, then what was not used for
            longest.
        fingerprint: of the checkpoint, see `checkpoint_fingerprint`.
        part: names the part of the model that is here, see `lfm_mlx.distributed.part_name`; it has a folder inside,
            and limits, of its own. "" for a model that is whole.
        retry_s: after a failure, seconds until a block is written again.

    Attributes:
        num_bytes: bytes of all files known, those of other models included.
        num_written: blocks written.
        num_damaged: files refused because they were damaged or something else.

    Raises:
        OptionError: the folder cannot be made, or `max_bytes` is not positive.
    """

    def __init__(
        self, folder: Path, *, max_bytes: int, fingerprint: str, part: str = "", retry_s: float = RETRY_S
    ) -> None:
        if max_bytes < 1:
            raise OptionError(f"max_bytes is {max_bytes}, expected at least 1")
        self._root = folder / part
        try:
            self._root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OptionError(
                f"the prefix cache's folder {self._root} cannot be made ({error.strerror}); name another one"
            ) from error
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self.retry_s = retry_s
        self._next_try_s: float | None = None  # None while writing succeeds.
        self.num_written = self.num_damaged = 0
        self.folder, self.part, self.fingerprint = folder, part, fingerprint
        self._folder = self._root
        self._sizes: OrderedDict[str, int] = OrderedDict()  # Of our files; longest unused first.
        self._others: list[tuple[float, Path, int]] = []  # When last used, where, how large; longest unused first.
        self._pending: dict[str, Writing] = {}
        self._jobs: deque[Callable[[], None] | None] = deque()
        self._done: deque[Writing] = deque()
        self._wake = threading.Condition()
        self._is_idle = True
        self._readers: ThreadPoolExecutor | None = None
        self._writer: threading.Thread | None = None

    def open(self, layout: str) -> list[BlockHeader]:
        """Begin with what earlier processes left for the same fingerprint and layout.

        Args:
            layout: all that decides what a block looks like.

        Returns:
            The blocks there are, those in front before those that follow them; their tensors were not read.
        """
        told = "\n".join(filter(None, [self.fingerprint, layout, self.part]))
        name = hashlib.blake2b(told.encode(), digest_size=20).hexdigest()
        self._folder = self._root / name
        try:
            self._folder.mkdir(exist_ok=True)
            self._find_others()
            headers = self._read_index()
        except OSError as error:
            self._give_up(error)
            return []
        return sorted(headers, key=lambda header: header.start)

    @property
    def is_writing(self) -> bool:
        """Whether blocks are written; a full or unwritable disk interrupts it, with one warning."""
        return self._next_try_s is None or time.monotonic() >= self._next_try_s

    def has_file(self, key: str) -> bool:
        """Whether the block is in its file."""
        return key in self._sizes

    def pending(self, key: str) -> Writing | None:
        """The block if it is on its way to its file."""
        return self._pending.get(key)

    def write(self, header: BlockHeader, block: Block) -> bool:
        """Queue an evaluated block, whether or not there is one of its key; returns whether blocks are written now."""
        if not self.is_writing:
            return False
        self.delete(header.key)
        writing = self._pending[header.key] = Writing(header=header, block=block)
        views = block_views(block)
        path = self._path(header.key)
        self._queue(lambda: self._write(writing, path, views))
        return True

    def delete(self, key: str) -> None:
        """Forget a block and delete its file."""
        if (pending := self._pending.pop(key, None)) is not None:
            pending.is_cancelled = True
        size = self._sizes.pop(key, None)
        self.num_bytes -= size or 0
        if pending is not None or size is not None:
            path = self._path(key)
            self._queue(lambda: path.unlink(missing_ok=True))

    @property
    def keys(self) -> list[str]:
        """Keys of the blocks in files, longest unused first."""
        return list(self._sizes)

    def renew(self, keys: Sequence[str]) -> None:
        """Make blocks the latest used, the last one latest of all."""
        for key in keys:
            if key in self._sizes:
                self._sizes.move_to_end(key)

    def refuse(self, key: str, problem: object) -> None:
        """Warn of a damaged block and delete its file."""
        self._warn_of(self._path(key), problem)
        self.delete(key)

    def touch(self, keys: Sequence[str]) -> None:
        """As `renew`; a later process will know."""
        self.renew(keys)
        now = time.time()
        # Parents a little later than their children, in the order of `keys`.
        times = [(self._path(key), now + i * 1e-4) for i, key in enumerate(keys) if key in self._sizes]
        if times:
            self._queue(lambda: _set_times(times))

    def read(self, keys: Sequence[str]) -> list[Block | None]:
        """Blocks, several files at once; None for one that is gone or damaged, which is forgotten."""
        read = map if len(keys) < 2 else self._pool().map
        return [self._checked(key, found) for key, found in zip(keys, read(self._read, keys), strict=True)]

    def size(self, key: str) -> int:
        """Bytes of a block's file."""
        return self._sizes[key]

    def begin_read(self, key: str) -> Future[StoredBlock | BlockFileError | OSError]:
        """Read a block while the caller does something else."""
        return self._pool().submit(self._read, key)

    def _pool(self) -> ThreadPoolExecutor:
        if self._readers is None:
            self._readers = ThreadPoolExecutor(_READERS, thread_name_prefix="prefix-cache-reader")
        return self._readers

    def take_written(self) -> list[Writing]:
        """Those that came to their end since the last call: written ones have `num_file_bytes`."""
        finished = []
        while self._done:
            writing = self._done.popleft()
            if writing.is_cancelled:
                continue
            del self._pending[writing.header.key]
            if writing.num_file_bytes is not None:
                self._sizes[writing.header.key] = writing.num_file_bytes
                self.num_bytes += writing.num_file_bytes
                self.num_written += 1
            finished.append(writing)
        return finished

    def overdue(self) -> list[str]:
        """The keys to `delete` to keep within the limit; files of other models are deleted at once."""
        while self._others and self.num_bytes > self.max_bytes:
            _, path, size = self._others.pop(0)
            self.num_bytes -= size
            self._queue(lambda path=path: path.unlink(missing_ok=True))  # type: ignore[misc]
        found, excess = [], self.num_bytes - self.max_bytes
        for key, size in self._sizes.items():
            if excess <= 0:
                break
            found.append(key)
            excess -= size
        return found

    def close(self, timeout_s: float) -> None:
        """Finish what is queued, as far as the time allows, and end the threads."""
        self.wait(timeout_s)
        with self._wake:
            self._jobs.clear()
            self._jobs.append(None)
            self._wake.notify_all()
        if self._writer is not None:
            self._writer.join(timeout_s)
        if self._readers is not None:
            self._readers.shutdown(cancel_futures=True)
        self._writer = self._readers = None

    def wait(self, timeout_s: float) -> bool:
        """Wait until nothing is queued; whether it came to that."""
        with self._wake:
            return self._wake.wait_for(lambda: not self._jobs and self._is_idle, timeout_s)

    def _path(self, key: str) -> Path:
        return self._folder / f"{key}{SUFFIX}"

    def _queue(self, job: Callable[[], None]) -> None:
        with self._wake:
            self._jobs.append(job)
            self._wake.notify_all()
        if self._writer is None:
            self._writer = threading.Thread(target=self._run_jobs, name="prefix-cache-writer", daemon=True)
            self._writer.start()

    def _run_jobs(self) -> None:
        while True:
            with self._wake:
                self._is_idle = not self._jobs
                self._wake.notify_all()
                self._wake.wait_for(lambda: bool(self._jobs))
                job = self._jobs.popleft()
                self._is_idle = job is None
            if job is None:
                return
            try:
                job()
            except OSError as error:
                self._give_up(error)
            # While it waits for the next one, it would keep a block in memory.
            job = None

    def _write(self, writing: Writing, path: Path, views: Tensors) -> None:
        try:
            if self.is_writing and not writing.is_cancelled:
                path.parent.mkdir(exist_ok=True)
                writing.num_file_bytes = write_block(path, writing.header, views)
                self._go_on()
        except OSError as error:
            self._give_up(error)
        finally:
            self._done.append(writing)

    def _give_up(self, error: OSError) -> None:
        """Write no more for a while; what is in memory and what was written stays usable."""
        if self._next_try_s is None:
            _LOG.warning(
                "prefix cache: %s: %s; prefixes are kept in memory only, and writing is tried again every %g s",
                self._folder,
                error.strerror,
                self.retry_s,
            )
        self._next_try_s = time.monotonic() + self.retry_s

    def _go_on(self) -> None:
        if self._next_try_s is not None:
            self._next_try_s = None
            _LOG.warning("prefix cache: %s: prefixes are written again", self._folder)

    def _read(self, key: str) -> StoredBlock | BlockFileError | OSError:
        try:
            return read_block(self._path(key))
        except (BlockFileError, OSError) as error:
            return error

    def _checked(self, key: str, found: StoredBlock | BlockFileError | OSError) -> Block | None:
        if isinstance(found, StoredBlock) and found.header.key == key:
            return found.as_block()
        # Another process that shares the folder may have deleted it.
        if not isinstance(found, FileNotFoundError):
            self._warn_of(self._path(key), found if isinstance(found, Exception) else "it holds another block")
        self.delete(key)
        return None

    def _warn_of(self, path: Path, problem: object) -> None:
        self.num_damaged += 1
        _LOG.warning("prefix cache: %s is not used: %s", path, problem)

    def _read_index(self) -> Iterable[BlockHeader]:
        """The headers of our files; what is none of ours is left alone, what is damaged is deleted."""
        headers = []
        for path, size, changed_s in _files(self._folder):
            if path.name.startswith("."):
                if time.time() - changed_s > _ABANDONED_S:
                    path.unlink(missing_ok=True)
                continue
            if not _is_block(path):
                self._warn_of(path, "it is no block of this cache")
                continue
            try:
                header = read_block_header(path)
                if header.key != path.stem:
                    raise BlockFileError("it holds another block than its name says")
            except FileNotFoundError:
                continue
            except BlockFileError as error:
                self._warn_of(path, error)
                path.unlink(missing_ok=True)
                continue
            self._sizes[header.key] = size
            self.num_bytes += size
            headers.append(header)
        return headers

    def _find_others(self) -> None:
        """Count the files of other models and layouts."""
        for folder in self._root.iterdir():
            if folder != self._folder and _KEY.fullmatch(folder.name) and folder.is_dir():
                self._others += [(changed_s, path, size) for path, size, changed_s in _files(folder) if _is_block(path)]
        self._others.sort()
        self.num_bytes += sum(size for _, _, size in self._others)


def _is_block(path: Path) -> bool:
    return path.suffix == SUFFIX and _KEY.fullmatch(path.stem) is not None


def _files(folder: Path) -> list[tuple[Path, int, float]]:
    """Files with their size and the time of their last change, longest unchanged first."""
    found = []
    for path in folder.iterdir():
        # Another process that shares the folder may delete one meanwhile.
        with contextlib.suppress(FileNotFoundError):
            facts = path.stat()
            if stat.S_ISREG(facts.st_mode):
                found.append((path, facts.st_size, facts.st_mtime))
    return sorted(found, key=lambda file: file[2])


def _set_times(times: Sequence[tuple[Path, float]]) -> None:
    for path, at in times:
        # Deleted by another process, perhaps.
        with contextlib.suppress(FileNotFoundError):
            os.utime(path, (at, at))
