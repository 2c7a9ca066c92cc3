import mlx.core as mx
import pytest

from lfm_mlx.convert.rounding import search_affine


def heavy_tailed(shape, dtype=mx.bfloat16):
    keys = mx.random.split(mx.random.key(3), 2)
    normal = mx.random.normal(shape, key=keys[0])
    return (normal * mx.exp(mx.random.normal(shape, key=keys[1]))).astype(dtype)


def squared_error(rows, packed, group_size, bits, weights=1.0):
    restored = mx.dequantize(*packed, group_size=group_size, bits=bits).astype(mx.float32)
    return (mx.square(restored - rows.astype(mx.float32)) * weights).sum(axis=-1)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_mlx_reads_the_result_and_it_is_closer_than_mlxs_own(bits, group_size):
    rows = heavy_tailed((24, 256))
    searched = search_affine(rows, group_size, bits)
    own = mx.quantize(rows, group_size=group_size, bits=bits)
    assert [(a.shape, a.dtype) for a in searched] == [(a.shape, a.dtype) for a in own]
    better, plain = (squared_error(rows, packed, group_size, bits) for packed in (searched, own))
    assert better.sum().item() < 0.97 * plain.sum().item()
    assert squared_error(mx.roll(rows, 1, axis=0), searched, group_size, bits).sum() > 2 * better.sum()


def test_no_group_gets_worse():
    rows = mx.random.normal((64, 64), key=mx.random.key(1)).astype(mx.bfloat16)
    better = squared_error(rows, search_affine(rows, 64, 4), 64, 4)
    plain = squared_error(rows, mx.quantize(rows, 64, 4), 64, 4)
    assert (better <= plain * 1.02).all().item()


def test_columns_that_matter_more_are_closer():
    rows = heavy_tailed((32, 64))
    importance = mx.where(mx.arange(64) < 8, 100.0, 1.0)
    weighted, plain = search_affine(rows, 64, 4, importance), search_affine(rows, 64, 4)
    errors = [squared_error(rows, packed, 64, 4, importance).sum().item() for packed in (weighted, plain)]
    assert errors[0] < 0.9 * errors[1]


@pytest.mark.parametrize("value", [0.0, 0.5, -3.0])
def test_a_constant_group_comes_back_as_it_was(value):
    rows = mx.full((2, 64), value, mx.bfloat16)
    restored = mx.dequantize(*search_affine(rows, 64, 4), group_size=64, bits=4)
    assert mx.array_equal(restored, rows).item()
