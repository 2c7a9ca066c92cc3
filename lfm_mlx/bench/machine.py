"""What a measurement ran on: chip, memory, system, versions, commit, and which of MLX's backends."""

from __future__ import annotations

import functools
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import mlx.core as mx

from lfm_mlx import __version__

Backend = Literal["metal", "cuda", "cpu"]


def backend() -> Backend:
    """Which backend of MLX computes by default here."""
    if mx.default_device().type == mx.cpu:
        return "cpu"
    return "metal" if mx.metal.is_available() else "cuda"


def machine() -> dict[str, Any]:
    """The machine, for a report."""
    info: dict[str, Any] = dict(mx.device_info())
    system = f"macOS {platform.mac_ver()[0]}" if sys.platform == "darwin" else platform.platform(terse=True)
    return {
        "chip": str(info.get("device_name", platform.processor())),
        "gpu_cores": gpu_cores() if backend() == "metal" else None,
        "cpu_cores": os.cpu_count(),
        "memory_bytes": memory_bytes(),
        "system": system,
        "architecture": platform.machine(),
        "backend": backend(),
    }


def memory_bytes() -> int:
    """Physical memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@functools.cache
def gpu_cores() -> int | None:
    """GPU cores of an Apple chip, which tell its memory bandwidth; None where macOS does not say."""
    command = ["system_profiler", "SPDisplaysDataType", "-json"]
    try:
        done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return read_gpu_cores(done.stdout)


def read_gpu_cores(profile: str) -> int | None:
    """The number of GPU cores that ``system_profiler SPDisplaysDataType -json`` tells."""
    try:
        displays = json.loads(profile).get("SPDisplaysDataType", [])
        counts = [int(display["sppci_cores"]) for display in displays if "sppci_cores" in display]
    except (ValueError, TypeError, AttributeError):
        return None
    return max(counts, default=None)


def versions() -> dict[str, str | None]:
    """Versions of Python, MLX, mlx-lm and lfm_mlx."""
    return {
        "python": platform.python_version(),
        "mlx": _installed("mlx"),
        "mlx_lm": _installed("mlx-lm"),
        "lfm_mlx": __version__,
    }


def commit() -> str | None:
    """The commit of the checkout this package lies in, "-dirty" behind it where files were changed; None outside."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    try:
        head = _git(root, "rev-parse", "--short=12", "HEAD")
        changed = _git(root, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return None
    return f"{head}-dirty" if changed else head


def _git(root: Path, *arguments: str) -> str:
    command = ["git", "-C", str(root), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=20).stdout.strip()


def _installed(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
