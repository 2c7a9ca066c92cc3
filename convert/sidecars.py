"""The files beside the weights: config.json as mlx-lm and transformers read it, tokenizer, template, licence."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lfm_mlx.config import ModelConfig, Quantization

from .staging import sync

_COPIED = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/*.jinja",
    "generation_config.json",
    "LICENSE*",
    "NOTICE*",
)


def find_sidecars(source: Path) -> list[Path]:
    """The files of the folder `source`, relative to it, that belong beside converted weights."""
    found = (path for pattern in _COPIED for path in source.glob(pattern) if path.is_file())
    return sorted({path.relative_to(source) for path in found})


def copy_sidecars(source: Path, folder: Path, files: Sequence[Path]) -> None:
    """Copy `files`, relative to `source`, into `folder`; links are followed (the hub's cache consists of them)."""
    for file in files:
        (folder / file).parent.mkdir(exist_ok=True)
        shutil.copyfile(source / file, folder / file)
        sync(folder / file)


def write_sidecars(folder: Path, made: Mapping[str, bytes]) -> None:
    """Write files that were made rather than copied."""
    for name, data in made.items():
        (folder / name).write_bytes(data)
        sync(folder / name)


def config_json(
    config: ModelConfig,
    default: Quantization | None,
    overrides: Mapping[str, Quantization],
    dtype: str | None,
) -> dict[str, Any]:
    """The config.json of the converted checkpoint, sorted by key.

    The source's keys keep their values; keys that mlx-lm 0.32 requires and newer configs leave out are added with the
    value that transformers takes for them.

    Args:
        config: the source's.
        default: how most matrices are stored; None writes no ``quantization`` block.
        overrides: by module path, how other matrices are stored.
        dtype: the type of unquantised tensors if it was changed.
    """
    dropped = ("_name_or_path", "quantization", "quantization_config")
    written = {key: value for key, value in config.raw.items() if key not in dropped}
    for key, value in {**_required(config), **_rope(config)}.items():
        if written.get(key) is None:
            written[key] = value
    if dtype is not None:
        written |= {key: dtype for key in ("dtype", "torch_dtype") if key in written} or {"dtype": dtype}
    if default is not None:
        block: dict[str, Any] = {"group_size": default.group_size, "bits": default.bits, "mode": default.mode}
        block |= {path: _override(how) for path, how in overrides.items()}
        written |= {"quantization": block, "quantization_config": block}
    return dict(sorted(written.items()))


def _override(how: Quantization) -> dict[str, Any]:
    """An exception as mlx-lm writes it: without a mode it is affine."""
    entry: dict[str, Any] = {"group_size": how.group_size, "bits": how.bits}
    return entry if how.mode == "affine" else {**entry, "mode": how.mode}


def _required(config: ModelConfig) -> dict[str, Any]:
    """Keys without which mlx-lm refuses a config."""
    keys: dict[str, Any] = {
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "max_position_embeddings": config.max_context,
        "norm_eps": config.norm_eps,
        "conv_bias": config.conv_bias,
        "conv_L_cache": config.conv_taps,
        "layer_types": list(config.layer_types),
    }
    return keys | (_required_moe(config) if config.model_type == "lfm2_moe" else _required_dense(config))


def _required_moe(config: ModelConfig) -> dict[str, Any]:
    return {
        "num_dense_layers": config.num_dense_layers,
        "use_expert_bias": config.use_expert_bias,
        "norm_topk_prob": config.normalize_expert_weights,
    }


def _required_dense(config: ModelConfig) -> dict[str, Any]:
    """The keys of the two-thirds rule, so that the feed-forward width comes out the same."""
    keys: dict[str, Any] = {
        "block_dim": config.hidden_size,
        "block_multiple_of": 256,
        "block_auto_adjust_ff_dim": True,
    }
    if "block_ffn_dim_multiplier" not in config.raw:
        keys["block_ffn_dim_multiplier"] = 1.0
    return keys


def _rope(config: ModelConfig) -> dict[str, Any]:
    """A flat ``rope_theta`` where the source says it only in a place that mlx-lm does not look at."""
    parameters = config.raw.get("rope_parameters") or {}
    return {} if parameters.get("rope_theta") is not None else {"rope_theta": config.rope_theta}
