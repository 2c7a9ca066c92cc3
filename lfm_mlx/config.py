"""config.json of every LFM2 generation, read and checked once.

Sources: transformers 5.23 ``Lfm2Config`` and ``Lfm2MoeConfig`` (defaults, the feed-forward width rule) and mlx-lm 0.32
(the ``quantization`` block). Keys of older and newer generations are accepted side by side.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from lfm_mlx.config_keys import LARGEST, ConfigKeys, shown
from lfm_mlx.errors import CheckpointError, ConfigError

LayerType = Literal["conv", "full_attention"]

MODEL_TYPES = ("lfm2", "lfm2_moe")

_MAX_COUNT = 65_536
"""Most layers or experts that are believed: lists of that length are made before any file is read."""

GROUP_SIZES = {"affine": (32, 64, 128), "mxfp4": (32,), "nvfp4": (16,), "mxfp8": (32,)}
"""Group sizes that MLX offers in each quantisation mode."""

BITS = {"affine": (2, 3, 4, 5, 6, 8), "mxfp4": (4,), "nvfp4": (4,), "mxfp8": (8,)}
"""Bits per weight that MLX offers in each quantisation mode."""


@dataclass(frozen=True, kw_only=True)
class Quantization:
    """How one weight matrix is stored: groups of `group_size` values in `bits` bits each."""

    group_size: int = 64
    bits: int = 4
    mode: str = "affine"

    def __post_init__(self) -> None:
        if self.mode not in tuple(BITS):  # a tuple also answers for a value that cannot be hashed
            raise ConfigError(f"quantization mode is {self.mode!r}, expected one of {', '.join(BITS)}")
        if self.bits not in BITS[self.mode]:
            raise ConfigError(
                f"quantization bits is {self.bits!r}, expected one of {BITS[self.mode]} in mode {self.mode}"
            )
        if self.group_size not in GROUP_SIZES[self.mode]:
            raise ConfigError(
                f"quantization group_size is {self.group_size!r}, expected one of {GROUP_SIZES[self.mode]} "
                f"in mode {self.mode}"
            )


@dataclass(frozen=True, kw_only=True)
class QuantizationConfig:
    """The ``quantization`` block: one default, and exceptions by module path (None: kept unquantised)."""

    default: Quantization
    overrides: Mapping[str, Quantization | None] = field(default_factory=dict)

    def of(self, path: str) -> Quantization | None:
        """How the module at `path` (``model.layers.0.conv.in_proj``) is stored; None means unquantised."""
        return self.overrides.get(path, self.default)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The architecture of one LFM2 model; every size an implementation needs, already derived.

    Make one with `ModelConfig.from_dict` or `read_config`; both check every value.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    layer_types: tuple[LayerType, ...]
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_size: int
    """Width of a dense feed-forward layer after the two-thirds rule."""
    conv_taps: int
    conv_size: int
    """Channels of a short convolution: `hidden_size`, unless the model is a part of one."""
    conv_bias: bool
    norm_eps: float
    rope_theta: float
    max_context: int
    tie_embeddings: bool
    num_dense_layers: int
    num_experts: int
    num_active_experts: int
    expert_ffn_size: int
    use_expert_bias: bool
    normalize_expert_weights: bool
    routed_scaling_factor: float
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    pad_token_id: int | None
    dtype: str | None
    quantization: QuantizationConfig | None
    raw: Mapping[str, Any] = field(repr=False, compare=False)
    """config.json as it was read."""

    @property
    def num_layers(self) -> int:
        """Number of layers, convolutions and attention together."""
        return len(self.layer_types)

    @property
    def attention_layers(self) -> tuple[int, ...]:
        """Indices of the attention layers."""
        return tuple(i for i, kind in enumerate(self.layer_types) if kind == "full_attention")

    @property
    def is_moe(self) -> bool:
        """Whether any layer has experts."""
        return self.num_dense_layers < self.num_layers

    def has_experts(self, layer: int) -> bool:
        """Whether the feed-forward part of `layer` is a mixture of experts."""
        return layer >= self.num_dense_layers

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of unquantised 16-bit keys and values that one token leaves behind."""
        return len(self.attention_layers) * 2 * self.num_kv_heads * self.head_dim * 2

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> ModelConfig:
        """Check a parsed config.json and derive every size.

        Raises:
            ConfigError: an unknown model type, or a value that is wrong or contradicts another; the message names
                key, value and expectation.
        """
        keys = ConfigKeys(raw)
        model_type = _check_model_type(raw)
        is_moe = model_type == "lfm2_moe"
        hidden_size = keys.integer("hidden_size", "block_dim")
        num_heads = keys.integer("num_attention_heads", "num_heads")
        layer_types = _layer_types(keys, is_moe)
        num_dense = keys.integer("num_dense_layers", default=2, minimum=0) if is_moe else len(layer_types)
        eos = raw.get("eos_token_id")
        config = cls(
            model_type=model_type,
            vocab_size=keys.integer("vocab_size"),
            hidden_size=hidden_size,
            layer_types=layer_types,
            num_heads=num_heads,
            num_kv_heads=keys.integer("num_key_value_heads", default=8),
            head_dim=keys.integer("head_dim", default=hidden_size // num_heads),
            ffn_size=keys.integer("intermediate_size") if is_moe else _dense_ffn_size(keys),
            conv_taps=keys.integer("conv_L_cache", default=3, minimum=2),
            conv_size=hidden_size,
            conv_bias=keys.boolean("conv_bias", default=False),
            norm_eps=keys.number("norm_eps", "block_norm_eps", default=1e-5),
            rope_theta=_rope_theta(keys),
            max_context=keys.integer("max_position_embeddings", default=128_000),
            tie_embeddings=keys.boolean("tie_embedding", "tie_word_embeddings", default=True),
            num_dense_layers=min(num_dense, len(layer_types)),
            num_experts=keys.integer("num_experts", maximum=_MAX_COUNT) if is_moe else 0,
            num_active_experts=keys.integer("num_experts_per_tok") if is_moe else 0,
            expert_ffn_size=keys.integer("moe_intermediate_size") if is_moe else 0,
            use_expert_bias=is_moe and keys.boolean("use_expert_bias", default=True),
            normalize_expert_weights=is_moe and keys.boolean("norm_topk_prob", default=True),
            routed_scaling_factor=keys.number("routed_scaling_factor", default=1.0),
            bos_token_id=keys.token_id("bos_token_id"),
            eos_token_ids=tuple(keys.token_id_list("eos_token_id")) if eos is not None else (),
            pad_token_id=keys.token_id("pad_token_id"),
            dtype=_dtype(keys),
            quantization=_quantization(raw),
            raw=dict(raw),
        )
        _check_sizes(config, keys)
        return config


def read_config(path: Path) -> ModelConfig:
    """Read and check ``config.json`` at `path` (the file itself or the folder that holds it).

    Raises:
        CheckpointError: the file is missing or is not JSON.
        ConfigError: a value cannot be used.
    """
    if path.is_dir():
        path = path / "config.json"
    raw = read_json_object(path)
    if raw is None:
        raise CheckpointError(
            f"{path}: not found, expected the checkpoint's config.json; name the folder that holds it"
        )
    try:
        return ModelConfig.from_dict(raw)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def read_json_object(path: Path) -> dict[str, Any] | None:
    """The JSON object that a checkpoint's file holds, or None where there is no such file.

    Raises:
        CheckpointError: the file cannot be read, or holds something else.
    """
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON ({error}); fetch the checkpoint again") from error
    if not isinstance(raw, dict):
        raise CheckpointError(
            f"{path}: holds a {type(raw).__name__}, expected a JSON object; fetch the checkpoint again"
        )
    return raw


def _check_model_type(raw: Mapping[str, Any]) -> str:
    model_type = raw.get("model_type")
    if model_type in MODEL_TYPES:
        return str(model_type)
    expected = " or ".join(MODEL_TYPES)
    if model_type is None:
        raise ConfigError(f"model_type is missing, expected {expected}; this is not an LFM2 text checkpoint")
    if "text_config" in raw or (isinstance(model_type, str) and "vl" in model_type.lower()):
        raise ConfigError(
            f"model_type is {model_type!r}, a vision-language model, expected {expected}; "
            "use the text checkpoint of the same size"
        )
    close = difflib.get_close_matches(shown(model_type).strip("'"), MODEL_TYPES, n=1, cutoff=0.75)
    hint = f" (nearest known: {close[0]})" if close else ""
    raise ConfigError(f"model_type is {shown(model_type)}, which is not supported, expected {expected}{hint}")


def _layer_types(keys: ConfigKeys, is_moe: bool) -> tuple[LayerType, ...]:
    count = keys.integer("num_hidden_layers", "num_layers", maximum=_MAX_COUNT)
    listed, indices = keys.raw.get("layer_types"), keys.raw.get("full_attn_idxs")
    if listed is None and indices is None:
        if is_moe:
            raise ConfigError("layer_types is missing, expected a list of 'conv' and 'full_attention', one per layer")
        indices = list(range(count))
    from_indices = _types_from_indices(indices, count) if indices is not None else None
    if listed is None:
        assert from_indices is not None
        return from_indices
    known = ("conv", "full_attention")
    if not isinstance(listed, list) or len(listed) != count or any(kind not in known for kind in listed):
        raise ConfigError(
            f"layer_types is {shown(listed)}, expected {count} entries (num_hidden_layers), "
            "each 'conv' or 'full_attention'"
        )
    if from_indices is not None and from_indices != tuple(listed):
        attention = [i for i, kind in enumerate(listed) if kind == "full_attention"]
        raise ConfigError(f"full_attn_idxs is {shown(indices)}, but layer_types has attention at {attention}")
    return tuple(listed)


def _types_from_indices(indices: object, count: int) -> tuple[LayerType, ...]:
    is_list = isinstance(indices, list) and all(isinstance(i, int) and not isinstance(i, bool) for i in indices)
    if not is_list or not all(0 <= i < count for i in indices):  # type: ignore[attr-defined]
        raise ConfigError(f"full_attn_idxs is {shown(indices)}, expected a list of layer indices from 0 to {count - 1}")
    chosen = set(indices)  # type: ignore[call-overload]
    return tuple("full_attention" if i in chosen else "conv" for i in range(count))


def _dense_ffn_size(keys: ConfigKeys) -> int:
    """The feed-forward width of a dense model, by the rule of transformers' ``Lfm2MLP``."""
    if not keys.boolean("block_auto_adjust_ff_dim", default=True):
        return keys.integer("block_ff_dim", "intermediate_size")
    size = int(2 * keys.integer("block_ff_dim", "intermediate_size", minimum=2) / 3)
    if "block_ffn_dim_multiplier" in keys.raw and keys.raw["block_ffn_dim_multiplier"] is None:
        return size
    multiplier = keys.number("block_ffn_dim_multiplier", default=1.0)
    if not 1 <= multiplier * size <= LARGEST:
        raise ConfigError(
            f"block_ffn_dim_multiplier is {multiplier}, expected one that gives a possible width of {size}"
        )
    size = int(multiplier * size)
    multiple = keys.integer("block_multiple_of", default=256)
    return multiple * ((size + multiple - 1) // multiple)


def _rope_theta(keys: ConfigKeys) -> float:
    _, parameters = keys.first("rope_parameters", "rope_scaling")
    if parameters is None:
        return keys.number("rope_theta", "theta", default=1_000_000.0)
    if not isinstance(parameters, Mapping):
        raise ConfigError(f"rope_parameters is {shown(parameters)}, expected an object with rope_theta and rope_type")
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind != "default":
        raise ConfigError(f"rope_parameters.rope_type is {shown(kind)}, expected 'default' (no other is supported)")
    if parameters.get("partial_rotary_factor", 1.0) != 1.0:
        found = shown(parameters["partial_rotary_factor"])
        raise ConfigError(f"rope_parameters.partial_rotary_factor is {found}, expected 1.0 (no other is supported)")
    if parameters.get("rope_theta") is None:
        return keys.number("rope_theta", "theta", default=1_000_000.0)
    try:
        return ConfigKeys(parameters).number("rope_theta", default=1_000_000.0)
    except ConfigError as error:
        raise ConfigError(f"rope_parameters.{error}") from error


def _dtype(keys: ConfigKeys) -> str | None:
    name, value = keys.first("dtype", "torch_dtype")
    if value is not None and not isinstance(value, str):
        raise ConfigError(f"{name} is {shown(value)}, expected a name such as 'bfloat16'")
    return value.removeprefix("torch.") if value else None


def _quantization(raw: Mapping[str, Any]) -> QuantizationConfig | None:
    key = "quantization" if raw.get("quantization") is not None else "quantization_config"
    block = raw.get(key)
    if block is None:
        return None
    if not isinstance(block, Mapping):
        raise ConfigError(f"{key} is {shown(block)}, expected an object with group_size and bits")
    if "group_size" not in block or "bits" not in block:
        method = block.get("quant_method", "unknown")
        raise ConfigError(
            f"{key}.quant_method is {shown(method)}, expected MLX quantisation (group_size and bits); "
            "use the unquantised checkpoint or an MLX conversion"
        )
    default = _quantization_entry(key, block)
    overrides: dict[str, Quantization | None] = {}
    for path, entry in block.items():
        if isinstance(entry, Mapping):
            overrides[path] = _quantization_entry(f"{key}.{path}", entry)
        elif entry is False:
            overrides[path] = None
    return QuantizationConfig(default=default, overrides=overrides)


def _quantization_entry(where: str, entry: Mapping[str, Any]) -> Quantization:
    keys = ConfigKeys(entry)
    mode = entry.get("mode", "affine")
    try:
        return Quantization(group_size=keys.integer("group_size"), bits=keys.integer("bits"), mode=mode)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error


def _check_sizes(config: ModelConfig, keys: ConfigKeys) -> None:
    """Refuse values that are each possible but do not fit together."""
    if keys.raw.get("head_dim") is None and config.hidden_size % config.num_heads:
        raise ConfigError(
            f"num_attention_heads is {config.num_heads}, expected a divisor of hidden_size {config.hidden_size}"
        )
    if config.num_heads % config.num_kv_heads:
        raise ConfigError(
            f"num_key_value_heads is {config.num_kv_heads}, "
            f"expected a divisor of num_attention_heads {config.num_heads}"
        )
    if config.head_dim % 2:
        raise ConfigError(f"head_dim is {config.head_dim}, expected an even number (RoPE rotates pairs)")
    for name in ("conv_dim", "conv_dim_out"):
        if keys.raw.get(name, config.hidden_size) not in (None, config.hidden_size):
            raise ConfigError(f"{name} is {shown(keys.raw[name])}, expected hidden_size {config.hidden_size}")
    if config.is_moe and config.num_active_experts > config.num_experts:
        raise ConfigError(
            f"num_experts_per_tok is {config.num_active_experts}, expected at most num_experts {config.num_experts}"
        )
    for name, token in (("bos_token_id", config.bos_token_id), *(("eos_token_id", i) for i in config.eos_token_ids)):
        if token is not None and token >= config.vocab_size:
            raise ConfigError(f"{name} is {token}, expected less than vocab_size {config.vocab_size}")
