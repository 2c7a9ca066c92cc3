"""Long inputs a block of rows at a time, so that what is computed on the way never exists for all of them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar

import mlx.core as mx

_IS_WHOLE: ContextVar[bool] = ContextVar("is_whole", default=False)


def in_blocks(
    compute: Callable[..., mx.array], block_rows: int, *arrays: mx.array, places: mx.array | None = None
) -> mx.array:
    """`compute` of `arrays`, at most `block_rows` of their first axis at a time, in order.

    Args:
        compute: maps blocks of the arrays ``(n, ...)`` to ``(n, ...)``, each row for itself.
        block_rows: rows of a block.
        arrays: of equal length, at least 1.
        places: each row's place in the result, a permutation ``(rows,)``; None: where it was.
    """
    num_rows = arrays[0].shape[0]
    if num_rows <= block_rows or _IS_WHOLE.get():
        return _placed(compute(*arrays), places)
    blocks = [slice(start, start + block_rows) for start in range(0, num_rows, block_rows)]
    if mx.default_device().type == mx.cpu:
        return _one_at_a_time(compute, blocks, arrays, places)
    done: list[mx.array] = []
    for block in blocks:
        parts = [array[block] for array in arrays]
        # Without this all blocks could be computed side by side: nothing else orders them.
        done.append(compute(*(mx.depends(parts, done[-1:]) if done else parts)))
    return _placed(mx.concatenate(done), places)


def _one_at_a_time(
    compute: Callable[..., mx.array], blocks: Sequence[slice], arrays: Sequence[mx.array], places: mx.array | None
) -> mx.array:
    """Each block evaluated and written where it belongs: they never wait, in memory of their own, to be joined.

    A CPU loses nothing by it; a GPU would stand still after every block.
    """
    out = mx.zeros(0)
    for block in blocks:
        rows = compute(*(array[block] for array in arrays))
        if not out.size:
            out = mx.zeros((arrays[0].shape[0], *rows.shape[1:]), rows.dtype)
        out[block if places is None else places[block]] = rows
        del rows
        mx.eval(out)
    return out


def _placed(rows: mx.array, places: mx.array | None) -> mx.array:
    return rows if places is None else rows[mx.argsort(places)]


@contextlib.contextmanager
def without_blocks() -> Iterator[None]:
    """Within: `in_blocks` computes all rows at once, for those who watch what goes through a layer."""
    token = _IS_WHOLE.set(True)
    try:
        yield
    finally:
        _IS_WHOLE.reset(token)
