"""How much memory do weights, caches, prefill and decode take, and what does the planner expect?"""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable
from typing import Any

import mlx.core as mx

from lfm_mlx.bench.chunk_memory import chunk_transients, fill_with_random
from lfm_mlx.bench.machine import backend
from lfm_mlx.bench.memory_growth import watch_growth
from lfm_mlx.bench.report import Report
from lfm_mlx.bench.sides import Ours, Rows
from lfm_mlx.bench.subject import Subject
from lfm_mlx.cache import ConvState
from lfm_mlx.engine import follow
from lfm_mlx.errors import OptionError
from lfm_mlx.memory import MemoryPlan, plan_memory, prefill_chunk_tokens, release_freed, set_memory_limits
from lfm_mlx.model import Model
from lfm_mlx.terminal import format_bytes

CONTEXT = 4096
CPU_COMPUTED = 2
DECODED = 2

NOTES = (
    "MLX: bytes of arrays. peak: the most that was held during the phase. process: the most memory the process ever",
    "had resident until then, Python and MLX themselves included.",
)


def ask_memory(
    subject: Subject,
    *,
    context: int = CONTEXT,
    batch_size: int = 1,
    computed: int | None = None,
    prefill_chunk: int | None = None,
    num_tokens: int | None = None,
) -> Report:
    """Measure loading, a prompt of `context` tokens, and decoding behind it.

    Args:
        subject: which model; a peer is not measured.
        context: tokens of the prompt.
        batch_size: rows.
        computed: tokens of it that are really computed, what stands before being random; None: all on a GPU, few on
            the CPU, which would take hours.
        prefill_chunk: the last so many tokens are computed once more as one chunk, in one layer of each kind.
        num_tokens: so many tokens are generated as an answer of their own afterwards, and memory is watched.

    Raises:
        OptionError: the chunk is longer than the context.
    """
    if prefill_chunk is not None and prefill_chunk > context:
        raise OptionError(f"prefill_chunk is {prefill_chunk}, expected at most the context, {context}")
    prompt = min(context, computed or (CPU_COMPUTED if backend() == "cpu" else context))
    phases: list[dict[str, Any]] = [_phase("before", lambda: None)]
    held: dict[str, Any] = {}
    phases.append(_phase("load", lambda: held.update(model=_make(subject))))
    model: Model = held["model"]
    chunk = min(prompt, prefill_chunk_tokens(model.config, model.dtype))
    plan = plan_memory(
        model.config,
        weight_bytes=model.num_bytes,
        context=context + DECODED,
        batch_size=batch_size,
        kv_bits=subject.kv_bits,
        dtype=model.dtype,
        chunk_tokens=chunk,
    )
    ours = Ours(model, kv_bits=subject.kv_bits)
    phases.append(_phase("cache", lambda: held.update(rows=_new_rows(ours, batch_size, context, prompt))))
    rows: Rows = held["rows"]
    phases.append(_phase("prefill", lambda: _prefill(ours, rows, prompt, chunk)))
    phases.append(_phase("decode", lambda: _decode(ours, rows, batch_size)))
    transients: dict[str, int] = {}
    if prefill_chunk is not None:
        phases.append(_phase("chunk", lambda: transients.update(chunk_transients(model, rows.state, prefill_chunk))))
        phases[-1]["peak_bytes"] = phases[-1]["active_bytes"] + max(transients.values())
    found = _found(model, rows, phases)
    planned = _planned(plan)
    growth: list[dict[str, Any]] = []
    if num_tokens is not None:
        held.clear()
        del rows
        if not follow(model):
            growth += watch_growth(model, num_tokens, kv_bits=subject.kv_bits)
    return Report(
        question="memory",
        parameters={**subject.parameters, "context": context, "computed": prompt, "batch_size": batch_size},
        results={
            "phases": phases,
            "found": found,
            "planned": planned,
            "chunk": {"tokens": prefill_chunk, "dtype": str(model.dtype), "transient_bytes": transients},
            "growth": growth,
        },
        title=f"Memory at {batch_size} x {context} tokens, {prompt} of them computed, {subject.name}",
        header=["", "MLX after", "MLX peak", "process"],
        rows=[
            *([phase["phase"], *_sizes(phase, "active_bytes", "peak_bytes", "process_bytes")] for phase in phases),
            ["", "", "found", "planned"],
            *([name, "", format_bytes(found[name]), format_bytes(planned[name])] for name in planned),
            *_chunk_rows(transients, found),
            *_growth_rows(growth),
        ],
        notes=(
            *NOTES,
            *(["All numbers are rank 0's, and the plan is that of its part."] if subject.num_ranks > 1 else []),
        ),
    )


