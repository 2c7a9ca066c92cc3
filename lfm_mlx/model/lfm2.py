"""The module tree of every LFM2 model, dense or with experts.

Shape letters, here and everywhere: B rows, L tokens in this call, S tokens visible to attention, D hidden, H query
heads, G key-value heads, P head width, E experts, A active experts, F expert width, W conv taps, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
from mlx.nn.layers.base import Module
from mlx.utils import tree_flatten

from lfm_mlx.cache import State
from lfm_mlx.config import ModelConfig
from lfm_mlx.errors import ContextLengthError, OptionError
from lfm_mlx.model.block import Block
from lfm_mlx.model.linear import AnyLinear, Embedding
from lfm_mlx.model.moe import MoE
from lfm_mlx.model.norm import Norm
from lfm_mlx.model.passage import Passage
from lfm_mlx.types import SamplingParams


class Model(Module):
    """Embedding, layers, final norm, head. `lfm_mlx.load` builds one from a checkpoint.

    Args:
        config: the architecture.
        embed_tokens: ``(V, D)``.
        layers: one block a layer.
        embedding_norm: the norm before the head.
        lm_head: ``(V, D)``, or None where the embedding serves as head.
        dtype: dtype of the activations.

    Attributes:
        sampling: how tokens are drawn when the caller says nothing; `load` puts the model card's values here.
        max_context: tokens a row may hold; at most the config's.
        kv_bits: 8 or 4 where keys and values are quantised unless a call says otherwise.
    """

    def __init__(
        self,
        *,
        config: ModelConfig,
        embed_tokens: Embedding,
        layers: Sequence[Block],
        embedding_norm: Norm,
        lm_head: AnyLinear | None,
        dtype: mx.Dtype,
    ) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = embed_tokens
        self.layers = list(layers)
        self.embedding_norm = embedding_norm
        if lm_head is not None:
            self.lm_head = lm_head
        self.dtype = dtype
        self.sampling = SamplingParams()
        self.max_context = config.max_context
        self.kv_bits: int | None = None

    def __call__(
        self, tokens: mx.array, state: State | None = None, *, lengths: Sequence[int] | None = None
    ) -> mx.array:
        """Logits of every token of a call.

        Args:
            tokens: int ``(B, L)``.
            state: what the rows have seen before, from `new_state`; it is moved on. None: they have seen nothing, and
                nothing is remembered.
            lengths: how many of each row's L tokens are real, the rest being padding on the right; None: all are.

        Returns:
            ``(B, L, V)`` in the model's dtype; those of padding mean nothing.

        Raises:
            OptionError: `tokens` is not (B, L), or does not fit `state` or `lengths`.
            ContextLengthError: a row would outgrow the context.
        """
        return self.head(self.hidden(tokens, state, lengths=lengths))

    def hidden(self, tokens: mx.array, state: State | None = None, *, lengths: Sequence[int] | None = None) -> mx.array:
        """Normalised hidden states ``(B, L, D)``: what `head` turns into logits. Arguments as for a call."""
        passage = Passage(self, tokens, state, lengths)
        passage.run(len(self.layers))
        return passage.normed

    def norm_behind(self, layer: int) -> Norm:
        """The norm that takes the output of layer `layer`: the next layer's first, or the one before the head."""
        return self.layers[layer + 1].operator_norm if layer + 1 < len(self.layers) else self.embedding_norm

    def head(self, hidden: mx.array) -> mx.array:
        """Logits ``(..., V)`` of normalised hidden states ``(..., D)``."""
        return self.lm_head(hidden) if "lm_head" in self else self.embed_tokens.as_linear(hidden)

    def new_state(self, batch_size: int = 1, *, kv_bits: int | None = None) -> State:
        """A state for `batch_size` rows that have seen nothing.

        Args:
            batch_size: number of rows.
            kv_bits: 8 or 4 to quantise keys and values; None takes the model's `kv_bits`.
        """
        bits = kv_bits if kv_bits is not None else self.kv_bits
        state = State.empty(self.config, batch_size, dtype=self.dtype, kv_bits=bits)
        state.max_context = self.max_context
        return state

    def checked_prompt(self, ids: Sequence[int]) -> list[int]:
        """`ids` as a list, if the model can take them and answer.

        Raises:
            OptionError: there are none, or one is outside the vocabulary.
            ContextLengthError: they leave no room for an answer.
        """
        if not ids:
            raise OptionError("prompt is empty, expected at least one token; give some text")
        vocab_size = self.config.vocab_size
        wrong = next((i for i in ids if not 0 <= i < vocab_size), None)
        if wrong is not None:
            raise OptionError(
                f"prompt has token id {wrong}, expected 0 to {vocab_size - 1}; is this the model's tokenizer?"
            )
        if len(ids) >= self.max_context:
            raise ContextLengthError(
                f"prompt has {len(ids):,} tokens, expected fewer than {self.max_context:,} (the context); shorten it"
            )
        return list(ids)

    @property
    def num_bytes(self) -> int:
        """Bytes of all weights."""
        return sum(array.nbytes for array in dict(tree_flatten(self.parameters())).values())

    @property
    def shared_bytes(self) -> int:
        """Bytes of the weights that every step reads, whatever its tokens: all but the experts'."""
        experts = [layer.feed_forward for layer in self.layers if isinstance(layer.feed_forward, MoE)]
        parts = [part for moe in experts for part in (moe.gate_up_proj, moe.down_proj)]
        arrays: list[mx.array] = [array for part in parts for array in dict(tree_flatten(part.parameters())).values()]
        return self.num_bytes - sum(array.nbytes for array in arrays)
