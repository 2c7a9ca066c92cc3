"""Edits a built model whose matrices are one rank's parts: puts in what ranks tell each other.

Two sums a layer, one behind the operator and one behind the feed-forward part, one behind the embedding, and the
logits of all ranks side by side. Between them a rank computes alone. The logits that come out are the same bits on
every rank, whatever the sums' order: each was computed by one rank and copied.
"""

from __future__ import annotations

import math
from typing import Protocol

import mlx.core as mx
from mlx.nn.layers.base import Module

from lfm_mlx.distributed.cut import RankPart
from lfm_mlx.kernels import Routing, add_norm, combine, weights_of
from lfm_mlx.model import AnyLinear, Embedding, Linear, Model, MoE, Norm, QuantizedLinear


class Group(Protocol):
    """Ranks that compute together: what is used of `mx.distributed.Group`, so that tests can do without processes."""

    def sum(self, x: mx.array) -> mx.array:
        """The sum over all ranks of arrays of one shape, the same on each."""
        ...

    def gather(self, x: mx.array) -> mx.array:
        """The arrays of all ranks stacked, ``(size, *x.shape)``, the same on each."""
        ...


class MlxGroup:
    """A `Group` over `mx.distributed`."""

    def __init__(self, group: mx.distributed.Group) -> None:
        self._group = group
        # By default each thread has its own stream, and collectives of two streams may wait for each other for ever.
        self._stream = mx.new_thread_unsafe_stream(mx.cpu)

    def finish(self) -> None:
        """Wait until all that was begun here is done."""
        mx.synchronize(self._stream)

    def sum(self, x: mx.array) -> mx.array:
        """As `Group.sum`."""
        return mx.distributed.all_sum(x, group=self._group, stream=self._stream)

    def gather(self, x: mx.array) -> mx.array:
        """As `Group.gather`."""
        return mx.distributed.all_gather(x[None], group=self._group, stream=self._stream)


class SummedLinear(Module):
    """A matrix that is cut by columns: each rank's product, added up."""

    def __init__(self, linear: AnyLinear, group: Group) -> None:
        super().__init__()
        if "bias" in linear:
            self.bias = linear.pop("bias")  # Added once, not by every rank.
        self.linear = linear
        self._group = group

    def __call__(self, x: mx.array) -> mx.array:
        """Map a rank's columns ``(..., in / size)`` to the whole ``(..., out)``."""
        y = self._group.sum(self.linear(x))
        return y + self.bias if "bias" in self else y


class GatheredLinear(Module):
    """A matrix that is cut by rows: the products of all ranks, side by side."""

    def __init__(self, linear: AnyLinear, group: Group) -> None:
        super().__init__()
        self.linear = linear
        self._group = group

    def __call__(self, x: mx.array) -> mx.array:
        """Map ``(..., in)`` to the whole ``(..., out)``."""
        return side_by_side(self._group.gather(self.linear(x)))


class ShardedEmbedding(Embedding):
    """A table that is cut by tokens; those of other ranks contribute zero to one sum.

    Args:
        table: this rank's rows.
        group: the ranks.
        tokens: which tokens they are of.
    """

    def __init__(self, table: Linear | QuantizedLinear, group: Group, tokens: range) -> None:
        super().__init__(table)
        self._group = group
        self._tokens = tokens

    def __call__(self, tokens: mx.array) -> mx.array:
        """Look up tokens ``(B, L)``: ``(B, L, D)``."""
        places, is_here = _places(tokens, self._tokens)
        vectors = super().__call__(places)
        return self._group.sum(mx.where(is_here[..., None], vectors, mx.array(0, dtype=vectors.dtype)))

    def as_linear(self, x: mx.array) -> mx.array:
        """Logits ``(..., V)`` of hidden states ``(..., D)``."""
        return side_by_side(self._group.gather(super().as_linear(x)))


