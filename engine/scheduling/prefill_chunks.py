"""How many tokens of a prompt a step computes, and whose prompt comes first. Pure.

Called by the scheduler. A chunk ends where the prefix cache wants a hybrid's state, and is bounded
by a limit that falls when memory runs out and recovers after. Tokens that score their successors
yield large logits, so a step holds a bounded number of them.
"""

from __future__ import annotations

from typing import Final

from engine.cache.prefix_cache import PrefixCache
from engine.scheduling.sequence import Sequence
from engine.scheduling.step_plan import PlanInMaking

# Prefill chunks are not cut smaller than this when memory is short: smaller ones save nothing.
MIN_PREFILL_CHUNK: Final = 16
# Prompt tokens that one step scores at most: their float32 logits of a 152k vocabulary are 156 MB.
MAX_SCORED_TOKENS: Final = 256


class PrefillChunks:
    """The sizes of chunks; `limit` is the most tokens that one may have now."""

    def __init__(self, prefix_cache: PrefixCache, largest: int, *, has_states: bool) -> None:
        """Take the limit to begin with; `has_states`: the cache says where states are kept."""
        self.limit = largest
        self._largest = largest
        self._prefix_cache = prefix_cache
        self._has_states = has_states

    def rank(self, sequence: Sequence) -> int:
        """Return how many chunks a sequence needs, less one for each time it was overtaken."""
        limit = self.limit
        if sequence.num_unscored:
            limit = min(limit, MAX_SCORED_TOKENS)
        num_chunks = -(-sequence.num_uncomputed // limit)
        return max(num_chunks - sequence.num_overtaken, 0)

    def size(self, sequence: Sequence, budget: int, making: PlanInMaking) -> int:
        """Return the tokens of the sequence's next chunk; 0 when it does not fit this step.

        Only a step's first chunk is cut to the budget: else the cuts, and with them the last bits
        of a prompt's KV, would depend on what else happens to run.
        """
        num_tokens = min(self._num_left(sequence, sequence.num_computed), self.limit)
        if num_tokens > budget:
            num_tokens = 0 if making.prefills else budget
        if making.num_scored + num_scored(sequence, num_tokens) > MAX_SCORED_TOKENS:
            return 0
        return num_tokens

    def shrink(self, longest: int) -> bool:
        """Halve the limit after a step with chunks of up to `longest` tokens ran out of memory.

        Return False when that was the minimum already.
        """
        if longest <= MIN_PREFILL_CHUNK:
            return False
        self.limit = max(MIN_PREFILL_CHUNK, longest // 2)
        return True

    def regrow(self) -> None:
        """Double the limit, to what it was at first at most."""
        self.limit = min(self.limit * 2, self._largest)

    def _num_left(self, sequence: Sequence, start: int) -> int:
        """Return how many tokens from `start` on a single chunk may have."""
        end = len(sequence.token_ids)
        if self._has_states:
            end = self._prefix_cache.next_cut(sequence, start) or end
        if sequence.num_unscored > MAX_SCORED_TOKENS:
            end = min(end, max(start, sequence.num_scored) + MAX_SCORED_TOKENS)
        return end - start


def num_scored(sequence: Sequence, num_tokens: int) -> int:
    """Return how many of the next tokens score their successor for the first time."""
    end = min(sequence.num_computed + num_tokens, sequence.num_scored + sequence.num_unscored)
    return max(0, end - max(sequence.num_computed, sequence.num_scored))
