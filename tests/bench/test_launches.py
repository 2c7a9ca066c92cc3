"""Reading launches from graphs small enough to count by hand."""

from __future__ import annotations

import contextlib
import shutil

import mlx.core as mx
import pytest

from lfm_mlx.bench.launches import count, stand_ins
from lfm_mlx.kernels import MetalKernel, add_norm, has_metal


def ready(*shape: int) -> mx.array:
    array = mx.random.normal(shape)
    mx.eval(array)
    return array


def test_views_are_free_and_each_other_node_is_a_launch() -> None:
    x = ready(4, 6)
    y = x.T.reshape(2, 12)[:, 3:][None]
    assert count([y]).total == 0
    assert count([mx.sort(mx.abs(y), axis=-1)]).total == 2


def test_a_concatenation_is_a_launch_an_input() -> None:
    assert count([mx.concatenate([ready(2), ready(3), ready(4)])]).by_kind == {"copy": 3}


@pytest.mark.skipif(
    shutil.which("g++") is None, reason="mx.compile needs g++ on the CPU, and there is none on the PATH"
)
def test_every_call_of_a_compiled_function_is_a_launch() -> None:
    fused = mx.compile(lambda x: mx.abs(x) * 2 + 1)
    x = fused(ready(3))
    assert count([x]).total == 1
    for _ in range(4):
        x = fused(x)
    assert count([x]).total == 5


def test_what_is_evaluated_already_is_not_counted() -> None:
    x = mx.abs(ready(3))
    mx.eval(x)
    assert count([x, mx.exp(x)]).total == 1


def test_operations_that_are_one_kernel_on_a_gpu_are_one_launch() -> None:
    x, weight = ready(1, 2, 1, 64), ready(64)
    packed = mx.quantize(ready(4, 64), group_size=64, bits=4)
    mx.eval(packed)
    with stand_ins():
        made = [
            mx.fast.rms_norm(x, weight, 1e-5),
            mx.fast.rms_norm(x, None, 1e-5),
            mx.fast.rope(x, 64, traditional=False, base=1e6, scale=1.0, offset=mx.array(3)),
            mx.fast.scaled_dot_product_attention(x, x, x, scale=1.0),
            mx.dequantize(*packed, group_size=64, bits=4),
        ]
        quantized = mx.quantize(x, group_size=64, bits=8)
    assert [array.shape for array in quantized] == [(1, 2, 1, 16), (1, 2, 1, 1), (1, 2, 1, 1)]
    assert made[4].shape == (4, 64)
    assert [count([array]).total for array in made] == [1] * 5
    assert count(quantized).by_kind == {"quantize": 1}
    assert count([*made, *quantized]).total == 6


def test_a_fused_kernel_is_one_launch_with_all_its_inputs_and_outputs() -> None:
    residual, update, weight = mx.abs(ready(2, 64)), mx.exp(ready(2, 64)), ready(64)
    with stand_ins():
        both = add_norm(residual, update, weight, 1e-5)
    assert [(array.shape, array.dtype) for array in both] == [((2, 64), mx.float32)] * 2
    assert count(both).by_kind == {"elementwise": 2, "fused kernel": 1}
    assert [count([array]).total for array in both] == [3, 3]


def test_stand_ins_leave_nothing_behind_even_after_an_error() -> None:
    had_metal, launch = has_metal(), MetalKernel.launch
    before = mx.fast.rms_norm, mx.fast.rope, mx.fast.scaled_dot_product_attention, mx.dequantize, mx.quantize
    with contextlib.suppress(ZeroDivisionError), stand_ins():
        assert mx.quantize is not before[-1]
        _ = 1 / 0
    assert (mx.fast.rms_norm, mx.fast.rope, mx.fast.scaled_dot_product_attention, mx.dequantize, mx.quantize) == before
    assert (has_metal(), MetalKernel.launch) == (had_metal, launch)


def test_an_operation_belongs_to_the_last_layer_whose_weights_it_needs() -> None:
    x, first, second = ready(3), ready(3), ready(3)
    shared, own = mx.arange(3.0), mx.arange(3.0) * 2
    y = mx.abs(x * first + shared)  # layer 0: multiply, add, abs
    z = y * second + shared + own  # layer 1: multiply, two adds, and what only it reads
    found = count([z], {0: [first], 1: [second]})
    assert found.by_layer == {-1: 1, 0: 3, 1: 5}
