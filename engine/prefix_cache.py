"""Sequences share the KV of equal beginnings: what is found, given, published and dropped.

Called by the scheduler; owns the prefix tree and tells the block pool which blocks are worth
keeping. Only full blocks of a step that has completed are published, and at least one token of a
sequence is always left to compute, since logits come from nothing else. Published blocks are never
written again, so whoever shares them reads what a computation of its own would have written.

A sequence that holds a node's block holds all blocks of its path and releases the last one first:
so a free block's descendants are all free too, and older in the pool's order than itself.
"""

from __future__ import annotations

from engine.block_pool import BlockPool
from engine.prefix_tree import PrefixNode, PrefixTree
from engine.sequence import Sequence

# What the next block of a sequence would be: the prefix before it (a salt for the empty one) and
# its tokens. Equal keys, equal KV.
BlockKey = tuple[PrefixNode | str, tuple[int, ...]]


class PrefixCache:
    """See the module's text. A cache that is not enabled finds and keeps nothing."""

    def __init__(self, pool: BlockPool, block_size: int, *, is_enabled: bool) -> None:
        self.pool = pool
        self.tree = PrefixTree(block_size)
        self.is_enabled = is_enabled
        self.num_hit_tokens = 0
        self._block_size = block_size
        pool.on_evict = self._evict

    def __repr__(self) -> str:
        return f"<PrefixCache: {self.tree}, {self.num_hit_tokens} tokens reused>"

    def find(self, sequence: Sequence) -> list[PrefixNode]:
        """Return the nodes that a sequence could go on with, beyond what it has computed."""
        if not self.is_enabled or not self._stands_at_block(sequence):
            return []
        limit = (len(sequence.token_ids) - 1) // self._block_size
        return self.tree.walk(self._node(sequence), sequence.token_ids, limit)

    def num_held(self, nodes: list[PrefixNode]) -> int:
        """Return how many of the nodes' blocks somebody holds: sharing them takes no free block."""
        return sum(self.pool.is_held(node.block) for node in nodes)

    def take(self, sequence: Sequence, nodes: list[PrefixNode]) -> None:
        """Let the sequence go on after `nodes`, which `find` returned for it."""
        if not nodes:
            return
        start = sequence.num_computed // self._block_size
        self.pool.share([node.block for node in nodes])
        # Blocks beyond what is computed remain from a step that ran out of memory.
        self.pool.release(sequence.block_table[start:][::-1])
        sequence.block_table[start:] = [node.block for node in nodes]
        sequence.prefix_node = nodes[-1]
        sequence.num_computed = nodes[-1].num_blocks * self._block_size
        if sequence.num_preemptions == 0:
            # A preempted sequence finds its own work again, which is nothing to tell a client.
            num_tokens = len(nodes) * self._block_size
            sequence.num_cached_tokens += num_tokens
            self.num_hit_tokens += num_tokens

    def publish(self, sequence: Sequence) -> None:
        """Make the full blocks known that the sequence has computed by now.

        Where another sequence was faster, its block takes the place of the own one, which is freed.
        """
        if not self.is_enabled:
            return
        node = self._node(sequence)
        for index in range(node.num_blocks, sequence.num_computed // self._block_size):
            if not node.is_alive:
                return
            own = sequence.block_table[index]
            node = self.tree.add(node, self.tree.block_tokens(sequence.token_ids, index), own)
            if node.block == own:
                self.pool.remember(own)
            else:
                self.pool.share([node.block])
                self.pool.release([own])
                sequence.block_table[index] = node.block
            sequence.prefix_node = node

    def discard(self, sequence: Sequence) -> None:
        """Forget all prefixes that begin like the sequence: its logits were not finite."""
        node = sequence.prefix_node
        while node is not None and node.parent is not None and node.parent.parent is not None:
            node = node.parent
        if node is not None and node.is_alive:
            self._remove(node)

    def next_key(self, sequence: Sequence) -> BlockKey | None:
        """Return the key of the first block that the sequence has not completed.

        None when sharing that block is out of the question: it is not full, or is the last one and
        begun by nobody else's leave.
        """
        index = 0 if sequence.prefix_node is None else sequence.prefix_node.num_blocks
        if not self.is_enabled or (index + 1) * self._block_size > len(sequence.token_ids):
            return None
        before = sequence.prefix_node or sequence.submit.cache_salt
        return before, self.tree.block_tokens(sequence.token_ids, index)

    def could_take_next(self, sequence: Sequence) -> bool:
        """Tell whether the sequence would use its next block if somebody published it."""
        end = sequence.num_computed + self._block_size
        return self._stands_at_block(sequence) and end < len(sequence.token_ids)

    def _stands_at_block(self, sequence: Sequence) -> bool:
        """Tell whether no block is begun behind the sequence's published ones."""
        node = sequence.prefix_node
        num_published = 0 if node is None else node.num_blocks
        is_alive = node is None or node.is_alive
        return is_alive and sequence.num_computed == num_published * self._block_size

    def _node(self, sequence: Sequence) -> PrefixNode:
        return sequence.prefix_node or self.tree.root(sequence.submit.cache_salt)

    def _evict(self, block: int) -> None:
        self._remove(self.tree.node_of(block))

    def _remove(self, node: PrefixNode) -> None:
        for removed in self.tree.remove(node):
            self.pool.forget(removed.block)
