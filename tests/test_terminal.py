from __future__ import annotations

import io
import sys

import click
import pytest

from lfm_mlx.errors import CheckpointError, OptionError
from lfm_mlx.terminal import QUIET_S, format_bytes, run


def ended(command: click.Command, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> object:
    """The exit code of a command run as a program."""
    monkeypatch.setattr(sys, "argv", ["program", *arguments])
    with pytest.raises(SystemExit) as exit_info:
        run(command, "program")
    return exit_info.value.code


def failing(error: BaseException) -> click.Command:
    """A command that raises."""

    @click.command()
    def command() -> None:
        click.echo("begun")
        raise error

    return command


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (OptionError("top_p is 2"), 1, "error: top_p is 2\n"),
        (CheckpointError("model: lost"), 1, "error: model: lost\n"),
        (OptionError("prompt is '\ud800'"), 1, "error: prompt is '?'\n"),
        (MemoryError(), 1, "error: out of memory; use a smaller model, a lower precision or a shorter context\n"),
        (KeyboardInterrupt(), 130, "\ninterrupted\n"),
        (click.Abort(), 130, "interrupted\n"),
        (click.ClickException("no"), 1, "Error: no\n"),
        (click.UsageError("no"), 2, "Usage: program [OPTIONS]\nTry 'program --help' for help.\n\nError: no\n"),
    ],
    ids=repr,
)
def test_an_error_is_one_message_and_an_exit_code(
    error: BaseException,
    code: int,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert ended(failing(error), monkeypatch) == code
    out, err = capsys.readouterr()
    assert (out, err) == ("begun\n", message)


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (None, 0, ""),
        (OptionError("top_p is 2"), 1, "error: rank 1: top_p is 2\n"),
        (click.UsageError("no"), 2, "error: rank 1: no\n"),
        (KeyboardInterrupt(), 130, "\n"),
    ],
    ids=repr,
)
def test_another_rank_is_silent_but_for_an_error_that_rank_0_may_not_have(
    error: BaseException | None,
    code: int,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    waits: list[float] = []
    monkeypatch.setenv("MLX_RANK", "1")
    monkeypatch.setattr("time.sleep", waits.append)
    command = failing(error) if error is not None else click.Command("command", callback=lambda: click.echo("done"))
    assert ended(command, monkeypatch) == code
    assert capsys.readouterr() == ("", message)
    assert waits == [QUIET_S] * isinstance(error, (OptionError, click.UsageError))


def test_a_bug_of_ours_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["program"])
    with pytest.raises(ZeroDivisionError):
        run(failing(ZeroDivisionError()), "program")


@pytest.mark.parametrize(("returned", "code"), [(None, 0), (0, 0), (130, 130), (3, 3)])
def test_what_a_command_returns_is_its_exit_code(
    returned: int | None, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = click.Command("command", callback=lambda: returned)
    assert ended(command, monkeypatch) == code
    assert ended(command, monkeypatch, "--help") == 0
    assert ended(command, monkeypatch, "--wrong") == 2


def test_characters_that_the_terminal_lacks_become_question_marks(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="latin-1")
    monkeypatch.setattr(sys, "stdout", terminal)
    with pytest.raises(UnicodeEncodeError):
        print("é 日")
    assert ended(click.Command("command", callback=lambda: print("é 日")), monkeypatch) == 0
    assert terminal.buffer.getvalue() == "é ?\n".encode("latin-1")  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.00 kB"),
        (1_234_567, "1.23 MB"),
        (4_900_000_000, "4.90 GB"),
        (2.5e12, "2.50 TB"),
        (5e15, "5000.00 TB"),
    ],
)
def test_bytes_are_written_for_people(num_bytes: float, text: str) -> None:
    assert format_bytes(num_bytes) == text
