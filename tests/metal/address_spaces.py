"""Type-checks a kernel's address spaces with libclang: C++ for OpenCL has the same four as Metal.

g++ knows none: `metal_subset.h` makes `device`, `constant`, `threadgroup` and `thread` empty. What is not found here: a
pointer without an address space, which Metal refuses and OpenCL lets point into any but `constant`.
"""

from __future__ import annotations

import re
from typing import Any

_PRELUDE = """
#define device __global
#define constant __constant
#define threadgroup __local
#define thread __private
#define INFINITY __builtin_inff()
typedef unsigned int uint;
typedef int int32_t;
typedef uint uint32_t;
typedef uint uint3 __attribute__((ext_vector_type(3)));
namespace metal {
enum class mem_flags { mem_none, mem_device, mem_threadgroup };
void threadgroup_barrier(mem_flags);
template <typename T> T simd_sum(T);
template <typename T> T simd_min(T);
template <typename T> T simd_max(T);
bool isnan(float);
namespace precise {
float exp(float);
float cos(float);
float sin(float);
float rsqrt(float);
}
}
using namespace metal;
"""

_SHARED = re.compile(r"\bthreadgroup\s+(\w+)\s+(\w+)\s*\[[^\]]+\]\s*;")


def refused(source: str) -> list[str]:
    """What libclang has against the Metal source of a kernel of float32 arrays; nothing where it is right.

    Raises:
        ImportError: libclang is not installed.
    """
    import clang.cindex  # not everywhere: the check is optional

    index: Any = clang.cindex.Index.create()
    # Only OpenCL kernels may declare local arrays, and those may not be templates: a pointer has the same type.
    text = _SHARED.sub(r"threadgroup \1* \2 = (threadgroup \1*)0;", source)
    text = re.sub(r"\s*\[\[[^\]]*(?:\([^)]*\))?\]\]", "", text)
    text = _PRELUDE + text
    options = ["-x", "cl", "-cl-std=clc++", "-cl-no-stdinc"]
    unit = index.parse("kernel.clcpp", args=options, unsaved_files=[("kernel.clcpp", text)])
    errors = [found for found in unit.diagnostics if found.severity >= clang.cindex.Diagnostic.Error]
    return [f"line {found.location.line - _PRELUDE.count(chr(10))}: {found.spelling}" for found in errors]
