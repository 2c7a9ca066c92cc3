"""The tree of token ids against a plain dictionary: which stretches were seen, and where rows part."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from lfm_mlx.cache.prefix_tree import PrefixTree, path_to

BLOCK = 4
IDS = st.lists(st.integers(0, 2), min_size=1, max_size=14)


def grow(tree: PrefixTree[int], ids: list[int]) -> None:
    """Make the tree hold `ids`: as its owner does, without arrays."""
    match = tree.find(ids)
    node = match.path[-1] if match.path else tree.root
    at = match.num_tokens
    if at < len(ids) and match.is_inside_last:
        node = tree.split(node, at - node.start, node.value)
    while at < len(ids):
        tokens = ids[at : at + tree.room(at)]
        node = tree.add(node, tokens, 0)
        at = node.stop


class AgainstAllPrefixes(RuleBasedStateMachine):
    """A set of all prefixes seen says what a tree has to find."""

    def __init__(self) -> None:
        super().__init__()
        self.tree: PrefixTree[int] = PrefixTree(BLOCK, 0)
        self.known: set[tuple[int, ...]] = {()}

    @rule(ids=IDS)
    def add(self, ids: list[int]) -> None:
        grow(self.tree, ids)
        self.known |= {tuple(ids[:n]) for n in range(len(ids) + 1)}

    @rule(ids=IDS)
    def remove_a_leaf(self, ids: list[int]) -> None:
        path = self.tree.find(ids).path
        if path and not path[-1].children:
            leaf = path[-1]
            whole = tuple(token for node in path_to(leaf) for token in node.tokens)
            assert self.tree.remove(leaf) == [leaf]
            self.known -= {whole[:n] for n in range(leaf.start + 1, leaf.stop + 1)}

    @rule(ids=IDS)
    def find(self, ids: list[int]) -> None:
        match = self.tree.find(ids)
        assert match.num_tokens == max(n for n in range(len(ids) + 1) if tuple(ids[:n]) in self.known)
        told = [token for node in match.path for token in node.tokens]
        assert told[: match.num_tokens] == ids[: match.num_tokens]
        assert match.is_inside_last == (len(told) > match.num_tokens)

    @invariant()
    def nodes_tell_all_and_stay_in_their_blocks(self) -> None:
        assert sum(len(node.tokens) for node in self.tree) == len(self.known) - 1
        for node in self.tree:
            assert node.start // BLOCK == (node.stop - 1) // BLOCK
            assert all(child.parent is node and child.start == node.stop for child in node.children.values())


TestAgainstAllPrefixes = AgainstAllPrefixes.TestCase
TestAgainstAllPrefixes.settings = settings(max_examples=30, stateful_step_count=20, deadline=None)


@settings(max_examples=20, deadline=None)
@given(IDS)
def test_removing_a_node_takes_out_what_follows_it_children_first(ids: list[int]) -> None:
    tree: PrefixTree[int] = PrefixTree(BLOCK, 0)
    grow(tree, ids)
    grow(tree, [*ids[:2], 3])
    first = tree.root.children[ids[0]]
    under = list(tree)
    removed = tree.remove(first)
    assert set(removed) == set(under)
    assert removed[-1] is first
    assert not list(tree)


@pytest.mark.parametrize(("length", "room"), [(0, 4), (1, 3), (3, 1), (4, 4)])
def test_room_reaches_to_the_end_of_the_block(length: int, room: int) -> None:
    assert PrefixTree(BLOCK, 0).room(length) == room


def test_a_leaf_takes_more_tokens() -> None:
    tree: PrefixTree[int] = PrefixTree(BLOCK, 0)
    leaf = tree.add(tree.root, [1, 2], 0)
    tree.extend(leaf, [0, 1])
    assert tree.find([1, 2, 0, 1, 1]).num_tokens == 4
    with pytest.raises(AssertionError):
        tree.extend(leaf, [1])
