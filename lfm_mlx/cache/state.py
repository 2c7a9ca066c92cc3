"""What a model remembers of a batch of rows: one state a layer, and the length of each row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx

from lfm_mlx.cache.attention_cache import AttentionCache
from lfm_mlx.cache.conv_state import ConvState
from lfm_mlx.cache.kv_cache import KVCache
from lfm_mlx.cache.quantized_kv_cache import QuantizedKVCache
from lfm_mlx.cache.span import Span
from lfm_mlx.config import ModelConfig
from lfm_mlx.errors import ContextLengthError, OptionError

LayerState = ConvState | AttentionCache


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """A state at one moment, in copies of its own: it stays valid whatever the state does later."""

    lengths: tuple[int, ...]
    layers: tuple[Any, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes held."""
        return sum(array.nbytes for layer in self.layers for array in layer)


@dataclass(frozen=True, kw_only=True, eq=False)
class Mark:
    """A place that one state can `State.rewind` to: the convolutions' rows; keys and values stay in the state."""

    lengths: tuple[int, ...]
    conv_rows: tuple[tuple[mx.array, ...], ...]


class State:
    """The state of a batch of rows, from `State.empty`; `begin` a call, run the layers, then `advance`.

    Attributes:
        layers: one ConvState or AttentionCache a layer.
        lengths: tokens each row has seen.
    """

    def __init__(self, layers: Sequence[LayerState], lengths: Sequence[int], max_context: int) -> None:
        self.layers = list(layers)
        self.lengths = tuple(lengths)
        self.max_context = max_context
        self._marks: list[Mark] = []
        self._asked: tuple[int, ...] = ()
        self._checkpoints: dict[int, mx.array] = {}

    @classmethod
    def empty(
        cls, config: ModelConfig, batch_size: int = 1, *, dtype: mx.Dtype = mx.float32, kv_bits: int | None = None
    ) -> State:
        """The state of `batch_size` rows that have seen nothing.

        Args:
            config: the model's.
            batch_size: number of rows, at least 1.
            dtype: dtype of keys, values and convolution rows: the model's activations'.
            kv_bits: 8 or 4 to quantise keys and values; None keeps them as computed.

        Raises:
            OptionError: a batch size below 1, or `kv_bits` that this model cannot have.
        """
        if batch_size < 1:
            raise OptionError(f"batch_size is {batch_size}, expected at least 1")

        def attention_cache() -> AttentionCache:
            if kv_bits is None:
                return KVCache.empty(batch_size, config.num_kv_heads, config.head_dim, dtype)
            return QuantizedKVCache.empty(batch_size, config.num_kv_heads, config.head_dim, kv_bits)

        layers: list[LayerState] = [
            attention_cache()
            if kind == "full_attention"
            else ConvState.zeros(batch_size, config.conv_taps - 1, config.conv_size, dtype)
            for kind in config.layer_types
        ]
        return cls(layers, (0,) * batch_size, config.max_context)

    @property
    def batch_size(self) -> int:
        """Number of rows."""
        return len(self.lengths)

    @property
    def arrays(self) -> list[mx.array]:
        """Every array held, for evaluation."""
        return [array for layer in self.layers for array in layer.arrays] + list(self._checkpoints.values())

    @property
    def num_bytes(self) -> int:
        """Bytes held by all layers."""
        return sum(array.nbytes for array in self.arrays)

    @property
    def capacity(self) -> int:
        """Tokens a row has room for until buffers have to grow; all it can take where there is no attention."""
        return min((layer.capacity for layer in self.attentions), default=self.max_context)

    @property
    def convolutions(self) -> list[ConvState]:
        """The convolution layers, in order."""
        return [layer for layer in self.layers if isinstance(layer, ConvState)]

    @property
    def attentions(self) -> list[AttentionCache]:
        """The attention layers, in order."""
        return [layer for layer in self.layers if isinstance(layer, AttentionCache)]

    def begin(self, num_tokens: int, counts: Sequence[int] | None = None) -> Span:
        """The span of the next `num_tokens` tokens of each row, of which `counts` are real.

        Raises:
            ContextLengthError: a row would become longer than the model's context.
        """
        span = Span.make(self.lengths, num_tokens, counts)
        if self._asked:
            start, end = self.lengths[0], span.ends[0]
            span = replace(span, asked=tuple(place - start for place in self._asked if start < place <= end))
        if span.end > self.max_context and max(span.ends) > self.max_context:
            raise ContextLengthError(
                f"a row would hold {max(span.ends):,} tokens, expected at most {self.max_context:,} "
                "(max_position_embeddings); shorten the prompt or lower max_tokens"
            )
        return span

    def advance(self, span: Span) -> None:
        """Count the tokens of a finished call."""
        self.lengths = span.ends
        if span.asked:
            self._collect(span)

    def ask(self, lengths: Sequence[int]) -> None:
        """Have prompts that are taken in from now on leave a checkpoint where the row has one of these lengths.

        The chunks of a prompt are not cut for it. Decode steps leave none: there, `checkpoint` costs the same.

        Raises:
            OptionError: the state has more than one row.
        """
        if self.batch_size != 1:
            raise OptionError(f"checkpoints were asked of a state of {self.batch_size} rows, expected 1")
        self._asked = tuple(lengths)

    def take_checkpoints(self) -> dict[int, mx.array]:
        """The checkpoints that were asked for and came, by the row's length; nothing is asked for any more."""
        taken, self._checkpoints, self._asked = self._checkpoints, {}, ()
        return taken

    def checkpoint(self, row: int = 0) -> mx.array:
        """What the convolutions remember of a row now: ``(C, W - 1, D)`` for C of them, a copy, unevaluated."""
        num_rows = [len(layer.rows) for layer in self.convolutions]
        if not num_rows:
            return mx.zeros((0, 0, 0))
        rows = [array[row, 0, 0] for layer in self.convolutions for array in layer.rows]
        return mx.stack(rows).reshape(len(num_rows), num_rows[0], -1)

    def _drop_places(self) -> None:
        self._marks = []
        self.take_checkpoints()

    def _collect(self, span: Span) -> None:
        handed_out = [layer.handed_out for layer in self.convolutions if layer.handed_out is not None]
        if len(handed_out) < len(self.convolutions):
            return
        together = mx.stack(handed_out, axis=1) if handed_out else mx.zeros((len(span.asked), 0, 0))
        for layer in self.convolutions:
            layer.handed_out = None
        for i, place in enumerate(span.asked):
            # A slice would keep the other checkpoints of the chunk alive.
            self._checkpoints[span.starts[0] + place] = together[mx.array([i])][0]

    def reserve(self, num_tokens: int, *, planned_len: int | None = None) -> None:
        """Make room for rows of `num_tokens` tokens in every attention layer.

        Args:
            num_tokens: tokens a row holds at once.
            planned_len: tokens that no row will exceed: buffers that grow later do not grow beyond.
        """
        for layer in self.attentions:
            layer.planned_len = planned_len
            layer.reserve(num_tokens)

    def snapshot(self) -> Snapshot:
        """A copy of the state as it is now."""
        longest = max(self.lengths)
        layers = [
            layer.snapshot(longest) if isinstance(layer, AttentionCache) else layer.snapshot() for layer in self.layers
        ]
        return Snapshot(lengths=self.lengths, layers=tuple(layers))

    def restore(self, snapshot: Snapshot) -> None:
        """Go back to a snapshot of this state, or of one of the same model; marks and checkpoints are gone."""
        self._drop_places()
        for layer, stored in zip(self.layers, snapshot.layers, strict=True):
            layer.restore(stored)
        self.lengths = snapshot.lengths

    def mark(self) -> Mark:
        """Remember this place; costs the convolutions' rows and no keys or values."""
        rows = tuple(layer.rows for layer in self.convolutions)
        mark = Mark(lengths=self.lengths, conv_rows=rows)
        self._marks.append(mark)
        return mark

    def rewind(self, mark: Mark) -> None:
        """Go back to a place of this state; marks made behind it are gone.

        Raises:
            OptionError: the mark is another state's, or was made behind a place that was gone back to.
        """
        if mark not in self._marks:
            raise OptionError("mark is not one of this state's, or the state went back to before it; make a new one")
        for layer, rows in zip(self.convolutions, mark.conv_rows, strict=True):
            layer.rows = rows
        self.lengths = mark.lengths
        self._marks = self._marks[: self._marks.index(mark) + 1]
        self._checkpoints = {n: rows for n, rows in self._checkpoints.items() if n <= self.lengths[0]}

    def forget(self, mark: Mark) -> None:
        """Drop a mark that is no longer needed."""
        self._marks.remove(mark)

    def keep(self, rows: Sequence[int], capacity: int | None = None) -> None:
        """Keep only these rows, in this order; marks and checkpoints are gone.

        Args:
            rows: the rows.
            capacity: tokens a row has room for afterwards, where that is less than now; at least its length.
        """
        self._drop_places()
        index = mx.array(list(rows), dtype=mx.int32)
        for layer in self.layers:
            if isinstance(layer, AttentionCache):
                layer.keep(index, capacity)
            else:
                layer.keep(index)
        self.lengths = tuple(self.lengths[row] for row in rows)

    def join(self, other: State) -> None:
        """Append the rows of another state of the same model; marks and checkpoints are gone."""
        self._drop_places()
        for layer, added in zip(self.layers, other.layers, strict=True):
            layer.join(added)  # type: ignore[arg-type]
        self.lengths += other.lengths