def _chunk_rows(transients: dict[str, int], found: dict[str, int]) -> list[list[object]]:
    if not transients:
        return []
    held = found["weights"] + found["keys and values"] + found["convolution states"]
    lines: list[list[object]] = [["one layer, one chunk", "", "beside", "in all"]]
    for kind, needed in transients.items():
        lines.append([kind, "", format_bytes(needed), format_bytes(held + needed)])
    return lines


def _growth_rows(growth: list[dict[str, Any]]) -> list[list[object]]:
    if not growth:
        return []
    lines: list[list[object]] = [["tokens generated", "cache", "other", "process"]]
    names = ("cache_bytes", "other_bytes", "resident_bytes")
    for look in growth:
        lines.append([f"{look['tokens']:,}", *_sizes(look, *names)])
    return lines


def process_peak_bytes() -> int:
    """The most memory this process has had resident."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _phase(name: str, run: Callable[[], object]) -> dict[str, Any]:
    release_freed()
    mx.reset_peak_memory()
    run()
    return {
        "phase": name,
        "active_bytes": mx.get_active_memory(),
        "peak_bytes": max(mx.get_peak_memory(), mx.get_active_memory()),
        "process_bytes": process_peak_bytes(),
    }


def _make(subject: Subject) -> Model:
    if subject.model is None:
        dtype = subject.made_up_dtype()
        set_memory_limits(plan_memory(subject.config, weight_bytes=0, context=CONTEXT, dtype=dtype))
    return subject.to_hold()


def _new_rows(ours: Ours, batch_size: int, context: int, prompt: int) -> Rows:
    rows = ours.new_rows([context - prompt] * batch_size, capacity=context + DECODED)
    fill_with_random(rows.state, context - prompt)
    return rows


def _prefill(ours: Ours, rows: Rows, prompt: int, chunk: int) -> None:
    tokens = mx.random.randint(0, ours.config.vocab_size, (rows.state.batch_size, prompt), key=mx.random.key(prompt))
    mx.eval(ours.stepper.prefill(rows.state, tokens, chunk_size=chunk))


def _decode(ours: Ours, rows: Rows, batch_size: int) -> None:
    ids = mx.zeros((batch_size,), dtype=mx.int32)
    for _ in range(DECODED):
        ids = ours.sample(rows, ids)
        mx.eval(ids, ours.arrays(rows))


def _found(model: Model, rows: Rows, phases: list[dict[str, Any]]) -> dict[str, int]:
    """What the planner plans, as it was measured."""
    state_bytes = rows.state.num_bytes
    conv_bytes = sum(layer.num_bytes for layer in rows.state.layers if isinstance(layer, ConvState))
    peak = max(phase["peak_bytes"] for phase in phases if phase["phase"] in ("prefill", "decode"))
    return {
        "weights": model.num_bytes,
        "keys and values": state_bytes - conv_bytes,
        "convolution states": conv_bytes,
        "transient": max(0, peak - model.num_bytes - state_bytes),
        "total": peak,
    }


def _planned(plan: MemoryPlan) -> dict[str, int]:
    return {
        "weights": plan.weight_bytes,
        "keys and values": plan.kv_bytes,
        "convolution states": plan.conv_bytes,
        "transient": plan.transient_bytes,
        "total": plan.total_bytes,
    }


def _sizes(phase: dict[str, Any], *names: str) -> list[str]:
    return [format_bytes(phase[name]) for name in names]
