import mlx.core as mx
import pytest

from lfm_mlx.config import Quantization
from lfm_mlx.convert.quantize import check_float16, quantize_rows
from lfm_mlx.errors import ConversionError

NAME = "model.layers.0.conv.in_proj.weight"


def identical(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and mx.array_equal(a, b).item()


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_dequantised_values_are_within_half_a_step_of_the_weights(bits):
    weight = mx.random.normal((48, 128), key=mx.random.key(0))
    restored = mx.dequantize(*quantize_rows(weight, Quantization(bits=bits, group_size=64)), 64, bits)
    groups = weight.reshape(48, 2, 64)
    step = (groups.max(axis=-1) - groups.min(axis=-1)) / (2**bits - 1)

    def steps_away(other):
        return (mx.abs(other.reshape(48, 2, 64) - groups).max(axis=-1) / step).max().item()

    # MLX moves the scale so that zero is exact, which costs up to half a step more at the far end of a group.
    assert steps_away(restored) <= 1.01
    assert steps_away(mx.roll(restored, 1, axis=1)) > 1.5


@pytest.mark.parametrize(
    ("mode", "bits", "group_size", "dtypes"),
    [
        ("affine", 4, 64, [mx.uint32, mx.bfloat16, mx.bfloat16]),
        ("mxfp4", 4, 32, [mx.uint32, mx.uint8]),
        ("nvfp4", 4, 16, [mx.uint32, mx.uint8]),
        ("mxfp8", 8, 32, [mx.uint32, mx.uint8]),
    ],
)
def test_each_mode_stores_its_own_parts(mode, bits, group_size, dtypes):
    weight = mx.zeros((16, 64), mx.bfloat16)
    made = quantize_rows(weight, Quantization(mode=mode, bits=bits, group_size=group_size))
    assert [array.dtype for array in made] == dtypes
    assert made[0].shape == (16, 64 * bits // 32)
    assert made[1].shape == (16, 64 // group_size)


@pytest.mark.parametrize("search", [False, True])
def test_rows_are_quantised_alike_together_and_in_parts(search):
    rows = mx.random.normal((48, 64), key=mx.random.key(1)).astype(mx.bfloat16)
    how = Quantization(bits=4, group_size=32)
    together = quantize_rows(rows, how, search)
    for first in range(0, 48, 16):
        part = quantize_rows(rows[first : first + 16], how, search)
        other = quantize_rows(rows[(first + 16) % 48 :][:16], how, search)
        for whole, array, wrong in zip(together, part, other, strict=True):
            assert identical(whole[first : first + 16], array)
            assert not identical(whole[first : first + 16], wrong)


def test_values_beyond_float16_are_refused_by_name():
    check_float16(NAME, mx.array([65504.0, -3.0]))
    with pytest.raises(ConversionError, match=f"{NAME}: holds values that float16 cannot represent"):
        check_float16(NAME, mx.array([70000.0, -3.0]))
