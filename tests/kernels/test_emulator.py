"""The emulator of Metal kernels: what is right passes, and each fault we plant is told from the others."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import numpy as np
import pytest
from metal.emulation import KernelFaultError, emulate, has_compiler
from metal.translation import TranslationError, to_cpp

pytestmark = pytest.mark.skipif(not has_compiler(), reason="there is no g++, through which kernels are emulated")

SUMS = """
  threadgroup float partial[32];
  const uint t = thread_position_in_threadgroup.x;
  const uint row = threadgroup_position_in_grid.y;
  const float own = simd_sum(float(x[row * x_shape[1] + t]));
  if (thread_index_in_simdgroup == 0) partial[simdgroup_index_in_threadgroup] = own;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  float total = 0;
  for (uint i = 0; i < simdgroups_per_threadgroup; i++) total += partial[i];
  y[row * x_shape[1] + t] = T(total);
"""
"""Each value of a row of y is the sum of the row of x."""

ROWS, WIDTH = 3, 96


def run(source: str, dtype: mx.Dtype = mx.float32, orders: Sequence[int] = (0, 1, 2, 3)) -> mx.array:
    kernel = mx.fast.metal_kernel(name="faulty", input_names=["x"], output_names=["y"], source=source)
    (y,) = emulate(
        kernel,
        [rows(dtype)],
        orders=orders,
        template=[("T", dtype)],
        grid=(WIDTH, ROWS, 1),
        threadgroup=(WIDTH, 1, 1),
        output_shapes=[(ROWS, WIDTH)],
        output_dtypes=[dtype],
    )
    return y


def rows(dtype: mx.Dtype) -> mx.array:
    return (mx.arange(ROWS * WIDTH).reshape(ROWS, WIDTH) % 7).astype(dtype)


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16])
def test_a_kernel_without_faults_computes_what_it_says(dtype: mx.Dtype) -> None:
    expected = mx.broadcast_to(rows(mx.float32).sum(axis=1, keepdims=True), (ROWS, WIDTH)).astype(dtype)
    assert mx.array_equal(run(SUMS, dtype), expected)


BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"
STORE = "y[row * x_shape[1] + t] ="

FAULTS = {
    "a dropped barrier": (BARRIER, "", "no barrier between|nothing has been written"),
    "a barrier for other memory": ("mem_flags::mem_threadgroup", "mem_flags::mem_device", "no barrier between|nothing"),
    "a barrier that some threads skip": (BARRIER, f"{BARRIER} if (t < 40) {BARRIER}", "diverge"),
    "a SIMD function that some lanes skip": ("simd_sum(", "t == 3 ? 0.0f : simd_sum(", "diverge"),
    "a thread that ends too early": ("float total = 0;", f"if (t == 5) return; {BARRIER} float total = 0;", "diverge"),
    "an off-by-one bound": ("i < simdgroups", "i <= simdgroups", r"partial\[3\], which nothing has been written to"),
    "a read past the end of an input": ("x[row * x_shape[1] + t]", "x[row * x_shape[1] + t + 1]", r"reads x\[288\]"),
    "a read before the start": (
        "x[row * x_shape[1] + t]",
        "x[int(row * x_shape[1] + t) - 1]",
        r"reads x\[-1\], outside",
    ),
    "a write past the end": (STORE, "y[(row + 1) * x_shape[1] + t] =", r"writes y\[288\]|another group"),
    "a write to an input": (STORE, "const_cast<device T*>(x)[t] = T(0); y[row * x_shape[1] + t] =", "an input"),
    "an output that is not written": (STORE, "if (t != 95) y[row * x_shape[1] + t] =", r"y\[95\] was never written"),
    "an output read before it is written": (
        "T(total)",
        "T(total + y[row * x_shape[1] + t])",
        "nothing has been written",
    ),
    "two groups that write one value": (STORE, "y[t] =", "another group has written"),
    "two threads that write one value": (STORE, "y[row * x_shape[1] + t / 2] =", "no barrier between"),
    "threadgroup memory past its end": ("] = own", "+ 30] = own", "past an array|outside of its 32 values"),
    "too much threadgroup memory": ("partial[32]", "partial[8193]", "32772 bytes of threadgroup memory"),
    "a local array past its end": ("total += partial[i]", "{float a[2] = {1, 2}; total += a[i];}", "past an array"),
    "a lane that does not exist": ("simd_sum(", "simd_shuffle(float(x[0]), 40) + simd_sum(", "lane 40"),
    "a float stored as bfloat": ("T(total)", "float(total)", "does not compile"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_caught_and_named(name: str) -> None:
    right, wrong, message = FAULTS[name]
    source = SUMS.replace(right, wrong)
    assert source != SUMS
    dtype = mx.bfloat16 if "bfloat" in name else mx.float32
    with pytest.raises(KernelFaultError, match=message):
        run(source, dtype)


def test_a_value_kept_from_thread_to_thread_is_caught() -> None:
    turns = "static uint turn = 0; y[row * x_shape[1] + t] = T(turn++);"
    with pytest.raises(KernelFaultError, match="writes memory that is no buffer's"):
        run(SUMS.replace(STORE + " T(total);", turns))


def test_threadgroup_memory_of_a_form_that_is_not_known_is_refused() -> None:
    source = "[[kernel]] void odd(\n  device float* y [[buffer(0)]]) {\n threadgroup float a[4], b[4];\n}\n"
    with pytest.raises(TranslationError, match="expected: threadgroup TYPE NAME"):
        to_cpp(source)


def test_sixteen_bit_floats_round_to_nearest_even() -> None:
    source = "const uint i = thread_position_in_grid.x; y[i] = T(x[i]); back[i] = float(y[i]);"
    kernel = mx.fast.metal_kernel(name="narrow", input_names=["x"], output_names=["y", "back"], source=source)
    generator = np.random.default_rng(0)
    patterns = np.arange(65536, dtype=np.uint32)
    halves = patterns.astype(np.uint16).view(np.float16).astype(np.float32)
    halves = np.where(np.isfinite(halves), halves, np.inf)
    bfloats, ties = (patterns << 16).view(np.float32), (patterns << 16 | 0x8000).view(np.float32)
    scattered = (generator.standard_normal(8000) * 10.0 ** generator.integers(-9, 6, 8000)).astype(np.float32)
    values = np.concatenate([halves[::8], halves[::8] * np.float32(1 + 2**-11), bfloats[::8], ties[::8], scattered])
    x = mx.array(values[~np.isnan(values)])
    for dtype in (mx.bfloat16, mx.float16):
        y, back = emulate(
            kernel,
            [x],
            orders=[0],
            template=[("T", dtype)],
            grid=(x.size, 1, 1),
            threadgroup=(256, 1, 1),
            output_shapes=[x.shape] * 2,
            output_dtypes=[dtype, mx.float32],
        )
        assert mx.array_equal(y, x.astype(dtype))
        assert mx.array_equal(back, x.astype(dtype).astype(mx.float32))
