"""Whether a fused kernel is right and fast on this device: tried out at first use, and remembered in a file.

Nobody who wrote a kernel has seen all devices and systems it will run on. So it is compared with stock operations on
random data before its first result is used, and timed beside them.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import platform
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import mlx.core as mx
from mlx.utils import tree_flatten

CACHE_FILE = "kernels.json"

TRIED_SHAPES = ((1, 1), (5, 1), (2, 3))
"""Rows, and tokens a row, on which results are compared; the first is timed too."""

TOLERANCES = {mx.float32: 1e-5, mx.float16: 2.0**-9, mx.bfloat16: 2.0**-6}
"""Largest difference allowed, relative to a value and the root mean square of all: some last bits of the dtype."""

SLOWER = 1.05
"""From this ratio of times on a kernel counts as slower; below is noise."""

_MOST_CALLS, _CALLS_S, _REPEATS = 20, 0.01, 5


class Case(Protocol):
    """What `lfm_mlx.kernels.choice.Case` is to a trial."""

    @property
    def dtype(self) -> mx.Dtype:
        """Of the activations."""
        ...


class Kernel(Protocol):
    """What `lfm_mlx.kernels.choice.FusedKernel` is to a trial."""

    name: str
    source: str
    launch: Callable[..., Any]
    reference: Callable[..., Any]
    example: Callable[[Any, int, int], tuple[Any, ...]]
    exact: Callable[..., Any] | None
    comparable: Callable[[Any], Sequence[mx.array]]


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What a trial found.

    Args:
        problem: how the kernel's results differ from those of stock operations; None where they agree.
        kernel_us: microseconds of a launch.
        reference_us: microseconds of the stock operations.
    """

    problem: str | None
    kernel_us: float
    reference_us: float

    @property
    def is_slower(self) -> bool:
        """Whether stock operations take less time."""
        return self.kernel_us > SLOWER * self.reference_us

    def permits(self, *, is_forced: bool) -> bool:
        """Whether the kernel may run; a slower one only if it `is_forced`, a wrong one never."""
        return self.problem is None and (is_forced or not self.is_slower)


@functools.cache
def verdict_of(kernel: Any, case: Any, is_forced: bool) -> Verdict:
    """The verdict on a kernel in a case: from the file of earlier verdicts, else from a trial, which is remembered.

    After a trial that does not permit the kernel, a `RuntimeWarning` says so.

    Args:
        kernel: a `FusedKernel`.
        case: a case of it.
        is_forced: whether the kernel is to run even if it is slower.
    """
    known = _read_verdicts().get(environment(), {}).get(_key(kernel, case))
    if known is not None:
        return known
    verdict = tried_again(kernel, case)
    if not verdict.permits(is_forced=is_forced):
        warnings.warn(describe(kernel, case, verdict), RuntimeWarning, stacklevel=2)
    return verdict


def tried_again(kernel: Any, case: Any) -> Verdict:
    """A new trial, whatever was found before; it is remembered for the next process."""
    verdict = try_out(kernel, case)
    _remember(environment(), _key(kernel, case), verdict)
    return verdict


def describe(kernel: Kernel, case: Case, verdict: Verdict) -> str:
    """What to say about a kernel that is left out."""
    found = verdict.problem or (
        f"it takes {verdict.kernel_us:.1f} us, the stock operations {verdict.reference_us:.1f} us"
    )
    return (
        f"the fused kernel {kernel.name} ({case}) is left out on {environment()}: {found}. Answers are not affected. "
        "Please report this line with the output of python -m lfm_mlx.bench kernels --verify"
    )


def try_out(kernel: Kernel, case: Case) -> Verdict:
    """Compare a kernel with stock operations, and time both."""
    try:
        problem = _first_problem(kernel, case)
    except (RuntimeError, ValueError) as error:  # Metal refuses to compile or to run it
        problem = f"it fails: {error}"
    if problem is not None:
        return Verdict(problem=problem, kernel_us=0.0, reference_us=0.0)
    arguments = kernel.example(case, *TRIED_SHAPES[0])
    return Verdict(
        problem=None,
        kernel_us=_time_us(kernel.launch, arguments),
        reference_us=_time_us(kernel.reference, arguments),
    )


