"""What each way of storing a matrix would cost, measured on some of its rows.

Rows are taken at even distances, as many of each expert: a few hundred thousand values tell the mean error of a matrix
to a percent or two, and are all that has to be read of it. They are rounded by MLX's own rule, which takes a seventh of
the time of a search for scales: that makes all errors smaller by much the same share.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from lfm_mlx.config import Quantization
from lfm_mlx.names import is_matrix, is_router, layer_of

from .piecework import cast_rows
from .quantize import quantize_rows
from .segments import WeightSource
from .sensitivity import Sensitivity
from .tasks import Piece, row_piece

SAMPLE_VALUES = 1 << 18
"""Values of a matrix that are looked at."""

ROUTER_BITS = 8
CHOICES: tuple[Quantization | None, ...] = (
    *(Quantization(bits=bits, group_size=size) for bits in (3, 4, 5, 6, 8) for size in (128, 64, 32)),
    None,
)
"""How a matrix may be stored; None leaves it unquantised."""

Costs = dict[str, dict[Quantization | None, float]]
"""By our name of a matrix, what each way to store it adds to the divergence; 0 for None."""


def choices_for(name: str, width: int) -> list[Quantization | None]:
    """How our matrix `name` with rows of `width` values may be stored; routers keep 8 bits at least."""
    return [
        how
        for how in CHOICES
        if how is None or (width % how.group_size == 0 and not (is_router(name) and how.bits < ROUTER_BITS))
    ]


def _usual_weight(name: str) -> float:
    """What a relative error usually counts: an expert's least, and most where tokens come in and go out.

    The numbers are what did best on the trained checkpoint in examples/tiny among 1, 4 and 8.
    """
    if layer_of(name) is None:
        return 16.0
    return 1.0 if ".switch_mlp." in name else 8.0


def measure_costs(
    source: WeightSource,
    dtypes: Mapping[str, str],
    sensitivities: Mapping[str, Sequence[Sensitivity]] | None,
) -> Costs:
    """Store samples of every matrix in every way and weigh the errors.

    Args:
        source: the checkpoint.
        dtypes: by our name the type of a matrix's values and scales, as safetensors spells it.
        sensitivities: from `lfm_mlx.convert.sensitivity`; None weighs relative errors by what kind of matrix it is.

    Returns:
        Divergences in nats with sensitivities, relative squared errors by kind of matrix without.
    """
    costs: Costs = {}
    for name, shape in source.tensors.items():
        if is_matrix(name):
            sample = _sample(source, name, dtypes[name])
            places = None if sensitivities is None else sensitivities[name]
            factor = _usual_weight(name) if places is None else 1.0
            costs[name] = {how: factor * _cost(sample, how, places) for how in choices_for(name, shape[-1])}
            mx.clear_cache()
    return costs


@dataclass(frozen=True, kw_only=True)
class _Sample:
    """Some rows of a matrix: values (rows, in), each row's expert, and how many rows each expert has."""

    values: mx.array
    matrices: mx.array
    rows_each: int


def _sample(source: WeightSource, name: str, dtype: str) -> _Sample:
    *outer, height, width = source.tensors[name]
    num_matrices = math.prod(outer)
    rows_each = max(1, min(height, SAMPLE_VALUES // (width * num_matrices)))
    inside = [(2 * i + 1) * height // (2 * rows_each) for i in range(rows_each)]
    wanted = [matrix * height + row for matrix in range(num_matrices) for row in inside]
    stored = source.stored_as(name)
    pieces: list[Piece] = []
    first = 0
    for parts in source.segments(name):
        end = first + parts[0].num_rows
        for start, count in _runs([row for row in wanted if first <= row < end]):
            reads = tuple(part.part(start - first, count) for part in parts)
            pieces.append(row_piece(name, width, reads, stored, dtype))
        first = end
    matrices = mx.repeat(mx.arange(num_matrices), rows_each)
    values = mx.concatenate([cast_rows(piece) for piece in pieces])
    mx.eval(values)
    return _Sample(values=values, matrices=matrices, rows_each=rows_each)


def _runs(rows: Sequence[int]) -> list[tuple[int, int]]:
    """Ascending rows as runs of consecutive ones, which are read at once: the first of each, and how many."""
    starts = [i for i, row in enumerate(rows) if i == 0 or row != rows[i - 1] + 1]
    return [(rows[start], stop - start) for start, stop in zip(starts, [*starts[1:], len(rows)], strict=True)]


def _cost(sample: _Sample, how: Quantization | None, places: Sequence[Sensitivity] | None) -> float:
    if how is None:
        return 0.0
    weight, scales, biases = quantize_rows(sample.values, how)
    restored = mx.dequantize(weight, scales, biases, group_size=how.group_size, bits=how.bits)
    values = sample.values.astype(mx.float32)
    noise = mx.square(restored.astype(mx.float32) - values)
    if places is None:
        return float(np.array(noise.sum())) / max(float(np.array(mx.square(values).sum())), 1e-30)
    weighed = [(noise * place.columns[sample.matrices]).sum() for place in places]
    return 0.5 * sum(float(np.array(each)) for each in weighed) / sample.rows_each
