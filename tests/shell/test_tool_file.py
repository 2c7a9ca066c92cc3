from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from lfm_mlx.errors import OptionError
from lfm_mlx.shell import Interrupts, read_tools

FILE = '''
from __future__ import annotations
from os.path import join
from json import *
import math
from lfm_mlx import tool
from neighbour import borrowed

def add(first: int, second: Number = 1) -> int:
    """Add two numbers."""
    print("adding")
    return first + second

Number = int
plus = add

@tool(changes=True)
def remove(name: str) -> str:
    """Remove a file."""
    return name

class Thing:
    pass

def _hidden() -> None:
    pass

def leave() -> None:
    raise SystemExit(3)

def wait() -> None:
    import os, signal
    os.kill(os.getpid(), signal.SIGINT)
'''


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "neighbour.py").write_text("def borrowed() -> None: ...\n")
    path = tmp_path / "tools.py"
    path.write_text(FILE)
    return path


def test_the_functions_that_a_file_defines_are_its_tools(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tools = {one.name: one for one in read_tools(file, Interrupts())}
    assert list(tools) == ["add", "remove", "leave", "wait"]
    assert tools["remove"].changes_something
    assert not tools["add"].changes_something
    assert tools["add"].call({"first": 2}) == "3"
    assert capsys.readouterr() == ("", "adding\n")


def test_a_tool_neither_ends_the_program_nor_outlives_an_interrupt(file: Path) -> None:
    interrupts = Interrupts()
    tools = {one.name: one for one in read_tools(file, interrupts)}
    with pytest.raises(RuntimeError, match="end the program with 3"):
        tools["leave"].call({})
    cancelled: list[int] = []
    with interrupts.cancelling(lambda: cancelled.append(1)):
        with pytest.raises(InterruptedError, match="stopped by the user"):
            tools["wait"].call({})
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(InterruptedError):  # The interrupt just came before this tool.
            tools["add"].call({"first": 2})
    assert cancelled == [1, 1]
    with interrupts.cancelling(lambda: None):
        assert tools["add"].call({"first": 2}) == "3"
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("import nowhere_at_all", r"cannot be imported \(ModuleNotFoundError: No module named 'nowhere_at_all'\)"),
        ("def f(:", r"cannot be imported \(SyntaxError"),
        ("1 / 0", r"cannot be imported \(ZeroDivisionError: division by zero\)"),
        ("raise SystemExit(2)", r"cannot be imported \(SystemExit: 2\)"),
        ("x = '\0'", "cannot be imported"),
        ("from json import dumps", "defines no function"),
        ("def f(*args): ...", "f: parameter '\\*args' is"),
    ],
)
def test_a_file_that_gives_no_tools_is_refused_by_name(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "tools.py"
    path.write_text(text)
    with pytest.raises(OptionError, match=f"tools.py: .*{message}"):
        read_tools(path, Interrupts())
    with pytest.raises(OptionError, match="is no file"):
        read_tools(tmp_path, Interrupts())
