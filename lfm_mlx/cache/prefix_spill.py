"""Which nodes of the prefix tree are on disk, on their way there, or to be read back."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx

from lfm_mlx.cache.block_file import BlockHeader, StoredBlock
from lfm_mlx.cache.disk import DiskStore
from lfm_mlx.cache.prefix_block import Block, BlockLayout
from lfm_mlx.cache.prefix_tree import Node, PrefixTree, path_to


@dataclass(eq=False, kw_only=True)
class Kept:
    """What is kept of a node's tokens.

    Attributes:
        block: in memory; None where it is on disk only.
        lengths: the row's lengths at which it has checkpoints.
        key: names the block on disk; None where it is not there and not on its way.
        digest: of all tokens up to the node's end, once it was needed.
    """

    block: Block | None
    lengths: set[int] = field(default_factory=set)
    key: str | None = None
    digest: Any = None


BlockNode = Node[Kept]


class Reading:
    """Blocks on their way from the disk to memory.

    Args:
        path: nodes from the root's child on.
        parts: those of them that are read, the keys they had then, and what comes.
        num_bytes: of their files.
    """

    def __init__(
        self, path: Sequence[BlockNode], parts: Sequence[tuple[BlockNode, str, Future[Any]]], num_bytes: int
    ) -> None:
        self.path = path
        self.parts = parts
        self.num_bytes = num_bytes

    @property
    def is_done(self) -> bool:
        """Whether all has come."""
        return all(future.done() for _, _, future in self.parts)

    def call_when_done(self, on_done: Callable[[], None]) -> None:
        """Call back, from another thread, whenever something has come."""
        for _, _, future in self.parts:
            future.add_done_callback(lambda _: on_done())


class Spill:
    """Writes the blocks of a tree to a store and reads them back.

    Args:
        tree: nodes are added to it for the blocks that the store has from earlier processes.
        store: where blocks go.
        layout: of the blocks.
        queued_bytes: most that blocks may take which are no longer in memory and not yet on disk.
    """

    def __init__(self, tree: PrefixTree[Kept], store: DiskStore, layout: BlockLayout, queued_bytes: int) -> None:
        self.store = store
        self._tree = tree
        self._layout = layout
        self._queued_limit = queued_bytes
        self._nodes: dict[str, BlockNode] = {}
        self._unsaved: dict[BlockNode, None] = {}
        self._queued: dict[BlockNode, int] = {}
        self._begin()

    @property
    def queued_bytes(self) -> int:
        """Bytes of blocks that are no longer in memory for rows, and not yet on disk."""
        return sum(self._queued.values())

    def note(self, node: BlockNode) -> None:
        """A node has a new or another block: it is to be written."""
        self._drop_file(node)
        node.value.digest = None
        self._unsaved[node] = None

    def forget(self, node: BlockNode) -> None:
        """A node was removed from the tree: its file goes too."""
        self._drop_file(node)
        self._unsaved.pop(node, None)

    def keeps(self, node: BlockNode) -> bool:
        """Whether a block that is to leave memory can be read back."""
        if node in self._unsaved:
            self._save(node)
        key, block = node.value.key, node.value.block
        if key is None or self.store.has_file(key):
            return key is not None
        assert block is not None
        if self.queued_bytes + block.num_bytes > self._queued_limit:
            return False
        self._queued[node] = block.num_bytes
        return True

    def load(self, nodes: Sequence[BlockNode]) -> BlockNode | None:
        """Have the blocks of all these nodes in memory; returns the first one whose block is lost, or None."""
        for node in nodes:
            writing = self.store.pending(node.value.key) if node.value.key is not None else None
            if node.value.block is None and writing is not None:
                node.value.block = writing.block
                self._queued.pop(node, None)
        absent = [node for node in nodes if node.value.block is None]
        blocks = self.store.read([str(node.value.key) for node in absent])
        lost = None
        for node, block in zip(absent, blocks, strict=True):
            if block is not None and self._layout.fits(block, len(node.tokens), node.value.lengths):
                node.value.block = block
            else:
                lost = lost or node
        return lost

    def begin_load(self, path: Sequence[BlockNode], max_bytes: int) -> Reading | None:
        """Start to read what `load` would read; None where that is nothing, or more than `max_bytes`."""
        keys = [node.value.key for node in path]
        absent = [
            (node, key)
            for node, key in zip(path, keys, strict=True)
            if node.value.block is None and key is not None and self.store.has_file(key)
        ]
        num_bytes = sum(self.store.size(key) for _, key in absent)
        if not 0 < num_bytes <= max_bytes:
            return None
        parts = [(node, key, self.store.begin_read(key)) for node, key in absent]
        return Reading(path, parts, num_bytes)

    def finish_load(self, reading: Reading) -> None:
        """Have what was read in memory; what is damaged is left to `load`, which says so."""
        for node, key, future in reading.parts:
            found = None if future.cancelled() or future.exception() is not None else future.result()
            if node.value.key == key and node.value.block is None and isinstance(found, StoredBlock):
                block = found.as_block()
                if found.header.key == key and self._layout.fits(block, len(node.tokens), node.value.lengths):
                    node.value.block = block

    def touch(self, path: Sequence[BlockNode]) -> None:
        """Nodes were used, from the tree's root on."""
        self.store.touch(_keys(path))

    def settle(self) -> list[BlockNode]:
        """Queue what is to be written, and look at what was; returns nodes that are neither in memory nor on disk now.

        Arrays that were queued on the device before are waited for.
        """
        lost = []
        for writing in self.store.take_written():
            node = self._nodes[writing.header.key]
            self._queued.pop(node, None)
            if writing.num_file_bytes is None:
                lost += self._without_file(node)
            else:
                self.store.renew(_keys(path_to(node)))
        for node in sorted(self._unsaved, key=lambda node: node.start):
            if node in self._unsaved:
                self._save(node)
        self._unsaved = {}
        for key in self.store.overdue():
            lost += self._without_file(self._nodes[key])
        return lost

    def _begin(self) -> None:
        """Nodes for what earlier processes left; what follows a block that is missing is deleted."""
        headers = self.store.open(f"{self._tree.block_tokens} {self._layout}")
        by_key = {self._digest(self._tree.root).hexdigest(): self._tree.root}
        for header in headers:
            parent = by_key.get(header.parent)
            if parent is not None and self._is_next(header, parent):
                kept = Kept(block=None, lengths=set(header.lengths), key=header.key)
                node = self._tree.add(parent, header.tokens, kept)
                by_key[header.key] = self._nodes[header.key] = node
            else:
                self.store.delete(header.key)
        for key in self.store.keys:
            self.store.renew(_keys(path_to(self._nodes[key])))

    def _is_next(self, header: BlockHeader, parent: BlockNode) -> bool:
        """Whether a stored block can follow a node; one with tokens that its key does not stand for is damaged."""
        digest = self._digest(parent).copy()
        digest.update(array("i", header.tokens).tobytes())
        num_tokens = len(header.tokens)
        is_sound = digest.hexdigest() == header.key and header.start == parent.stop
        if not is_sound or not 0 < num_tokens <= self._tree.room(parent.stop):
            self.store.refuse(header.key, "its tokens are not those it is named for")
            return False
        return header.tokens[0] not in parent.children

    def _save(self, node: BlockNode) -> None:
        """Queue a node, and in front of it those before it that are not on disk: alone, it could not be found."""
        chain = [node]
        while chain[-1].parent is not None and chain[-1].parent.parent is not None:
            if chain[-1].parent.value.key is not None:
                break
            chain.append(chain[-1].parent)
        for part in reversed(chain):
            self._unsaved.pop(part, None)
            if part.value.block is None or not self.store.is_writing or not self._write(part, part.value.block):
                return

    def _write(self, node: BlockNode, block: Block) -> bool:
        """Queue a block, unless writing failed meanwhile."""
        assert node.parent is not None
        key = self._digest(node).hexdigest()
        header = BlockHeader(
            key=key,
            parent=self._digest(node.parent).hexdigest(),
            start=node.start,
            tokens=node.tokens,
            lengths=tuple(sorted(block.checkpoints)),
        )
        # The writer only reads bytes: computing an array on another thread than its own is not allowed.
        mx.eval(block.arrays)
        if not self.store.write(header, block):
            return False
        node.value.key = key
        self._nodes[key] = node
        return True

    def _digest(self, node: BlockNode) -> Any:
        """A hash of all tokens up to the node's end, however they are divided into nodes."""
        path = [self._tree.root, *path_to(node)]
        known = max((i for i, part in enumerate(path) if part.value.digest is not None), default=-1)
        for i in range(known + 1, len(path)):
            digest = path[i - 1].value.digest.copy() if i else hashlib.blake2b(digest_size=20)
            digest.update(array("i", path[i].tokens).tobytes())
            path[i].value.digest = digest
        return path[-1].value.digest

    def _without_file(self, node: BlockNode) -> list[BlockNode]:
        self._drop_file(node)
        return [node] if node.value.block is None else []

    def _drop_file(self, node: BlockNode) -> None:
        key, node.value.key = node.value.key, None
        self._queued.pop(node, None)
        if key is not None:
            self._nodes.pop(key, None)
            self.store.delete(key)


def _keys(path: Sequence[BlockNode]) -> list[str]:
    """Keys of the nodes that have one, those behind others first."""
    return [node.value.key for node in reversed(path) if node.value.key is not None]
