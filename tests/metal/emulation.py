"""Runs kernels of `mx.fast.metal_kernel` on the CPU and checks what each thread does with memory.

Caught are: accesses outside of buffers, writes to inputs, reads of what was never written, races, barriers and SIMD
functions that not all threads reach, outputs left unwritten, and results that depend on the order of threads or groups.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from metal.translation import Launch, generated, parameters, to_cpp

COMPILER = "g++"
HERE = Path(__file__).parent
CACHE = HERE.parents[1] / "build" / "emulated_kernels"

IN_ORDER, REVERSED, SHUFFLED = 0, 1, 2
ORDERS = (IN_ORDER, REVERSED, SHUFFLED)
"""Orders in which threads and groups take turns; any larger number shuffles in yet another way."""

_RUNTIME = ("runtime.cpp", "metal_subset.h")
_FLAGS = ["-std=c++17", "-fPIC", "-ffp-contract=off", "-fno-strict-aliasing", "-U_FORTIFY_SOURCE"]
_CHECKED = [
    "-fsanitize=thread",
    "--param=tsan-instrument-func-entry-exit=0",
    "-fsanitize=bounds,signed-integer-overflow,shift,integer-divide-by-zero",
    "-fsingle-precision-constant",
    "-ftrivial-auto-var-init=pattern",
    "-Wno-attributes",
    "-Wno-unused-value",
]


class KernelFaultError(Exception):
    """A kernel did what it must not do; the message says which thread did what."""


class _Buffer(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_char_p),
        ("data", ctypes.c_void_p),
        ("bytes", ctypes.c_uint64),
        ("item_bytes", ctypes.c_uint64),
        ("is_output", ctypes.c_int32),
    )


def has_compiler() -> bool:
    """Whether kernels can be emulated here."""
    return shutil.which(COMPILER) is not None


def emulate(kernel: Any, inputs: Sequence[mx.array], *, orders: Sequence[int] = ORDERS, **call: Any) -> list[mx.array]:
    """Call `kernel` as Metal would run it.

    Args:
        kernel: made by `mx.fast.metal_kernel`.
        inputs: its inputs, evaluated.
        orders: orders of threads and groups in which it runs; all must give the same outputs.
        call: what else the kernel is called with: template, grid, threadgroup, output_shapes, output_dtypes.

    Returns:
        The outputs.

    Raises:
        KernelFaultError: see above.
    """
    launch = generated(kernel, inputs, call)
    runs = [_run(launch, inputs, call["output_shapes"], call["output_dtypes"], order) for order in orders]
    for order, outputs in zip(orders[1:], runs[1:], strict=True):
        if any(a.tobytes() != b.tobytes() for a, b in zip(runs[0], outputs, strict=True)):
            raise KernelFaultError(f"the outputs depend on the order of the threads: {orders[0]} and {order} differ")
    return [
        mx.array(output).view(dtype).reshape(shape)
        for output, shape, dtype in zip(runs[0], call["output_shapes"], call["output_dtypes"], strict=True)
    ]


def _run(
    launch: Launch,
    inputs: Sequence[mx.array],
    shapes: Sequence[Sequence[int]],
    dtypes: Sequence[mx.Dtype],
    order: int,
) -> list[np.ndarray[Any, Any]]:
    runtime, kernel = _runtime(), _compiled(launch.source)
    given = iter(inputs)
    outputs = [
        np.zeros(int(np.prod(shape)), dtype=_as_unsigned(dtype)) for shape, dtype in zip(shapes, dtypes, strict=True)
    ]
    made = iter(outputs)
    arrays: list[np.ndarray[Any, Any]] = []
    names = parameters(launch.source)
    latest: mx.array | None = None
    for parameter in names:
        if parameter.is_output:
            arrays.append(next(made))
        elif latest is not None and parameter.name.endswith("_shape"):
            arrays.append(np.array(latest.shape, dtype=np.int32))
        elif latest is not None and parameter.name.endswith("_ndim"):
            arrays.append(np.array([latest.ndim], dtype=np.int32))
        else:
            latest = next(given)
            assert launch.has_row_contiguous_inputs, "only row-contiguous inputs are emulated"
            arrays.append(np.array(mx.contiguous(latest).view(_UNSIGNED[latest.dtype.size])).reshape(-1))
    buffers = (_Buffer * len(names))(
        *(
            _Buffer(parameter.name.encode(), array.ctypes.data, array.nbytes, array.itemsize, parameter.is_output)
            for parameter, array in zip(names, arrays, strict=True)
        )
    )
    dims = ctypes.c_uint32 * 3
    fault = runtime.emulator_run(kernel, buffers, len(names), dims(*launch.grid), dims(*launch.group), order)
    if fault:
        raise KernelFaultError(fault.decode())
    return outputs


_UNSIGNED = {1: mx.uint8, 2: mx.uint16, 4: mx.uint32, 8: mx.uint64}


def _as_unsigned(dtype: mx.Dtype) -> str:
    return f"u{dtype.size}"


@functools.cache
def _runtime() -> Any:
    CACHE.mkdir(parents=True, exist_ok=True)
    target = CACHE / f"runtime-{_digest(*_FLAGS, *((HERE / name).read_text() for name in _RUNTIME))}.so"
    if not target.exists():
        _compile(["-O2", "-shared", str(HERE / _RUNTIME[0])], target)
    library = ctypes.CDLL(str(target), mode=ctypes.RTLD_GLOBAL)  # kernels find its functions
    library.emulator_run.restype = ctypes.c_char_p
    return library


@functools.cache
def _compiled(source: str) -> Any:
    """The kernel's entry, compiled unless that was done before."""
    text, header = to_cpp(source), (HERE / _RUNTIME[1]).read_text()
    target = CACHE / f"{_digest(text, header, *_FLAGS, *_CHECKED)}.so"
    if not target.exists():
        _compile(["-O1", *_CHECKED, f"-I{HERE}", "-shared", "-nostdlib", "-x", "c++", "-"], target, text)
    return ctypes.CDLL(str(target)).emulator_call_kernel


def _compile(arguments: Sequence[str], target: Path, text: str | None = None) -> None:
    made = target.with_suffix(f".{os.getpid()}")  # put in place whole: another process may want it too
    command = [COMPILER, *_FLAGS, *arguments, "-o", str(made)]
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    if done.returncode:
        raise KernelFaultError(f"the kernel does not compile:\n{done.stderr}")
    made.replace(target)


def _digest(*texts: str) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:24]
