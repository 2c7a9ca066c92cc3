"""What would several machines bring? On paper: bytes, collectives, memory and speed for 1 to 8 ranks."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from lfm_mlx.bench.report import Report
from lfm_mlx.bench.roofline import APPLE_BANDWIDTH
from lfm_mlx.bench.shapes import ViewWeights
from lfm_mlx.bench.subject import Subject
from lfm_mlx.bench.traffic import touched_share
from lfm_mlx.checkpoint import Checkpoint
from lfm_mlx.config import ModelConfig, Quantization
from lfm_mlx.distributed import Mode, RankPart, local_config, part_bytes
from lfm_mlx.distributed.cut import working_sizes
from lfm_mlx.distributed.wire import draw_traffic, layers_traffic, step_traffic
from lfm_mlx.errors import OptionError
from lfm_mlx.memory import kv_bytes_per_token, plan_memory
from lfm_mlx.names import EMBEDDING, expected_tensors, is_matrix
from lfm_mlx.terminal import format_bytes

MOST_RANKS = 8
ITEM_BYTES = 2
CHUNK_TOKENS = 512
"""Prompt tokens whose activations travel together."""

WORTH = 1.1
"""Times the speed of one machine from which more machines are said to pay."""

CHIP, TERAFLOPS = "M4 Pro", 8.0


@dataclass(frozen=True, kw_only=True)
class Wire:
    """A connection between machines, as it is assumed to be.

    Args:
        name: what it is called.
        gb_per_s: that one machine sends while it receives as much.
        hop_us: microseconds from one rank to the next.
        is_mesh: whether a collective of any number of ranks takes two hops; else 2 (N - 1).
    """

    name: str
    gb_per_s: float
    hop_us: float
    is_mesh: bool = False

    def seconds(self, num_collectives: float, sent_bytes: float, size: int) -> float:
        """What collectives take that send so much."""
        hops = 2 if self.is_mesh else 2 * (size - 1)
        return num_collectives * hops * self.hop_us * 1e-6 + sent_bytes / self.gb_per_s / 1e9


WIRES = (
    Wire(name="10 GbE", gb_per_s=1.1, hop_us=150),
    Wire(name="Thunderbolt 4 bridge", gb_per_s=2.0, hop_us=150),
    Wire(name="Thunderbolt 5 bridge", gb_per_s=5.0, hop_us=150),
    Wire(name="RDMA over Thunderbolt 5", gb_per_s=6.5, hop_us=10, is_mesh=True),
)

NOTES = (
    "Numbers of ranks that do not divide the model are left out. sent: by one rank.",
    "Wires are assumed, not measured: "
    + "; ".join(f"{w.name} {w.gb_per_s:g} GB/s, {w.hop_us:g} us" for w in WIRES)
    + ".",
    "150 us a hop is half of the 300 us that are reported for a message over TCP; for RDMA 5 to 50 us are reported.",
    "Speeds are upper bounds: decode from weights, keys and values read at the chip's bandwidth, prefill from matrix",
    "products, experts chosen evenly, both with nothing beside them but the wire. wait: the wire's part of decoding.",
)


class _Paper:
    """A model's tensors by name, in bytes."""

    def __init__(self, subject: Subject) -> None:
        self.config: ModelConfig = subject.config
        names = list(expected_tensors(self.config))
        self._weights = (
            Checkpoint(subject.folder) if subject.model is not None else ViewWeights(self.config, subject.bits)
        )
        self.bytes_of = {
            name: self._weights.tensor(name).nbytes
            for base in names
            for name in (base, f"{base.removesuffix('weight')}scales", f"{base.removesuffix('weight')}biases")
            if self._weights.has(name) and (name == base or is_matrix(base))
        }

    def quantization_of(self, name: str) -> Quantization | None:
        """How a matrix is stored."""
        return self._weights.quantization_of(name)


def ask_distributed_plan(
    subject: Subject,
    *,
    context: int = 4096,
    batch_sizes: tuple[int, ...] = (1, 16),
    chip: str = CHIP,
    teraflops: float = TERAFLOPS,
) -> Report:
    """Count what 1 to 8 ranks would hold, send and wait for, and how fast that could be.

    Args:
        subject: which model; nothing of it is loaded.
        context: tokens that a row has seen.
        batch_sizes: numbers of rows decoded together.
        chip: of every machine.
        teraflops: of its matrix products.

    Raises:
        OptionError: the chip is not in the table.
    """
    if chip not in APPLE_BANDWIDTH:
        raise OptionError(f"chip is {chip!r}, expected one of {', '.join(APPLE_BANDWIDTH)}")
    paper = _Paper(subject)
    modes: list[Mode] = ["tensor", "expert"] if paper.config.is_moe else ["tensor"]
    found = []
    for mode in modes:
        for size in working_sizes(paper.config, paper, mode):
            if size <= MOST_RANKS and (size > 1 or mode == "tensor"):
                part = RankPart(rank=0, size=size, mode=mode)
                found.append(
                    _of_size(paper, part, context, batch_sizes, APPLE_BANDWIDTH[chip], teraflops, subject.kv_bits)
                )
    return Report(
        question="distributed",
        parameters={**subject.parameters, "context": context, "batch_sizes": list(batch_sizes), "chip": chip},
        results={"sizes": found, "wires": [vars(wire) for wire in WIRES]},
        title=f"Several machines ({chip}, {teraflops:g} TFLOP/s each) at {context} tokens of context, {subject.name}",
        header=[
            "ranks",
            "weights",
            "memory",
            "sums",
            "sent a token",
            "a prompt's",
            "wire",
            "rows",
            "tokens/s",
            "wait",
            "prefill",
        ],
        rows=[line for one in found for line in _lines(one)],
        notes=[*NOTES, *_verdict(found)],
    )


