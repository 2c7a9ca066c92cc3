"""How many tokens a second does decoding make, over contexts and batch sizes, and how far is that from the roofline?"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from lfm_mlx.bench.machine import backend, machine
from lfm_mlx.bench.report import Report
from lfm_mlx.bench.roofline import Bandwidth, bandwidth
from lfm_mlx.bench.sides import Ours, Rows, Side
from lfm_mlx.bench.subject import Subject
from lfm_mlx.bench.traffic import kv_bytes_per_position, step_weight_bytes

GPU_CONTEXTS = (128, 4096, 16384, 32768)
CPU_CONTEXTS = (128, 1024)
BATCH_SIZES = (1, 4)
REPEATS = 3


def ask_decode_speed(
    subject: Subject,
    *,
    contexts: Sequence[int] | None = None,
    batch_sizes: Sequence[int] = BATCH_SIZES,
    repeats: int = REPEATS,
    num_tokens: int | None = None,
) -> Report:
    """Time greedy decoding, one step ahead of the reader as in generation; caches are filled with zeros beforehand.

    Args:
        subject: which model.
        contexts: tokens that each row has seen; None suits the device.
        batch_sizes: numbers of rows.
        repeats: runs of each case; medians are reported.
        num_tokens: tokens of a run; None suits the device.
    """
    chosen = contexts or (CPU_CONTEXTS if backend() == "cpu" else GPU_CONTEXTS)
    steps = num_tokens or (8 if backend() == "cpu" else 64)
    sides = subject.to_run()
    roof = bandwidth(machine()["chip"])
    cases = [
        _measure(sides, batch_size, context, repeats, steps, roof) for batch_size in batch_sizes for context in chosen
    ]
    names = [side.name for side in sides]
    return Report(
        question="decode",
        parameters={
            **subject.parameters,
            "contexts": list(chosen),
            "batch_sizes": list(batch_sizes),
            "repeats": repeats,
            "tokens": steps,
        },
        results={"cases": cases, "roofline": {"gb_per_s": round(roof.gb_per_s, 2), "source": roof.source}},
        title=f"Decode speed in tokens/s of all rows, {subject.name}",
        header=["rows x context", *names, "roofline", "GB/s", "share", *(["ratio"] if len(names) > 1 else [])],
        rows=[_table_row(case, names) for case in cases],
        notes=(
            f"roofline: {roof.gb_per_s:.0f} GB/s ({roof.source}) over the bytes a step has to read: weights of the",
            "experts expected to be chosen, the other weights, keys and values. share: lfm_mlx of the roofline.",
            *(["Bytes, GB/s and roofline are those of one rank and its part."] if subject.num_ranks > 1 else []),
        ),
    )


def run_steps(side: Side, rows: Any, num_steps: int, batch_size: int) -> float:
    """Seconds that `num_steps` decode steps take."""
    ids = mx.zeros((batch_size,), dtype=mx.int32)
    mx.eval(ids)
    started = time.perf_counter()
    for _ in range(num_steps):
        following = side.sample(rows, ids)
        mx.async_eval(following, side.arrays(rows))
        mx.eval(ids)
        ids = following
    mx.eval(ids, side.arrays(rows))
    return time.perf_counter() - started


def _measure(
    sides: Sequence[Side], batch_size: int, context: int, repeats: int, steps: int, roof: Bandwidth
) -> dict[str, Any]:
    capacity = context + steps * (repeats + 1) + 1
    all_rows = [side.new_rows([context] * batch_size, capacity=capacity) for side in sides]
    times: list[list[float]] = [[] for _ in sides]
    for turn in range(repeats + 1):
        for side, rows, seconds in zip(sides, all_rows, times, strict=True):
            taken = run_steps(side, rows, steps, batch_size)
            if turn:  # the first run compiles and warms up
                seconds.append(taken / steps)
    medians = [statistics.median(seconds) for seconds in times]
    step_bytes = _step_bytes(sides[0], all_rows[0], batch_size, context)
    speeds = {side.name: batch_size / median for side, median in zip(sides, medians, strict=True)}
    limit = batch_size * roof.gb_per_s * 1e9 / step_bytes
    achieved = step_bytes / medians[0] / 1e9
    return {
        "batch_size": batch_size,
        "context": context,
        "tokens_per_s": {name: round(speed, 3) for name, speed in speeds.items()},
        "step_bytes": round(step_bytes),
        "achieved_gb_per_s": round(achieved, 3),
        "roofline_tokens_per_s": round(limit, 2),
        "roofline_share": round(achieved / roof.gb_per_s, 4),
        "ratio": round(medians[1] / medians[0], 4) if len(medians) == 2 else None,
    }


def _step_bytes(side: Side, rows: Any, batch_size: int, context: int) -> float:
    assert isinstance(side, Ours)
    assert isinstance(rows, Rows)
    return step_weight_bytes(side.model, batch_size) + kv_bytes_per_position(rows.state) * context


def _table_row(case: dict[str, Any], names: Sequence[str]) -> list[object]:
    row = [f"{case['batch_size']} x {case['context']}", *(case["tokens_per_s"][name] for name in names)]
    row += [case["roofline_tokens_per_s"], case["achieved_gb_per_s"], f"{case['roofline_share']:.1%}"]
    return [*row, case["ratio"]] if len(names) > 1 else row
