"""What earlier rows have computed, kept for later rows that begin with the same tokens."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence

import mlx.core as mx

from lfm_mlx.cache.prefix_block import Block, fill_state
from lfm_mlx.cache.prefix_tree import Node, PrefixTree
from lfm_mlx.cache.state import State
from lfm_mlx.config import ModelConfig
from lfm_mlx.errors import OptionError

BLOCK_TOKENS = 256
"""Tokens a block holds at most; a checkpoint of the convolutions at every end of one adds 5 % to its bytes."""

BlockNode = Node[Block]


class PrefixCache:
    """Blocks of earlier rows in a tree: what rows have in common is held once.

    A row can go on from any checkpoint of the convolutions, which rows leave where they were asked to: at `places`.
    Continuing from there is the same computation as without the cache. All methods belong to one thread.

    Args:
        config: the model's.
        dtype: of the model's activations.
        kv_bits: 8 or 4 where keys and values are quantised.
        max_bytes: most that is held; what was not used for longest goes first.
        block_tokens: tokens a block holds at most.

    Attributes:
        num_bytes: bytes held.
        num_hits: rows that went on from here.
        num_misses: rows that began at nothing.
        num_reused_tokens: tokens that these hits saved.
        num_evictions: blocks dropped to keep within `max_bytes`.

    Raises:
        OptionError: `max_bytes` or `block_tokens` is not positive, or the model cannot have these `kv_bits`.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        dtype: mx.Dtype,
        kv_bits: int | None = None,
        max_bytes: int,
        block_tokens: int = BLOCK_TOKENS,
    ) -> None:
        for name, value in (("max_bytes", max_bytes), ("block_tokens", block_tokens)):
            if value < 1:
                raise OptionError(f"{name} is {value}, expected at least 1")
        self.max_bytes = max_bytes
        self.kv_bits = kv_bits
        self.block_tokens = block_tokens
        self.num_bytes = 0
        self.num_hits = self.num_misses = self.num_reused_tokens = self.num_evictions = 0
        self._layout = _layout(State.empty(config, dtype=dtype, kv_bits=kv_bits))
        self._tree: PrefixTree[Block] = PrefixTree(block_tokens, Block((), {}))
        self._by_age: OrderedDict[BlockNode, int] = OrderedDict()  # Bytes of each; parents behind their children.

    @property
    def num_blocks(self) -> int:
        """Blocks held."""
        return len(self._by_age)

    def places(self, ids: Sequence[int], start: int = 0, border_ids: Collection[int] = ()) -> list[int]:
        """The lengths behind `start` at which a prompt is to leave checkpoints, for `State.ask`.

        These are the ends of blocks, the places in front of the tokens `border_ids`, where messages begin, and the one
        in front of the last token, from which the same prompt goes on.
        """
        last = len(ids) - 1
        ends = range(self.block_tokens, len(ids), self.block_tokens)
        borders = [i for i in range(start + 1, len(ids)) if ids[i] in border_ids] if border_ids else []
        return sorted(place for place in {*ends, *borders, last} if place > start)

    def find(self, ids: Sequence[int]) -> int:
        """How many tokens of `ids` a row could reuse; always fewer than all of them. Changes nothing."""
        return self._find(ids)[1]

    def restore(self, ids: Sequence[int], state: State) -> int:
        """Put a row to the furthest checkpoint that `ids` share with an earlier row.

        Args:
            ids: the row's tokens.
            state: one row that has seen nothing; room that was reserved in it stays. It gets copies: what becomes of
                the cache later does not touch it.

        Returns:
            How many of the tokens need not be computed; always fewer than all of them.

        Raises:
            OptionError: the state is not one empty row of the model and precision this cache is for.
        """
        if state.lengths != (0,):
            raise OptionError(f"state holds rows of {list(state.lengths)} tokens, expected a single one of 0")
        self._check(state)
        path, num_tokens = self._find(ids)
        if not num_tokens:
            self.num_misses += 1
            return 0
        self.num_hits += 1
        self.num_reused_tokens += num_tokens
        self._touch(path)
        blocks = [node.value for node in path]
        fill_state(state, blocks, blocks[-1].checkpoints[num_tokens], num_tokens)
        mx.async_eval(state.arrays)
        return num_tokens

    def insert(self, ids: Sequence[int], state: State, row: int, checkpoints: Mapping[int, mx.array]) -> None:
        """Keep what a row has computed, up to its last checkpoint; what is held already is not copied again.

        Args:
            ids: tokens the row has seen, from its beginning.
            state: where the row is; the copies are queued on the device, nothing waits for them.
            row: which of the state's rows.
            checkpoints: ``(C, W - 1, D)`` by the row's length, of `State.take_checkpoints` and `State.checkpoint`.

        Raises:
            OptionError: the state is of another model or precision, or the row is shorter than `ids`.
        """
        self._check(state)
        if len(ids) > state.lengths[row]:
            raise OptionError(f"ids are {len(ids)} tokens, but row {row} of the state has seen {state.lengths[row]}")
        stop = max((length for length in checkpoints if length <= len(ids)), default=0)
        path = self._place(tuple(ids[:stop]), state, row)
        for node in path:
            found = {n: rows for n, rows in checkpoints.items() if node.start < n <= node.stop}
            node.value.checkpoints |= {n: rows for n, rows in found.items() if n not in node.value.checkpoints}
        self._touch(path)
        self.shrink(self.max_bytes)
        mx.async_eval([array for node in path if node in self._by_age for array in node.value.arrays])

    def shrink(self, max_bytes: int) -> None:
        """Drop the blocks that were not used for longest until at most `max_bytes` are held."""
        while self.num_bytes > max_bytes:
            node, num_bytes = self._by_age.popitem(last=False)
            assert not node.children
            self._tree.remove(node)
            self.num_bytes -= num_bytes
            self.num_evictions += 1

    def clear(self) -> None:
        """Drop everything."""
        self.shrink(0)

    def _find(self, ids: Sequence[int]) -> tuple[list[BlockNode], int]:
        """The nodes up to the furthest usable checkpoint, and its length; none and 0 where there is none."""
        match = self._tree.find(ids)
        limit = min(match.num_tokens, len(ids) - 1)
        for i in reversed(range(len(match.path))):
            usable = [length for length in match.path[i].value.checkpoints if length <= limit]
            if usable:
                return match.path[: i + 1], max(usable)
        return [], 0

    def _place(self, ids: tuple[int, ...], state: State, row: int) -> list[BlockNode]:
        """The nodes of exactly these ids; those that were not there are made from the row."""
        match = self._tree.find(ids)
        path, at = match.path, match.num_tokens
        if at == len(ids):
            return path
        if match.is_inside_last:
            path[-1] = self._split(path[-1], at - path[-1].start)
        elif path and not path[-1].children and at % self.block_tokens:
            at = self._extend(path[-1], ids, state, row)
        while at < len(ids):
            stop = min(at + self._tree.room(at), len(ids))
            parent = path[-1] if path else self._tree.root
            path.append(self._tree.add(parent, ids[at:stop], Block.copied(state, row, at, stop)))
            at = stop
        return path

    def _split(self, node: BlockNode, num_tokens: int) -> BlockNode:
        first, rest = node.value.split(num_tokens, node.start + num_tokens)
        upper = self._tree.split(node, num_tokens, first)
        node.value = rest
        mx.async_eval(first.arrays, rest.arrays)
        self.num_bytes += rest.num_bytes - self._by_age[node]
        self._by_age[node] = rest.num_bytes
        return upper

    def _extend(self, leaf: BlockNode, ids: tuple[int, ...], state: State, row: int) -> int:
        """Fill up a leaf's block; one block is better than two, and the row has all its columns."""
        stop = min(leaf.start + self._tree.room(leaf.start), len(ids))
        self._tree.extend(leaf, ids[leaf.stop : stop])
        leaf.value = Block(Block.copied(state, row, leaf.start, stop).columns, leaf.value.checkpoints)
        return stop

    def _touch(self, path: Sequence[BlockNode]) -> None:
        """Count the bytes of nodes that were used, and make them the youngest, the first ones youngest of all."""
        for node in reversed(path):
            num_bytes = node.value.num_bytes
            self.num_bytes += num_bytes - self._by_age.get(node, 0)
            self._by_age[node] = num_bytes
            self._by_age.move_to_end(node)

    def _check(self, state: State) -> None:
        if _layout(state) != self._layout:
            raise OptionError(
                "state is of another model, dtype or kv_bits than the prefix cache; make the cache with those of "
                "the engine"
            )


def _layout(state: State) -> list[tuple[object, ...]]:
    """What has to be equal for a state to take another one's columns."""
    columns = [
        (buffer.dtype, buffer.shape[1], buffer.shape[3]) for layer in state.attentions for buffer in layer.arrays
    ]
    return columns + [(row.dtype, row.shape[3]) for layer in state.convolutions for row in layer.rows]
