"""One attempt at a job: its tasks shared among processes, checked, and entered in the journal as they are done."""

from __future__ import annotations

import contextlib
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from .card import write_card
from .feed import Feed
from .gguf_source import GgufSource
from .hashing import Hasher
from .job import Job, describe
from .journal import Journal
from .manifest import write_manifest
from .piecework import digest_of
from .sidecars import config_json, copy_sidecars, write_sidecars
from .staging import sync
from .tasks import Task
from .verify import verify
from .workers import do_tasks
from .write import allocate, write_index, write_json

Progress = Callable[[int, int], None]
"""Called at the start and after each task with the source bytes converted so far and the bytes there are in all."""

_AHEAD_BYTES = 1 << 30
"""How far hashing the source may run ahead of converting it."""


class Attempt:
    """One attempt at a job.

    Args:
        job: what is to be done.
        source: the folder of the files beside the weights.
        named: what the model card says it was made from.
        feed: provides the weights.
        texts: files of text that scales or recipe were found with.
    """

    def __init__(self, job: Job, source: Path, named: Path, feed: Feed, texts: Sequence[Path] = ()) -> None:
        self.job = job
        self.source = source
        self.named = named
        self.feed = feed
        self.texts = texts
        self.num_resumed = 0

    def fill(self, folder: Path, sidecars: Sequence[Path], num_workers: int, progress: Progress | None) -> None:
        """Fill `folder`, config.json and the manifest last, and check that it loads."""
        job = self.job
        identity = {
            "source": self.feed.identity,
            **describe(job),
            "plan": job.fingerprint(self.feed.folder),
        }
        is_new = not (folder / ".journal").is_file()
        journal = Journal.begin(folder, identity) if is_new else Journal.resume(folder, identity)
        allocate(folder, job.shards)
        self._check_done(journal, folder)
        self._do_tasks(journal, folder, num_workers, progress)
        for shard in job.shards:
            sync(folder / shard.file)
        write_index(folder, job.shards, job.num_parameters)
        copy_sidecars(self.source, folder, sidecars)
        if isinstance(job.source, GgufSource):
            write_sidecars(folder, job.source.sidecars())
        config = config_json(job.source.config, job.recipe.default, job.overrides(), job.dtype)
        write_json(folder / "config.json", config)
        verify(folder, job.planned)
        write_card(folder, self.named, describe(job), job.num_bytes, job.bits_per_weight)
        write_manifest(folder, self.source, sidecars, journal.inputs, describe(job), self.texts)
        journal.remove()

    def _check_done(self, journal: Journal, folder: Path) -> None:
        """Forget the tasks whose work is not there as it was."""
        for task in self.job.tasks:
            if task.number in journal.tasks and digest_of(task, folder) != journal.tasks[task.number]:
                del journal.tasks[task.number]
        self.num_resumed = len(journal.tasks)

    def _do_tasks(self, journal: Journal, folder: Path, num_workers: int, progress: Progress | None) -> None:
        job, total = self.job, self.job.source_bytes
        todo = [task for task in job.tasks if task.number not in journal.tasks]
        done_bytes = total - sum(task.source_bytes for task in todo)
        if progress is not None:
            progress(done_bytes, total)
        needs = _Needs(todo, job.source.files, {self.feed.folder / name for name in journal.inputs}, self.feed)

        def on_file(file: Path, size: int, digest: str) -> None:
            self.feed.confirm(file, digest)
            journal.add_input(str(file.relative_to(self.feed.folder)), size, digest)
            needs.hashed(file)

        hasher = Hasher(on_file)
        with contextlib.closing(_Closing(hasher.stop)), contextlib.closing(_Closing(self.feed.stop)):
            self.feed.begin(needs.files)
            order = _Order(needs, self.feed, hasher)
            for done in do_tasks(order.dispatch(todo), folder, num_workers, self.feed.stop):
                journal.add_task(done.task.number, done.digest)
                done_bytes += done.task.source_bytes
                needs.done(done.task)
                if progress is not None:
                    progress(done_bytes, total)
            order.finish()
        for file in job.source.files:
            self.feed.check(file)


class _Closing:
    """Lets `contextlib.closing` call any function."""

    def __init__(self, close: Callable[[], None]) -> None:
        self.close = close


class _Needs:
    """Which files are still needed, by tasks and to be hashed; the feed is told when one is not any more.

    Attributes:
        files: those that are needed at the start, in the source's order.
        unhashed: those of them whose SHA-256 is not known yet.
    """

    def __init__(self, todo: Sequence[Task], files: Sequence[Path], hashed: set[Path], feed: Feed) -> None:
        self.feed = feed
        self.unhashed = set(files) - hashed
        self._left = Counter(file for task in todo for file in task.files)
        self._lock = threading.Lock()
        self.files = [file for file in files if file in self.unhashed or self._left[file]]

    def done(self, task: Task) -> None:
        """A task was done."""
        for file in task.files:
            with self._lock:
                self._left[file] -= 1
                is_last = not self._left[file]
            if is_last:
                self.feed.check(file)
                self._release(file)

    def hashed(self, file: Path) -> None:
        """A file was hashed."""
        with self._lock:
            self.unhashed.discard(file)
        self._release(file)

    def _release(self, file: Path) -> None:
        with self._lock:
            is_needed = file in self.unhashed or self._left[file] > 0
        if not is_needed:
            self.feed.release(file)


class _Order:
    """Hands out tasks in the order of the source's files and lets these be hashed along with it."""

    def __init__(self, needs: _Needs, feed: Feed, hasher: Hasher) -> None:
        self.files = list(needs.files)
        self.unhashed = frozenset(needs.unhashed)
        self.feed = feed
        self.hasher = hasher
        self.before_bytes = 0
        self.opened_bytes = 0

    def dispatch(self, tasks: Sequence[Task]) -> Iterator[Task]:
        """The tasks, each once its files are there."""
        for task in tasks:
            for file in sorted(task.files):
                self._open_to(file, is_joint=len(task.files) > 1)
            self.hasher.allow(self.before_bytes + task.pieces[-1].reads[-1].offset + _AHEAD_BYTES)
            yield task

    def finish(self) -> None:
        """Hash what no task has asked for."""
        self.hasher.allow(float("inf"))
        if self.files:
            self._open_to(self.files[-1])
        self.hasher.finish()

    def _open_to(self, file: Path, *, is_joint: bool = False) -> None:
        while file in self.files:
            opened = self.files.pop(0)
            self.feed.ensure(opened, is_joint=is_joint)
            if opened in self.unhashed:
                self.before_bytes, self.opened_bytes = self.opened_bytes, self.opened_bytes + opened.stat().st_size
                self.hasher.allow(self.before_bytes)
                self.hasher.add([opened])
