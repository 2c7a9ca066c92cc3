"""Kernel launches of a step, counted from its graph without running it.

A node of the graph is one launch, with these exceptions, read in MLX's Metal sources (mlx/backend/gpu, backend/metal):

* Views launch nothing: they share their input's memory (`FREE`).
* A concatenation copies each input into place: one launch an input.
* A chain of elementwise operations that `mx.compile` fused is one node and one launch.
* Writing into an array (SliceUpdate, ScatterAxis) is one launch, as its input is given away.
* Operations of `mx.fast`, `mx.dequantize` and `mx.quantize` are one launch. MLX's CPU backend expands them into many
  nodes, so while counting each is replaced by a stand-in of one node (`stand_ins`), on every backend alike.
* What ranks add up or gather counts as one launch, though the processor does it and the GPU waits.
* A fused kernel of our own is one launch. Without Metal it cannot even be put into a graph, so there a stand-in of one
  node takes its place too, with the same inputs and outputs, and it is assumed to have passed its trial.

What a graph does not show is counted by `lfm_mlx.bench.layouts` (copies that a kernel makes because it cannot read its
input's layout) or not at all: attention takes two launches instead of one from 4,096 tokens on (1,024 on Max and Ultra
chips), and sorting the whole vocabulary takes about fourteen.
"""

from __future__ import annotations

import collections
import contextlib
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx

from lfm_mlx.bench.machine import backend
from lfm_mlx.errors import OptionError
from lfm_mlx.kernels import FusedKernel, MetalKernel, Verdict, choice, compiling, has_metal, quantized_products

FREE = frozenset(
    {
        "AsStrided",
        "Bitcast",
        "Broadcast",
        "BroadcastAxes",
        "Copy",
        "CustomTransforms",
        "Depends",
        "ExpandDims",
        "Flatten",
        "Identity",
        "NumberOfElements",
        "Reshape",
        "Slice",
        "Split",
        "Squeeze",
        "StopGradient",
        "Transpose",
        "Unflatten",
        "View",
    }
)
"""Primitives that share memory instead of launching a kernel; for Reshape and Flatten see `lfm_mlx.bench.layouts`."""

KINDS = {
    "QuantizedMatmul": "matmul",
    "Matmul": "matmul",
    "AddMM": "matmul",
    "GatherQMM": "expert matmul",
    "GatherMM": "expert matmul",
    "CumSum": "norm",
    "CumProd": "rope",
    "CumMax": "attention",
    "Sort": "dequantize",
    "CumMin": "quantize",
    "SliceUpdate": "cache write",
    "ScatterAxis": "cache write",
    "Scatter": "cache write",
    "ArgPartition": "expert choice",
    "Gather": "gather",
    "GatherAxis": "gather",
    "CumLogAddExp": "fused kernel",
    "CustomKernel": "fused kernel",
    "Arange": "index",
    "Concatenate": "copy",
    "Contiguous": "copy",
    "AsType": "copy",
    "Full": "copy",
    "Convolution": "convolution",
    "Reduce": "reduction",
    "AllReduce": "collective",
    "AllGather": "collective",
}
"""What a primitive does in a decode step; all others are elementwise. Scans and sorts are stand-ins (`stand_ins`)."""

PASSED = Verdict(problem=None, kernel_us=0.0, reference_us=0.0)
"""What is assumed of a fused kernel where it cannot be tried out."""

_NODE = re.compile(r'^\{ \d+ \[label ="(?P<primitive>[^"]*)", shape=rectangle\]; \}$')
_INPUT = re.compile(r'^"(?P<array>[^"]*)" -> \d+$')
_OUTPUT = re.compile(r'^\d+ -> "(?P<array>[^"]*)"$')


@dataclass(kw_only=True)
class Node:
    """One operation: its primitive and the arrays it reads and makes, by name."""

    primitive: str
    inputs: list[str] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)

    @property
    def launches(self) -> int:
        """Kernels it launches."""
        if self.primitive in FREE:
            return 0
        return len(self.inputs) if self.primitive == "Concatenate" else 1

    @property
    def kind(self) -> str:
        """What it does, for people."""
        known = KINDS.get(self.primitive)
        return known or ("fused elementwise" if self.primitive.startswith("Compiled") else "elementwise")


