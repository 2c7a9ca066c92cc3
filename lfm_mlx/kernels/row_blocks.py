"""Long inputs a block of rows at a time, so that what is computed on the way never exists for all of them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar

import mlx.core as mx

_IS_WHOLE: ContextVar[bool] = ContextVar("is_whole", default=False)


def in_blocks(compute: Callable[..., mx.array], block_rows: int, *arrays: mx.array) -> mx.array:
    """`compute` of `arrays`, at most `block_rows` of their first axis at a time, in order.

    Args:
        compute: maps blocks of the arrays ``(n, ...)`` to ``(n, ...)``, each row for itself.
        block_rows: rows of a block.
        arrays: of equal length, at least 1.
    """
    num_rows = arrays[0].shape[0]
    if num_rows <= block_rows or _IS_WHOLE.get():
        return compute(*arrays)
    done: list[mx.array] = []
    for start in range(0, num_rows, block_rows):
        parts = [array[start : start + block_rows] for array in arrays]
        # Without this all blocks could be computed side by side: nothing else orders them.
        done.append(compute(*(mx.depends(parts, done[-1:]) if done else parts)))
    return mx.concatenate(done)


@contextlib.contextmanager
def without_blocks() -> Iterator[None]:
    """Within: `in_blocks` computes all rows at once, for those who watch what goes through a layer."""
    token = _IS_WHOLE.set(True)
    try:
        yield
    finally:
        _IS_WHOLE.reset(token)