def environment() -> str:
    """Device, system and MLX: what a verdict depends on beside the kernel."""
    system = f"macOS {platform.mac_ver()[0]}" if sys.platform == "darwin" else platform.system()
    device = mx.device_info().get("device_name", platform.processor())
    return f"{device}, {system}, mlx {version('mlx')}"


def verdict_path() -> Path:
    """The file of verdicts, in the user's folder of caches."""
    if folder := os.environ.get("XDG_CACHE_HOME"):
        return Path(folder) / "lfm_mlx" / CACHE_FILE
    caches = Path("Library", "Caches") if sys.platform == "darwin" else Path(".cache")
    return Path.home() / caches / "lfm_mlx" / CACHE_FILE


def disagreement(found: Sequence[mx.array], expected: Sequence[mx.array]) -> str | None:
    """How results differ by more than rounding; None where they do not.

    Args:
        found: arrays; whole numbers have to be equal.
        expected: arrays of the same shapes and dtypes.
    """
    for i, (a, b) in enumerate(zip(found, expected, strict=True)):
        if a.shape != b.shape or a.dtype != b.dtype:
            return f"result {i} is {a.dtype} {a.shape}, expected {b.dtype} {b.shape}"
        if a.dtype not in TOLERANCES:
            if not mx.array_equal(a, b).item():
                return f"result {i} differs"
            continue
        wide, wanted = a.astype(mx.float32), b.astype(mx.float32)
        scale = mx.abs(wanted) + mx.sqrt(mx.mean(mx.square(wanted)))
        error = mx.max(mx.abs(wide - wanted) / scale)
        # Written so that it holds for an error that is no number.
        if not (error <= TOLERANCES[a.dtype]).item():
            return f"result {i} is off by {error.item():.2g} of its size, expected at most {TOLERANCES[a.dtype]:.2g}"
    return None


def _first_problem(kernel: Kernel, case: Case) -> str | None:
    for num_rows, num_tokens in TRIED_SHAPES:
        arguments = kernel.example(case, num_rows, num_tokens)
        found = kernel.comparable(kernel.launch(*arguments))
        expected = kernel.comparable((kernel.exact or kernel.reference)(*arguments))
        if problem := disagreement(found, expected):
            return f"{num_rows} x {num_tokens} tokens: {problem}"
    return None


def _time_us(function: Callable[..., Any], arguments: Sequence[Any]) -> float:
    """The fastest of a few runs of many calls, in microseconds a call."""

    def run(num_calls: int) -> float:
        started = time.perf_counter()
        results = [function(*arguments) for _ in range(num_calls)]
        mx.eval([array for array in dict(tree_flatten(results)).values() if isinstance(array, mx.array)])
        return (time.perf_counter() - started) / num_calls

    run(1)  # warms up, and compiles
    num_calls = max(1, min(_MOST_CALLS, int(_CALLS_S / run(1))))
    return min(run(num_calls) for _ in range(_REPEATS)) * 1e6


def _key(kernel: Kernel, case: Case) -> str:
    return f"{kernel.name} {case} {hashlib.sha256(kernel.source.encode()).hexdigest()[:12]}"


def _read_verdicts() -> dict[str, dict[str, Verdict]]:
    """All verdicts of the file; none where it is missing or cannot be understood, as they can be found again."""
    try:
        places = json.loads(verdict_path().read_text(encoding="utf-8"))
        return {
            place: {key: Verdict(**stored) for key, stored in verdicts.items()} for place, verdicts in places.items()
        }
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def _remember(place: str, key: str, verdict: Verdict) -> None:
    places = _read_verdicts()
    places.setdefault(place, {})[key] = verdict
    stored = {place: {key: asdict(value) for key, value in verdicts.items()} for place, verdicts in places.items()}
    path = verdict_path()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, encoding="utf-8") as file:
            json.dump(stored, file, indent=1)
        Path(file.name).replace(path)
    except OSError:
        return  # A folder that cannot be written costs a trial in the next process, no more.
