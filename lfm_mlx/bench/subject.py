"""What a question is asked about: a checkpoint or a named geometry, on this side and on a peer's."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx

from lfm_mlx.bench.machine import backend, memory_bytes
from lfm_mlx.bench.peer import Peer, loaded_peer, made_up_peer
from lfm_mlx.bench.shapes import RandomWeights, ViewWeights, config_named, made_up_model
from lfm_mlx.bench.sides import Ours, Side
from lfm_mlx.config import ModelConfig, Quantization, QuantizationConfig, read_config
from lfm_mlx.errors import MemoryPlanError, OptionError
from lfm_mlx.hub import fetch
from lfm_mlx.load import compute_dtype, load
from lfm_mlx.names import expected_tensors
from lfm_mlx.sampling import recommended_sampling
from lfm_mlx.terminal import format_bytes
from lfm_mlx.types import SamplingParams

LARGE_SHAPES = "lfm2.5-8b-a1b"
LARGE_SHAPES_BYTES = 14_000_000_000
"""Memory from which a GPU gets the largest default."""


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model by checkpoint or by geometry.

    Args:
        shapes: a name in `lfm_mlx.bench.shapes.SHAPES`; ignored with `model`.
        model: folder or repo id of a checkpoint.
        bits: bits of made-up weights.
        kv_bits: 8 or 4 to quantise keys and values; not together with `peer`.
        peer: whether mlx-lm does the same work.

    Raises:
        OptionError: both `kv_bits` and `peer`.
    """

    shapes: str = LARGE_SHAPES
    model: str | None = None
    bits: int = 4
    kv_bits: int | None = None
    peer: bool = False

    def __post_init__(self) -> None:
        if self.peer and self.kv_bits is not None:
            raise OptionError(f"kv_bits is {self.kv_bits}, expected None beside a peer: its own caches are compared")

    @property
    def name(self) -> str:
        """What to call it."""
        return self.model or f"{self.shapes} ({self.bits}-bit, made-up weights)"

    @property
    def parameters(self) -> dict[str, Any]:
        """For the report."""
        model = {"shapes": self.shapes, "bits": self.bits} if self.model is None else {"model": self.model}
        return {**model, "kv_bits": self.kv_bits, "peer": self.peer}

    @property
    def config(self) -> ModelConfig:
        """Its architecture."""
        return read_config(self.folder) if self.model is not None else config_named(self.shapes)

    @property
    def folder(self) -> Path:
        """Where the checkpoint lies; downloads it where `model` is a repo id."""
        if self.model is None:
            raise OptionError(f"shapes is {self.shapes!r}, which is no checkpoint; name one with --model")
        return fetch(self.model)

    def sampling(self) -> SamplingParams:
        """How its model card wants tokens to be drawn."""
        config = self.config
        return recommended_sampling(
            model_type=config.model_type, vocab_size=config.vocab_size, name=self.model or self.shapes
        )

    def without_memory(self) -> list[Side]:
        """Sides to build steps with and never to run: compiled as on a GPU, in bfloat16, whatever the device."""
        weights = ViewWeights(self.config, self.bits)
        sides: list[Side] = [Ours(made_up_model(weights, mx.bfloat16), is_compiled=True, kv_bits=self.kv_bits)]
        return [*sides, made_up_peer(weights, mx.bfloat16)] if self.peer else sides

    def to_run(self) -> list[Side]:
        """Sides with weights in memory, each its own.

        Raises:
            MemoryPlanError: two copies of the weights do not fit this machine.
        """
        if self.model is not None:
            model = load(self.model).model
            self._check_room(model.num_bytes)
            return [Ours(model, kv_bits=self.kv_bits), *self._loaded_peer(model.dtype)]
        weights = RandomWeights(self.config, self.bits)
        dtype = self.made_up_dtype()
        ours = Ours(made_up_model(weights, dtype), kv_bits=self.kv_bits)
        self._check_room(ours.model.num_bytes)
        return [ours, made_up_peer(weights, dtype)] if self.peer else [ours]

    def made_up_dtype(self) -> mx.Dtype:
        """The dtype that made-up weights compute in here."""
        num_values = sum(math.prod(shape) for shape in expected_tensors(self.config).values())
        config = replace(self.config, quantization=QuantizationConfig(default=Quantization(bits=self.bits)))
        return compute_dtype(config, weight_bytes=num_values * self.bits // 8)

    def _loaded_peer(self, dtype: mx.Dtype) -> list[Peer]:
        return [loaded_peer(str(self.folder), self.config, dtype)] if self.peer else []

    def _check_room(self, weight_bytes: int) -> None:
        needed = weight_bytes * 2 * 1.1
        if self.peer and needed > memory_bytes():
            raise MemoryPlanError(
                f"--peer holds the weights twice, {format_bytes(needed)}, and this machine has "
                f"{format_bytes(memory_bytes())}; leave --peer out, or choose smaller --shapes"
            )


def default_shapes() -> str:
    """The largest geometry that a run of a few minutes can take on this machine."""
    if backend() == "cpu":
        return "tiny-moe"
    return LARGE_SHAPES if memory_bytes() >= LARGE_SHAPES_BYTES else "lfm2-1.2b"


def has_room_for_peer() -> bool:
    """Whether the weights of `default_shapes` fit this machine twice."""
    return default_shapes() != LARGE_SHAPES or memory_bytes() >= 2 * LARGE_SHAPES_BYTES


def uneven_lengths(batch_size: int, context: int) -> list[int]:
    """Lengths of rows, the longest `context`; no two alike where that is possible."""
    step = max(1, min(37, (context - 1) // max(batch_size - 1, 1)))
    return [max(1, context - row * step) for row in range(batch_size)]
