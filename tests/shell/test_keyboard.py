from __future__ import annotations

import io
import os
from pathlib import Path

import pytest
from prompt_toolkit.completion import CompleteEvent
from prompt_toolkit.document import Document

from lfm_mlx.shell import Commands, keyboard


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("/s", ["system", "save", "stats"]),
        ("/think f", ["fold"]),
        ("/reset x", []),
        ("/save nowhere/at/all", []),
        ("hello /s", []),
        ("/s\n/s", []),
    ],
)
def test_tab_offers_commands_and_what_stands_behind_them(typed: str, offered: list[str]) -> None:
    completer = keyboard._CommandCompleter(Commands.words())
    assert [one.text for one in completer.get_completions(Document(typed), CompleteEvent())] == offered


def test_the_history_is_private_and_survives_a_place_that_cannot_be_written(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    path = keyboard.history_path()
    assert path == tmp_path / "lfm_mlx" / "history"
    keyboard._History(path).store_string("first\nsecond")
    assert list(keyboard._History(path).load_history_strings()) == ["first\nsecond"]
    assert path.stat().st_mode & 0o077 == 0
    for bad in (tmp_path, path / "below", None):
        history = keyboard._History(bad)
        history.store_string("lost")
        history.store_string("\ud800")
        assert list(history.load_history_strings()) == []


def test_the_history_is_below_the_home_where_nothing_else_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", os.sep + "somewhere")
    for value in ("", "relative"):
        monkeypatch.setenv("XDG_STATE_HOME", value)
        assert keyboard.history_path() == Path("/somewhere/.local/state/lfm_mlx/history")


def test_plain_lines_are_joined_at_a_backslash(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("one\\\ntwo\nthree\n"))
    assert [keyboard.read_plain_lines(), keyboard.read_plain_lines()] == ["one\ntwo", "three"]
    with pytest.raises(EOFError):
        keyboard.read_plain_lines()
    assert capsys.readouterr().out == "> . > > \n"
