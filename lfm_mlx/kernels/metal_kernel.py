"""A kernel written in the Metal Shading Language, and what several of them use."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import mlx.core as mx

Dims = tuple[int, int, int]

SIMD_LANES = 32
"""Threads of a SIMD group on every Apple GPU."""

MAX_THREADS = 1024
"""Most threads of a threadgroup."""

GROUP_SUM = """
// The sum of `value` over all threads of the group, in each of them. `partial` has room for a value a SIMD group; SIMD
// groups are full. Called once: a second call would write `partial` while others read it.
inline float group_sum(float value, threadgroup float* partial, uint lane, uint simdgroup, uint num_simdgroups) {
  value = metal::simd_sum(value);
  if (lane == 0) {
    partial[simdgroup] = value;
  }
  metal::threadgroup_barrier(metal::mem_flags::mem_threadgroup);
  return metal::simd_sum(lane < num_simdgroups ? partial[lane] : 0.0f);
}
"""


class MetalKernel:
    """A kernel of `mx.fast.metal_kernel`, built when it is first launched.

    Args:
        name: what Metal calls it.
        inputs: the names of its inputs in `source`.
        outputs: the names of its outputs in `source`.
        source: the body of the kernel; MLX writes the signature.
        header: functions that the body calls.
    """

    def __init__(
        self, name: str, *, inputs: Sequence[str], outputs: Sequence[str], source: str, header: str = ""
    ) -> None:
        self.name = name
        self.inputs = list(inputs)
        self.outputs = list(outputs)
        self.source = source
        self.header = header

    def launch(
        self,
        inputs: Sequence[mx.array],
        *,
        template: Sequence[tuple[str, Any]],
        grid: Dims,
        threadgroup: Dims,
        output_shapes: Sequence[Sequence[int]],
        output_dtypes: Sequence[mx.Dtype],
    ) -> list[mx.array]:
        """One launch; arguments as of a kernel of `mx.fast.metal_kernel`. Only on Metal."""
        kernel = built(self.name, tuple(self.inputs), tuple(self.outputs), self.source, self.header)
        made: list[mx.array] = kernel(
            inputs=list(inputs),
            template=list(template),
            grid=grid,
            threadgroup=threadgroup,
            output_shapes=list(output_shapes),
            output_dtypes=list(output_dtypes),
        )
        return made


@functools.cache
def built(name: str, inputs: tuple[str, ...], outputs: tuple[str, ...], source: str, header: str) -> Any:
    """What `mx.fast.metal_kernel` makes of a kernel; kept."""
    return mx.fast.metal_kernel(
        name=f"lfm_mlx_{name}", input_names=list(inputs), output_names=list(outputs), source=source, header=header
    )


def threads_for(width: int, values_per_thread: int) -> int:
    """Threads that a row of `width` values takes, in full SIMD groups."""
    threads = -(-width // values_per_thread)
    return -(-threads // SIMD_LANES) * SIMD_LANES


@functools.cache
def constant(value: float) -> mx.array:
    """A float32 scalar for a kernel; kept, as an array made in the step would have to be uploaded each time."""
    made = mx.array(value, dtype=mx.float32)
    mx.eval(made)
    return made
