"""What the README shows, run as a user would: in a folder with the embedded checkpoint in examples/tiny."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")

NETWORK = re.compile(r"LiquidAI/|\bMODEL=|models/")
"""What a command shows that needs a download."""

needs_tiny = pytest.mark.skipif(
    not (ROOT / "examples/tiny/model.safetensors").exists(),
    reason="examples/tiny has no weights; `make tiny` trains them",
)


def blocks(language: str, text: str = README) -> list[str]:
    """The code blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def commands(text: str = README) -> list[str]:
    """The lines of shell blocks that run our modules on local files."""
    lines = [line for block in blocks("sh", text) for line in block.splitlines()]
    return [line for line in lines if "python -m lfm_mlx" in line and not NETWORK.search(line)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A working directory that has the examples and can be written to."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    return tmp_path


def run(command: list[str], folder: Path) -> str:
    """Standard output of a command that succeeds."""
    done = subprocess.run(command, cwd=folder, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    return done.stdout


def run_in_shell(line: str, folder: Path) -> str:
    """Run a shell line with this interpreter as its python."""
    ours = re.sub(r"\bpython\b", shlex.quote(sys.executable), line)
    return run(["bash", "-o", "pipefail", "-c", ours], folder)


@needs_tiny
@pytest.mark.parametrize("line", commands())
def test_a_command_of_the_readme_works(line: str, folder: Path) -> None:
    assert run_in_shell(line, folder).strip()


@needs_tiny
@pytest.mark.parametrize("block", blocks("python"))
def test_a_program_of_the_readme_works(block: str, folder: Path) -> None:
    assert run([sys.executable, "-c", block], folder).strip()


def test_there_are_commands_and_programs_to_run() -> None:
    assert len(commands()) >= 4
    assert len(blocks("python")) >= 1


def test_a_command_or_program_that_fails_is_found(folder: Path) -> None:
    text = "```sh\npython -m lfm_mlx.generate --wrong\npython -m lfm_mlx.chat --model LiquidAI/a\nmake demo\n```\n"
    (line,) = commands(text)
    with pytest.raises(AssertionError, match="--wrong"):
        run_in_shell(line, folder)
    (block,) = blocks("python", "```python\nfrom lfm_mlx import nothing\n```\n")
    with pytest.raises(AssertionError, match="nothing"):
        run([sys.executable, "-c", block], folder)
