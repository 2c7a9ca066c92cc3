"""The programs in examples/, run on the embedded checkpoint as a user would."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
TINY = EXAMPLES / "tiny"

pytestmark = pytest.mark.skipif(not (TINY / "model.safetensors").exists(), reason="examples/tiny has no weights")


def run(name: str, *arguments: str, expected_code: int = 0) -> str:
    """What an example prints."""
    command = [sys.executable, str(EXAMPLES / name), *arguments, "--model", str(TINY)]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", stdin=subprocess.DEVNULL, timeout=120)
    assert done.returncode == expected_code, done.stderr
    return done.stdout


def test_streaming_chat() -> None:
    output = run("streaming_chat.py", "Hello", "What is the capital of France?", "--max-tokens", "60")
    assert [line for line in output.splitlines() if line.startswith(">")] == [
        "> Hello",
        "> What is the capital of France?",
    ]
    cached = [int(count) for count in re.findall(r"(\d+) of the prompt were known", output)]
    assert cached[0] == 0
    assert cached[1] > 0


def test_tool_use() -> None:
    output = run("tool_use.py", "What's the weather in Paris?", "--max-tokens", "80")
    assert 'get_weather({"city": "Paris"}) -> {"temperature": 18, "condition": "sunny"}' in output
    assert output.strip().splitlines()[-1]


def test_structured_extraction() -> None:
    person = json.loads(run("structured_extraction.py", "Ada was born in 1815.", "--max-tokens", "400"))
    assert set(person) == {"name", "year_of_birth"}


def test_structured_extraction_says_when_the_answer_was_cut() -> None:
    assert run("structured_extraction.py", "Ada was born in 1815.", "--max-tokens", "3", expected_code=1) == ""


def test_long_document(tmp_path: Path) -> None:
    document = tmp_path / "notes.txt"
    document.write_text("The code of the door is 4711. " * 20, encoding="utf-8")
    output = run("long_document.py", str(document), "What is the code?", "Hello", "--max-tokens", "40")
    counts = [(int(a), int(b)) for a, b in re.findall(r"prompt (\d+) tokens, (\d+) cached", output)]
    (first_len, first_cached), (second_len, second_cached) = counts
    assert first_cached == 0
    assert 0 < second_len - second_cached < 30 < first_len


def test_async_app() -> None:
    output = run("async_app.py", "Hello", "--max-tokens", "60", "--stop-after", "60")
    assert "[stop]" in output or "[length]" in output
    assert "2 messages so far" in output
    stopped = run("async_app.py", "Hello", "--max-tokens", "60", "--stop-after", "0")
    assert "[cancelled]" in stopped


def test_every_example_is_run() -> None:
    text = Path(__file__).read_text(encoding="utf-8")
    programs = [path.name for path in EXAMPLES.glob("*.py") if "def main(" in path.read_text(encoding="utf-8")]
    assert len(programs) >= 5
    assert [name for name in programs if f'"{name}"' not in text] == []