def _of_size(
    paper: _Paper,
    part: RankPart,
    context: int,
    batch_sizes: tuple[int, ...],
    gb_per_s: float,
    teraflops: float,
    kv_bits: int | None,
) -> dict[str, Any]:
    config, size = paper.config, part.size
    local = local_config(config, part)
    weight_bytes = sum(part_bytes(name, count, part) for name, count in paper.bytes_of.items())
    step = step_traffic(config, size, batch_size=1, item_bytes=ITEM_BYTES)
    chunk = layers_traffic(config, size, num_tokens=CHUNK_TOKENS, num_last=1, item_bytes=ITEM_BYTES)
    chunk += draw_traffic(config, size, batch_size=1, item_bytes=ITEM_BYTES)
    memory = plan_memory(
        local, weight_bytes=weight_bytes, context=context, batch_size=max(batch_sizes), kv_bits=kv_bits
    )
    prefill_s = CHUNK_TOKENS * _operations(config, size) / teraflops / 1e12
    speeds = []
    for wire in WIRES if size > 1 else WIRES[:1]:
        wire_s = wire.seconds(chunk.num_collectives, chunk.sent_bytes, size) if size > 1 else 0.0
        for rows in batch_sizes:
            read = _step_bytes(paper, part, rows) + rows * context * _kv_bytes(local, kv_bits)
            traffic = step_traffic(config, size, batch_size=rows, item_bytes=ITEM_BYTES)
            wait_s = wire.seconds(traffic.num_collectives, traffic.sent_bytes, size) if size > 1 else 0.0
            step_s = read / gb_per_s / 1e9 + wait_s
            speeds.append(
                {
                    "wire": wire.name if size > 1 else None,
                    "rows": rows,
                    "tokens_per_s": rows / step_s,
                    "wait_share": wait_s / step_s,
                    "prefill_tokens_per_s": CHUNK_TOKENS / (prefill_s + wire_s),
                }
            )
    return {
        "ranks": size,
        "mode": part.mode if size > 1 else None,
        "weight_bytes": weight_bytes,
        "memory_bytes": memory.total_bytes,
        "collectives_per_token": step.num_collectives if size > 1 else 0,
        "sent_bytes_per_token": step.sent_bytes,
        "sent_bytes_per_prompt_token": chunk.sent_bytes / CHUNK_TOKENS,
        "speeds": speeds,
    }


def _kv_bytes(local: ModelConfig, kv_bits: int | None) -> int:
    return len(local.attention_layers) * kv_bytes_per_token(local, kv_bits, mx.bfloat16)


def _step_bytes(paper: _Paper, part: RankPart, rows: int) -> float:
    """Bytes of weights that one rank reads in a decode step.

    Where experts are dealt out, those of other ranks are taken for the first one here, of weight zero: it is read too.
    """
    config = paper.config
    touched = touched_share(config, rows) if config.is_moe else 0.0
    if part.mode == "expert" and part.size > 1:
        touched += (1 - touched) * part.size / config.num_experts
    total = 0.0
    for name, count in paper.bytes_of.items():
        share = touched if ".switch_mlp." in name else 1.0
        if name.startswith(EMBEDDING.removesuffix("weight")) and not config.tie_embeddings:
            share = min(1.0, rows / config.vocab_size)
        total += share * part_bytes(name, count, part)
    return total


def _operations(config: ModelConfig, size: int) -> float:
    """Floating-point operations of a prompt's token in the matrices of one rank, experts being chosen evenly."""
    total = 0.0
    for name, shape in expected_tensors(config).items():
        if is_matrix(name) and ".embed_tokens" not in name and not name.startswith("lm_head"):
            active = config.num_active_experts / config.num_experts if ".switch_mlp." in name else 1.0
            total += 2 * active * math.prod(shape) / size
    return total


def _lines(one: dict[str, Any]) -> list[list[object]]:
    first: list[object] = [
        f"{one['ranks']} {one['mode'] or ''}".strip(),
        format_bytes(one["weight_bytes"]),
        format_bytes(one["memory_bytes"]),
        one["collectives_per_token"],
        format_bytes(one["sent_bytes_per_token"]),
        format_bytes(one["sent_bytes_per_prompt_token"]),
    ]
    return [
        [
            *(first if i == 0 else [""] * len(first)),
            speed["wire"] or "-",
            speed["rows"],
            speed["tokens_per_s"],
            f"{100 * speed['wait_share']:.0f} %",
            speed["prefill_tokens_per_s"],
        ]
        for i, speed in enumerate(one["speeds"])
    ]


def _verdict(found: list[dict[str, Any]]) -> list[str]:
    """Where it pays, and where it does not, by the numbers above."""
    alone = {speed["rows"]: speed for speed in found[0]["speeds"]}
    lines = []
    for wire in WIRES:
        gains: dict[str, list[float]] = {}
        for one in found[1:]:
            for speed in one["speeds"]:
                if speed["wire"] == wire.name:
                    base = alone[speed["rows"]]
                    gains.setdefault(f"{speed['rows']} row(s)", []).append(speed["tokens_per_s"] / base["tokens_per_s"])
                    gain = speed["prefill_tokens_per_s"] / base["prefill_tokens_per_s"]
                    gains.setdefault("prefill", []).append(gain)
        told = ", ".join(f"{what} {min(values):.2f} to {max(values):.2f}" for what, values in gains.items())
        lines.append(f"{wire.name}, times the speed of one machine, worst to best number of ranks: {told}")
        worth = [what for what, values in gains.items() if max(values) >= WORTH]
        lines.append(f"  so it pays for {' and '.join(worth) if worth else 'memory alone'}")
    return lines
