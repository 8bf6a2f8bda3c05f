"""What one step computes: rows of tokens, and the moves of a hybrid's states before them.

Made by the scheduler, read by the engine; a tensor-parallel leader sends it to its workers. Pure.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from engine.cache.prefix_cache import PublicationKey
from engine.cache.snapshots import StateCopy
from engine.scheduling.sequence import Sequence


@dataclass(frozen=True, slots=True)
class PlannedRow:
    """Tokens start..start+num_tokens-1 of a sequence; `samples` when its last one is among them.

    The last `num_scored` tokens, not counting one that samples, score their successors.
    """

    sequence: Sequence
    start: int
    num_tokens: int
    samples: bool
    num_scored: int = 0

    @property
    def num_logits(self) -> int:
        """How many of the last tokens yield logits."""
        return self.num_scored + self.samples

    @property
    def token_ids(self) -> list[int]:
        """The tokens to compute."""
        return self.sequence.token_ids[self.start : self.start + self.num_tokens]

    @property
    def block_table(self) -> list[int]:
        """The sequence's KV blocks, in order."""
        return self.sequence.block_table

    @property
    def state_slot(self) -> int:
        """Where a hybrid's recurrent state of the sequence is."""
        return self.sequence.state_slot


@dataclass(frozen=True, slots=True)
class StepPlan:
    """The rows of one step: decode rows first, `num_decodes` of them, then prefill rows.

    `state_copies` move a hybrid's states between slots before anything is computed.
    """

    rows: list[PlannedRow] = field(default_factory=list)
    num_decodes: int = 0
    state_copies: list[StateCopy] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        """Tokens of all rows."""
        return sum(row.num_tokens for row in self.rows)


@dataclass(slots=True)
class PlanInMaking:
    """The rows so far, whose they are, and what their sequences publish next."""

    decodes: list[PlannedRow] = field(default_factory=list)
    prefills: list[PlannedRow] = field(default_factory=list)
    planned: set[Sequence] = field(default_factory=set)
    num_scored: int = 0
    keys: set[PublicationKey] = field(default_factory=set)

    def add_decode(self, row: PlannedRow) -> None:
        """Add the row of a sequence that decodes."""
        self.decodes.append(row)
        self.planned.add(row.sequence)

    def add_prefill(self, row: PlannedRow, key: PublicationKey | None) -> None:
        """Add a chunk of a prompt."""
        self.prefills.append(row)
        self.planned.add(row.sequence)
        self.num_scored += row.num_scored
        if key is not None:
            self.keys.add(key)
