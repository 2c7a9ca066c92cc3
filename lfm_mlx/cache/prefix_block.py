"""A stretch of one row's tokens as the prefix cache keeps it: keys and values of all layers, and conv checkpoints."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

import mlx.core as mx

from lfm_mlx.cache.attention_cache import AttentionCache
from lfm_mlx.cache.state import State


class Block:
    """Arrays of its own, no views of a row's buffers: what they take is freed with the block.

    Attributes:
        columns: keys and values of n tokens, arrays of a kind stacked over the attention layers, ``(N, G, n, width)``:
            one array for unquantised ones, one for codes and one for scales and biases of quantised ones.
        checkpoints: what the convolutions remember at some lengths of the row, ``(C, W - 1, D)`` each.
    """

    def __init__(self, columns: Sequence[mx.array], checkpoints: dict[int, mx.array]) -> None:
        self.columns = tuple(columns)
        self.checkpoints = checkpoints

    @classmethod
    def copied(cls, state: State, row: int, start: int, stop: int) -> Block:
        """The columns of a row's tokens from `start` to `stop`, without checkpoints, unevaluated."""
        buffers = [buffer for layer in state.attentions for buffer in layer.arrays]
        columns = [
            mx.stack([buffers[i][row, :, start:stop] for i in places]) for places in _places_by_kind(state.attentions)
        ]
        return cls(columns, {})

    @property
    def arrays(self) -> list[mx.array]:
        """Every array held."""
        return [*self.columns, *self.checkpoints.values()]

    @property
    def num_bytes(self) -> int:
        """Bytes held."""
        return sum(array.nbytes for array in self.columns) + sum(rows.nbytes for rows in self.checkpoints.values())

    def split(self, num_tokens: int, length: int) -> tuple[Block, Block]:
        """Two blocks: the first `num_tokens` tokens, and the rest; `length` is the row's length at the cut."""
        first = [mx.contiguous(array[:, :, :num_tokens]) for array in self.columns]
        rest = [mx.contiguous(array[:, :, num_tokens:]) for array in self.columns]
        before = {at: rows for at, rows in self.checkpoints.items() if at <= length}
        after = {at: rows for at, rows in self.checkpoints.items() if at > length}
        return Block(first, before), Block(rest, after)


@dataclass(frozen=True, kw_only=True)
class BlockLayout:
    """What blocks of one model and precision look like.

    Args:
        columns: dtype, N, G and width of each array.
        checkpoint: dtype and shape.
    """

    columns: tuple[tuple[mx.Dtype, int, int, int], ...]
    checkpoint: tuple[mx.Dtype, tuple[int, ...]]

    @classmethod
    def of(cls, state: State) -> BlockLayout:
        """The layout of blocks of rows of `state`."""
        buffers = [buffer for layer in state.attentions for buffer in layer.arrays]
        kinds = [(buffers[places[0]], len(places)) for places in _places_by_kind(state.attentions)]
        rows = [row for layer in state.convolutions for row in layer.rows]
        num_convolutions = len(state.convolutions)
        shape = (num_convolutions, len(rows) // num_convolutions, rows[0].shape[3]) if rows else (0, 0, 0)
        return cls(
            columns=tuple((buffer.dtype, count, buffer.shape[1], buffer.shape[3]) for buffer, count in kinds),
            checkpoint=(rows[0].dtype if rows else mx.float32, shape),
        )

    def fits(self, block: Block, num_tokens: int, lengths: Collection[int]) -> bool:
        """Whether a block of unknown origin holds `num_tokens` tokens and checkpoints at just these lengths."""
        columns = [(array.dtype, tuple(array.shape)) for array in block.columns]
        if columns != [(dtype, (n, g, num_tokens, width)) for dtype, n, g, width in self.columns]:
            return False
        checkpoints = [(rows.dtype, tuple(rows.shape)) for rows in block.checkpoints.values()]
        return set(block.checkpoints) == set(lengths) and all(found == self.checkpoint for found in checkpoints)


def fill_state(state: State, blocks: Sequence[Block], checkpoint: mx.array, num_tokens: int) -> None:
    """Put an empty row to where `num_tokens` tokens have been seen; nothing is evaluated.

    Args:
        state: one row that has seen nothing; room that was reserved in it stays.
        blocks: of the row from its beginning; together at least `num_tokens` tokens long.
        checkpoint: ``(C, W - 1, D)`` at `num_tokens`.
        num_tokens: the row's length afterwards.
    """
    attentions = state.attentions
    pieces: dict[int, list[mx.array]] = {}
    for kind, places in enumerate(_places_by_kind(attentions)):
        stacks = list(_first_columns((block.columns[kind] for block in blocks), num_tokens))
        for i, place in enumerate(places):
            pieces[place] = [stack[i : i + 1] for stack in stacks]
    first = 0
    for layer in attentions:
        layer.fill([pieces[first + i] for i in range(len(layer.arrays))])
        first += len(layer.arrays)
    for convolution, rows in zip(state.convolutions, checkpoint, strict=True):
        convolution.rows = tuple(rows[i, None, None, None] for i in range(len(convolution.rows)))
    state.lengths = (num_tokens,)


def _first_columns(arrays: Iterable[mx.array], num_tokens: int) -> Iterable[mx.array]:
    """Arrays ``(N, G, n, width)``, the last one cut, that hold `num_tokens` tokens together."""
    for array in arrays:
        n = array.shape[2]
        yield array if n <= num_tokens else array[:, :, :num_tokens]
        num_tokens -= n


def _places_by_kind(attentions: Sequence[AttentionCache]) -> list[list[int]]:
    """Which of all layers' buffers can be stacked: those of one dtype and width."""
    buffers = [buffer for layer in attentions for buffer in layer.arrays]
    kinds: dict[object, list[int]] = {}
    for i, buffer in enumerate(buffers):
        kinds.setdefault((buffer.dtype, buffer.shape[1], buffer.shape[3]), []).append(i)
    return list(kinds.values())
