"""Reads messages from a terminal: an editor with history where the terminal can do it, plain lines where not."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
from prompt_toolkit.data_structures import Size
from prompt_toolkit.document import Document
from prompt_toolkit.history import FileHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.output import ColorDepth
from prompt_toolkit.output.vt100 import Vt100_Output
from prompt_toolkit.shortcuts import CompleteStyle

Keyboard = Callable[[], str]
"""Waits for a message. Raises EOFError at Ctrl-D and KeyboardInterrupt at Ctrl-C on an empty line."""

PROMPT, CONTINUATION = "> ", ". "

Words = Mapping[str, Sequence[str] | None]
"""Commands by name, with the words that may stand behind them; None for the name of a file."""


def make_keyboard(words: Words, *, is_dumb: bool) -> Keyboard:
    """A keyboard for this terminal.

    Args:
        words: what Tab completes.
        is_dumb: the terminal cannot move its cursor.
    """
    if is_dumb:
        sys.stdin.reconfigure(errors="replace")  # type: ignore[union-attr]
        return read_plain_lines
    # A terminal that does not tell where its cursor is would be waited for, and complained about.
    output = Vt100_Output(
        sys.stdout,
        _terminal_size,
        term=os.environ.get("TERM"),
        default_color_depth=ColorDepth.DEPTH_1_BIT,
        enable_cpr=False,
    )
    session: PromptSession[str] = PromptSession(
        PROMPT,
        output=output,
        multiline=True,
        prompt_continuation=CONTINUATION,
        key_bindings=_bindings(),
        history=_History(history_path()),
        completer=_CommandCompleter(words),
        complete_while_typing=False,
        complete_style=CompleteStyle.READLINE_LIKE,
        reserve_space_for_menu=0,
    )
    return session.prompt


def read_plain_lines() -> str:
    """A message from lines as the terminal gives them; a backslash at the end of one announces another."""
    lines: list[str] = []
    while True:
        try:
            line = input(CONTINUATION if lines else PROMPT)
        except (EOFError, KeyboardInterrupt):
            print()
            raise
        if not line.endswith("\\"):
            return "\n".join([*lines, line])
        lines.append(line[:-1])


def _terminal_size() -> Size:
    columns, rows = os.get_terminal_size(sys.stdout.fileno())
    return Size(rows=rows or 24, columns=columns or 80)


def history_path() -> Path | None:
    """Where messages are remembered; None where there is no home."""
    given = os.environ.get("XDG_STATE_HOME", "")
    try:
        folder = Path(given) if os.path.isabs(given) else Path.home() / ".local" / "state"
    except RuntimeError:
        return None
    return folder / "lfm_mlx" / "history"


class _History(FileHistory):
    """A history that goes on without its file where that cannot be read or written."""

    def __init__(self, path: Path | None) -> None:
        super().__init__(str(path or os.devnull))
        with contextlib.suppress(OSError):
            if path is not None:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.touch(mode=0o600)  # What is said to a model is nobody else's business.

    def load_history_strings(self) -> Iterable[str]:
        try:
            return list(super().load_history_strings())
        except OSError:
            return []

    def store_string(self, string: str) -> None:
        with contextlib.suppress(OSError, UnicodeEncodeError):
            super().store_string(string)


def _bindings() -> KeyBindings:
    bindings = KeyBindings()

    @bindings.add("enter")
    def send(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if buffer.document.text_before_cursor.endswith("\\"):
            buffer.delete_before_cursor()
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @bindings.add("escape", "enter")
    def start_line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    @bindings.add("c-c")
    def clear(event: KeyPressEvent) -> None:
        if event.current_buffer.text:
            event.current_buffer.reset()
        else:
            event.app.exit(exception=KeyboardInterrupt)

    return bindings


class _CommandCompleter(Completer):
    """Completes commands, and then what may stand behind them."""

    def __init__(self, words: Words) -> None:
        self._words = words
        self._paths = PathCompleter(expanduser=True)

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterable[Completion]:
        text = document.text_before_cursor
        if not text.startswith("/") or "\n" in text:
            return
        name, space, rest = text[1:].partition(" ")
        known = self._words.get(name, ()) if space else tuple(self._words)
        if known is None:
            yield from self._paths.get_completions(Document(rest), complete_event)
            return
        typed = rest if space else name
        yield from (Completion(word, -len(typed)) for word in known if word.startswith(typed))
