"""What an interrupted conversion has done so far, so that the next one can go on from there.

A text file beside the output: a line that says which conversion this is, then a line for each task that is done with
the SHA-256 of what it wrote. Lines are only ever added; one that was cut off by a kill is ignored, and what the others
say is checked against the files before it is believed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lfm_mlx.errors import ConversionError

NAME = ".journal"


class Journal:
    """The journal of the conversion in `folder`. Make one with `Journal.begin` or `Journal.resume`.

    Attributes:
        tasks: by number, the SHA-256 of what a finished task wrote.
        inputs: by name, bytes and SHA-256 of a source file that was read completely.
    """

    def __init__(self, folder: Path) -> None:
        self.file = folder / NAME
        self.tasks: dict[int, str] = {}
        self.inputs: dict[str, dict[str, Any]] = {}

    @classmethod
    def begin(cls, folder: Path, identity: Mapping[str, Any]) -> Journal:
        """A new journal of the conversion that `identity` describes."""
        journal = cls(folder)
        journal._add({"conversion": identity})
        return journal

    @classmethod
    def resume(cls, folder: Path, identity: Mapping[str, Any]) -> Journal:
        """The journal that an interrupted run left in `folder`.

        Raises:
            ConversionError: it belongs to another conversion; the message says what differs.
        """
        journal = cls(folder)
        first, *lines = journal.lines() or [{}]
        _check_same(first.get("conversion", {}), json.loads(json.dumps(identity)), folder)
        for line in lines:
            if "task" in line:
                journal.tasks[line["task"]] = line["sha256"]
            elif "input" in line:
                journal.inputs[line["input"]] = {"bytes": line["bytes"], "sha256": line["sha256"]}
        return journal

    def add_task(self, number: int, digest: str) -> None:
        """Remember a task as done."""
        self.tasks[number] = digest
        self._add({"task": number, "sha256": digest})

    def add_input(self, name: str, num_bytes: int, digest: str) -> None:
        """Remember the SHA-256 of a source file."""
        self.inputs[name] = {"bytes": num_bytes, "sha256": digest}
        self._add({"input": name, **self.inputs[name]})

    def remove(self) -> None:
        """Delete the file: the conversion is complete."""
        self.file.unlink()

    def _add(self, line: Mapping[str, Any]) -> None:
        # A line that a kill cut off is closed, so that it does not swallow this one.
        data = json.dumps(line).encode() + b"\n"
        descriptor = os.open(self.file, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            size = os.fstat(descriptor).st_size
            if size and os.pread(descriptor, 1, size - 1) != b"\n":
                data = b"\n" + data
            os.write(descriptor, data)
        finally:
            os.close(descriptor)

    def lines(self) -> list[dict[str, Any]]:
        """All lines that are whole."""
        lines = []
        for text in self.file.read_text(encoding="utf-8").split("\n"):
            try:
                line = json.loads(text)
            except ValueError:
                continue
            if isinstance(line, dict):
                lines.append(line)
        return lines


def conversion_in(folder: Path) -> dict[str, Any]:
    """What the conversion in `folder` was described as when it was begun; empty where that cannot be read."""
    journal = Journal(folder)
    first = (journal.lines() or [{}])[0].get("conversion")
    return first if isinstance(first, dict) else {}


def has_progress(folder: Path) -> bool:
    """Whether an interrupted conversion in `folder` finished at least one task."""
    try:
        return '"task"' in (folder / NAME).read_text(encoding="utf-8")
    except OSError:
        return False


def _check_same(found: Mapping[str, Any], expected: Mapping[str, Any], folder: Path) -> None:
    if found == expected:
        return
    for key, value in expected.items():
        was = found.get(key)
        if was == value:
            continue
        if key == "source" and isinstance(was, dict):
            changed = sorted(name for name in was.keys() | value.keys() if was.get(name) != value.get(name))
            raise ConversionError(
                f"{folder}: the source has changed since this conversion was interrupted ({', '.join(changed[:4])}), "
                "expected the same files; start again without --resume"
            )
        raise ConversionError(
            f"{folder}: was begun with {key} {was!r:.200}, not {value!r:.200}; give the same options to --resume, or "
            "start again without it"
        )
    raise ConversionError(f"{folder}: was begun by another version, {found!r:.200}; start again without --resume")