class ShardedMoE(MoE):
    """Experts of which a rank holds a part: of each one's width, or some of them whole.

    Args:
        whole: as it was built from the rank's matrices.
        group: the ranks.
        experts: which experts these are, where they are dealt out; None where each is cut.
    """

    def __init__(self, whole: MoE, group: Group, experts: range | None) -> None:
        super().__init__(
            gate=whole.gate,
            expert_bias=whole.expert_bias if "expert_bias" in whole else None,
            gate_up_proj=whole.gate_up_proj,
            down_proj=whole.down_proj,
            num_active=whole.num_active,
            normalize_weights=whole.normalize_weights,
            scaling_factor=whole.scaling_factor,
        )
        self._group = group
        self._experts = experts

    def route(self, tokens: mx.array) -> Routing:
        """Choose experts for tokens ``(..., D)``; those that other ranks hold weigh zero.

        In a step they become our first one, which is computed for nothing: a step does not wait to know how many they
        are. For many tokens ``(T, D)`` they become one behind our last, which `_sorted` leaves out.
        """
        routing = super().route(tokens)
        if self._experts is None:
            return routing
        weights = routing.scores
        if not routing.is_weighed:
            parts = [weights[..., i : i + 1] for i in range(self.num_active)]
            weights = mx.concatenate(weights_of(parts, self.scaling_factor, self.normalize_weights), axis=-1)
        places, is_here = _places(routing.experts, self._experts)
        if tokens.ndim == 2:
            places = mx.where(is_here, places, mx.array(len(self._experts), dtype=places.dtype))
        return Routing(places, mx.where(is_here, weights, mx.array(0.0)), True)

    def _sorted(self, tokens: mx.array, experts: mx.array) -> mx.array:
        if self._experts is None:
            return super()._sorted(tokens, experts)
        T, A = experts.shape
        order = mx.argsort(experts.flatten())
        # Waits for the router: what is known after that spares the other ranks' share of the work.
        num_here = (experts < len(self._experts)).sum().item()
        assert isinstance(num_here, int)
        rows, chosen = order[:num_here] // A, experts.flatten()[order[:num_here]]
        outputs = mx.zeros((1, tokens.shape[-1]), dtype=tokens.dtype)  # Of all pairs that are left out.
        if num_here:
            hidden = self._gated(self.gate_up_proj(tokens[rows][:, None], chosen, is_sorted=True))
            outputs = mx.concatenate([self.down_proj(hidden, chosen, is_sorted=True).squeeze(-2), outputs])
        return outputs[mx.minimum(mx.argsort(order), num_here)].reshape(T, -1)

    def _combine(
        self, residual: mx.array, outputs: mx.array, routing: Routing, norm: Norm
    ) -> tuple[mx.array, mx.array]:
        update = combine(None, outputs, routing, self.scaling_factor, self.normalize_weights)
        return add_norm(residual, self._group.sum(update), norm.weight, norm.eps)


def shard(model: Model, group: Group, part: RankPart) -> Model:
    """Make a model of the whole out of one rank's part; returns it.

    Args:
        model: built from `ShardedWeights` with `local_config`; it is changed.
        group: the ranks.
        part: the rank's.
    """
    config = model.config
    model.embed_tokens = ShardedEmbedding(model.embed_tokens.table, group, part.of(config.vocab_size))
    if "lm_head" in model:
        model.lm_head = GatheredLinear(model.lm_head, group)  # type: ignore[assignment]
    for layer in model.layers:
        layer.operator.out_proj = SummedLinear(layer.operator.out_proj, group)  # type: ignore[assignment]
        if isinstance(layer.feed_forward, MoE):
            experts = part.of(config.num_experts) if part.mode == "expert" else None
            layer.feed_forward = ShardedMoE(layer.feed_forward, group, experts)
        else:
            layer.feed_forward.down_proj = SummedLinear(layer.feed_forward.down_proj, group)  # type: ignore[assignment]
    return model


def side_by_side(parts: mx.array) -> mx.array:
    """``(size, ..., V / size)`` as ``(..., V)``."""
    if math.prod(parts.shape[1:-1]) == 1:
        return parts.reshape(*parts.shape[1:-1], -1)
    return mx.moveaxis(parts, 0, -2).reshape(*parts.shape[1:-1], -1)


def _places(ids: mx.array, mine: range) -> tuple[mx.array, mx.array]:
    """Where ids of `mine` stand among them, 0 for others; and which are of `mine`."""
    is_here = (ids >= mine.start) & (ids < mine.stop)
    return mx.where(is_here, ids - mine.start, mx.array(0, dtype=ids.dtype)), is_here
