"""What earlier rows have computed, kept for later rows that begin with the same tokens."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from typing import Protocol

import mlx.core as mx

from lfm_mlx.cache.disk import DiskStore
from lfm_mlx.cache.prefix_block import Block, BlockLayout, fill_state
from lfm_mlx.cache.prefix_spill import BlockNode, Kept, Reading, Spill
from lfm_mlx.cache.prefix_tree import PrefixTree
from lfm_mlx.cache.state import State
from lfm_mlx.config import ModelConfig
from lfm_mlx.errors import OptionError

BLOCK_TOKENS = 256
"""Tokens a block holds at most; a checkpoint of the convolutions at every end of one adds 5 % to its bytes."""

FIRST_PLACES = (32, 64, 128)
"""Checkpoints inside a row's first block, so that a change in its first message leaves at least half of what is in
front of it."""

READING_PART = 2
"""Blocks that are read ahead of rows take at most this part of what is allowed: more would push each other out."""

MAX_TAILS = 1024
"""Tails held at most: last blocks of rows that are not full. One saves less than a block's tokens, but each takes
Python's and MLX's objects beside its arrays, a few kB, so without a limit thousands of short prompts would add up."""

QUEUED_PART = 8
"""Blocks that left memory and wait for the disk take at most this part of what is allowed; others are dropped."""


class Company(Protocol):
    """Caches of other processes that have to restore as much as this one; without disks they do so anyway."""

    def common_length(self, lengths: Collection[int]) -> int:
        """The largest of the lengths that a row could be restored to on all of them; 0 where there is none."""
        ...

    def have_all(self, is_here: bool) -> bool:
        """Whether all of them have in memory what they need, as this one has or has not."""
        ...


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
        disk: where blocks are written too, to be read back when they are no longer in memory or after a restart.

    Attributes:
        num_hits: rows that went on from here.
        num_misses: rows that began at nothing.
        num_reused_tokens: tokens that these hits saved.
        num_evictions: blocks that left memory to keep within `max_bytes`.
        company: of other processes that restore the same rows; None where this one is alone.

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
        disk: DiskStore | None = None,
    ) -> None:
        for name, value in (("max_bytes", max_bytes), ("block_tokens", block_tokens)):
            if value < 1:
                raise OptionError(f"{name} is {value}, expected at least 1")
        self.max_bytes = max_bytes
        self.kv_bits = kv_bits
        self.block_tokens = block_tokens
        self.company: Company | None = None
        self.num_hits = self.num_misses = self.num_reused_tokens = self.num_evictions = 0
        self._layout = BlockLayout.of(State.empty(config, dtype=dtype, kv_bits=kv_bits))
        self._tree: PrefixTree[Kept] = PrefixTree(block_tokens, Kept(block=None))
        self._by_age: OrderedDict[BlockNode, int] = OrderedDict()  # Bytes of each; parents behind their children.
        self._tails: OrderedDict[BlockNode, None] = OrderedDict()  # By age; some are tails no longer.
        self._block_bytes = 0
        self._reading_bytes = 0
        self._spill = Spill(self._tree, disk, self._layout, max_bytes // QUEUED_PART) if disk is not None else None

    @property
    def num_bytes(self) -> int:
        """Bytes held, with those that wait for the disk."""
        return self._block_bytes + (self._spill.queued_bytes if self._spill is not None else 0)

    @property
    def disk(self) -> DiskStore | None:
        """Where blocks are written too."""
        return self._spill.store if self._spill is not None else None

    @property
    def num_blocks(self) -> int:
        """Blocks in memory."""
        return len(self._by_age)

    def places(self, ids: Sequence[int], start: int = 0, border_ids: Collection[int] = ()) -> list[int]:
        """The lengths behind `start` at which a prompt is to leave checkpoints, for `State.ask`.

        These are the ends of blocks, some places in the first one, the places in front of the tokens `border_ids`,
        where messages begin, and the one in front of the last token, from which the same prompt goes on.
        """
        last = len(ids) - 1
        ends = [*range(self.block_tokens, len(ids), self.block_tokens), *(n for n in FIRST_PLACES if n < len(ids))]
        borders = [i for i in range(start + 1, len(ids)) if ids[i] in border_ids] if border_ids else []
        return sorted(place for place in {*ends, *borders, last} if place > start)

    def find(self, ids: Sequence[int]) -> int:
        """How many tokens of `ids` a row could reuse; always fewer than all of them. Changes nothing."""
        return self._find(ids)[1]

    def begin_restore(self, ids: Sequence[int]) -> Reading | None:
        """Start to read from the disk what `restore` will need, so that it need not wait for that.

        Returns:
            For `finish_reading`, once it is done; None where nothing is to be read, or too much at once.
        """
        if self._spill is None:
            return None
        reading = self._spill.begin_load(self._find(ids)[0], self.max_bytes // READING_PART - self._reading_bytes)
        if reading is not None:
            self._reading_bytes += reading.num_bytes
        return reading

    def finish_reading(self, reading: Reading) -> None:
        """Have in memory what was read; waits for it where it is not done."""
        assert self._spill is not None
        self._reading_bytes -= reading.num_bytes
        self._spill.finish_load(reading)
        # Some may have left the tree meanwhile.
        self._touch([node for node in reading.path if node.parent is not None and node.value.block is not None])
        self.shrink(self.max_bytes)

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
        self.settle()
        path, num_tokens = self._choose(ids)
        while num_tokens and not self._have_all(self._load(path)):
            path, num_tokens = self._choose(ids)
        if not num_tokens:
            self.num_misses += 1
            return 0
        self.num_hits += 1
        self.num_reused_tokens += num_tokens
        blocks = [_block(node) for node in path]
        fill_state(state, blocks, blocks[-1].checkpoints[num_tokens], num_tokens)
        mx.async_eval(state.arrays)
        self._touch(path)
        if self._spill is not None:
            self._spill.touch(path)
        self.shrink(self.max_bytes)
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
        self.settle()
        stop = max((length for length in checkpoints if length <= len(ids)), default=0)
        path = self._place(tuple(ids[:stop]), state, row)
        while not self._load([node for node in path if _lacking(node, checkpoints)]):
            path = self._place(tuple(ids[:stop]), state, row)
        for node in path:
            self._add_checkpoints(node, checkpoints)
        path = [node for node in path if node.value.block is not None]
        self._touch(path)
        self.shrink(self.max_bytes)
        mx.async_eval([array for node in path if node in self._by_age for array in _block(node).arrays])

    def shrink(self, max_bytes: int) -> None:
        """Have what was not used for longest leave memory until at most `max_bytes` and `MAX_TAILS` are held."""
        while self.num_bytes > max_bytes and self._by_age:
            self._evict(next(iter(self._by_age)))
        while len(self._tails) > MAX_TAILS:
            node, _ = self._tails.popitem(last=False)
            if self._is_tail(node):
                self._evict(node)

    def clear(self) -> None:
        """Drop everything, on disk too."""
        for node in list(self._tree.root.children.values()):
            self._remove(node)

    def settle(self) -> None:
        """Send to the disk what was computed since the last call, which `restore` and `insert` do as well.

        To be called when the device is idle; it waits for blocks that are still being copied.
        """
        if self._spill is not None:
            for node in self._spill.settle():
                if node.parent is not None:
                    self._remove(node)

    def close(self, timeout_s: float = 30.0) -> None:
        """Finish writing to the disk, as far as the time allows."""
        self.settle()
        if self._spill is not None:
            self._spill.store.close(timeout_s)

    def _find(self, ids: Sequence[int]) -> tuple[list[BlockNode], int]:
        """The nodes up to the furthest usable checkpoint, and its length; none and 0 where there is none."""
        match = self._tree.find(ids)
        limit = min(match.num_tokens, len(ids) - 1)
        for i in reversed(range(len(match.path))):
            usable = [length for length in match.path[i].value.lengths if length <= limit]
            if usable:
                return match.path[: i + 1], max(usable)
        return [], 0

    def _choose(self, ids: Sequence[int]) -> tuple[list[BlockNode], int]:
        """As `_find`, but as far as all of the company can go."""
        if self.company is None:
            return self._find(ids)
        match = self._tree.find(ids)
        limit = min(match.num_tokens, len(ids) - 1)
        ends = {length: i for i, node in enumerate(match.path) for length in node.value.lengths if length <= limit}
        common = self.company.common_length(ends)
        return (match.path[: ends[common] + 1], common) if common else ([], 0)

    def _have_all(self, is_here: bool) -> bool:
        return is_here if self.company is None else self.company.have_all(is_here)

    def _place(self, ids: tuple[int, ...], state: State, row: int) -> list[BlockNode]:
        """The nodes of exactly these ids; those that were not there are made from the row."""
        match = self._tree.find(ids)
        path, at = match.path, match.num_tokens
        if at == len(ids):
            return path
        is_leaf = bool(path) and not path[-1].children and at % self.block_tokens > 0
        if (match.is_inside_last or is_leaf) and not self._load(path[-1:]):
            return self._place(ids, state, row)
        if match.is_inside_last:
            path[-1] = self._split(path[-1], at - path[-1].start)
        elif is_leaf:
            at = self._extend(path[-1], ids, state, row)
        while at < len(ids):
            stop = min(at + self._tree.room(at), len(ids))
            parent = path[-1] if path else self._tree.root
            path.append(self._tree.add(parent, ids[at:stop], Kept(block=Block.copied(state, row, at, stop))))
            self._note(path[-1])
            at = stop
        return path

    def _split(self, node: BlockNode, num_tokens: int) -> BlockNode:
        length = node.start + num_tokens
        first, rest = _block(node).split(num_tokens, length)
        mx.async_eval(first.arrays, rest.arrays)
        upper = self._tree.split(node, num_tokens, Kept(block=first, lengths=set(first.checkpoints)))
        node.value.block, node.value.lengths = rest, set(rest.checkpoints)
        self._count(node)
        self._note(upper)
        self._note(node)
        return upper

    def _extend(self, leaf: BlockNode, ids: tuple[int, ...], state: State, row: int) -> int:
        """Fill up a leaf's block; one block is better than two, and the row has all its columns."""
        stop = min(leaf.start + self._tree.room(leaf.start), len(ids))
        self._tree.extend(leaf, ids[leaf.stop : stop])
        leaf.value.block = Block(Block.copied(state, row, leaf.start, stop).columns, _block(leaf).checkpoints)
        self._note(leaf)
        return stop

    def _add_checkpoints(self, node: BlockNode, checkpoints: Mapping[int, mx.array]) -> None:
        lengths = _lacking(node, checkpoints)
        if lengths:
            _block(node).checkpoints |= {n: checkpoints[n] for n in lengths}
            node.value.lengths |= set(lengths)
            self._note(node)

    def _load(self, path: Sequence[BlockNode]) -> bool:
        """Whether all these nodes have their blocks in memory; one that is lost is removed."""
        if self._spill is None:
            return True
        lost = self._spill.load(path)
        self._touch([node for node in path if node.value.block is not None])
        if lost is not None:
            self._remove(lost)
        return lost is None

    def _evict(self, node: BlockNode) -> None:
        """Have a block in memory leave it, though not the disk."""
        self.num_evictions += 1
        parent = node.parent
        if self._spill is not None and self._spill.keeps(node):
            self._uncount(node)
            node.value.block = None
        else:
            self._remove(node)
        if parent is not None and parent in self._by_age and parent not in self._tails and self._is_tail(parent):
            self._tails[parent] = None
            self._tails.move_to_end(parent, last=False)

    def _remove(self, node: BlockNode) -> None:
        for gone in self._tree.remove(node):
            self._uncount(gone)
            if self._spill is not None:
                self._spill.forget(gone)

    def _note(self, node: BlockNode) -> None:
        if self._spill is not None:
            self._spill.note(node)

    def _touch(self, path: Sequence[BlockNode]) -> None:
        """Make nodes the youngest, the first ones youngest of all."""
        for node in reversed(path):
            self._count(node)
            self._by_age.move_to_end(node)
        if path and self._is_tail(path[-1]):
            self._tails[path[-1]] = None
            self._tails.move_to_end(path[-1])

    def _count(self, node: BlockNode) -> None:
        num_bytes = _block(node).num_bytes
        self._block_bytes += num_bytes - self._by_age.get(node, 0)
        self._by_age[node] = num_bytes

    def _is_tail(self, node: BlockNode) -> bool:
        """Whether a block in memory is not full, and none of those behind it is there."""
        is_full = len(node.tokens) == self.block_tokens
        return not is_full and not any(child in self._by_age for child in node.children.values())

    def _uncount(self, node: BlockNode) -> None:
        self._block_bytes -= self._by_age.pop(node, 0)
        self._tails.pop(node, None)

    def _check(self, state: State) -> None:
        if BlockLayout.of(state) != self._layout:
            raise OptionError(
                "state is of another model, dtype or kv_bits than the prefix cache; make the cache with those of "
                "the engine"
            )


def _lacking(node: BlockNode, lengths: Collection[int]) -> list[int]:
    """The lengths inside a node at which it has no checkpoint yet."""
    return [n for n in lengths if node.start < n <= node.stop and n not in node.value.lengths]


def _block(node: BlockNode) -> Block:
    assert node.value.block is not None
    return node.value.block
