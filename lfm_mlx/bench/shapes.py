"""Models of any size without a checkpoint: named geometries, and weights made up for them."""

from __future__ import annotations

import contextlib
import difflib
import math
import zlib
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import mlx.core as mx

from lfm_mlx import build
from lfm_mlx.config import ModelConfig, Quantization
from lfm_mlx.distributed import Cut, RankPart, Ranks, ShardedWeights, check_size, local_config, set_ranks, shard
from lfm_mlx.errors import OptionError
from lfm_mlx.model import Model
from lfm_mlx.names import Shape, expected_tensors, is_matrix, is_router

TAILS = ("normal", "heavy")
"""How weights are distributed: normally, or by Student's t of three degrees, which has outliers as trained ones do."""

BITS = (4, 8, 16)
"""Bits a made-up weight may have; 16 leaves matrices unquantised."""


def _dense(
    hidden: int, layers: int, attention: list[int], heads: int, ffn: int, vocab: int = 65536, theta: float = 1e6
) -> dict[str, Any]:
    return {
        "model_type": "lfm2",
        "vocab_size": vocab,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "full_attn_idxs": attention,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "block_dim": hidden,
        "block_ff_dim": ffn,
        "block_auto_adjust_ff_dim": False,
        "block_multiple_of": 256,
        "block_ffn_dim_multiplier": 1.0,
        "norm_eps": 1e-5,
        "conv_L_cache": 3,
        "conv_bias": False,
        "rope_theta": theta,
        "max_position_embeddings": 128000,
        "tie_word_embeddings": True,
        "dtype": "bfloat16",
    }


def _moe(
    hidden: int,
    layers: int,
    attention: list[int],
    heads: int,
    ffn: int,
    expert_ffn: int,
    experts: int,
    vocab: int = 65536,
    theta: float = 1e6,
) -> dict[str, Any]:
    return {
        **_dense(hidden, layers, attention, heads, ffn, vocab, theta),
        "model_type": "lfm2_moe",
        "intermediate_size": ffn,
        "moe_intermediate_size": expert_ffn,
        "num_experts": experts,
        "num_experts_per_tok": 4,
        "num_dense_layers": 2,
        "use_expert_bias": True,
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.0,
    }


_SMALL = [2, 5, 8, 10, 12, 14]
_LARGE = [2, 5, 9, 13, 17, 21, 24, 27]
_EXPERTS = [2, 6, 10, 14, 18, 21]

SHAPES: Mapping[str, dict[str, Any]] = {
    "lfm2.5-8b-a1b": _moe(2048, 24, _EXPERTS, 32, 7168, 1792, 32, vocab=128000, theta=5e6),
    "lfm2-8b-a1b": _moe(2048, 24, _EXPERTS, 32, 7168, 1792, 32),
    # Which of its 40 layers attend, and the width of its dense layers, are guesses that fit the published totals.
    "lfm2-24b-a2b": _moe(2048, 40, list(range(2, 40, 4)), 32, 11776, 1536, 64),
    "lfm2.5-2.6b": {
        **_dense(2048, 30, _LARGE, 32, 10752, vocab=128000, theta=1e7),
        "max_position_embeddings": 131072,
    },
    "lfm2-2.6b": _dense(2048, 30, _LARGE, 32, 10752),
    "lfm2-1.2b": _dense(2048, 16, _SMALL, 32, 8192),
    "lfm2-700m": _dense(1536, 16, _SMALL, 24, 6912),
    "lfm2-350m": _dense(1024, 16, _SMALL, 16, 4608),
    "lfm2.5-230m": _dense(1024, 14, [2, 4, 6, 8, 10, 12], 16, 2560),
    "tiny-moe": _moe(256, 4, [1, 3], 8, 512, 128, 8, vocab=1024),
    "tiny-dense": _dense(256, 4, [1, 3], 8, 512, vocab=1024),
}
"""config.json by name; the two tiny ones are no published models."""


def config_named(name: str) -> ModelConfig:
    """The geometry of that name.

    Raises:
        OptionError: there is none.
    """
    if name not in SHAPES:
        close = difflib.get_close_matches(name, SHAPES, n=1, cutoff=0)
        raise OptionError(f"shapes is {name!r}, expected one of {', '.join(SHAPES)} (nearest: {close[0]})")
    return ModelConfig.from_dict(SHAPES[name])


class MadeUp(Protocol):
    """Made-up weights: `lfm_mlx.build.Weights`, the config that they are of, and parts of them."""

    config: ModelConfig

    def tensor_part(self, name: str, cut: Cut, part: RankPart) -> mx.array:
        """One rank's part of the tensor, made without the rest."""
        ...

    def has(self, name: str) -> bool:
        """As `lfm_mlx.build.Weights.has`."""
        ...

    def tensor(self, name: str) -> mx.array:
        """As `lfm_mlx.build.Weights.tensor`."""
        ...

    def quantization_of(self, name: str) -> Quantization | None:
        """As `lfm_mlx.build.Weights.quantization_of`."""
        ...


