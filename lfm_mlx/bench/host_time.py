"""How long does Python take to build a step? And does anything get traced again while a context grows?"""

from __future__ import annotations

import contextlib
import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from lfm_mlx.bench.launches import require_compiler, stand_ins
from lfm_mlx.bench.machine import backend
from lfm_mlx.bench.report import Report
from lfm_mlx.bench.sides import Ours, Side
from lfm_mlx.bench.subject import Subject, uneven_lengths
from lfm_mlx.model import Model
from lfm_mlx.step import Stepper

BATCH_SIZES = (1, 4, 16)
CONTEXT = 1000
REPEATS = 60
WARM_UP = 3
GROWN_TO = 32768
GROWTH_STEP = 256

NOTES = (
    "Processor time of the thread that builds the graph of one greedy decode step; nothing is evaluated, garbage",
    "collection is off; medians of steps that alternate between the sides. Rows of a batch have unequal lengths.",
)
STAND_INS_NOTE = "On the CPU, operations that are one node on a GPU are replaced by stand-ins of about the same cost."


class CountingStepper(Stepper):
    """A `Stepper` that counts how often its compiled functions are traced.

    Attributes:
        num_traces: how often until now.
    """

    def __init__(self, model: Model) -> None:
        self.num_traces = 0
        super().__init__(model, is_compiled=True)

    def _compiled(self, function: Callable[..., Any]) -> Callable[..., Any]:  # type: ignore[override]
        def run(*arguments: Any) -> Any:
            self.num_traces += 1
            return function(*arguments)

        return super()._compiled(run)


def ask_host_time(
    subject: Subject,
    *,
    batch_sizes: Sequence[int] = BATCH_SIZES,
    repeats: int = REPEATS,
    grown_to: int = GROWN_TO,
) -> Report:
    """Time the building of decode steps, and count traces.

    Args:
        subject: which model.
        batch_sizes: numbers of rows.
        repeats: timed steps a side and batch size.
        grown_to: the context up to which traces are counted, if the model can have it.

    Raises:
        OptionError: MLX cannot compile here.
    """
    require_compiler()
    grown_to = min(grown_to, subject.config.max_context - 1)
    sides = subject.without_memory()
    timed = []
    for batch_size in batch_sizes:
        times = time_building(sides, uneven_lengths(batch_size, CONTEXT), repeats)
        timed.append({"batch_size": batch_size, **_summary([side.name for side in sides], times)})
    ours = sides[0]
    assert isinstance(ours, Ours)
    traces = count_traces(ours.model, grown_to)
    names = [side.name for side in sides]
    return Report(
        question="host",
        parameters={**subject.parameters, "context": CONTEXT, "repeats": repeats, "grown_to": grown_to},
        results={"steps": timed, "traces": traces},
        title=f"Host time to build a step in ms, {subject.name}",
        header=["rows", *names, "ratio", "by the clock"],
        rows=[[str(case["batch_size"]), *case["ms"].values(), case["ratio"], case["clock_ratio"]] for case in timed],
        notes=(
            *NOTES,
            *([STAND_INS_NOTE] if backend() == "cpu" else []),
            f"Traces: {traces['first_step']} for the first step, {traces['later']} more while one row's context grows "
            f"from 1 to {grown_to:,} tokens.",
        ),
    )


@dataclass(frozen=True, kw_only=True)
class Taken:
    """Seconds that one step took to build: of the thread that built it, and on the clock."""

    thread_s: float
    clock_s: float


def time_building(sides: Sequence[Side], lengths: Sequence[int], repeats: int) -> list[list[Taken]]:
    """What each side takes to build a step, `repeats` times, the sides taking turns."""
    tokens = mx.zeros((len(lengths),), dtype=mx.int32)
    mx.eval(tokens)
    times: list[list[Taken]] = [[] for _ in sides]
    was_collecting = gc.isenabled()
    gc.disable()
    with stand_ins(is_linked=False) if backend() == "cpu" else contextlib.nullcontext():
        try:
            for turn in range(WARM_UP + repeats):
                for side, steps in zip(sides, times, strict=True):
                    taken = _build_once(side, lengths, tokens)
                    if turn >= WARM_UP:
                        steps.append(taken)
        finally:
            if was_collecting:
                gc.enable()
    return times


def _summary(names: Sequence[str], times: Sequence[Sequence[Taken]]) -> dict[str, Any]:
    thread = [statistics.median(taken.thread_s for taken in steps) for steps in times]
    clock = [statistics.median(taken.clock_s for taken in steps) for steps in times]
    return {
        "ms": {name: round(1000 * median, 4) for name, median in zip(names, thread, strict=True)},
        "clock_ms": {name: round(1000 * median, 4) for name, median in zip(names, clock, strict=True)},
        "ratio": round(thread[0] / thread[1], 4) if len(thread) == 2 else None,
        "clock_ratio": round(clock[0] / clock[1], 4) if len(clock) == 2 else None,
    }


def _build_once(side: Side, lengths: Sequence[int], tokens: mx.array) -> Taken:
    # Rows are new for each step: a graph that was never evaluated must not be built upon.
    rows = side.new_rows(lengths, capacity=max(lengths) + 1, is_view=True)
    thread, clock = time.thread_time(), time.perf_counter()
    ids = side.sample(rows, tokens)
    taken = Taken(thread_s=time.thread_time() - thread, clock_s=time.perf_counter() - clock)
    del ids
    return taken


def count_traces(model: Model, grown_to: int) -> dict[str, int]:
    """Traces of one row's first step, and of steps at 1, 2, 3 and every 256th token up to `grown_to` after it."""
    ours = Ours(model, is_compiled=True)
    ours.stepper = stepper = CountingStepper(model)
    contexts = [1, 2, 3, *(end + after for end in range(GROWTH_STEP, grown_to + 1, GROWTH_STEP) for after in (-1, 0))]
    tokens = mx.zeros((1,), dtype=mx.int32)
    first = 0
    with stand_ins():
        for context in contexts:
            ours.sample(ours.new_rows([context], capacity=context + 1, is_view=True), tokens)
            first = first or stepper.num_traces
    return {"first_step": first, "later": stepper.num_traces - first, "steps": len(contexts)}
