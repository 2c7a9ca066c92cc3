"""A conversation as a JSON file."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lfm_mlx.errors import CheckpointError, OptionError
from lfm_mlx.types import Message

FILE_FORMAT = "lfm_mlx chat 1"


def write_messages(path: Path, messages: Sequence[Message]) -> None:
    """Write a file, whole or not at all.

    Raises:
        OptionError: it cannot be written, or a message has no JSON form; what stood there before still does.
    """
    if not path.name:
        raise OptionError(f"{path}: is a folder, expected the name of a file in it")
    if "\0" in str(path):
        raise OptionError(f"{str(path)!r} holds a NUL, expected the name of a file; leave it out")
    beside = path.with_name(f".{path.name}.partial")
    try:
        text = json.dumps(
            {"format": FILE_FORMAT, "messages": list(messages)}, ensure_ascii=False, indent=2, allow_nan=False
        )
        beside.write_text(text + "\n", encoding="utf-8")
        beside.replace(path)
    except (OSError, TypeError, ValueError, RecursionError) as error:
        with contextlib.suppress(OSError):
            beside.unlink()
        if isinstance(error, OSError):
            raise OptionError(f"{path}: cannot be written ({error.strerror}); choose another file") from error
        raise OptionError(f"a message has no JSON form ({error}), expected text and JSON values; correct it") from error


def read_messages(path: Path) -> list[dict[str, Any]]:
    """The messages of a file that `write_messages` wrote.

    Raises:
        CheckpointError: the file is missing or is not such a file.
    """
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}); name a file that a chat was saved to") from error
    messages = stored.get("messages") if isinstance(stored, dict) and stored.get("format") == FILE_FORMAT else None
    if not isinstance(messages, list) or not all(isinstance(one, dict) and "role" in one for one in messages):
        raise CheckpointError(f"{path}: is no saved chat, expected a JSON object with format {FILE_FORMAT!r}")
    return messages
