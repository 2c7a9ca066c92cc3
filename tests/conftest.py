"""Fixtures that several test folders share; the functions behind them are in random_models.py."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest
from random_models import tiny_config, tiny_dense_config, tiny_model, write_checkpoint

from lfm_mlx.model import Model

# Tests start many processes: where no bytecode is kept, each of them compiles the package again.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

# A runner in the background may have told its children to ignore these; the tests are about what they do.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)


def pytest_xdist_auto_num_workers() -> int:
    """A worker more than cores: many tests wait for processes, sockets and clocks."""
    return (os.cpu_count() or 1) + 1


@pytest.fixture(scope="session")
def moe_model() -> Model:
    """A tiny mixture of experts; tests leave it as it is."""
    return tiny_model(tiny_config())


@pytest.fixture(scope="session")
def dense_model() -> Model:
    """A tiny dense model; tests leave it as it is."""
    return tiny_model(tiny_dense_config())


@pytest.fixture
def checkpoint_folder(tmp_path: Path) -> Path:
    """A tiny mixture of experts on disk, in the MLX layout; tests may damage it."""
    return write_checkpoint(tmp_path / "checkpoint")
