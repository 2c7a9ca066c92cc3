"""Rows in blocks: the same result, in order, and less memory on the way."""

from __future__ import annotations

import mlx.core as mx
import pytest

from lfm_mlx.kernels import in_blocks, without_blocks


@pytest.mark.parametrize("num_rows", [1, 7, 8, 9, 40])
def test_blocks_give_what_the_whole_gives(num_rows: int) -> None:
    x, y = mx.random.normal((num_rows, 3)), mx.arange(num_rows)
    sizes: list[int] = []

    def compute(x: mx.array, y: mx.array) -> mx.array:
        sizes.append(x.shape[0])
        return x * y[:, None]

    found = in_blocks(compute, 8, x, y)
    assert mx.array_equal(found, x * y[:, None])
    assert sum(sizes) == num_rows
    assert max(sizes) <= 8
    assert len(sizes) == -(-num_rows // 8)


@pytest.mark.parametrize("num_rows", [1, 8, 21])
def test_rows_go_to_their_places(num_rows: int) -> None:
    x, places = mx.random.normal((num_rows, 3)), mx.random.permutation(num_rows)
    found = in_blocks(lambda rows: rows * 2, 8, x, places=places)
    assert mx.array_equal(found[places], x * 2)
    assert num_rows == 1 or not mx.array_equal(found, x * 2)  # The control: not where they were.


def test_the_result_exists_once() -> None:
    x = mx.random.normal((64, 10_000))
    places = mx.random.permutation(64)
    mx.eval(x, places)
    for given in (None, places):
        mx.clear_cache()
        mx.reset_peak_memory()
        held = mx.get_active_memory()
        out = in_blocks(lambda rows: mx.exp(rows), 2, x, places=given)
        mx.eval(out)
        # The CPU runs up to ten operations ahead. Side by side and put together it would be twice the result.
        assert mx.get_peak_memory() - held < 1.6 * out.nbytes
        del out


def test_what_is_computed_on_the_way_exists_for_one_block_only() -> None:
    x = mx.random.normal((64, 1))
    mx.eval(x)

    def peak(block_rows: int) -> int:
        mx.clear_cache()
        mx.reset_peak_memory()
        held = mx.get_active_memory()
        wide = in_blocks(lambda rows: mx.exp(rows + mx.zeros((1, 20_000))).sum(axis=1), block_rows, x)
        mx.eval(wide)
        return mx.get_peak_memory() - held

    # The CPU runs up to ten operations ahead, so a few blocks are alive at once.
    assert peak(1) < peak(64) / 3


def test_without_blocks_all_rows_come_at_once() -> None:
    sizes: list[int] = []

    def compute(x: mx.array) -> mx.array:
        sizes.append(x.shape[0])
        return x

    with without_blocks():
        in_blocks(compute, 8, mx.zeros((20, 1)))
    in_blocks(compute, 8, mx.zeros((20, 1)))
    assert sizes == [20, 8, 8, 4]
