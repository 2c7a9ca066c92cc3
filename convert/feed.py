"""The source's files while they are converted: there when they are needed, and the same as at the start."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

from lfm_mlx.errors import CheckpointError

from .write import INDEX


class Feed(Protocol):
    """Provides the files of a source."""

    identity: dict[str, Any]
    """By file, what tells whether it is the same one later."""

    folder: Path
    """Where the files are; each has its name from there."""

    def room_bytes(self) -> tuple[int, int]:
        """Bytes that providing them takes: beside the output, and in huggingface_hub's cache."""
        ...

    def begin(self, files: Sequence[Path]) -> None:
        """These will be asked for, in this order."""
        ...

    def ensure(self, file: Path, *, is_joint: bool = False) -> None:
        """Return when `file` can be read.

        Args:
            file: one of those that `begin` named.
            is_joint: whether it is read together with others, so that none of these is released before it is there.
        """
        ...

    def check(self, file: Path) -> None:
        """All of `file` was read.

        Raises:
            CheckpointError: it is not the file that it was at the start.
        """
        ...

    def confirm(self, file: Path, digest: str) -> None:
        """`file` has the SHA-256 `digest`.

        Raises:
            CheckpointError: it should have another one.
        """
        ...

    def release(self, file: Path) -> None:
        """`file` was converted and hashed; nobody will ask for it again."""
        ...

    def stop(self) -> None:
        """Whoever waits in `ensure` is to be woken."""
        ...


class LocalFeed:
    """Files of a folder, told apart by length and time of change."""

    def __init__(self, folder: Path, files: Iterable[Path]) -> None:
        self.folder = folder
        names = [*files, *(folder / name for name in ("config.json", INDEX) if (folder / name).is_file())]
        self.identity: dict[str, Any] = {str(file.relative_to(folder)): _stamp(file) for file in names}

    def room_bytes(self) -> tuple[int, int]:
        """None: all are here."""
        return 0, 0

    def begin(self, files: Sequence[Path]) -> None:
        """Nothing: all are here."""

    def ensure(self, file: Path, *, is_joint: bool = False) -> None:
        """Check that `file` is what it was."""
        self.check(file)

    def confirm(self, file: Path, digest: str) -> None:
        """Nothing: whatever it is, it is what was given."""

    def release(self, file: Path) -> None:
        """Nothing: what lies in a folder of the user's stays there."""

    def stop(self) -> None:
        """Nothing: nobody waits."""

    def check(self, file: Path) -> None:
        """Check that `file` is what it was.

        Raises:
            CheckpointError: it is not.
        """
        before = self.identity[str(file.relative_to(self.folder))]
        try:
            now = _stamp(file)
        except OSError as error:
            raise CheckpointError(
                f"{file}: is gone ({error.strerror}), expected it until the conversion ends"
            ) from error
        if now != before:
            raise CheckpointError(
                f"{file}: was changed while it was being converted ({before[0]:,} bytes before, {now[0]:,} now), "
                "expected it to stay as it is; convert it again when it is complete"
            )


def _stamp(file: Path) -> list[int]:
    status = file.stat()
    return [status.st_size, status.st_mtime_ns]
