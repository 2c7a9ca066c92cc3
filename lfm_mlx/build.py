"""Weights by name -> a `Model`: fused matrices are made here, layer by layer, and never written to disk."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import mlx.core as mx
from mlx.utils import tree_flatten

from lfm_mlx.config import ModelConfig, Quantization
from lfm_mlx.model import (
    MLP,
    AnyExpertLinear,
    AnyLinear,
    Attention,
    Block,
    Embedding,
    ExpertLinear,
    Linear,
    Model,
    MoE,
    Norm,
    QuantizedExpertLinear,
    QuantizedLinear,
    ShortConv,
    SplitExpertLinear,
    SplitLinear,
)
from lfm_mlx.names import EMBEDDING, FINAL_NORM, HEAD, dense_matrices


class Weights(Protocol):
    """Our tensors by name, as `lfm_mlx.checkpoint.Checkpoint` gives them."""

    def has(self, name: str) -> bool:
        """Whether there is a tensor of this name."""
        ...

    def tensor(self, name: str) -> mx.array:
        """The tensor, unevaluated."""
        ...

    def quantization_of(self, name: str) -> Quantization | None:
        """How the matrix ``X.weight`` is stored; None when unquantised."""
        ...


def build_model(
    config: ModelConfig,
    weights: Weights,
    dtype: mx.Dtype,
    on_part: Callable[[int], None] | None = None,
) -> Model:
    """Assemble and evaluate a model; at no time does more than one layer exist twice.

    The embedding comes last: while matrices of a layer are joined, their parts take the place that it will have.

    Args:
        config: the architecture.
        weights: every tensor that `lfm_mlx.names.expected_tensors` lists, plain or quantised.
        dtype: of activations, unquantised weights, and affine scales and biases. Router bias and convolution taps
            stay float32.
        on_part: called after each part (each layer, final norm and head, embedding) with its bytes in memory.
    """
    builder = _Builder(config, weights, dtype)
    report = on_part or (lambda num_bytes: None)
    layers = []
    for i in range(config.num_layers):
        layers.append(builder.block(i))
        report(_evaluate(layers[-1]))
    norm = Norm(builder.plain(FINAL_NORM), config.norm_eps)
    head = None if config.tie_embeddings else builder.matrix(HEAD)
    report(_evaluate(norm) + (_evaluate(head) if head is not None else 0))
    embedding = Embedding(builder.table(EMBEDDING))
    report(_evaluate(embedding))
    return Model(config=config, embed_tokens=embedding, layers=layers, embedding_norm=norm, lm_head=head, dtype=dtype)


def build_embedding(config: ModelConfig, weights: Weights, dtype: mx.Dtype) -> Embedding:
    """The embedding alone, not evaluated; arguments as for `build_model`."""
    return Embedding(_Builder(config, weights, dtype).table(EMBEDDING))


def build_layer(config: ModelConfig, weights: Weights, dtype: mx.Dtype, layer: int) -> Block:
    """One layer alone, not evaluated; arguments as for `build_model`."""
    return _Builder(config, weights, dtype).block(layer)


def build_head(config: ModelConfig, weights: Weights, dtype: mx.Dtype) -> tuple[Norm, AnyLinear | Embedding]:
    """The final norm and what turns its result into logits, not evaluated; arguments as for `build_model`."""
    builder = _Builder(config, weights, dtype)
    norm = Norm(builder.plain(FINAL_NORM), config.norm_eps)
    return norm, Embedding(builder.table(EMBEDDING)) if config.tie_embeddings else builder.matrix(HEAD)


def _evaluate(module: Embedding | Block | Norm | AnyLinear) -> int:
    arrays = list(dict(tree_flatten(module.parameters())).values())
    mx.eval(arrays)
    return sum(array.nbytes for array in arrays)


class _Builder:
    def __init__(self, config: ModelConfig, weights: Weights, dtype: mx.Dtype) -> None:
        self.config = config
        self.weights = weights
        self.dtype = dtype

    def plain(self, name: str) -> mx.array:
        return self.weights.tensor(name).astype(self.dtype)

    def table(self, name: str) -> Linear | QuantizedLinear:
        return self._joined([name], axis=0)

    def matrix(self, *names: str) -> AnyLinear:
        """One matrix of several stacked row-wise; kept apart where their storage differs."""
        if len({self.weights.quantization_of(name) for name in names}) > 1:
            return SplitLinear([self._joined([name], axis=0) for name in names])
        return self._joined(names, axis=0)

    def _joined(self, names: Sequence[str], axis: int) -> Linear | QuantizedLinear:
        stored = self.weights.quantization_of(names[0])
        bias_name = names[0].removesuffix("weight") + "bias"
        bias = self.plain(bias_name) if self.weights.has(bias_name) else None
        if stored is None:
            return Linear(_concatenated([self.plain(name) for name in names], axis), bias)
        weight, scales, biases = self._quantized(names, axis)
        return QuantizedLinear(weight, scales, biases, stored, bias)

    def experts(self, *names: str) -> AnyExpertLinear:
        if len({self.weights.quantization_of(name) for name in names}) > 1:
            return SplitExpertLinear([self.experts(name) for name in names])
        stored = self.weights.quantization_of(names[0])
        if stored is None:
            return ExpertLinear(_concatenated([self.plain(name) for name in names], axis=1))
        weight, scales, biases = self._quantized(names, axis=1)
        return QuantizedExpertLinear(weight, scales, biases, stored)

    def _quantized(self, names: Sequence[str], axis: int) -> tuple[mx.array, mx.array, mx.array | None]:
        paths = [name.removesuffix(".weight") for name in names]
        weight = _concatenated([self.weights.tensor(f"{path}.weight") for path in paths], axis)
        scales = _concatenated([self.weights.tensor(f"{path}.scales") for path in paths], axis)
        if not self.weights.has(f"{paths[0]}.biases"):
            return weight, scales, None
        biases = _concatenated([self.weights.tensor(f"{path}.biases") for path in paths], axis)
        return weight, scales.astype(self.dtype), biases.astype(self.dtype)

    def block(self, layer: int) -> Block:
        prefix = f"model.layers.{layer}"
        eps = self.config.norm_eps
        is_attention = self.config.layer_types[layer] == "full_attention"
        return Block(
            Norm(self.plain(f"{prefix}.operator_norm.weight"), eps),
            self.attention(f"{prefix}.self_attn") if is_attention else self.short_conv(f"{prefix}.conv"),
            Norm(self.plain(f"{prefix}.ffn_norm.weight"), eps),
            self.moe(f"{prefix}.feed_forward")
            if self.config.has_experts(layer)
            else self.mlp(f"{prefix}.feed_forward"),
        )

    def attention(self, prefix: str) -> Attention:
        config = self.config
        width = config.head_dim
        query_norm, key_norm = (self.plain(f"{prefix}.{which}_layernorm.weight") for which in "qk")
        queries = mx.broadcast_to(query_norm, (config.num_heads, width))
        keys = mx.broadcast_to(key_norm, (config.num_kv_heads, width))
        return Attention(
            qkv_proj=self.matrix(*(f"{prefix}.{which}_proj.weight" for which in "qkv")),
            qk_norm=mx.concatenate([queries, keys]),
            out_proj=self.matrix(f"{prefix}.out_proj.weight"),
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=width,
            rope_theta=config.rope_theta,
            eps=config.norm_eps,
        )

    def short_conv(self, prefix: str) -> ShortConv:
        taps = self.weights.tensor(f"{prefix}.conv.weight").astype(mx.float32)  # (D, W, 1)
        bias = f"{prefix}.conv.bias"
        return ShortConv(
            in_proj=self.matrix(f"{prefix}.in_proj.weight"),
            taps=[mx.contiguous(taps[:, i, 0]) for i in range(taps.shape[1])],
            bias=self.weights.tensor(bias).astype(mx.float32) if self.weights.has(bias) else None,
            out_proj=self.matrix(f"{prefix}.out_proj.weight"),
        )

    def mlp(self, prefix: str) -> MLP:
        gate, up, down = (f"{prefix}.{name}.weight" for name in dense_matrices(self.config))
        return MLP(self.matrix(gate, up), self.matrix(down))

    def moe(self, prefix: str) -> MoE:
        config = self.config
        gate, up, down = (f"{prefix}.switch_mlp.{name}_proj.weight" for name in ("gate", "up", "down"))
        bias = f"{prefix}.expert_bias"
        return MoE(
            gate=self.matrix(f"{prefix}.gate.weight"),
            expert_bias=self.weights.tensor(bias).astype(mx.float32) if self.weights.has(bias) else None,
            gate_up_proj=self.experts(gate, up),
            down_proj=self.experts(down),
            num_active=config.num_active_experts,
            normalize_weights=config.normalize_expert_weights,
            scaling_factor=config.routed_scaling_factor,
        )


def _concatenated(arrays: Sequence[mx.array], axis: int) -> mx.array:
    return arrays[0] if len(arrays) == 1 else mx.concatenate(list(arrays), axis=axis)
