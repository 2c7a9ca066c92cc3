"""Layouts followed through views, against numpy, and the copies that kernels make."""

from __future__ import annotations

import itertools

import mlx.core as mx
import numpy as np
import pytest

from lfm_mlx.bench.launches import stand_ins
from lfm_mlx.bench.layouts import Layout, count_copies, reshaped
from lfm_mlx.kernels import add_norm


def layout_of(array: np.ndarray) -> Layout:
    return Layout(array.shape, tuple(stride // array.itemsize for stride in array.strides))


SHAPES = [(24,), (4, 6), (2, 2, 6), (3, 8), (2, 3, 4), (1, 24), (4, 1, 6), (2, 1, 3, 4)]


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
@pytest.mark.parametrize("cut", [np.s_[:], np.s_[:, 1:], np.s_[:, :, :2], np.s_[:1], np.s_[:, :1]])
def test_a_reshape_copies_exactly_where_numpy_has_to(order: tuple[int, ...], cut: tuple[slice, ...]) -> None:
    array = np.arange(60).reshape(3, 4, 5)[cut].transpose(order)
    sizes = [n for n in range(1, array.size + 1) if array.size % n == 0]
    for rows in sizes:
        wanted = (rows, 1, array.size // rows)
        made = array.reshape(wanted)
        found = reshaped(layout_of(array), wanted)
        assert (found is not None) == np.shares_memory(array, made)
        if found is not None:
            pairs = zip(wanted, found.strides, layout_of(made).strides, strict=True)
            assert all(n == 1 or a == b for n, a, b in pairs)


def copies(build: object, *shape: int) -> int:
    assert callable(build)
    with stand_ins(are_kernels_real=True):
        return count_copies(lambda x: [build(x)], mx.zeros(shape))


def attend(queries: mx.array) -> mx.array:
    return mx.fast.scaled_dot_product_attention(queries, queries, queries, scale=1.0)


def test_a_reshape_of_a_transposed_array_copies_unless_nothing_moved() -> None:
    assert copies(lambda x: x.transpose(0, 2, 1).reshape(2, 12), 2, 3, 4) == 1
    assert copies(lambda x: x.transpose(0, 2, 1).reshape(2, 4), 2, 1, 4) == 0


def test_queries_cut_from_a_larger_array_are_copied_for_several_rows_only() -> None:
    assert copies(lambda x: attend(x[:, :4]), 1, 6, 1, 8) == 0
    assert copies(lambda x: attend(x[:, :4]), 2, 6, 1, 8) == 1
    assert copies(lambda x: attend(x), 2, 6, 1, 8) == 0


def test_a_norm_of_a_slice_with_gaps_copies() -> None:
    assert copies(lambda x: mx.fast.rms_norm(x[:, :, :4], None, 1e-5), 2, 3, 8) == 1
    assert copies(lambda x: mx.fast.rms_norm(x[:1], None, 1e-5), 2, 3, 8) == 0


def test_rope_reads_heads_and_tokens_in_either_order() -> None:
    def rotate(x: mx.array) -> mx.array:
        return mx.fast.rope(x, 8, traditional=False, base=1e6, scale=1.0, offset=0)

    assert copies(lambda x: rotate(x.transpose(0, 2, 1, 3)), 2, 5, 3, 8) == 0
    assert copies(lambda x: rotate(x.transpose(1, 2, 0, 3)), 2, 5, 3, 8) == 1


def test_a_fused_kernel_copies_rows_with_gaps() -> None:
    weight = mx.ones((8,))
    mx.eval(weight)
    assert copies(lambda x: add_norm(x[:, :8], x[:, 8:], weight, 1e-5)[0], 3, 16) == 2
    assert copies(lambda x: add_norm(x[:2], x[2:], weight, 1e-5)[0], 4, 8) == 0


def test_a_quantized_matmul_copies_rows_with_gaps() -> None:
    packed = mx.quantize(mx.zeros((4, 64)), group_size=64, bits=4)
    mx.eval(packed)
    assert copies(lambda x: mx.quantized_matmul(x[:, :64], *packed, group_size=64, bits=4), 3, 128) == 1
    assert copies(lambda x: mx.quantized_matmul(x[:2], *packed, group_size=64, bits=4), 3, 64) == 0
