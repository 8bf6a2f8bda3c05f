"""The recurrent states of a hybrid model: which slot is a sequence's, which a cached prefix's.

Called by the scheduler and the prefix cache; pure bookkeeping. Running sequences and snapshots draw
slots from one pool. A snapshot takes only what is free or the place of the least recently used
snapshot; a sequence that needs a slot displaces that one, too. States are copied at the beginning
of a step, in the order of `take_copies`: a slot's content is still what it was when the step before
ended, so a copy may be noted after its source has been released and before its target is in use.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

from engine.cache.prefix_tree import PrefixNode
from engine.cache.slot_pool import NULL_SLOT, SlotPool

StateCopy = tuple[int, int]  # source slot, target slot


class Snapshots:
    """States by prefix. `on_evict` is called with the prefix that has lost its state."""

    def __init__(self, slots: SlotPool) -> None:
        self.slots = slots
        self.on_evict: Callable[[PrefixNode], None] = lambda _: None
        self._slot_of: OrderedDict[PrefixNode, int] = OrderedDict()  # least recently used first
        self._copies: list[StateCopy] = []

    def __repr__(self) -> str:
        return f"<Snapshots: {len(self)}, {self.slots}>"

    def __len__(self) -> int:
        return len(self._slot_of)

    def __contains__(self, node: PrefixNode) -> bool:
        return node in self._slot_of

    @property
    def has_room(self) -> bool:
        """Whether one more sequence could have a slot."""
        return self.slots.num_free > 0 or bool(self._slot_of)

    def allocate(self) -> int:
        """Return a slot for a sequence; see `has_room`."""
        if not self.slots.num_free:
            self._evict()
        return self.slots.allocate()

    def restore(self, node: PrefixNode, slot: int) -> int:
        """Put a prefix's state into a sequence's slot, a new one for the null slot; return it."""
        source = self._slot_of[node]
        self._slot_of.move_to_end(node)
        # This may displace the very snapshot: then its slot is the sequence's and holds the state.
        target = self.allocate() if slot == NULL_SLOT else slot
        self._copies.append((source, target))
        return target

    def save(self, node: PrefixNode, slot: int) -> None:
        """Keep the state that `slot` has now as that of a prefix, if there is a slot for it."""
        if node in self._slot_of:
            self._slot_of.move_to_end(node)
        elif self.has_room:
            target = self.allocate()
            self._slot_of[node] = target
            self._copies.append((slot, target))

    def drop(self, node: PrefixNode) -> None:
        """Give a prefix's state up, if it has one."""
        slot = self._slot_of.pop(node, None)
        if slot is not None:
            self.slots.release(slot)

    def take_copies(self) -> list[StateCopy]:
        """Return the copies that the next step must begin with, and start anew."""
        copies, self._copies = self._copies, []
        return copies

    def _evict(self) -> None:
        node = next(iter(self._slot_of))
        self.drop(node)
        self.on_evict(node)
