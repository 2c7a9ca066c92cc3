"""The picture of decode speed."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest

from lfm_mlx.bench.plot import plot_decode
from lfm_mlx.bench.report import Report
from lfm_mlx.errors import OptionError


def report() -> Report:
    cases = [
        {
            "batch_size": batch_size,
            "context": context,
            "tokens_per_s": {"lfm_mlx": 90.0, "mlx-lm": 50.0},
            "roofline_tokens_per_s": 120.0,
        }
        for batch_size in (1, 4)
        for context in (128, 4096)
    ]
    return Report(question="decode", parameters={}, results={"cases": cases}, title="Speed, tiny", header=[], rows=[])


def test_a_picture_is_written(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    plot_decode(report(), tmp_path / "speed.png")
    assert (tmp_path / "speed.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", ["missing/speed.png", "speed.nothing"])
def test_a_picture_that_cannot_be_written_is_refused(tmp_path: Path, name: str) -> None:
    pytest.importorskip("matplotlib")
    with pytest.raises(OptionError, match="cannot be written"):
        plot_decode(report(), tmp_path / name)


def test_without_matplotlib_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> Any:
        raise ImportError(name)

    monkeypatch.setattr(importlib, "import_module", fail)
    with pytest.raises(OptionError, match=r"lfm-mlx\[bench\]"):
        plot_decode(report(), tmp_path / "speed.png")
