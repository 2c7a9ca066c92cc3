"""Where fused kernels are run: on Metal if there is Metal, else emulated."""

from __future__ import annotations

from pathlib import Path

import pytest
from metal.drop_in import use_metal


@pytest.fixture
def metal(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Fused kernels run, and are checked where they are emulated."""
    use_metal(monkeypatch, tmp_path)
