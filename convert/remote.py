"""A repo's weights, downloaded file by file while they are converted, and deleted again where that is wished.

Beside the output lies a folder with what is needed of the source: the headers of all files at once, so that everything
can be planned, and then one file of weights after another. It outlives a conversion that was interrupted, and so does a
download that is half done.
"""

from __future__ import annotations

import os
import re
import shutil
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lfm_mlx.checkpoint import Checkpoint
from lfm_mlx.errors import CheckpointError, LfmError
from lfm_mlx.hub_weights import RemoteCheckpoint, RemoteFile
from lfm_mlx.names import Shape

from .hashing import sha256_of
from .segments import CheckpointSource, Parts
from .write import INDEX

_SHA256 = re.compile(r"[0-9a-f]{64}")
_AT_ONCE = 2
"""Files that are on the disk at a time where they are deleted again: one is converted, the next one downloaded."""


class RemoteSource:
    """A repo's checkpoint as a `lfm_mlx.convert.segments.WeightSource`.

    Args:
        remote: the repo's checkpoint.
        folder: the folder beside the output; it is made.

    Raises:
        CheckpointError: the repo is no whole checkpoint.
        DownloadError: the hub was not reached.
    """

    def __init__(self, remote: RemoteCheckpoint, folder: Path) -> None:
        self.remote = remote
        self.folder = folder / "weights"
        headers = folder / "headers"
        for each in (headers, self.folder):
            each.mkdir(parents=True, exist_ok=True)
        for name in ("config.json", INDEX):
            if (remote.folder / name).is_file():
                shutil.copyfile(remote.folder / name, headers / name)
        for file in remote.files:
            stub = headers / file.name
            if not stub.is_file() or stub.stat().st_size != file.num_bytes:
                stub.write_bytes(remote.read_start(file))
                os.truncate(stub, file.num_bytes)  # a hole, which takes no room
        self._source = CheckpointSource(Checkpoint(headers))
        self.config = self._source.config
        self.files = tuple(self.folder / file.name for file in self._source.files)

    @property
    def tensors(self) -> dict[str, Shape]:
        """Our tensors with their unquantised shapes, in the order of the forward pass."""
        return self._source.tensors

    def dtype(self, name: str) -> str:
        """The type of the values, of the scales where they are quantised."""
        return self._source.dtype(name)

    def stored_as(self, name: str) -> Any:
        """How our tensor is quantised."""
        return self._source.stored_as(name)

    def segments(self, name: str) -> Iterator[Parts]:
        """All rows of our tensor in order, where they will be."""
        for parts in self._source.segments(name):
            yield tuple(replace(part, file=self.folder / part.file.name) for part in parts)


class RemoteFeed:
    """Downloads the files of a `RemoteSource` in a thread, a `lfm_mlx.convert.feed.Feed`.

    Args:
        source: the checkpoint.
        discard: download beside the output rather than into huggingface_hub's cache, and delete each file that was
            converted; what lay in the cache before stays there.
    """

    def __init__(self, source: RemoteSource, *, discard: bool) -> None:
        self.remote = source.remote
        self.folder = source.folder
        self.discard = discard
        self._files = {self.folder / file.name: file for file in self.remote.files}
        self.identity: dict[str, Any] = {file.name: [file.num_bytes, file.etag] for file in self.remote.files}
        config = self.remote.folder / "config.json"
        self.identity[config.name] = [config.stat().st_size, sha256_of(config)]
        self._changed = threading.Condition()
        self._waiting: list[Path] = []
        self._present: set[Path] = set()
        self._demanded: Path | None = None
        self._error: Exception | None = None
        self._is_stopped = False
        self._damaged: list[Path] = []

    def room_bytes(self) -> tuple[int, int]:
        """Bytes that downloads will take: beside the output, and in huggingface_hub's cache."""
        left = [0 if self._is_here(file) else file.num_bytes for file in self.remote.files]
        if not self.discard:
            return 0, sum(left)
        return max(sum(left[i : i + _AT_ONCE]) for i in range(len(left))), 0

    def _is_here(self, file: RemoteFile) -> bool:
        return file.cached is not None or (self.folder / file.name).is_file()

    def begin(self, files: Sequence[Path]) -> None:
        """Start to download these, in this order."""
        self._waiting = list(files)
        threading.Thread(target=self._run, daemon=True).start()

    def ensure(self, file: Path, *, is_joint: bool = False) -> None:
        """Return when `file` can be read; one that is needed together with others is downloaded beside them.

        Raises:
            DownloadError: it cannot be downloaded.
        """
        with self._changed:
            self._demanded = file if is_joint else None
            self._changed.notify_all()
            self._changed.wait_for(lambda: file in self._present or self._error or self._is_stopped)
            if self._error is not None:
                raise self._error
            if file not in self._present:
                raise CheckpointError(f"{file}: was not downloaded, the conversion was stopped")

    def check(self, file: Path) -> None:
        """Nothing: a file that was downloaded is nobody else's."""

    def confirm(self, file: Path, digest: str) -> None:
        """Compare the SHA-256 of what was downloaded with the hub's.

        Raises:
            CheckpointError: they differ; the file is deleted when the conversion stops.
        """
        expected = self._files[file].etag
        if _SHA256.fullmatch(expected) and digest != expected:
            self._damaged.append(file)
            raise CheckpointError(
                f"{self.remote.name}: {file.name} has SHA-256 {digest[:12]}..., expected {expected[:12]}...; it was "
                "damaged on its way or in the cache, download it again"
            )

    def release(self, file: Path) -> None:
        """`file` is not needed any more."""
        if self.discard:
            self._delete(file)
            with self._changed:
                self._present.discard(file)
                self._changed.notify_all()

    def stop(self) -> None:
        """Download nothing more, and wake whoever waits."""
        with self._changed:
            self._is_stopped = True
            self._changed.notify_all()
        while self._damaged:
            self._delete(self._damaged.pop())

    def _delete(self, file: Path) -> None:
        file.unlink(missing_ok=True)  # of a file in the cache only the link

    def _run(self) -> None:
        while (file := self._next()) is not None:
            try:
                self._fetch(file)
            except (LfmError, OSError) as error:
                with self._changed:
                    self._error = error
                    self._changed.notify_all()
                return
            with self._changed:
                if self._is_stopped:
                    return
                self._present.add(file)
                self._changed.notify_all()

    def _next(self) -> Path | None:
        with self._changed:
            self._changed.wait_for(lambda: self._is_stopped or not self._waiting or self._has_room())
            return None if self._is_stopped or not self._waiting else self._waiting.pop(0)

    def _has_room(self) -> bool:
        return not self.discard or self._demanded in self._waiting or len(self._present) < _AT_ONCE

    def _fetch(self, file: Path) -> None:
        remote = self._files[file]
        if file.is_file() and not file.is_symlink():
            return  # an interrupted conversion has downloaded it
        file.unlink(missing_ok=True)
        if self.discard and remote.cached is None:
            self.remote.download_to(remote, file, lambda: not self._is_stopped)
        else:
            file.symlink_to(os.path.realpath(self.remote.download(remote)))


def has_downloads(folder: Path) -> bool:
    """Whether the folder beside an output holds something that would have to be downloaded again."""
    return any(not path.is_symlink() for path in (folder / "weights").glob("*"))


def download_folder(out: Path, remote: RemoteCheckpoint) -> Path:
    """The folder beside `out` for the source's files."""
    return out.parent / f".{out.name}.download-{remote.commit[:12]}"
