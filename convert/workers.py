"""Tasks shared among worker processes, or done in this one; their results come back one by one."""

from __future__ import annotations

import contextlib
import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from lfm_mlx.errors import ConversionError

from .piecework import perform
from .tasks import Task


@dataclass(frozen=True, kw_only=True)
class Done:
    """A task that is done, and the SHA-256 of what it wrote."""

    task: Task
    digest: str


def do_tasks(
    tasks: Iterable[Task], folder: Path, num_workers: int, stop: Callable[[], None] = lambda: None
) -> Iterator[Done]:
    """Do every task, each as soon as a worker is free; a task is taken from `tasks` only then.

    Args:
        tasks: what is to be done; it is iterated over in threads when there are several workers, never at once.
        folder: holds the output files, allocated already.
        num_workers: processes; 1 works in this one.
        stop: called at the end, whatever it is; it must wake `tasks` if they wait for something.

    Raises:
        LfmError, OSError: what a task ended with.
        ConversionError: a worker process died.
    """
    if num_workers == 1:
        for task in tasks:
            yield Done(task=task, digest=perform(task, folder))
        return
    results: queue.Queue[Done | Exception | None] = queue.Queue()
    shared = _Shared(tasks)
    workers = []
    try:
        for _ in range(num_workers):
            workers.append(_Worker(folder, shared, results))
        for worker in workers:
            worker.thread.start()
        num_busy = num_workers
        while num_busy:
            result = results.get()
            if result is None:
                num_busy -= 1
            elif isinstance(result, Exception):
                raise result
            else:
                yield result
    finally:
        shared.close()
        stop()
        for worker in workers:
            worker.stop()


class _Shared:
    """The tasks that are left, for several threads."""

    def __init__(self, tasks: Iterable[Task]) -> None:
        self._tasks = iter(tasks)
        self._lock = threading.Lock()
        self._is_open = True

    def next(self) -> Task | None:
        with self._lock:
            return next(self._tasks, None) if self._is_open else None

    def close(self) -> None:
        self._is_open = False


class _Worker:
    """One process and the thread that feeds it."""

    def __init__(self, folder: Path, shared: _Shared, results: queue.Queue[Done | Exception | None]) -> None:
        self.folder = folder
        self.shared = shared
        self.results = results
        # Inheritable descriptors pass on the lock of the folder: nobody else takes it while a worker may still write.
        self.process = subprocess.Popen(
            [sys.executable, "-m", "lfm_mlx.convert.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            close_fds=False,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        )
        self.thread = threading.Thread(target=self._feed, daemon=True)

    def stop(self) -> None:
        """End the process, whatever it does."""
        self.process.kill()
        self.process.wait()
        if self.thread.ident is not None:
            self.thread.join()
        for pipe in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(OSError):  # a task that it never read
                pipe.close()  # type: ignore[union-attr]

    def _feed(self) -> None:
        try:
            self._send(self.folder)
            while (task := self.shared.next()) is not None:
                self._send(task)
                number, outcome = self._receive()
                assert number == task.number
                self.results.put(outcome if isinstance(outcome, Exception) else Done(task=task, digest=outcome))
        except (OSError, EOFError, pickle.UnpicklingError):
            self.results.put(self._death())
        except Exception as error:  # noqa: BLE001  what `tasks` raises belongs to whoever takes the results
            self.results.put(error)
        self.results.put(None)

    def _send(self, value: object) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(pickle.dumps(value))
        self.process.stdin.flush()

    def _receive(self) -> tuple[int, str | Exception]:
        assert self.process.stdout is not None
        number, outcome = pickle.load(self.process.stdout)
        return number, outcome

    def _death(self) -> ConversionError:
        code = self.process.wait()
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        hint = " (often the system's answer to too little memory)" if code == -signal.SIGKILL else ""
        return ConversionError(
            f"a worker process ended with {how}{hint}, expected it to go on; continue with --resume (resume=True), "
            "perhaps with fewer --jobs"
        )
