"""The Metal source that MLX generates for a kernel, and the same as C++ for g++ and `metal_subset.h`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

Dims = tuple[int, int, int]

_SIGNATURE = re.compile(r"\[\[kernel\]\] void (?P<name>\w+)\((?P<parameters>.*?)\) \{\n", re.DOTALL)
_INSTANCE = re.compile(
    r"^template \[\[host_name\(.*?\)\]\] \[\[kernel\]\] decltype\((?P<instance>.*)\) .*;$", re.MULTILINE
)
_BUFFER = re.compile(
    r"(?:const )?(?:device|constant) (?P<type>[\w:<> ]+?)(?P<by>[*&]) (?P<name>\w+) \[\[buffer\((\d+)\)\]\]"
)
_BUILTIN = re.compile(r"(?P<type>uint3?) \w+ \[\[(?P<builtin>\w+)\]\]")
_SHARED = re.compile(r"\bthreadgroup\s+(?P<type>\w+)\s+(?P<name>\w+)\s*(?P<extents>(?:\[[^\]]+\])*)\s*;")
_OTHER_SHARED = re.compile(r"\bthreadgroup\s+\w+\s+\w+\s*[=,\[;]")

_BUILTINS = {
    "thread_position_in_threadgroup": "position_in_threadgroup",
    "thread_position_in_grid": "position_in_grid",
    "threadgroup_position_in_grid": "group_position",
    "threads_per_threadgroup": "group_size",
    "threads_per_grid": "grid_size",
    "threadgroups_per_grid": "num_groups",
    "thread_index_in_threadgroup": "index_in_threadgroup",
    "simdgroup_index_in_threadgroup": "simdgroup_index",
    "thread_index_in_simdgroup": "lane_index",
    "simdgroups_per_threadgroup": "num_simdgroups",
}


class TranslationError(Exception):
    """The source uses Metal in a way that the emulator does not know."""


@dataclass(frozen=True, kw_only=True)
class Launch:
    """One call of a kernel, as MLX would hand it to Metal.

    Args:
        source: all of the Metal source, with signature and instantiation.
        grid: threads in all.
        group: threads of a threadgroup.
        has_row_contiguous_inputs: whether MLX copies inputs that are not.
    """

    source: str
    grid: Dims
    group: Dims
    has_row_contiguous_inputs: bool


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """A buffer of a kernel: its name, and whether the kernel writes it."""

    name: str
    is_output: bool


def generated(kernel: Any, inputs: Sequence[mx.array], call: dict[str, Any]) -> Launch:
    """What MLX generates when `kernel`, made by `mx.fast.metal_kernel`, is called.

    MLX does so wherever it runs, while a function is exported; nothing is computed.
    """
    records: list[dict[str, Any]] = []
    mx.export_function(records.append, lambda *arrays: kernel(inputs=list(arrays), **call), *inputs)
    (found,) = [record["arguments"] for record in records if record.get("name") == "CustomKernel"]
    _, source, *dims = found[:8]
    return Launch(source=source, grid=tuple(dims[:3]), group=tuple(dims[3:]), has_row_contiguous_inputs=found[9])


def parameters(source: str) -> list[Parameter]:
    """The buffers of a kernel, in order."""
    signature = _signature(source)
    return [
        Parameter(name=match["name"], is_output=not match[0].startswith("const "))
        for match in _BUFFER.finditer(signature["parameters"])
    ]


def to_cpp(source: str) -> str:
    """C++ that runs the kernel through `metal_subset.h`; line numbers in messages are those of `source`.

    Raises:
        TranslationError: the source has threadgroup memory or parameters of a form that is not known.
    """
    signature = _signature(source)
    instance = _INSTANCE.search(source)
    called = instance["instance"] if instance else signature["name"]
    body = _INSTANCE.sub("", source)
    body = _SHARED.sub(_shared_array, body)
    if found := _OTHER_SHARED.search(body):
        raise TranslationError(
            f"threadgroup memory is declared as {found[0]!r}, expected: threadgroup TYPE NAME[SIZE];"
        )
    arguments, buffers = [], 0
    for text in signature["parameters"].split(",\n"):
        if match := _BUFFER.search(text):
            star = "*" if match["by"] == "&" else ""
            arguments.append(f"{star}static_cast<{match['type']}*>(buffers[{buffers}])")
            buffers += 1
        elif (match := _BUILTIN.search(text)) and match["builtin"] in _BUILTINS:
            arguments.append(f"emulator::{_BUILTINS[match['builtin']]}()")
        else:
            raise TranslationError(f"the kernel has the parameter {text.strip()!r}, which the emulator does not know")
    call = f'extern "C" void emulator_call_kernel(void* const* buffers) {{\n  {called}({", ".join(arguments)});\n}}\n'
    return f'#include "metal_subset.h"\n#line 1 "kernel"\n{body}\n{call}'


def _signature(source: str) -> re.Match[str]:
    found = _SIGNATURE.search(source)
    if found is None:
        raise TranslationError("the source has no [[kernel]] function")
    return found


def _shared_array(match: re.Match[str]) -> str:
    name, kind = match["name"], f"{match['type']}{match['extents']}"
    place = f'emulator::shared({match.start()}, "{name}", sizeof({kind}), sizeof({match["type"]}))'
    return f"auto& {name} = *static_cast<std::add_pointer_t<{kind}>>({place});"