@dataclass(frozen=True, kw_only=True)
class Count:
    """The launches of a step.

    Args:
        total: all of them.
        by_kind: what they do, most frequent first.
        by_layer: launches of each layer; -1 stands for what comes before the first layer or serves several, and one
            past the last for final norm and head. Empty where no weights were named.
    """

    total: int
    by_kind: Mapping[str, int]
    by_layer: Mapping[int, int]


def count(outputs: Sequence[mx.array], weights: Mapping[int, Sequence[mx.array]] | None = None) -> Count:
    """Count the launches that evaluating `outputs` takes; nothing is evaluated.

    Args:
        outputs: unevaluated arrays, made within `stand_ins`.
        weights: arrays by the layer they belong to, -1 for the embedding; tells the layer of every operation.
    """
    named = {f"layer {layer} {i}": array for layer, arrays in (weights or {}).items() for i, array in enumerate(arrays)}
    nodes = read_graph(outputs, named)
    by_kind: collections.Counter[str] = collections.Counter()
    by_layer: collections.Counter[int] = collections.Counter()
    for node, layer in zip(nodes, layers_of(nodes), strict=True):
        by_kind[node.kind] += node.launches
        by_layer[layer] += node.launches
    return Count(
        total=sum(by_kind.values()),
        by_kind={kind: number for kind, number in by_kind.most_common() if number},
        by_layer={layer: by_layer[layer] for layer in sorted(by_layer)} if weights else {},
    )


