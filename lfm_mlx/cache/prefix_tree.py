"""A radix tree over token ids: which stretches of tokens rows have in common. It knows no arrays."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

Value = TypeVar("Value")


class Node(Generic[Value]):
    """Tokens that follow those of the parent; where rows part, a node ends.

    Attributes:
        tokens: at least one, except at the root.
        start: tokens in front of the node.
        parent: None at the root, and after the node was removed.
        children: by the first of their tokens.
        value: what the owner of the tree keeps of these tokens.
    """

    __slots__ = ("children", "parent", "start", "tokens", "value")

    def __init__(self, parent: Node[Value] | None, start: int, tokens: tuple[int, ...], value: Value) -> None:
        self.parent = parent
        self.start = start
        self.tokens = tokens
        self.children: dict[int, Node[Value]] = {}
        self.value = value

    @property
    def stop(self) -> int:
        """Tokens up to and with the node's last one."""
        return self.start + len(self.tokens)


@dataclass(frozen=True, kw_only=True)
class Match(Generic[Value]):
    """The nodes from the root on that begin like some ids, and how many ids they share; the last may share a part."""

    path: list[Node[Value]]
    num_tokens: int

    @property
    def is_inside_last(self) -> bool:
        """Whether ids and tree part, or the ids end, in the middle of the last node."""
        return bool(self.path) and self.num_tokens < self.path[-1].stop


class PrefixTree(Generic[Value]):
    """Nodes of at most `block_tokens` tokens, none of them across a multiple of `block_tokens`.

    Args:
        block_tokens: at least 1.
        root_value: the root's value.
    """

    def __init__(self, block_tokens: int, root_value: Value) -> None:
        self.block_tokens = block_tokens
        self.root: Node[Value] = Node(None, 0, (), root_value)

    def find(self, ids: Sequence[int]) -> Match[Value]:
        """The nodes that begin like `ids`."""
        path: list[Node[Value]] = []
        node, at = self.root, 0
        while at < len(ids):
            child = node.children.get(ids[at])
            if child is None:
                break
            path.append(child)
            shared = _shared_len(child.tokens, ids[at : child.stop])
            at += shared
            if shared < len(child.tokens):
                break
            node = child
        return Match(path=path, num_tokens=at)

    def add(self, parent: Node[Value], tokens: Sequence[int], value: Value) -> Node[Value]:
        """A new child; `tokens` does not begin like one that is there, and stays in its block."""
        assert tokens[0] not in parent.children
        assert 0 < len(tokens) <= self.room(parent.stop)
        node = parent.children[tokens[0]] = Node(parent, parent.stop, tuple(tokens), value)
        return node

    def extend(self, leaf: Node[Value], tokens: Sequence[int]) -> None:
        """More tokens for a node without children, up to the end of its block."""
        assert not leaf.children
        assert len(leaf.tokens) + len(tokens) <= self.room(leaf.start)
        leaf.tokens += tuple(tokens)

    def split(self, node: Node[Value], num_tokens: int, value: Value) -> Node[Value]:
        """Cut a node behind its first `num_tokens` tokens.

        Returns:
            A new node with those tokens and `value`; the old one is its only child and keeps its value.
        """
        assert node.parent is not None
        assert 0 < num_tokens < len(node.tokens)
        upper = Node(node.parent, node.start, node.tokens[:num_tokens], value)
        node.parent.children[node.tokens[0]] = upper
        node.tokens = node.tokens[num_tokens:]
        node.start = upper.stop
        node.parent = upper
        upper.children[node.tokens[0]] = node
        return upper

    def remove(self, node: Node[Value]) -> list[Node[Value]]:
        """Take a node out with all that follow it; they are returned, children before parents."""
        assert node.parent is not None
        del node.parent.children[node.tokens[0]]
        removed = [node]
        for found in removed:
            removed += found.children.values()
        for gone in removed:
            gone.parent = None
        return removed[::-1]

    def room(self, length: int) -> int:
        """Tokens from `length` to the end of its block."""
        return self.block_tokens - length % self.block_tokens

    def __iter__(self) -> Iterator[Node[Value]]:
        """All nodes but the root, parents before children."""
        queue = list(self.root.children.values())
        for node in queue:
            yield node
            queue += node.children.values()


def path_to(node: Node[Value]) -> list[Node[Value]]:
    """The nodes from the root's child to `node`."""
    path = []
    at: Node[Value] | None = node
    while at is not None and at.parent is not None:
        path.append(at)
        at = at.parent
    return path[::-1]


def _shared_len(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens two sequences share at their beginning."""
    if tuple(first) == tuple(second):
        return len(first)
    return next(
        (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second))
    )
