"""A checkpoint's forward pass with one layer in memory at a time, for models that do not fit as a whole."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import mlx.core as mx

from lfm_mlx.build import build_embedding, build_head, build_layer
from lfm_mlx.cache import Span
from lfm_mlx.checkpoint import Checkpoint
from lfm_mlx.load import compute_dtype
from lfm_mlx.model import AnyLinear, Block, Embedding, MoE, Norm

HEAD_TOKENS = 256
"""Tokens whose logits are computed at once."""


class Layerwise:
    """The parts of the checkpoint in `folder`, each read when it is asked for and not kept.

    Args:
        folder: an unquantised or quantised checkpoint.
    """

    def __init__(self, folder: Path) -> None:
        self.checkpoint = Checkpoint(folder)
        self.config = self.checkpoint.config
        self.dtype = compute_dtype(self.config, weight_bytes=self.checkpoint.num_bytes)

    def embed(self, sequences: Sequence[Sequence[int]]) -> list[mx.array]:
        """What the first layer gets for each sequence: (1, L, D)."""
        embedding = build_embedding(self.config, self.checkpoint, self.dtype)
        made = [embedding(mx.array([ids])).astype(self.dtype) for ids in sequences]
        mx.eval(made)
        return made

    def layer(self, index: int) -> Block:
        """One layer."""
        return build_layer(self.config, self.checkpoint, self.dtype, index)

    def head(self) -> tuple[Norm, AnyLinear | Embedding]:
        """The final norm, and what turns its result into logits."""
        return build_head(self.config, self.checkpoint, self.dtype)

    def logits(self, hidden: Sequence[mx.array]) -> Iterator[mx.array]:
        """For each sequence its logits (L, V) in float32, a few hundred tokens at a time: (at most 256, V)."""
        norm, head = self.head()
        for x in hidden:
            for first in range(0, x.shape[1], HEAD_TOKENS):
                normed = norm(x[:, first : first + HEAD_TOKENS])
                made = head.as_linear(normed) if isinstance(head, Embedding) else head(normed)
                yield made[0].astype(mx.float32)

    def run(self, sequences: Sequence[Sequence[int]]) -> list[mx.array]:
        """What the last layer gives for each sequence: (1, L, D)."""
        hidden = self.embed(sequences)
        for index in range(self.config.num_layers):
            block = self.layer(index)
            hidden = [step_through(block, x).hidden for x in hidden]
            mx.eval(hidden)
            del block
            mx.clear_cache()
        return hidden


class Step:
    """What a layer made of a sequence.

    Attributes:
        hidden: (1, L, D).
        experts: the experts chosen for each token in ascending order, (L, A), or None in a dense layer.
    """

    def __init__(self, hidden: mx.array, experts: mx.array | None) -> None:
        self.hidden = hidden
        self.experts = experts


def step_through(block: Block, x: mx.array) -> Step:
    """Run one layer over a whole sequence (1, L, D)."""
    summed = x + block.operator(block.operator_norm(x), None, Span.make((0,), x.shape[1]))
    normed = block.ffn_norm(summed)
    experts = None
    if isinstance(block.feed_forward, MoE):
        experts = mx.sort(block.feed_forward.route(normed[0]).experts.astype(mx.int32), axis=-1)
    hidden, _ = block.feed_forward(normed, summed, block.operator_norm)  # the norm behind it is not wanted
    return Step(hidden, experts)
