"""Does memory grow while an answer does? A long answer, watched every so many tokens."""

from __future__ import annotations

import gc
import resource
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx

from lfm_mlx.bench.launches import read_graph
from lfm_mlx.cache import State, Transcript
from lfm_mlx.engine import Engine, Request
from lfm_mlx.model import Model
from lfm_mlx.types import SamplingParams

WATCHED_EVERY = 1000

PROMPT = (1, 2, 3, 4)


def watch_growth(
    model: Model, num_tokens: int, *, kv_bits: int | None = None, every: int = WATCHED_EVERY
) -> Iterator[dict[str, Any]]:
    """Generate `num_tokens` tokens with an `Engine`, as an answer is, and look at memory every `every` of them.

    Keys and values have room for all tokens from the beginning: whatever grows is something else.

    Yields:
        tokens: generated until now.
        resident_bytes: of the process.
        active_bytes: of MLX's arrays.
        cache_bytes: of keys, values and convolution rows among them.
        other_bytes: of what is neither these nor weights.
        graph_nodes: operations that hang on the state; 0 where all of it is evaluated.
        python_objects: that the garbage collector knows.
    """
    engine = Engine(model, kv_bits=kv_bits)
    transcript = Transcript(engine.new_state())
    request = Request(prompt=PROMPT, sampling=SamplingParams(seed=0), max_tokens=num_tokens, transcript=transcript)
    transcript.state.reserve(len(PROMPT) + num_tokens)
    row = engine.submit(request)
    seen = 0
    while not engine.is_idle:
        engine.step()
        if len(row.generated) >= seen + every:
            seen += every
            yield _look(model, transcript.state, len(row.generated))


def _look(model: Model, state: State, num_tokens: int) -> dict[str, Any]:
    gc.collect()
    mx.eval(state.arrays)
    active = mx.get_active_memory()
    return {
        "tokens": num_tokens,
        "resident_bytes": resident_bytes(),
        "active_bytes": active,
        "cache_bytes": state.num_bytes,
        "other_bytes": active - state.num_bytes - model.num_bytes,
        "graph_nodes": len(read_graph(state.arrays)),
        "python_objects": len(gc.get_objects()),
    }


def resident_bytes() -> int:
    """Memory of this process that is resident now; where the system does not tell (macOS), the most it ever was."""
    table = Path("/proc/self/statm")
    if table.exists():
        return int(table.read_text().split()[1]) * resource.getpagesize()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
