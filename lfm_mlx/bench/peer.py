"""mlx-lm doing the same work: its own model, caches and sampling, with the same weights."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx

from lfm_mlx.bench.shapes import MadeUp, view_of
from lfm_mlx.bench.sides import GREEDY, weights_by_layer
from lfm_mlx.config import ModelConfig
from lfm_mlx.names import expected_tensors
from lfm_mlx.types import SamplingParams

PEERS = ("mlx-lm",)

PREFILL_CHUNK = 2048
"""Prompt tokens at once, the default of mlx-lm's generate_step."""


class PeerRows:
    """mlx-lm's rows: caches, a sampler, logits processors and the tokens they look at."""

    def __init__(self, caches: list[Any], sampler: Any, processors: list[Any], tokens: mx.array | None) -> None:
        self.caches = caches
        self.sampler = sampler
        self.processors = processors
        self.tokens = tokens


class Peer:
    """mlx-lm with a model of its own class.

    Args:
        model: an ``mlx_lm.models.lfm2.Model`` or ``lfm2_moe.Model``.
        config: the same architecture, as we read it.
        dtype: of its activations.
    """

    name = "mlx-lm"

    def __init__(self, model: Any, config: ModelConfig, dtype: mx.Dtype) -> None:
        self.model = model
        self.config = config
        self.dtype = dtype

    def new_rows(
        self, lengths: Sequence[int], *, capacity: int, params: SamplingParams = GREEDY, is_view: bool = False
    ) -> PeerRows:
        """As `Side.new_rows`; several rows have the caches of its batch generator, padded on the left."""
        make: Callable[..., mx.array] = view_of if is_view else mx.zeros
        caches = [self._cache(layer, list(lengths), capacity, make) for layer in range(self.config.num_layers)]
        sampling = importlib.import_module("mlx_lm.sample_utils")
        sampler = sampling.make_sampler(
            temp=params.temperature, top_p=params.top_p, min_p=params.min_p, top_k=params.top_k
        )
        penalty = params.repetition_penalty
        processors = [sampling.make_repetition_penalty(penalty)] if penalty != 1.0 else []
        tokens = mx.zeros((max(lengths),), dtype=mx.int32) if processors else None
        mx.eval(tokens)
        rows = PeerRows(caches, sampler, processors, tokens)
        # Unevaluated random keys would count as part of the next step.
        mx.eval(self.arrays(rows), mx.random.state)
        return rows

    def _cache(self, layer: int, lengths: list[int], capacity: int, make: Callable[..., mx.array]) -> Any:
        caches = importlib.import_module("mlx_lm.models.cache")
        config, longest = self.config, max(lengths)
        if config.layer_types[layer] == "conv":
            state = caches.ArraysCache(size=1)
            if longest:
                state[0] = mx.zeros((len(lengths), config.conv_taps - 1, config.hidden_size), dtype=self.dtype)
            return state
        if len(lengths) == 1:
            cache = caches.KVCache()
            cache.offset = longest
        else:
            cache = caches.BatchKVCache([longest - length for length in lengths])
            cache.offset = cache.offset + longest
            cache._idx = longest
        if longest:
            columns = -(-capacity // cache.step) * cache.step
            shape = (len(lengths), config.num_kv_heads, columns, config.head_dim)
            cache.keys, cache.values = make(shape, self.dtype), make(shape, self.dtype)
        return cache

    def logits(self, rows: PeerRows, tokens: mx.array) -> mx.array:
        """As `Side.logits`."""
        logits: mx.array = self.model(tokens[:, None], cache=rows.caches)
        return logits[:, -1, :]

    def sample(self, rows: PeerRows, tokens: mx.array) -> mx.array:
        """As `Side.sample`: what its generate_step and its batch generator do after the model."""
        logits = self.logits(rows, tokens)
        if rows.processors:
            rows.tokens = mx.concatenate([rows.tokens, tokens[:1]]) if rows.tokens is not None else tokens[:1]
            processed = [logits[row : row + 1] for row in range(logits.shape[0])]
            for processor in rows.processors:
                processed = [processor(rows.tokens, row) for row in processed]
            logits = mx.concatenate(processed) if len(processed) > 1 else processed[0]
        logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        ids: mx.array = rows.sampler(logprobs)
        return ids

    def prefill(self, rows: PeerRows, tokens: mx.array) -> mx.array:
        """As `Side.prefill`: chunks as in its generate_step."""
        last = tokens.shape[1] - 1
        for start in range(0, last, PREFILL_CHUNK):
            self.model(tokens[:, start : min(start + PREFILL_CHUNK, last)], cache=rows.caches)
            mx.eval(self.arrays(rows))
            mx.clear_cache()
        return self.logits(rows, tokens[:, last])

    def arrays(self, rows: PeerRows) -> list[mx.array]:
        """As `Side.arrays`."""
        held = [_held(cache) for cache in rows.caches]
        return [array for arrays in held for array in arrays if isinstance(array, mx.array)]

    def weights(self) -> dict[int, list[mx.array]]:
        """As `Side.weights`."""
        return weights_by_layer(self.model, self.model.layers, self.model.model.embed_tokens)


def _held(cache: Any) -> list[Any]:
    if hasattr(cache, "keys"):
        return [cache.keys, cache.values, cache.offset, getattr(cache, "left_padding", None)]
    return list(cache.cache)


def made_up_peer(weights: MadeUp, dtype: mx.Dtype) -> Peer:
    """mlx-lm's model of the same made-up weights."""
    model = _empty_model(weights.config)
    nn = importlib.import_module("mlx.nn")
    names = expected_tensors(weights.config)

    def stored(path: str, module: Any) -> Any:
        how = weights.quantization_of(f"{path}.weight") if f"{path}.weight" in names else None
        return False if how is None else {"group_size": how.group_size, "bits": how.bits, "mode": how.mode}

    nn.quantize(model, class_predicate=stored)
    tensors = [*names, *(f"{name.removesuffix('weight')}{part}" for name in names for part in ("scales", "biases"))]
    loaded = [(name, _cast(weights.tensor(name), name, dtype)) for name in tensors if weights.has(name)]
    model.load_weights(loaded)
    for layer in model.layers:
        mx.eval(layer.parameters())
    mx.eval(model.parameters())
    model.eval()
    return Peer(model, weights.config, dtype)


def loaded_peer(folder: str, config: ModelConfig, dtype: mx.Dtype) -> Peer:
    """The checkpoint in `folder` as mlx-lm loads it, cast to `dtype` as ours is."""
    utilities = importlib.import_module("mlx_lm.utils")
    model, _ = utilities.load_model(importlib.import_module("pathlib").Path(folder))
    model.set_dtype(dtype)
    mx.eval(model.parameters())
    return Peer(model, config, dtype)


def _empty_model(config: ModelConfig) -> Any:
    # mlx-lm takes a second to import, and only comparisons need it.
    module = importlib.import_module(f"mlx_lm.models.{config.model_type}")
    return module.Model(module.ModelArgs.from_dict(dict(config.raw)))


def _cast(array: mx.array, name: str, dtype: mx.Dtype) -> mx.array:
    is_kept = array.dtype == mx.uint32 or name.endswith("expert_bias")
    return array if is_kept or array.dtype == dtype else array.astype(dtype)
