"""What does a conversion to 4 bits take: seconds, and memory of all its processes?"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from lfm_mlx.bench.report import Report
from lfm_mlx.errors import LfmError
from lfm_mlx.terminal import format_bytes

SAMPLE_S = 0.1

NOTES = (
    "peak: the sum over all processes of the most memory that each had resident, whenever that was.",
    "equal: how many tensors of the two conversions are equal bit for bit.",
)


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a command took: seconds, bytes of the peaks of its processes added up, and how many those were."""

    elapsed_s: float
    peak_bytes: int
    num_processes: int


def ask_conversion_cost(source: Path, *, jobs: int | None = None, peer: str | None = None) -> Report:
    """Convert a checkpoint with recipe 4bit, in processes of its own, and with the peer after that.

    Args:
        source: folder of an unquantised checkpoint; the results lie beside it while this runs.
        jobs: worker processes; None leaves the converter its choice.
        peer: ``mlx-lm``, to compare times and every tensor.

    Raises:
        LfmError: a conversion failed; the message is its own.
    """
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix=".conversions-", dir=source.parent) as parent:
        ours, theirs = Path(parent) / "lfm_mlx", Path(parent) / "mlx_lm"
        more = [] if jobs is None else ["--jobs", str(jobs)]
        results["lfm_mlx"] = measure(
            ["lfm_mlx.convert", "--model", str(source), "--out", str(ours), "--recipe", "4bit", "--quiet", *more]
        )
        if peer is not None:
            results[peer] = measure(["mlx_lm", "convert", "--hf-path", str(source), "--mlx-path", str(theirs), "-q"])
            num_equal, num_all = count_equal(ours, theirs)
    rows = [
        [name, f"{cost.elapsed_s:.1f} s", format_bytes(cost.peak_bytes), cost.num_processes]
        for name, cost in results.items()
    ]
    found: dict[str, Any] = {name: vars(cost) for name, cost in results.items()}
    if peer is not None:
        found |= {
            "ratio": results["lfm_mlx"].elapsed_s / results[peer].elapsed_s,
            "equal": num_equal,
            "tensors": num_all,
        }
        rows.append(["ratio", f"{found['ratio']:.2f}", f"{num_equal} of {num_all} equal", ""])
    return Report(
        question="convert",
        parameters={"source": source.name, "jobs": jobs, "peer": peer},
        results=found,
        title=f"Conversion of {source.name} to 4 bits",
        header=["", "time", "peak", "processes"],
        rows=rows,
        notes=NOTES,
    )


def measure(module: Sequence[str]) -> Cost:
    """Run ``python -m ...`` and watch it and its descendants.

    Raises:
        LfmError: it failed; the message is the last line it wrote.
    """
    started = time.perf_counter()
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen([sys.executable, "-m", *module], stdout=output, stderr=output)
        peaks: dict[int, int] = {}
        while process.poll() is None:
            for pid, num_bytes in _resident(process.pid).items():
                peaks[pid] = max(num_bytes, peaks.get(pid, 0))
            time.sleep(SAMPLE_S)
        elapsed_s = time.perf_counter() - started
        output.seek(0)
        lines = output.read().strip().splitlines() or ["no output"]
    if process.returncode:
        raise LfmError(f"{' '.join(module[:2])} ended with {process.returncode}: {lines[-1]}; run it by hand")
    return Cost(elapsed_s=elapsed_s, peak_bytes=sum(peaks.values()), num_processes=len(peaks))


def _resident(root: int) -> dict[int, int]:
    """Bytes that a process and its descendants have resident, the peak where the system knows it."""
    listed = subprocess.run(["ps", "-axo", "pid=,ppid=,rss="], capture_output=True, text=True, check=True).stdout
    table = [tuple(int(field) for field in line.split()) for line in listed.splitlines()]
    family = {root}
    while grown := {pid for pid, parent, _ in table if parent in family} - family:
        family |= grown
    return {pid: max(rss * 1024, _high_water(pid)) for pid, _, rss in table if pid in family}


def _high_water(pid: int) -> int:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0  # no such file system, or the process has just ended
    line = next((line for line in status.splitlines() if line.startswith("VmHWM")), "VmHWM: 0 kB")
    return int(line.split()[1]) * 1024


def count_equal(first: Path, second: Path) -> tuple[int, int]:
    """How many tensors of two checkpoints are equal bit for bit, and how many there are in either."""
    ours, theirs = _tensors(first), _tensors(second)
    names = ours.keys() | theirs.keys()
    return sum(_are_equal(ours.pop(name, None), theirs.pop(name, None)) for name in sorted(names)), len(names)


def _tensors(folder: Path) -> dict[str, mx.array]:
    tensors: dict[str, mx.array] = {}
    for file in sorted(folder.glob("model*.safetensors")):
        loaded = mx.load(str(file))
        assert isinstance(loaded, dict)
        tensors |= loaded
    return tensors


def _are_equal(first: mx.array | None, second: mx.array | None) -> bool:
    if first is None or second is None or first.dtype != second.dtype or first.shape != second.shape:
        return False
    is_equal = bool(mx.array_equal(first.view(mx.uint8), second.view(mx.uint8)).item())
    mx.clear_cache()
    return is_equal
