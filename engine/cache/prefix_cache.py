"""Sequences share the KV of equal beginnings: what is found, given, published and dropped.

Called by the scheduler; owns the prefix tree and tells the block pool which blocks are worth
keeping. Only full blocks of a step that has completed are published, and at least one token of a
sequence is always left to compute, since logits come from nothing else, and all that it has still
to score. Published blocks are never written again, so whoever shares them reads what a computation
of its own would have written.

A sequence that holds a node's block holds all blocks of its path and releases the last one first:
so a free block's descendants are all free too, and older in the pool's order than itself.

A hybrid model can go on from a prefix only where its recurrent state was kept. That is done at
cuts: block-aligned lengths of the prompt at which the scheduler ends a chunk. A sequence publishes
its blocks when it reaches one, and a prefix is found as far as its deepest snapshot. A dense model
is the same with a cut after every block and no state to keep.
"""

from __future__ import annotations

from typing import Final

from engine.cache.block_pool import BlockPool
from engine.cache.prefix_tree import PrefixNode, PrefixTree
from engine.cache.snapshots import Snapshots
from engine.scheduling.sequence import Sequence

# A long prompt is cut this often even where nothing marks a turn: a request that leaves the common
# path loses half of it on average, about two seconds of prefill on a fast GPU's 27B model.
SNAPSHOT_INTERVAL: Final = 4096

# What a sequence publishes next: the prefix before it (a salt for the empty one) and its tokens.
# Equal keys, equal KV.
PublicationKey = tuple[PrefixNode | str, tuple[int, ...]]


class PrefixCache:
    """See the module's text. A cache that is not enabled finds and keeps nothing."""

    def __init__(
        self,
        pool: BlockPool,
        block_size: int,
        *,
        is_enabled: bool,
        snapshots: Snapshots | None = None,
    ) -> None:
        """Take the pool, and for a hybrid model its snapshots."""
        self.pool = pool
        self.tree = PrefixTree(block_size)
        self.is_enabled = is_enabled
        self.snapshots = snapshots
        self.num_hit_tokens = 0
        self._block_size = block_size
        self._interval = max(SNAPSHOT_INTERVAL // block_size, 1) * block_size
        pool.on_evict = self._evict
        if snapshots is not None:
            snapshots.on_evict = self._prune

    def __repr__(self) -> str:
        return f"<PrefixCache: {self.tree}, {self.num_hit_tokens} tokens reused>"

    def find(self, sequence: Sequence) -> list[PrefixNode]:
        """Return the nodes that a sequence could go on with, beyond what it has computed."""
        if not self.is_enabled or not self._stands_at_cut(sequence):
            return []
        limit = sequence.num_skippable // self._block_size
        nodes = self.tree.walk(self._node(sequence), sequence.token_ids, limit)
        if self.snapshots is not None:
            while nodes and nodes[-1] not in self.snapshots:
                nodes.pop()
        return nodes

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
        if self.snapshots is not None:
            sequence.state_slot = self.snapshots.restore(nodes[-1], sequence.state_slot)
        if sequence.num_preemptions == 0:
            # A preempted sequence finds its own work again, which is nothing to tell a client.
            num_tokens = len(nodes) * self._block_size
            sequence.num_cached_tokens += num_tokens
            self.num_hit_tokens += num_tokens

    def next_cut(self, sequence: Sequence, start: int) -> int | None:
        """Return the first length above `start` at which the sequence publishes, if there is one.

        A hybrid's chunk must end exactly there; a dense model's blocks are published in passing.
        """
        if not self.is_enabled:
            return None
        if self.snapshots is None:
            end = (start // self._block_size + 1) * self._block_size
            return end if end <= len(sequence.token_ids) else None
        # What is behind the last turn mark is tokenised anew with the reply: nobody will find it.
        last = sequence.stable_length // self._block_size * self._block_size
        cut = min(last, (start // self._interval + 1) * self._interval)
        return cut if cut > start else None

    def publish(self, sequence: Sequence) -> None:
        """Make known what the sequence has computed by now; a hybrid does so at its cuts only.

        Where another sequence was faster, its block takes the place of the own one, which is freed.
        """
        length = sequence.num_computed
        if not self.is_enabled or not self._is_cut(sequence, length):
            return
        node = self._node(sequence)
        for index in range(node.num_blocks, length // self._block_size):
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
        if self.snapshots is not None and node.is_alive:
            self.snapshots.save(node, sequence.state_slot)

    def discard(self, sequence: Sequence) -> None:
        """Forget all prefixes that begin like the sequence: its logits were not finite."""
        node = sequence.prefix_node
        while node is not None and node.parent is not None and node.parent.parent is not None:
            node = node.parent
        if node is not None and node.is_alive:
            self._remove(node)

    def next_key(self, sequence: Sequence) -> PublicationKey | None:
        """Return the key of what the sequence publishes next; None when it publishes no more."""
        node = sequence.prefix_node
        start = 0 if node is None else node.num_blocks * self._block_size
        cut = self.next_cut(sequence, start)
        if cut is None:
            return None
        return node or sequence.submit.cache_salt, tuple(sequence.token_ids[start:cut])

    def could_take_next(self, sequence: Sequence) -> bool:
        """Tell whether the sequence would go on with its next key if somebody published it."""
        cut = self.next_cut(sequence, sequence.num_computed)
        return self._stands_at_cut(sequence) and cut is not None and cut <= sequence.num_skippable

    def _stands_at_cut(self, sequence: Sequence) -> bool:
        """Tell whether nothing is computed behind what the sequence has published or taken."""
        node = sequence.prefix_node
        num_published = 0 if node is None else node.num_blocks
        is_alive = node is None or node.is_alive
        return is_alive and sequence.num_computed == num_published * self._block_size

    def _is_cut(self, sequence: Sequence, length: int) -> bool:
        return self.snapshots is None or self.next_cut(sequence, length - 1) == length

    def _node(self, sequence: Sequence) -> PrefixNode:
        return sequence.prefix_node or self.tree.root(sequence.submit.cache_salt)

    def _evict(self, block: int) -> None:
        self._remove(self.tree.node_of(block))

    def _remove(self, node: PrefixNode) -> None:
        for removed in self.tree.remove(node):
            self.pool.forget(removed.block)
            if self.snapshots is not None:
                self.snapshots.drop(removed)

    def _prune(self, node: PrefixNode) -> None:
        """Forget the blocks that led to a lost snapshot only: nobody can go on from them."""
        assert self.snapshots is not None, "only snapshots are lost"
        while node.parent is not None and not node.children and node not in self.snapshots:
            if self.pool.is_held(node.block):
                return
            parent = node.parent
            self._remove(node)
            node = parent
