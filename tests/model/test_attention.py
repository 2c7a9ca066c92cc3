"""Attention against plain NumPy: head norms, rotation, shared key-value heads, causality."""

from __future__ import annotations

import dataclasses

import mlx.core as mx
import numpy as np
import pytest
from random_models import RandomWeights, relative_error, tiny_config

from lfm_mlx.build import build_model
from lfm_mlx.cache import KVCache, Span
from lfm_mlx.config import ModelConfig
from lfm_mlx.model import Attention

TOLERANCE = 1e-5
NUM_TOKENS = 9
PREFIX = "model.layers.1.self_attn"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """An attention layer, and its tensors by their short names."""

    config: ModelConfig
    layer: Attention
    tensors: dict[str, np.ndarray]


@pytest.fixture(
    scope="module",
    params=[{}, {"num_key_value_heads": 1}, {"num_key_value_heads": 4}, {"head_dim": 12}, {"hidden_size": 36}],
    ids=str,
)
def case(request) -> Case:
    config = ModelConfig.from_dict(tiny_config(**{"head_dim": 6} | request.param, rope_theta=1e3))
    weights = RandomWeights(config)
    short = {n.split(".")[-2]: np.array(a) for n, a in weights.tensors.items() if n.startswith(PREFIX)}
    return Case(config=config, layer=build_model(config, weights, mx.float32).layers[1].operator, tensors=short)


def hidden(case: Case, seed: int = 0) -> np.ndarray:
    values = np.random.default_rng(seed).standard_normal((2, NUM_TOKENS, case.config.hidden_size))
    return values.astype(np.float32)


def normed(heads: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    return heads / np.sqrt((heads**2).mean(axis=-1, keepdims=True) + eps) * weight


def rotated(heads: np.ndarray, theta: float, *, is_interleaved: bool) -> np.ndarray:
    """RoPE of (B, L, heads, P): halves turn against each other, or neighbours when interleaved."""
    width = heads.shape[-1]
    angles = np.arange(heads.shape[1])[:, None] / theta ** (np.arange(0, width, 2) / width)  # (L, P / 2)
    cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
    first = slice(0, None, 2) if is_interleaved else slice(0, width // 2)
    second = slice(1, None, 2) if is_interleaved else slice(width // 2, None)
    out = np.empty_like(heads)
    out[..., first] = heads[..., first] * cos - heads[..., second] * sin
    out[..., second] = heads[..., second] * cos + heads[..., first] * sin
    return out


def reference(
    case: Case, x: np.ndarray, *, is_interleaved: bool = False, norms_after: bool = False, is_shared: bool = True
) -> np.ndarray:
    """Transformers' Lfm2Attention, written out, with one thing wrong on demand."""
    config, tensors = case.config, case.tensors
    B, L, _ = x.shape

    def heads_of(which: str, count: int) -> np.ndarray:
        return (x @ tensors[f"{which}_proj"].T).reshape(B, L, count, config.head_dim)

    def positioned(which: str, count: int) -> np.ndarray:
        heads, weight = heads_of(which, count), tensors[f"{which}_layernorm"]
        if norms_after:
            return normed(rotated(heads, config.rope_theta, is_interleaved=is_interleaved), weight, config.norm_eps)
        return rotated(normed(heads, weight, config.norm_eps), config.rope_theta, is_interleaved=is_interleaved)

    queries, keys = positioned("q", config.num_heads), positioned("k", config.num_kv_heads)
    values = heads_of("v", config.num_kv_heads)
    out = np.zeros_like(queries)
    for head in range(config.num_heads):
        group = head // (config.num_heads // config.num_kv_heads) if is_shared else head % config.num_kv_heads
        scores = np.einsum("blp,bsp->bls", queries[:, :, head], keys[:, :, group]) / config.head_dim**0.5
        scores = np.where(np.tril(np.ones((L, L), dtype=bool)), scores, -np.inf)
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        weights /= weights.sum(axis=-1, keepdims=True)
        out[:, :, head] = weights @ values[:, :, group]
    return out.reshape(B, L, -1) @ tensors["out_proj"].T


def test_attention_gives_what_numpy_gives_with_and_without_a_cache(case):
    x = hidden(case)
    expected = reference(case, x)
    span = Span.make((0, 0), NUM_TOKENS)
    assert relative_error(case.layer(mx.array(x), None, span), expected) < TOLERANCE
    cache = KVCache.empty(2, case.config.num_kv_heads, case.config.head_dim, mx.float32)
    parts = [
        case.layer(mx.array(x[:, start:stop]), cache, Span.make((start, start), stop - start))
        for start, stop in ((0, 4), (4, 5), (5, NUM_TOKENS))
    ]
    assert relative_error(mx.concatenate(parts, axis=1), expected) < TOLERANCE


@pytest.mark.parametrize("wrong", ["is_interleaved", "norms_after"])
def test_control_another_order_of_norm_and_rotation_is_noticed(case, wrong):
    x = hidden(case)
    found = case.layer(mx.array(x), None, Span.make((0, 0), NUM_TOKENS))
    assert relative_error(found, reference(case, x, **{wrong: True})) > 1e-3


def test_control_another_sharing_of_key_value_heads_is_noticed_where_there_is_another(case):
    x = hidden(case)
    found = case.layer(mx.array(x), None, Span.make((0, 0), NUM_TOKENS))
    has_another = case.config.num_kv_heads == 2
    assert (relative_error(found, reference(case, x, is_shared=False)) > 1e-3) == has_another


def test_a_token_never_changes_what_came_before_it(case):
    x = hidden(case)
    changed = x.copy()
    changed[:, 5] += 1
    span = Span.make((0, 0), NUM_TOKENS)
    difference = np.abs(np.array(case.layer(mx.array(x), None, span) - case.layer(mx.array(changed), None, span)))
    assert (difference[:, :5] == 0).all()
    assert difference[:, 5:].max() > 1e-3


@pytest.mark.parametrize("offsets", [4, [4, 7]], ids=["even", "uneven"])
def test_one_token_a_row_in_the_shape_of_a_step_gives_what_a_call_of_one_token_gives(case, offsets):
    x, offsets = mx.array(hidden(case)[:, :1]), mx.array(offsets)
    called, stepped = case.layer.project(x, offsets), case.layer.project(x[:, :, None], offsets)
    for found, expected in zip(stepped, called, strict=True):
        assert relative_error(found, expected) < TOLERANCE
    elsewhere = case.layer.project(x[:, :, None], offsets + 1)
    assert all(relative_error(found, expected) > 1e-3 for found, expected in zip(elsewhere[:2], called, strict=False))
    merged = case.layer.merge_one(stepped[0])
    assert merged.shape == (2, 1, 1, case.config.hidden_size)
    assert relative_error(merged[:, 0], case.layer.merge(called[0])) < TOLERANCE
