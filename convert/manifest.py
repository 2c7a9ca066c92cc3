"""manifest.json: from which bytes a checkpoint was made, how, and of which bytes it consists."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import mlx.core as mx

from lfm_mlx.config import read_json_object
from lfm_mlx.errors import CheckpointError

from .card import NAME as CARD
from .hashing import sha256_of
from .write import INDEX, write_json

NAME = "manifest.json"

_READ = ("config.json", INDEX, CARD)
"""Files of a source that are read and not copied."""


def write_manifest(
    folder: Path,
    source: Path,
    sidecars: Sequence[Path],
    inputs: Mapping[str, Mapping[str, Any]],
    options: Mapping[str, Any],
    texts: Sequence[Path] = (),
) -> None:
    """Write the manifest of the finished checkpoint in `folder`.

    Args:
        folder: all files but the manifest are there.
        source: the folder that was converted.
        sidecars: files beside its weights that were copied, relative to it.
        inputs: bytes and SHA-256 of its weights' files by name.
        options: recipe and types.
        texts: files of text that scales or recipe were found with.
    """
    small = {str(file): _entry(source / file) for file in [*map(Path, _READ), *sidecars] if (source / file).is_file()}
    read = {**small, **inputs}
    write_json(
        folder / NAME,
        {
            "format": 1,
            "made_by": {"lfm_mlx": sys.modules["lfm_mlx"].__version__, "mlx": mx.__version__},  # type: ignore[attr-defined]
            "options": dict(options),
            "source": {name: dict(read[name]) for name in sorted(read)},
            **({"texts": {file.name: _entry(file) for file in texts}} if texts else {}),
            "files": _entries(folder),
        },
    )


def add_to_manifest(folder: Path, names: Sequence[str]) -> None:
    """Enter files that were written after the conversion; nothing happens where there is no manifest."""
    manifest = read_json_object(folder / NAME)
    if manifest is not None:
        manifest["files"] = dict(
            sorted({**manifest["files"], **{name: _entry(folder / name) for name in names}}.items())
        )
        write_json(folder / NAME, manifest)


def check_manifest(folder: Path) -> int:
    """Compare every file of a converted folder with its manifest.

    Returns:
        The number of files compared.

    Raises:
        CheckpointError: there is no manifest, or a file is missing, extra or different.
    """
    manifest = read_json_object(folder / NAME)
    if manifest is None:
        raise CheckpointError(f"{folder / NAME}: not found; only folders that lfm_mlx converted have one")
    expected, found = manifest.get("files", {}), _entries(folder)
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise CheckpointError(
                f"{folder / name}: is {_told(found.get(name))}, expected {_told(expected.get(name))}; "
                "convert or fetch it again"
            )
    return len(found)


def _entries(folder: Path) -> dict[str, dict[str, Any]]:
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in (NAME, ".journal"))
    with ThreadPoolExecutor(max_workers=2) as pool:
        return {
            str(file.relative_to(folder)): entry for file, entry in zip(files, pool.map(_entry, files), strict=True)
        }


def _entry(file: Path) -> dict[str, Any]:
    return {"bytes": file.stat().st_size, "sha256": sha256_of(file)}


def _told(entry: Mapping[str, Any] | None) -> str:
    return "not there" if entry is None else f"{entry['bytes']:,} bytes with SHA-256 {entry['sha256'][:12]}..."
