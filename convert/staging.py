"""A folder that appears complete or not at all: written beside its place, renamed at the end.

While a conversion to ``OUT`` runs, its files are in ``.OUT.partial-xxxxxxxx`` in the same parent; a folder that is
being replaced waits in ``.OUT.replaced-xxxxxxxx``. What a killed run left behind is tidied up by the next one, or gone
on with.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from lfm_mlx.errors import ConversionError

from .journal import has_progress

PATIENCE_S = 5.0
"""How long a lock is waited for."""


def check_destination(source: Path, out: Path, *, force: bool) -> None:
    """Refuse a destination that cannot be written or must not be replaced. Both paths are resolved already.

    Raises:
        ConversionError: `out` exists and `force` is off, is no checkpoint, or overlaps `source`.
    """
    if out == source:
        raise ConversionError(f"{out}: source and destination are the same folder; name another destination")
    if source in out.parents:
        raise ConversionError(f"{out}: lies inside the source {source}; name a destination outside of it")
    if out in source.parents:
        raise ConversionError(f"{out}: contains the source {source}; name another destination")
    existing = _nearest(out)
    if not existing.is_dir():
        raise ConversionError(f"{existing}: is a file, expected a folder or nothing; name another destination")
    if not out.exists() or not any(out.iterdir()):
        return
    if not force:
        raise ConversionError(f"{out}: exists already; replace it with --force (force=True) or name another one")
    if not (out / "config.json").is_file():
        raise ConversionError(f"{out}: is not a model folder (no config.json), so it is not replaced; empty it first")


def tidy(out: Path, *, keep_progress: bool = False, keep: Path | None = None) -> list[str]:
    """Remove what earlier, interrupted runs to `out` left beside it; put a replaced folder back if `out` is missing.

    Args:
        out: the destination.
        keep_progress: leave a folder that `staged` can go on with.
        keep: a folder with downloads that is still good.

    Returns:
        One sentence for each thing done.

    Raises:
        ConversionError: another conversion to `out` is running.
    """
    if not out.parent.is_dir():
        return []
    notes = []
    kept = find_progress(out) if keep_progress else None
    for partial in _beside(out, "partial"):
        if partial == kept:
            continue
        with _lock(partial) as is_ours:
            if not is_ours:
                raise ConversionError(f"{out}: another conversion is writing it ({partial}); wait for it to end")
            is_progress = has_progress(partial)
            shutil.rmtree(partial)
        hint = " (--resume would have gone on with it)" if is_progress else ""
        notes.append(f"removed {partial}, left by an interrupted conversion{hint}")
    for downloads in _beside(out, "download"):
        if downloads != keep:
            shutil.rmtree(downloads)
            notes.append(f"removed {downloads}, downloaded for another conversion to {out}")
    for replaced in _beside(out, "replaced"):
        if out.exists():
            shutil.rmtree(replaced)
            notes.append(f"removed {replaced}, left by an interrupted conversion")
        else:
            replaced.rename(out)
            notes.append(f"restored {out}, moved aside by an interrupted conversion")
    return notes


def check_space(out: Path, needed_bytes: int, *, cache: Path | None = None, cache_bytes: int = 0) -> None:
    """Refuse to start when the disk below `out` has fewer than `needed_bytes` free, or the one below `cache`.

    Args:
        out: the destination.
        needed_bytes: for it, and for what lies beside it meanwhile.
        cache: a folder that the source is downloaded to.
        cache_bytes: bytes of what is downloaded there.

    Raises:
        ConversionError: the disk is too full; the message says how many bytes are free and needed.
    """
    existing = _nearest(out.parent)
    if cache is not None and os.stat(cache).st_dev == os.stat(existing).st_dev:
        needed_bytes += cache_bytes
    elif cache is not None and shutil.disk_usage(cache).free < cache_bytes:
        raise ConversionError(
            f"{cache}: {shutil.disk_usage(cache).free:,} bytes free, expected {cache_bytes:,} for the source; free "
            "some space, set HF_HOME to a larger disk, or let each file be deleted once it is converted "
            "(--discard-source)"
        )
    free_bytes = shutil.disk_usage(existing).free
    if free_bytes < needed_bytes:
        raise ConversionError(
            f"{existing}: {free_bytes:,} bytes free, expected {needed_bytes:,} for {out.name}"
            f"{' and its source' if cache_bytes else ''}; free some space or name a destination on another disk"
            f"{', or let files be deleted once they are converted (--discard-source)' if cache_bytes else ''}"
        )


def find_progress(out: Path) -> Path | None:
    """The folder in which an interrupted conversion to `out` got somewhere, if there is one."""
    if not out.parent.is_dir():
        return None
    return next((partial for partial in _beside(out, "partial") if has_progress(partial)), None)


@contextlib.contextmanager
def staged(out: Path, *, resume: bool = False, keeps: Callable[[BaseException], bool] | None = None) -> Iterator[Path]:
    """A folder that becomes `out` when the block ends well.

    An `out` that exists is kept until the new one is complete, and put back if the exchange fails.

    Args:
        out: the destination.
        resume: yield the folder of an interrupted conversion, if there is one, instead of an empty one.
        keeps: whether the folder stays, for a later `resume`, when the block raises this; otherwise it is removed.

    Raises:
        ConversionError: another conversion to `out` is running.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = find_progress(out) if resume else None
    if partial is None:
        partial = _sibling(out, "partial")
        partial.mkdir()
    try:
        with _lock(partial) as is_ours:
            if not is_ours:
                raise _BusyError(f"{out}: another conversion is writing it ({partial}); wait for it to end")
            yield partial
            sync(partial)
            replaced = _exchange(partial, out)
    except _BusyError:
        raise
    except BaseException as error:
        if not (keeps is not None and keeps(error) and has_progress(partial)):
            shutil.rmtree(partial, ignore_errors=True)
        raise
    if replaced is not None:
        shutil.rmtree(replaced, ignore_errors=True)


class _BusyError(ConversionError):
    """Somebody else's folder is not ours to remove."""


def sync(path: Path) -> None:
    """Wait until a file or a folder's entries are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _exchange(new: Path, out: Path) -> Path | None:
    """Rename `new` to `out`; returns where the former `out` is now, if there was one."""
    replaced = _sibling(out, "replaced") if out.exists() else None
    try:
        if replaced is not None:
            out.rename(replaced)
        new.rename(out)
    except BaseException:
        if replaced is not None and replaced.exists() and not out.exists():
            replaced.rename(out)
        raise
    sync(out.parent)
    return replaced


@contextlib.contextmanager
def _lock(folder: Path) -> Iterator[bool]:
    """Hold the lock on `folder` while it is written; False when another process holds it.

    Worker processes inherit the lock. Those of a run that was killed notice it after their piece, hence the patience.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    os.set_inheritable(descriptor, True)
    try:
        yield _locked(descriptor)
    finally:
        os.close(descriptor)


def _locked(descriptor: int) -> bool:
    end = time.monotonic() + PATIENCE_S
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > end:
                return False
            time.sleep(0.05)
            continue
        except OSError:
            pass  # a file system without locks: two runs at once are then the user's to avoid
        return True


def _nearest(path: Path) -> Path:
    """`path` or the closest folder above it that exists."""
    return next(place for place in (path, *path.parents) if place.exists())


def _sibling(out: Path, purpose: str) -> Path:
    return out.parent / f".{out.name}.{purpose}-{secrets.token_hex(4)}"


def _beside(out: Path, purpose: str) -> list[Path]:
    prefix = f".{out.name}.{purpose}-"
    return sorted(path for path in out.parent.iterdir() if path.name.startswith(prefix) and path.is_dir())