class _Storage:
    """Which tensors there are and how each is stored: by the config, else matrices in `bits` bits and routers in 8."""

    def __init__(self, config: ModelConfig, bits: int = 4) -> None:
        if bits not in BITS:
            raise OptionError(f"bits is {bits!r}, expected one of {', '.join(map(str, BITS))}")
        self.config = config
        self.bits = bits
        self.shapes = expected_tensors(config)

    def has(self, name: str) -> bool:
        """Whether there is a tensor of this name."""
        path, _, part = name.rpartition(".")
        if part in ("scales", "biases"):
            return f"{path}.weight" in self.shapes and self.quantization_of(f"{path}.weight") is not None
        return name in self.shapes

    def quantization_of(self, name: str) -> Quantization | None:
        """How a matrix is stored: as the config says, else by the bits asked for."""
        if not is_matrix(name):
            return None
        if self.config.quantization is not None:
            return self.config.quantization.of(name.removesuffix(".weight"))
        if self.bits == 16:
            return None
        return Quantization(bits=8 if is_router(name) else self.bits)

    def _stored_as(self, name: str) -> tuple[Shape, mx.Dtype]:
        path, _, part = name.rpartition(".")
        matrix = f"{path}.weight" if part in ("scales", "biases") else name
        shape, stored = self.shapes[matrix], self.quantization_of(matrix)
        if stored is None:
            return shape, mx.float32 if part == "expert_bias" else mx.bfloat16
        if part == "weight":
            return (*shape[:-1], shape[-1] * stored.bits // 32), mx.uint32
        return (*shape[:-1], shape[-1] // stored.group_size), mx.bfloat16

    def _part_shape(self, name: str, cut: Cut, part: RankPart) -> Shape:
        shape = list(self._stored_as(name)[0])
        shape[cut.axis] = sum(map(len, cut.ranges(shape[cut.axis], part)))
        return tuple(shape)


class ViewWeights(_Storage):
    """Zeros that take no memory, at any size: to build steps with, not to run them."""

    def tensor(self, name: str) -> mx.array:
        """The tensor: one number, seen as an array of the right shape."""
        return view_of(*self._stored_as(name))

    def tensor_part(self, name: str, cut: Cut, part: RankPart) -> mx.array:
        """As `MadeUp.tensor_part`."""
        return view_of(self._part_shape(name, cut, part), self._stored_as(name)[1])


class RandomWeights(_Storage):
    """Random numbers, scaled so that activations stay finite through all layers; the same for the same name."""

    def tensor(self, name: str) -> mx.array:
        """The tensor; codes are drawn at once."""
        return self._drawn(name, self._stored_as(name)[0], zlib.crc32(name.encode()))

    def tensor_part(self, name: str, cut: Cut, part: RankPart) -> mx.array:
        """As `MadeUp.tensor_part`; numbers of its own, not those of the whole tensor."""
        return self._drawn(name, self._part_shape(name, cut, part), zlib.crc32(f"{name} {part.rank}".encode()))

    def _drawn(self, name: str, shape: Shape, seed: int) -> mx.array:
        whole, dtype = self._stored_as(name)
        path, _, part = name.rpartition(".")
        if part in ("scales", "biases"):
            return mx.full(shape, self._scale(path) * (1.0 if part == "scales" else self._offset(path)), dtype=dtype)
        if dtype == mx.uint32:
            # MLX draws integers through float32: four times the bytes, which would be the peak of what is measured.
            import numpy as np

            generator = np.random.default_rng(seed)
            return mx.array(np.frombuffer(generator.bytes(4 * math.prod(shape)), dtype=np.uint32).reshape(shape))
        if name.endswith("norm.weight"):
            return mx.ones(shape, dtype=dtype)
        width = 0.01 if part == "expert_bias" else 0.5 if name.endswith(".conv.conv.weight") else whole[-1] ** -0.5
        return (mx.random.normal(shape, key=mx.random.key(seed)) * width).astype(dtype)

    def _scale(self, path: str) -> float:
        """The step between codes that gives a matrix of D columns about the standard deviation 1 / sqrt(D).

        A power of two, so that the offset has no rounding error: it would be the same everywhere and add up.
        """
        stored = self.quantization_of(f"{path}.weight")
        assert stored is not None
        columns = self.shapes[f"{path}.weight"][-1]
        return 2.0 ** round(math.log2(math.sqrt(12 / columns) / (1 << stored.bits)))

    def _offset(self, path: str) -> float:
        stored = self.quantization_of(f"{path}.weight")
        assert stored is not None
        return -((1 << stored.bits) - 1) / 2


def view_of(shape: Shape, dtype: mx.Dtype) -> mx.array:
    """Zeros ``shape`` that share one element."""
    return mx.broadcast_to(mx.array(0, dtype=dtype), shape)


def made_up_model(weights: MadeUp, dtype: mx.Dtype) -> Model:
    """Our model of made-up weights; of views it takes no memory."""
    with _joining_views() if isinstance(weights, ViewWeights) else contextlib.nullcontext():
        return build.build_model(weights.config, weights, dtype)


def made_up_part(weights: MadeUp, dtype: mx.Dtype, ranks: Ranks) -> Model:
    """`made_up_model` on several ranks: this one's part.

    Raises:
        OptionError: the model cannot be cut into so many parts.
    """
    part = ranks.part
    check_size(weights.config, weights, part.size, part.mode)
    with _joining_views() if isinstance(weights, ViewWeights) else contextlib.nullcontext():
        mine = ShardedWeights(weights, part, weights.tensor_part)
        built = build.build_model(local_config(weights.config, part), mine, dtype)
    set_ranks(shard(built, ranks.group, part), ranks)
    return built


@contextlib.contextmanager
def _joining_views() -> Iterator[None]:
    """While building: matrices that are stacked become one view instead of one array with memory."""

    def joined(arrays: list[mx.array], axis: int) -> mx.array:
        shape = list(arrays[0].shape)
        shape[axis] = sum(array.shape[axis] for array in arrays)
        return view_of(tuple(shape), arrays[0].dtype)

    original = build._concatenated
    build._concatenated = joined  # type: ignore[assignment]
    try:
        yield
    finally:
        build._concatenated = original
