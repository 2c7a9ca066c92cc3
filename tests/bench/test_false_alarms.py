"""The rate of false alarms is measured, not promised here; that the count is a real one is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from chat_checkpoints import write_tokenizer

from lfm_mlx.bench import __main__ as command_line
from lfm_mlx.errors import OptionError


def ask(*arguments: str) -> None:
    command_line.group.main(["loops", *arguments], prog_name="bench", standalone_mode=False)


def test_loops_among_texts_are_counted_and_what_is_no_text_is_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, texts = tmp_path / "model", tmp_path / "texts"
    model.mkdir()
    (texts / "inner").mkdir(parents=True)
    write_tokenizer(model)
    (texts / "inner" / "loop.txt").write_text("Wait, I check that again. " * 400)
    (texts / "numbers.csv").write_text("\n".join(str(n * n * n) for n in range(1000)))
    (texts / "short.txt").write_text("Hello.")
    (texts / "picture.png").write_bytes(bytes(range(256)) * 40)
    ask("--model", str(model), "--texts", str(texts))
    results = json.loads(capsys.readouterr().out)["results"]
    assert results["texts"] == 2
    assert [alarm[0] for alarm in results["alarms"]] == ["inner/loop.txt"]
    assert results["kinds"] == {".txt": 1, ".csv": 1}
    (texts / "numbers.csv").unlink()
    (texts / "inner" / "loop.txt").unlink()
    with pytest.raises(OptionError, match="holds no text of 1,200 tokens"):
        ask("--model", str(model), "--texts", str(texts))
