"""How fast a machine could be: memory bandwidth by chip or by measurement, arithmetic by measurement."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx

from lfm_mlx.bench.machine import backend, gpu_cores

APPLE_BANDWIDTH = {
    "M1": 68.25,
    "M1 Pro": 200,
    "M1 Max": 400,
    "M1 Ultra": 800,
    "M2": 100,
    "M2 Pro": 200,
    "M2 Max": 400,
    "M2 Ultra": 800,
    "M3": 100,
    "M3 Pro": 150,
    "M3 Max": 400,
    "M3 Ultra": 819,
    "M4": 120,
    "M4 Pro": 273,
    "M4 Max": 546,
    "M5": 153,
    "M5 Pro": 307,
    "M5 Max": 614,
}
"""GB/s from Apple's specifications; where a chip has variants, the one with the most GPU cores."""

SMALLER_VARIANTS = {("M3 Max", 30): 300, ("M4 Max", 32): 410, ("M5 Max", 32): 460}
"""GB/s of variants by chip and GPU cores."""

COPY_BYTES = {"cpu": 1 << 26, "cuda": 1 << 28, "metal": 1 << 28}
"""What the copy test moves, by backend: beyond its caches."""


@dataclass(frozen=True, kw_only=True)
class Bandwidth:
    """Memory bandwidth in GB/s, and where the number is from."""

    gb_per_s: float
    source: str


def bandwidth(chip: str) -> Bandwidth:
    """The memory bandwidth of `chip`, the device name that MLX gives; measured where Apple states none."""
    if backend() == "metal":
        stated = apple_bandwidth(chip, gpu_cores())
        if stated is not None:
            return stated
    num_bytes = COPY_BYTES[backend()]
    return Bandwidth(gb_per_s=measure_copy(num_bytes), source=f"measured here by copying {num_bytes >> 20} MiB")


def apple_bandwidth(chip: str, cores: int | None = None) -> Bandwidth | None:
    """What Apple states for a chip ("Apple M4 Max") with that many GPU cores; None for a chip not in the table."""
    match = re.search(r"\bM\d+( Pro| Max| Ultra)?\b", chip)
    name = match[0] if match else ""
    if name not in APPLE_BANDWIDTH:
        return None
    if (name, cores) in SMALLER_VARIANTS and cores is not None:
        return Bandwidth(
            gb_per_s=SMALLER_VARIANTS[name, cores], source=f"Apple's specification of {name}, {cores} cores"
        )
    is_largest = cores is None and any(name == other for other, _ in SMALLER_VARIANTS)
    note = " with the most cores" if is_largest else ""
    return Bandwidth(gb_per_s=APPLE_BANDWIDTH[name], source=f"Apple's specification of {name}{note}")


def measure_copy(num_bytes: int, repeats: int = 5) -> float:
    """GB/s of the fastest of some copies, bytes read and written counted."""
    source = mx.ones((num_bytes // 4,))
    mx.eval(source, mx.negative(source))
    fastest = min(_seconds(lambda: mx.negative(source)) for _ in range(repeats))
    return 2 * num_bytes / fastest / 1e9


def measure_matmul(dtype: mx.Dtype, repeats: int = 3) -> float:
    """TFLOP/s of the fastest of some square matrix products in `dtype`."""
    size = 512 if backend() == "cpu" else 4096
    left = mx.random.normal((size, size)).astype(dtype)
    mx.eval(left, left @ left)
    fastest = min(_seconds(lambda: left @ left) for _ in range(repeats))
    return 2 * size**3 / fastest / 1e12


def _seconds(make: Callable[[], mx.array]) -> float:
    started = time.perf_counter()
    mx.eval(make())
    return time.perf_counter() - started
