"""How many kernels does a token launch? By kind and by layer, at any context and batch size, without running any."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from lfm_mlx.bench.launches import Count, count, require_compiler, stand_ins
from lfm_mlx.bench.layouts import count_copies
from lfm_mlx.bench.report import Report
from lfm_mlx.bench.sides import GREEDY, Side
from lfm_mlx.bench.subject import Subject, uneven_lengths
from lfm_mlx.errors import OptionError
from lfm_mlx.types import SamplingParams

CONTEXTS = (1, 1024, 8192, 32768, 127999)
BATCH_SIZES = (1, 4, 16)
BATCH_CONTEXT = 1024
"""Context of the longest row where several rows are counted."""

MOST_COLUMNS = 400_000
"""Rows times context: beyond, MLX's CPU backend takes another road through attention than a GPU does."""

NOTES = (
    "Counted from the graph and not run: one node is one launch, views are free, a concatenation is one an input.",
    "copies: inputs that Metal's kernels copy first because of their layout. Rows of a batch have unequal lengths.",
    "Not counted: attention's second pass (from 4,096 tokens on; 1,024 on Max and Ultra), alike for both sides.",
)


def ask_launches(
    subject: Subject, *, contexts: Sequence[int] | None = None, batch_sizes: Sequence[int] = BATCH_SIZES
) -> Report:
    """Count the launches of a decode step on every side.

    Args:
        subject: which model.
        contexts: tokens that a single row has seen; None: from one to all that the model can have.
        batch_sizes: numbers of rows, beside one.

    Raises:
        OptionError: MLX cannot compile here.
    """
    require_compiler()
    chosen = contexts or [context for context in CONTEXTS if context < subject.config.max_context]
    cases = [(1, context) for context in chosen]
    cases += [(B, BATCH_CONTEXT) for B in batch_sizes if (B, BATCH_CONTEXT) not in cases]
    sides = subject.without_memory()
    found = {side.name: _count_side(side, cases, subject.sampling()) for side in sides}
    rows = [_table_row(i, *case, list(found.values())) for i, case in enumerate(cases)]
    names = list(found)
    return Report(
        question="kernels",
        parameters={**subject.parameters, "contexts": list(chosen), "batch_sizes": list(batch_sizes)},
        results={"sides": found, "ratio": _ratio(found)},
        title=f"Kernel launches a token, {subject.name}",
        header=["rows x context", *(f"{name}{part}" for name in names for part in ("", " copies"))],
        rows=[*rows, *_kind_rows(found), *_sampling_rows(found)],
        notes=NOTES,
    )


def count_step(
    side: Side, lengths: Sequence[int], params: SamplingParams | None = None, *, has_layers: bool = False
) -> Count:
    """The launches of one decode step, with the choice of the next tokens where `params` is given."""
    rows, tokens = _prepare(side, lengths, params)
    with stand_ins():
        last = side.logits(rows, tokens) if params is None else side.sample(rows, tokens)
        return count([last, *side.arrays(rows)], side.weights() if has_layers else None)


def count_step_copies(side: Side, lengths: Sequence[int]) -> int:
    """The copies that kernels of one decode step make because of their inputs' layout."""
    rows, tokens = _prepare(side, lengths, None)
    with stand_ins(are_kernels_real=True):
        return count_copies(lambda x: [side.logits(rows, x), *side.arrays(rows)], tokens)


def _prepare(side: Side, lengths: Sequence[int], params: SamplingParams | None) -> tuple[Any, mx.array]:
    if len(lengths) * max(lengths) > MOST_COLUMNS:
        raise OptionError(
            f"rows times context is {len(lengths)} x {max(lengths)}, expected at most {MOST_COLUMNS:,}; count fewer"
        )
    rows = side.new_rows(lengths, capacity=max(lengths) + 1, params=params or GREEDY, is_view=True)
    tokens = mx.zeros((len(lengths),), dtype=mx.int32)
    mx.eval(tokens)
    return rows, tokens


def _count_side(side: Side, cases: Sequence[tuple[int, int]], card: SamplingParams) -> dict[str, Any]:
    decode = []
    for batch_size, context in cases:
        lengths = uneven_lengths(batch_size, context)
        launches, copies = count_step(side, lengths).total, count_step_copies(side, lengths)
        decode.append({"batch_size": batch_size, "context": context, "launches": launches, "copies": copies})
    single = count_step(side, [BATCH_CONTEXT], has_layers=True)
    sampling = {
        name: count_step(side, [BATCH_CONTEXT], params).total - single.total
        for name, params in (("greedy", GREEDY), ("card", card))
    }
    return {
        "decode": decode,
        "by_kind": dict(single.by_kind),
        "by_layer": {str(layer): number for layer, number in single.by_layer.items()},
        "sampling": sampling,
    }


def _table_row(i: int, batch_size: int, context: int, found: Sequence[dict[str, Any]]) -> list[object]:
    counts = [side["decode"][i] for side in found]
    return [f"{batch_size} x {context}", *(case[key] for case in counts for key in ("launches", "copies"))]


def _kind_rows(found: dict[str, dict[str, Any]]) -> list[list[object]]:
    kinds = list(dict.fromkeys(kind for side in found.values() for kind in side["by_kind"]))
    return [
        [f"  {kind}", *(x for side in found.values() for x in (side["by_kind"].get(kind, 0), ""))] for kind in kinds
    ]


def _sampling_rows(found: dict[str, dict[str, Any]]) -> list[list[object]]:
    return [
        [f"+ sampling, {name}", *(x for side in found.values() for x in (side["sampling"][name], ""))]
        for name in ("greedy", "card")
    ]


def _ratio(found: dict[str, dict[str, Any]]) -> float | None:
    """Ours over the peer's, one row."""
    totals = [side["decode"][0]["launches"] for side in found.values()]
    return round(totals[0] / totals[1], 4) if len(totals) == 2 else None
