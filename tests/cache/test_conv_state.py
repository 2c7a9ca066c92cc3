"""What a short convolution remembers: always the latest real inputs, and no more memory than theirs."""

from __future__ import annotations

import gc

import mlx.core as mx
import numpy as np
import pytest

from lfm_mlx.cache import ConvState, Span

WIDTH = 4


def numbered(batch_size: int, num_tokens: int, first: int = 1) -> mx.array:
    """Inputs (B, L, WIDTH) whose value at row b, position i is 100 b + first + i."""
    values = 100 * np.arange(batch_size)[:, None] + first + np.arange(num_tokens)
    return mx.array(np.repeat(values[..., None], WIDTH, axis=2).astype(np.float32))


def remembered(state: ConvState) -> list[list[float]]:
    """The remembered numbers of each row, oldest first."""
    return np.concatenate([np.array(row) for row in state.rows], axis=2)[:, 0, :, 0].tolist()


@pytest.mark.parametrize(
    ("num_rows", "num_tokens", "expected"),
    [(2, 1, [0, 1]), (2, 2, [1, 2]), (2, 5, [4, 5]), (1, 3, [3]), (4, 2, [0, 0, 1, 2])],
    ids=str,
)
def test_the_latest_inputs_are_remembered_oldest_first(num_rows, num_tokens, expected):
    state = ConvState.zeros(1, num_rows, WIDTH, mx.float32)
    seen = state.extend(numbered(1, num_tokens), Span.make((0,), num_tokens))
    assert seen.shape == (1, num_rows + num_tokens, WIDTH)
    assert [row.shape for row in state.rows] == [(1, 1, 1, WIDTH)] * num_rows
    assert remembered(state) == [expected]


def test_padding_is_never_remembered():
    state = ConvState.zeros(3, 2, WIDTH, mx.float32)
    state.extend(numbered(3, 2), Span.make((0, 0, 0), 2))
    state.extend(numbered(3, 4, first=11), Span.make((2, 2, 2), 4, [4, 1, 0]))
    assert remembered(state) == [[13, 14], [102, 111], [201, 202]]


def test_keep_and_join_move_whole_rows():
    state = ConvState.zeros(2, 2, WIDTH, mx.float32)
    state.extend(numbered(2, 3), Span.make((0, 0), 3))
    other = ConvState.zeros(1, 2, WIDTH, mx.float32)
    state.keep(mx.array([1, 0, 1]))
    state.join(other)
    assert remembered(state) == [[102, 103], [2, 3], [102, 103], [0, 0]]


def test_a_snapshot_is_not_moved_by_what_follows():
    state = ConvState.zeros(1, 2, WIDTH, mx.float32)
    state.extend(numbered(1, 3), Span.make((0,), 3))
    snapshot = state.snapshot()
    for _ in range(2):
        state.extend(numbered(1, 3, first=50), Span.make((3,), 3))
        assert remembered(state) == [[51, 52]]
        state.restore(snapshot)
        assert remembered(state) == [[2, 3]]


@pytest.mark.parametrize("lengths", [None, [5000]], ids=["whole", "padded"])
def test_a_remembered_row_does_not_keep_its_chunk_in_memory(lengths):
    chunk = held_after(lambda chunk: extended(chunk, lengths))
    assert chunk < 100_000


def test_control_a_plain_slice_keeps_its_chunk_in_memory():
    assert held_after(lambda chunk: chunk[:, -2:]) > 20_000_000


def extended(chunk: mx.array, lengths: list[int] | None) -> ConvState:
    state = ConvState.zeros(1, 2, chunk.shape[2], mx.float32)
    state.extend(chunk, Span.make((0,), chunk.shape[1], lengths))
    mx.eval(state.arrays)
    return state


def held_after(keep) -> int:
    """Bytes still active after a 20 MB chunk is gone and what `keep` made of it is not."""
    gc.collect()
    before = mx.get_active_memory()
    chunk = mx.zeros((1, 5120, 1024)) + 1
    kept = keep(chunk)
    mx.eval(kept.arrays if isinstance(kept, ConvState) else kept)
    del chunk
    gc.collect()
    return mx.get_active_memory() - before


def test_bytes_are_those_of_the_rows():
    assert ConvState.zeros(3, 2, WIDTH, mx.bfloat16).num_bytes == 3 * 2 * WIDTH * 2
