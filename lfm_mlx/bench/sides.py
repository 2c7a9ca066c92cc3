"""The two sides of a comparison: this runtime, and what the questions ask of any side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import mlx.core as mx
from mlx.utils import tree_flatten

from lfm_mlx.bench.shapes import view_of
from lfm_mlx.cache import ConvState, State
from lfm_mlx.config import ModelConfig
from lfm_mlx.distributed import ranks_of
from lfm_mlx.model import Model
from lfm_mlx.sampling import Sampler
from lfm_mlx.step import Stepper
from lfm_mlx.types import SamplingParams

GREEDY = SamplingParams()


class Side(Protocol):
    """A runtime with a model in it. A `rows` value is the side's own: what a batch of rows remembers."""

    name: str
    config: ModelConfig

    def new_rows(
        self, lengths: Sequence[int], *, capacity: int, params: SamplingParams = GREEDY, is_view: bool = False
    ) -> Any:
        """Rows that have seen `lengths` tokens, all zeros.

        Args:
            lengths: tokens of each row; 0 for rows that are to be prefilled.
            capacity: tokens a row has room for.
            params: how the rows sample.
            is_view: make keys and values that take no memory and must not be evaluated.
        """
        ...

    def logits(self, rows: Any, tokens: mx.array) -> mx.array:
        """One step: logits ``(B, V)`` after `tokens` ``(B,)``, unevaluated; the rows move on."""
        ...

    def sample(self, rows: Any, tokens: mx.array) -> mx.array:
        """One step and the choice of the next tokens ``(B,)``, unevaluated; the rows move on."""
        ...

    def prefill(self, rows: Any, tokens: mx.array) -> mx.array:
        """Take prompts ``(B, L)`` into new rows; logits ``(B, V)``, unevaluated."""
        ...

    def arrays(self, rows: Any) -> list[mx.array]:
        """What has to be evaluated with every step."""
        ...

    def weights(self) -> dict[int, list[mx.array]]:
        """All weights by layer, -1 for the embedding, one past the last for final norm and head."""
        ...


class Rows:
    """Our rows: a state, a sampler and its state."""

    def __init__(self, state: State, sampler: Sampler) -> None:
        self.state = state
        self.sampler = sampler
        self.sampler_state = sampler.start([[] for _ in state.lengths])


class Ours:
    """This runtime.

    Args:
        model: any model.
        is_compiled: whether steps are compiled; None: as in use on this device.
        kv_bits: bits of keys and values; None: as computed.
    """

    name = "lfm_mlx"

    def __init__(self, model: Model, *, is_compiled: bool | None = None, kv_bits: int | None = None) -> None:
        self.model = model
        self.config = model.config
        self.stepper = Stepper(model, is_compiled=is_compiled)
        self.kv_bits = kv_bits
        self._ranks = ranks_of(model)

    def new_rows(
        self, lengths: Sequence[int], *, capacity: int, params: SamplingParams = GREEDY, is_view: bool = False
    ) -> Rows:
        """As `Side.new_rows`."""
        state = self.model.new_state(len(lengths), kv_bits=self.kv_bits)
        state.lengths = tuple(lengths)
        state.reserve(capacity)
        if is_view:
            for layer in state.layers:
                if not isinstance(layer, ConvState):
                    layer.arrays = tuple(view_of(array.shape, array.dtype) for array in layer.arrays)
        mx.eval(state.arrays)
        rows = Rows(state, Sampler([params] * len(lengths), self.config.vocab_size))
        mx.eval(rows.sampler_state)
        return rows

    def logits(self, rows: Rows, tokens: mx.array) -> mx.array:
        """As `Side.logits`."""
        return self.stepper.decode(rows.state, tokens)

    def sample(self, rows: Rows, tokens: mx.array) -> mx.array:
        """As `Side.sample`."""
        sampled = self.stepper.decode_and_sample(rows.state, tokens, rows.sampler, rows.sampler_state)
        rows.sampler_state = sampled.sampler_state
        return sampled.ids if self._ranks is None else self._ranks.share(sampled.ids)

    def prefill(self, rows: Rows, tokens: mx.array) -> mx.array:
        """As `Side.prefill`."""
        return self.stepper.prefill(rows.state, tokens)

    def arrays(self, rows: Rows) -> list[mx.array]:
        """As `Side.arrays`."""
        return [*rows.state.arrays, *rows.sampler_state.values()]

    def weights(self) -> dict[int, list[mx.array]]:
        """As `Side.weights`."""
        return weights_by_layer(self.model, self.model.layers, self.model.embed_tokens)


def weights_by_layer(model: Any, layers: Sequence[Any], embedding: Any) -> dict[int, list[mx.array]]:
    """The arrays of `model`, by layer; what is in no layer and not in the embedding comes after the last."""
    found = {-1: _arrays(embedding), **{i: _arrays(layer) for i, layer in enumerate(layers)}}
    seen = {id(array) for arrays in found.values() for array in arrays}
    found[len(layers)] = [array for array in _arrays(model) if id(array) not in seen]
    return found


def _arrays(module: Any) -> list[mx.array]:
    return list(dict(tree_flatten(module.parameters())).values())
