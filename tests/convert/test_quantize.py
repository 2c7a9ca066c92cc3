import mlx.core as mx
import pytest

from lfm_mlx.config import Quantization
from lfm_mlx.convert.quantize import cast, check_float16, quantize
from lfm_mlx.errors import ConversionError

NAME = "model.layers.0.conv.in_proj.weight"
PATH = "model.layers.0.conv.in_proj"


def identical(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and mx.array_equal(a, b).item()


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_dequantised_values_are_within_half_a_step_of_the_weights(bits):
    weight = mx.random.normal((48, 128), key=mx.random.key(0))
    made = quantize(NAME, weight, Quantization(bits=bits, group_size=64))
    restored = mx.dequantize(*(made[f"{PATH}.{part}"] for part in ("weight", "scales", "biases")), 64, bits)
    groups = weight.reshape(48, 2, 64)
    step = (groups.max(axis=-1) - groups.min(axis=-1)) / (2**bits - 1)

    def steps_away(other):
        return (mx.abs(other.reshape(48, 2, 64) - groups).max(axis=-1) / step).max().item()

    # MLX moves the scale so that zero is exact, which costs up to half a step more at the far end of a group.
    assert steps_away(restored) <= 1.01
    assert steps_away(mx.roll(restored, 1, axis=1)) > 1.5


@pytest.mark.parametrize(
    ("mode", "bits", "group_size", "parts"),
    [
        ("affine", 4, 64, {"weight": mx.uint32, "scales": mx.bfloat16, "biases": mx.bfloat16}),
        ("mxfp4", 4, 32, {"weight": mx.uint32, "scales": mx.uint8}),
        ("nvfp4", 4, 16, {"weight": mx.uint32, "scales": mx.uint8}),
        ("mxfp8", 8, 32, {"weight": mx.uint32, "scales": mx.uint8}),
    ],
)
def test_each_mode_stores_its_own_parts(mode, bits, group_size, parts):
    weight = mx.zeros((16, 64), mx.bfloat16)
    made = quantize(NAME, weight, Quantization(mode=mode, bits=bits, group_size=group_size))
    assert {name: array.dtype for name, array in made.items()} == {f"{PATH}.{p}": d for p, d in parts.items()}
    assert made[NAME].shape == (16, 64 * bits // 32)
    assert made[f"{PATH}.scales"].shape == (16, 64 // group_size)


def test_a_stack_of_experts_is_quantised_like_each_expert_alone():
    name = "model.layers.2.feed_forward.switch_mlp.up_proj.weight"
    stack = mx.random.normal((3, 16, 64), key=mx.random.key(1)).astype(mx.bfloat16)
    how = Quantization(bits=4, group_size=64)
    together = quantize(name, stack, how)
    for expert in range(3):
        alone = quantize(name, stack[expert], how)
        other = quantize(name, stack[(expert + 1) % 3], how)
        for part, array in alone.items():
            assert identical(together[part][expert], array)
            assert not identical(together[part][expert], other[part])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", None])
def test_expert_bias_becomes_float32_whatever_the_rest_is_cast_to(dtype):
    bias = mx.array([0.5, -0.25], mx.bfloat16)
    made = cast("model.layers.2.feed_forward.expert_bias", bias, dtype)
    assert identical(made, bias.astype(mx.float32))


def test_other_tensors_are_cast_as_asked_or_left_alone():
    norm = mx.array([0.1, 0.7], mx.float32)
    assert identical(cast("model.embedding_norm.weight", norm, None), norm)
    assert identical(cast("model.embedding_norm.weight", norm, "float16"), norm.astype(mx.float16))


def test_values_beyond_float16_are_refused_by_name():
    check_float16(NAME, mx.array([65504.0, -3.0]))
    with pytest.raises(ConversionError, match=f"{NAME}: holds values that float16 cannot represent"):
        check_float16(NAME, mx.array([70000.0, -3.0]))