def read_graph(outputs: Sequence[mx.array], named: Mapping[str, mx.array] | None = None) -> list[Node]:
    """The operations that lead to `outputs`, inputs before their readers; `named` arrays appear under their names."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "graph.dot"
        mx.export_to_dot(str(path), *outputs, **(named or {}))
        text = path.read_text(encoding="utf-8")
    nodes: list[Node] = []
    # A node's edges follow it. Its number does not tell it from others: all calls of a compiled function share one.
    for line in text.splitlines():
        if match := _NODE.match(line):
            words = match["primitive"].split()  # "View uint32", "Sum AllReduce"
            nodes.append(Node(primitive=words[-1] if words[-1] == "AllReduce" else words[0]))
        elif match := _INPUT.match(line):
            nodes[-1].inputs.append(match["array"])
        elif match := _OUTPUT.match(line):
            nodes[-1].outputs.append(match["array"])
    return nodes


def layers_of(nodes: Sequence[Node]) -> list[int]:
    """The layer of each operation: the last one whose weights it depends on.

    An operation that depends on no weights belongs to the layer that reads it, or to -1 where several do.
    """
    depths: dict[str, int | None] = {}
    found: list[int | None] = []
    readers: dict[str, list[int]] = collections.defaultdict(list)
    for i, node in enumerate(nodes):
        known = [depth for name in node.inputs if (depth := _depth(name, depths)) is not None]
        found.append(max(known, default=None))
        depths.update(dict.fromkeys(node.outputs, found[i]))
        for name in node.inputs:
            readers[name].append(i)
    for i in reversed(range(len(nodes))):
        if found[i] is None:
            layers = {found[reader] for name in nodes[i].outputs for reader in readers[name]}
            found[i] = layers.pop() if len(layers) == 1 else -1
    return [-1 if layer is None else layer for layer in found]


def _depth(name: str, depths: Mapping[str, int | None]) -> int | None:
    return int(name.split()[1]) if name.startswith("layer ") else depths.get(name)


def require_compiler() -> None:
    """Refuse to count or time compiled steps where MLX cannot compile.

    Raises:
        OptionError: MLX uses the CPU, where it compiles through g++, and there is none.
    """
    if backend() == "cpu" and shutil.which("g++") is None:
        raise OptionError(
            "no g++ was found on the PATH: MLX's CPU backend compiles through it; install it, or use a GPU"
        )


@contextlib.contextmanager
def stand_ins(*, is_linked: bool = True, are_kernels_real: bool = False) -> Iterator[None]:
    """Within: operations that are one kernel on a GPU make one node on every backend. Never evaluate what they make.

    Args:
        is_linked: whether norm, rope, attention and fused kernels depend on all their inputs, which takes a second
            node; without, they are one node of one input, and cost about as much to build as the real ones.
        are_kernels_real: whether fused kernels are put into the graph themselves where there is no Metal, which works
            only within `mx.export_function`; what ranks do together, it cannot export, and stand-ins take its place.
    """
    replaced: dict[tuple[Any, str], Any] = {
        (mx.fast, "rms_norm"): _norm if is_linked else _light_norm,
        (mx.fast, "rope"): _rope if is_linked else _light_rope,
        (mx.fast, "scaled_dot_product_attention"): _attention if is_linked else _light_attention,
        (mx, "dequantize"): _dequantize,
        (mx, "quantize"): _quantize,
        (compiling, "is_compiling"): lambda: True,  # some functions take another road where nothing is compiled
        (quantized_products, "is_widening"): lambda dtype: False,
    }
    if not has_metal():
        replaced[choice, "has_metal"] = lambda: True
        replaced[FusedKernel, "verdict"] = lambda kernel, case, is_forced: PASSED
        if not are_kernels_real:
            replaced[MetalKernel, "launch"] = _launch if is_linked else _light_launch
    if are_kernels_real:
        replaced[mx.distributed, "all_sum"] = lambda x, group, stream: mx.sort(x, axis=-1)
        replaced[mx.distributed, "all_gather"] = lambda x, group, stream: mx.concatenate([x] * group.size())
    originals = {place: getattr(*place) for place in replaced}
    for (module, name), stand_in in replaced.items():
        setattr(module, name, stand_in)
    try:
        yield
    finally:
        for (module, name), original in originals.items():
            setattr(module, name, original)


def _with(x: mx.array, *others: object) -> mx.array:
    """`x`, depending on the arrays among `others`."""
    arrays = [other for other in others if isinstance(other, mx.array)]
    return mx.depends([x], arrays)[0] if arrays else x


def _norm(x: mx.array, weight: mx.array | None, eps: float, **_: Any) -> mx.array:
    return mx.cumsum(_with(x, weight), axis=-1)


def _rope(x: mx.array, dims: int, *, offset: int | mx.array, **_: Any) -> mx.array:
    return mx.cumprod(_with(x, offset), axis=-1)


def _attention(
    q: mx.array, k: mx.array, v: mx.array, *, scale: float, mask: mx.array | str | None = None, **_: Any
) -> mx.array:
    return mx.cummax(_with(q, k, v, mask), axis=-1)


def _light_norm(x: mx.array, weight: mx.array | None, eps: float, **_: Any) -> mx.array:
    return mx.cumsum(x, axis=-1)


def _light_rope(x: mx.array, dims: int, **_: Any) -> mx.array:
    return mx.cumprod(x, axis=-1)


def _light_attention(q: mx.array, k: mx.array, v: mx.array, **_: Any) -> mx.array:
    return mx.cummax(q, axis=-1)


def _dequantize(
    w: mx.array,
    /,
    scales: mx.array,
    biases: mx.array | None = None,
    group_size: int | None = None,
    bits: int | None = None,
    **_: Any,
) -> mx.array:
    shape = (*w.shape[:-1], w.shape[-1] * 32 // (bits or 4))
    spread = mx.as_strided(scales, shape, (0,) * len(shape))
    return mx.sort(_with(spread, w, biases), axis=-1)


def _launch(kernel: MetalKernel, inputs: Sequence[mx.array], **call: Any) -> list[mx.array]:
    return _light_launch(kernel, [_with(*inputs)], **call)


def _light_launch(
    kernel: MetalKernel,
    inputs: Sequence[mx.array],
    *,
    output_shapes: Sequence[Sequence[int]],
    output_dtypes: Sequence[mx.Dtype],
    **_: Any,
) -> list[mx.array]:
    made = mx.logcumsumexp(inputs[0], axis=-1)
    return [
        mx.as_strided(made.view(dtype), shape, (0,) * len(shape))
        for shape, dtype in zip(output_shapes, output_dtypes, strict=True)
    ]


def _quantize(
    w: mx.array, /, group_size: int | None = None, bits: int | None = None, **_: Any
) -> tuple[mx.array, mx.array, mx.array]:
    made = mx.cummin(w, axis=-1)
    outer, width = w.shape[:-1], w.shape[-1]
    packed, groups = (*outer, width * (bits or 4) // 32), (*outer, width // (group_size or 64))
    codes = mx.as_strided(made.view(mx.uint32), packed, (0,) * len(packed))
    scales = mx.as_strided(made, groups, (0,) * len(groups))
    return codes, scales, scales
