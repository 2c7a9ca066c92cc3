"""The emulator in the place of Metal: the same tests run emulated here, and for real on a Mac."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from lfm_mlx.kernels import MetalKernel
from lfm_mlx.kernels.metal_kernel import built
from lfm_mlx.kernels.verdict import verdict_of
from metal.emulation import COMPILER, ORDERS, emulate, has_compiler

choice = importlib.import_module("lfm_mlx.kernels.choice")


def use_metal(monkeypatch: pytest.MonkeyPatch, cache: Path, *, orders: Sequence[int] = ORDERS) -> None:
    """Let fused kernels run: on Metal where there is Metal, else emulated.

    Args:
        monkeypatch: undoes it.
        cache: folder for verdicts, so that none of an earlier test or of the user's are found.
        orders: orders of threads that every emulated launch runs in.
    """
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    monkeypatch.delenv("LFM_MLX_KERNELS", raising=False)
    verdict_of.cache_clear()
    if mx.metal.is_available():
        return
    if not has_compiler():
        pytest.skip(f"there is neither Metal nor {COMPILER}, through which kernels are emulated")

    def launch(kernel: MetalKernel, inputs: Sequence[mx.array], **call: Any) -> list[mx.array]:
        made = built(kernel.name, tuple(kernel.inputs), tuple(kernel.outputs), kernel.source, kernel.header)
        return emulate(made, inputs, orders=orders, **call)

    monkeypatch.setattr(MetalKernel, "launch", launch)
    monkeypatch.setattr(choice, "has_metal", lambda: True)
