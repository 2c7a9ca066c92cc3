"""How many prompt tokens a second does prefill take, over prompt lengths and batch sizes?"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from lfm_mlx.bench.machine import backend
from lfm_mlx.bench.report import Report
from lfm_mlx.bench.roofline import measure_matmul
from lfm_mlx.bench.sides import Ours, Side
from lfm_mlx.bench.subject import Subject
from lfm_mlx.bench.traffic import prefill_operations

GPU_LENGTHS = (512, 2048, 8192)
CPU_LENGTHS = (128, 512)
BATCH_SIZES = (1,)
REPEATS = 3


def ask_prefill_speed(
    subject: Subject,
    *,
    lengths: Sequence[int] | None = None,
    batch_sizes: Sequence[int] = BATCH_SIZES,
    repeats: int = REPEATS,
) -> Report:
    """Time prompts of random tokens, from the first token to logits.

    Args:
        subject: which model.
        lengths: tokens of a prompt; None suits the device.
        batch_sizes: numbers of prompts taken at once.
        repeats: runs of each case; medians are reported.
    """
    chosen = lengths or (CPU_LENGTHS if backend() == "cpu" else GPU_LENGTHS)
    sides = subject.to_run()
    ours = sides[0]
    assert isinstance(ours, Ours)
    peak = measure_matmul(ours.model.dtype)
    config, share = subject.config, 1 / subject.num_ranks
    cases = [
        _measure(sides, batch_size, length, repeats, peak, share * prefill_operations(config, length))
        for batch_size in batch_sizes
        for length in chosen
    ]
    names = [side.name for side in sides]
    return Report(
        question="prefill",
        parameters={
            **subject.parameters,
            "lengths": list(chosen),
            "batch_sizes": list(batch_sizes),
            "repeats": repeats,
        },
        results={"cases": cases, "matmul_tflop_per_s": round(peak, 4)},
        title=f"Prefill speed in tokens/s of all rows, {subject.name}",
        header=["rows x tokens", *names, "TFLOP/s", "share", *(["ratio"] if len(names) > 1 else [])],
        rows=[_table_row(case, names) for case in cases],
        notes=(
            f"share: of {peak:.3g} TFLOP/s, what a large unquantised matrix product reached here.",
            *(["TFLOP/s: of one rank, all of them doing an equal part."] if subject.num_ranks > 1 else []),
        ),
    )


def _measure(
    sides: Sequence[Side], batch_size: int, length: int, repeats: int, peak: float, operations: float
) -> dict[str, Any]:
    vocab_size = sides[0].config.vocab_size
    tokens = mx.random.randint(0, vocab_size, (batch_size, length), dtype=mx.int32, key=mx.random.key(length))
    mx.eval(tokens)
    times: list[list[float]] = [[] for _ in sides]
    for turn in range(repeats + 1):
        for side, seconds in zip(sides, times, strict=True):
            taken = _run(side, tokens)
            if turn:
                seconds.append(taken)
    medians = [statistics.median(seconds) for seconds in times]
    speeds = {side.name: batch_size * length / median for side, median in zip(sides, medians, strict=True)}
    achieved = batch_size * operations / medians[0] / 1e12
    return {
        "batch_size": batch_size,
        "length": length,
        "tokens_per_s": {name: round(speed, 3) for name, speed in speeds.items()},
        "tflop_per_s": round(achieved, 5),
        "matmul_share": round(achieved / peak, 4),
        "ratio": round(medians[1] / medians[0], 4) if len(medians) == 2 else None,
    }


def _run(side: Side, tokens: mx.array) -> float:
    batch_size, length = tokens.shape
    rows = side.new_rows([0] * batch_size, capacity=length)
    started = time.perf_counter()
    mx.eval(side.prefill(rows, tokens), side.arrays(rows))
    return time.perf_counter() - started


def _table_row(case: dict[str, Any], names: Sequence[str]) -> list[object]:
    row = [f"{case['batch_size']} x {case['length']}", *(case["tokens_per_s"][name] for name in names)]
    row += [case["tflop_per_s"], f"{case['matmul_share']:.1%}"]
    return [*row, case["ratio"]] if len(names) > 1 else row
