"""The steps of one epoch as `GenerateStep` messages, and back, fully checked. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, chain, pairwise
from typing import Protocol

from cortexd.errors import InvalidValue
from cortexd.messages.rpc import GenerateStep
from engine.cache.slot_pool import NULL_SLOT
from engine.cache.snapshots import StateCopy
from engine.scheduling.step_plan import StepPlan
from engine.token_ids import pack_token_ids, unpack_token_ids
from engine.tp.block_tables import KnownTables, SentTables, TableChanges


class CacheBounds(Protocol):
    """How many blocks and usable state slots the cache has; see `CacheSize`."""

    @property
    def num_blocks(self) -> int: ...
    @property
    def num_state_slots(self) -> int: ...


@dataclass(frozen=True, slots=True)
class ReceivedRow:
    """A row of the leader's plan, as a worker has it; see `engine.batch.StepRow`."""

    start: int
    num_tokens: int
    num_logits: int
    token_ids: list[int]
    block_table: list[int]
    state_slot: int


@dataclass(frozen=True, slots=True)
class ReceivedStep:
    """The leader's plan, as a worker has it."""

    rows: list[ReceivedRow]
    state_copies: list[StateCopy]


class StepEncoder:
    """The leader's side: counts the steps and knows which blocks the workers know."""

    def __init__(self, model_id: str) -> None:
        self.num_steps = 0
        self._model_id = model_id
        self._tables = SentTables()

    def encode(self, plan: StepPlan) -> GenerateStep:
        """Return the message of the next step."""
        self.num_steps += 1
        rows = plan.rows
        tables = self._tables.changes(rows)
        return GenerateStep(
            model_id=self._model_id,
            step=self.num_steps,
            starts=pack_token_ids([row.start for row in rows]),
            lengths=pack_token_ids([row.num_tokens for row in rows]),
            tokens=pack_token_ids(list(chain.from_iterable(row.token_ids for row in rows))),
            dropped_tables=pack_token_ids(tables.dropped),
            tables=pack_token_ids(tables.handles),
            num_kept_blocks=pack_token_ids(tables.num_kept),
            num_new_blocks=pack_token_ids(tables.num_new),
            blocks=pack_token_ids(tables.blocks),
            state_slots=pack_token_ids([row.state_slot for row in rows]),
            state_copies=pack_token_ids(list(chain.from_iterable(plan.state_copies))),
            num_logits=pack_token_ids([row.num_logits for row in rows]),
        )


class StepDecoder:
    """A worker's side, for one cache. A step that was refused has no successor."""

    def __init__(self, bounds: CacheBounds, block_size: int) -> None:
        self._bounds = bounds
        self._block_size = block_size
        self._num_steps = 0
        self._tables = KnownTables(bounds.num_blocks)

    def decode(self, message: GenerateStep) -> ReceivedStep:
        """Return the plan. Raises: InvalidValue when it cannot be run, or is not the next one.

        A row out of range would read or write another sequence's memory, so nothing is taken on
        trust.
        """
        try:
            return self._decoded(message)
        except InvalidValue as error:
            raise InvalidValue(f"step {message.step}: {error.message}") from None

    def _decoded(self, message: GenerateStep) -> ReceivedStep:
        self._num_steps += 1
        if message.step != self._num_steps:
            raise InvalidValue(f"it comes as number {self._num_steps}; allowed: each step once")
        starts = unpack_token_ids(message.starts, "starts")
        lengths = unpack_token_ids(message.lengths, "lengths")
        tokens = unpack_token_ids(message.tokens, "tokens")
        state_slots = unpack_token_ids(message.state_slots, "state_slots")
        num_logits = unpack_token_ids(message.num_logits, "num_logits")
        changes = _table_changes(message)
        columns = (starts, lengths, state_slots, num_logits)
        table_columns = (changes.handles, changes.num_kept, changes.num_new)
        sizes = [len(column) for column in (*columns, *table_columns)]
        if not starts or len(set(sizes)) > 1:
            raise InvalidValue(f"columns of {sizes} rows; allowed: one entry each for every row")
        _check_rows(starts, lengths, num_logits, tokens)
        _check_row_slots(state_slots, self._bounds.num_state_slots)
        rows = [
            ReceivedRow(start, end - begin, wanted, tokens[begin:end], table, slot)
            for start, (begin, end), table, wanted, slot in zip(
                starts,
                pairwise(accumulate(lengths, initial=0)),
                self._tables.apply(changes),
                num_logits,
                state_slots,
                strict=True,
            )
        ]
        for row in rows:
            if row.start + row.num_tokens > len(row.block_table) * self._block_size:
                raise InvalidValue(
                    f"{row.start + row.num_tokens} tokens in {len(row.block_table)} blocks of "
                    f"{self._block_size}"
                )
        return ReceivedStep(rows, _state_copies(message, self._bounds.num_state_slots))


def _table_changes(message: GenerateStep) -> TableChanges:
    return TableChanges(
        unpack_token_ids(message.dropped_tables, "dropped_tables"),
        unpack_token_ids(message.tables, "tables"),
        unpack_token_ids(message.num_kept_blocks, "num_kept_blocks"),
        unpack_token_ids(message.num_new_blocks, "num_new_blocks"),
        unpack_token_ids(message.blocks, "blocks"),
    )


def _check_rows(
    starts: Sequence[int], lengths: Sequence[int], num_logits: Sequence[int], tokens: Sequence[int]
) -> None:
    if min(lengths) < 1 or min(starts) < 0:
        raise InvalidValue("a row without tokens, or before its sequence's first")
    if any(not 0 <= wanted <= length for wanted, length in zip(num_logits, lengths, strict=True)):
        raise InvalidValue("logits of more tokens than a row has")
    if sum(lengths) != len(tokens):
        raise InvalidValue(f"{len(tokens)} tokens for rows of {sum(lengths)}")


def _check_row_slots(slots: Sequence[int], num_slots: int) -> None:
    """Check that each row of a hybrid has a slot of its own, and no other row one."""
    allowed = range(1, num_slots + 1) if num_slots else range(NULL_SLOT, NULL_SLOT + 1)
    is_shared = num_slots > 0 and len(set(slots)) < len(slots)
    if is_shared or any(slot not in allowed for slot in slots):
        raise InvalidValue(f"state slots {slots[:10]}; allowed: one each, of {num_slots}")


def _state_copies(message: GenerateStep, num_slots: int) -> list[StateCopy]:
    flat = unpack_token_ids(message.state_copies, "state_copies")
    if len(flat) % 2 or any(not 1 <= slot <= num_slots for slot in flat):
        raise InvalidValue(f"state copies {flat[:10]}; allowed: pairs of slots, 1 to {num_slots}")
    return list(zip(flat[::2], flat[1::2], strict=True))
