"""Which token prefixes have their KV in which blocks: a tree with one full block per edge.

Used by the prefix cache; pure Python. A node is found by its parent and its block's tokens, which
is a hash chain whose collisions cannot matter: the tokens themselves are the keys. Each salt has a
root of its own, so tenants that must not see each other's timing share nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from engine.cache.block_pool import NULL_BLOCK


@dataclass(slots=True, eq=False)
class PrefixNode:
    """The prefix that ends with this block; the root is the empty one.

    `num_blocks` counts the blocks of the whole prefix. A node that has left the tree `is_alive` no
    more, and nothing is added below it.
    """

    parent: PrefixNode | None
    salt: str
    tokens: tuple[int, ...]
    block: int
    num_blocks: int
    children: dict[tuple[int, ...], PrefixNode] = field(default_factory=dict)
    is_alive: bool = True

    def __repr__(self) -> str:
        return f"<PrefixNode of {self.num_blocks} blocks, {len(self.children)} children>"


class PrefixTree:
    """All known prefixes of a model."""

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self._roots: dict[str, PrefixNode] = {}
        self._by_block: dict[int, PrefixNode] = {}

    def __len__(self) -> int:
        return len(self._by_block)

    def __repr__(self) -> str:
        return f"<PrefixTree: {len(self)} blocks, {len(self._roots)} salts>"

    def root(self, salt: str) -> PrefixNode:
        """Return the empty prefix of a salt; it joins the tree with its first child."""
        return self._roots.get(salt) or PrefixNode(None, salt, (), NULL_BLOCK, 0)

    def block_tokens(self, token_ids: list[int], index: int) -> tuple[int, ...]:
        """Return the tokens of a sequence's block `index`."""
        return tuple(token_ids[index * self.block_size : (index + 1) * self.block_size])

    def walk(self, node: PrefixNode, token_ids: list[int], max_blocks: int) -> list[PrefixNode]:
        """Return the nodes below `node` along the tokens, up to `max_blocks` blocks from the root.

        `token_ids` is the whole sequence, which begins with the prefix of `node`.
        """
        found: list[PrefixNode] = []
        while node.num_blocks < max_blocks:
            child = node.children.get(self.block_tokens(token_ids, node.num_blocks))
            if child is None:
                break
            found.append(child)
            node = child
        return found

    def add(self, parent: PrefixNode, tokens: tuple[int, ...], block: int) -> PrefixNode:
        """Return the child of `parent` for these tokens: the known one, or a new one of `block`."""
        assert parent.is_alive, f"{parent} has left the tree"
        assert len(tokens) == self.block_size, "only full blocks are shared"
        child = parent.children.get(tokens)
        if child is None:
            assert block not in self._by_block, f"block {block} holds another prefix already"
            child = PrefixNode(parent, parent.salt, tokens, block, parent.num_blocks + 1)
            parent.children[tokens] = child
            self._by_block[block] = child
            if parent.parent is None:
                self._roots[parent.salt] = parent
        return child

    def node_of(self, block: int) -> PrefixNode:
        """Return the node that a block belongs to."""
        return self._by_block[block]

    def remove(self, node: PrefixNode) -> list[PrefixNode]:
        """Take a node and all below it out of the tree; return them."""
        assert node.parent is not None, "a root goes with its last child"
        del node.parent.children[node.tokens]
        root = node.parent
        if root.parent is None and not root.children:
            del self._roots[root.salt]
        removed = list(_subtree(node))
        for each in removed:
            each.is_alive = False
            del self._by_block[each.block]
        return removed


def _subtree(node: PrefixNode) -> Iterator[PrefixNode]:
    pending = [node]
    while pending:
        node = pending.pop()
        yield node
        pending += node.children.values()
