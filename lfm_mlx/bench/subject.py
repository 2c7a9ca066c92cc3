"""What a question is asked about: a checkpoint or a named geometry, on this side and on a peer's."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import mlx.core as mx

from lfm_mlx.bench.machine import backend, memory_bytes
from lfm_mlx.bench.peer import loaded_peer, made_up_peer
from lfm_mlx.bench.shapes import MadeUp, RandomWeights, ViewWeights, config_named, made_up_model, made_up_part
from lfm_mlx.bench.sides import Ours, Side
from lfm_mlx.config import ModelConfig, Quantization, QuantizationConfig, read_config
from lfm_mlx.distributed import Mode, Ranks, join_ranks, ranks_of
from lfm_mlx.errors import MemoryPlanError, OptionError
from lfm_mlx.hub import fetch
from lfm_mlx.load import compute_dtype, load
from lfm_mlx.model import Model
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
        num_ranks: processes that share the model, started by ``mlx.launch``; each of them asks the question.
        mode: how it is cut among them.
        asked: what else was asked, which all ranks have to have alike.
        joined: the ranks, once the model is there.

    Raises:
        OptionError: `peer` together with `kv_bits` or several ranks.
    """

    shapes: str = LARGE_SHAPES
    model: str | None = None
    bits: int = 4
    kv_bits: int | None = None
    peer: bool = False
    num_ranks: int = 1
    mode: Mode = "tensor"
    asked: Mapping[str, object] = field(default_factory=dict)
    joined: list[Ranks] = field(default_factory=list, compare=False, repr=False)

    def __post_init__(self) -> None:
        if self.peer and self.kv_bits is not None:
            raise OptionError(f"kv_bits is {self.kv_bits}, expected None beside a peer: its own caches are compared")
        if self.peer and self.num_ranks > 1:
            raise OptionError(
                f"peer is mlx-lm, which does not share this model among {self.num_ranks} ranks; leave --peer or "
                f"--{self.mode}-parallel out"
            )

    @property
    def name(self) -> str:
        """What to call it."""
        ranks = f", {self.num_ranks} ranks ({self.mode})" if self.num_ranks > 1 else ""
        return (self.model or f"{self.shapes} ({self.bits}-bit, made-up weights)") + ranks

    @property
    def parameters(self) -> dict[str, Any]:
        """For the report."""
        model = {"shapes": self.shapes, "bits": self.bits} if self.model is None else {"model": self.model}
        ranks = {"ranks": self.num_ranks, "mode": self.mode} if self.num_ranks > 1 else {}
        return {**model, "kv_bits": self.kv_bits, "peer": self.peer, **ranks}

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
        if self.num_ranks > 1:
            return [Ours(self._made_up(weights, mx.bfloat16), is_compiled=True, kv_bits=self.kv_bits)]
        sides: list[Side] = [Ours(made_up_model(weights, mx.bfloat16), is_compiled=True, kv_bits=self.kv_bits)]
        return [*sides, made_up_peer(weights, mx.bfloat16)] if self.peer else sides

    def to_run(self) -> list[Side]:
        """Sides with weights in memory, each its own.

        Raises:
            MemoryPlanError: two copies of the weights do not fit this machine.
        """
        model = self.to_hold()
        self._check_room(model.num_bytes)
        ours = Ours(model, kv_bits=self.kv_bits)
        if not self.peer:
            return [ours]
        if self.model is not None:
            return [ours, loaded_peer(str(self.folder), self.config, model.dtype)]
        return [ours, made_up_peer(RandomWeights(self.config, self.bits), model.dtype)]

    def to_hold(self) -> Model:
        """Our model with weights in memory: on several ranks, this one's part."""
        if self.model is None:
            return self._made_up(RandomWeights(self.config, self.bits), self.made_up_dtype())
        if self.num_ranks == 1:
            return load(self.model).model
        model = load(self.model, **{f"{self.mode}_parallel": self.num_ranks}).model  # type: ignore[arg-type]
        ranks = ranks_of(model)
        assert ranks is not None
        ranks.link.agree({"kv_bits": self.kv_bits, **self.asked})
        self.joined.append(ranks)
        return model

    def _made_up(self, weights: MadeUp, dtype: mx.Dtype) -> Model:
        if self.num_ranks == 1:
            return made_up_model(weights, dtype)
        named = {"shapes": self.shapes, "model": self.model, "bits": self.bits, "kv_bits": self.kv_bits}
        ranks = join_ranks(self.num_ranks, self.mode, {**named, **self.asked})
        self.joined.append(ranks)
        with ranks.link.failing_together():
            return made_up_part(weights, dtype, ranks)

    def is_answered_elsewhere(self) -> bool:
        """On a rank other than 0, wait until rank 0 has what it asked for; returns whether this is such a rank."""
        for ranks in self.joined:
            if not ranks.is_leader:
                ranks.link.wait_for_end()
                return True
        return False

    def made_up_dtype(self) -> mx.Dtype:
        """The dtype that made-up weights compute in here."""
        num_values = sum(math.prod(shape) for shape in expected_tensors(self.config).values())
        config = replace(self.config, quantization=QuantizationConfig(default=Quantization(bits=self.bits)))
        return compute_dtype(config, weight_bytes=num_values * self.bits // 8)

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
