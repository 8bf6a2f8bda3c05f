"""One sequence: its tokens, how far they are computed, and the blocks that hold their KV.

The scheduler owns the instances; the engine appends sampled tokens. Pure Python, no tensors.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from cortexd.messages.inference import Submit
from engine.cache.prefix_tree import PrefixNode
from engine.cache.slot_pool import NULL_SLOT


class SequenceState(enum.Enum):
    """Where the scheduler keeps a sequence."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(slots=True, eq=False)
class Sequence:
    """Tokens 0..num_computed-1 have their KV in `block_table`; the rest is to be computed.

    `token_ids` is the prompt followed by the output. A sequence decodes when exactly its last token
    is not computed and prefills otherwise; after a preemption its output is prefilled again.
    """

    owner: str
    submit: Submit
    token_ids: list[int]
    num_prompt_tokens: int
    max_tokens: int  # clamped to the context
    stop_token_ids: frozenset[int]  # empty when end tokens are ignored
    seed: int
    bad_words: list[list[int]] = field(default_factory=list)  # none is empty
    allowed_token_ids: list[int] = field(default_factory=list)  # empty: all
    state: SequenceState = SequenceState.WAITING
    num_computed: int = 0
    block_table: list[int] = field(default_factory=list)
    prefix_node: PrefixNode | None = None  # the blocks before this and its own are shareable
    state_slot: int = NULL_SLOT  # of a hybrid model's recurrent state, while it runs
    waiting_since: float = 0.0  # when the scheduler queued it, by its clock, seconds
    num_preemptions: int = 0
    num_overtaken: int = 0  # steps in which a newer sequence prefilled and this one could not
    stable_length: int = 0  # so many tokens will begin the conversation's next prompt, too
    num_cached_tokens: int = 0  # prompt tokens that came from the prefix cache
    num_scored: int = 0  # leading tokens whose logits have scored their successor in the prompt

    def __repr__(self) -> str:
        return (
            f"<Sequence {self.owner}:{self.sequence_id} {self.state.value}, "
            f"{self.num_computed}/{len(self.token_ids)} computed, {len(self.block_table)} blocks>"
        )

    @property
    def sequence_id(self) -> int:
        """The owner's own number of this sequence."""
        return self.submit.sequence_id

    @property
    def num_output_tokens(self) -> int:
        """Tokens generated so far."""
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def num_uncomputed(self) -> int:
        """Tokens that the next passes must compute."""
        return len(self.token_ids) - self.num_computed

    @property
    def num_unscored(self) -> int:
        """Prompt tokens whose log-probability is wanted and not known; the first one has none."""
        if self.submit.num_prompt_logprobs < 0:
            return 0
        return self.num_prompt_tokens - 1 - self.num_scored

    @property
    def num_skippable(self) -> int:
        """Leading tokens whose KV others may provide; those after it must yield logits."""
        return self.num_scored if self.num_unscored else len(self.token_ids) - 1
