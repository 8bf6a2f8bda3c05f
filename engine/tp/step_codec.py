"""One step's plan as the `GenerateStep` message, and back, fully checked. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, chain, pairwise
from typing import Protocol

from cortexd.errors import InvalidValue
from cortexd.messages.rpc import GenerateStep
from engine.scheduler import StepPlan
from engine.slot_pool import NULL_SLOT
from engine.snapshots import StateCopy
from engine.token_ids import pack_token_ids, unpack_token_ids


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


def encode_step(model_id: str, step: int, plan: StepPlan) -> GenerateStep:
    """Return the message for one step."""
    rows = plan.rows
    blocks = [row.block_table for row in rows]
    return GenerateStep(
        model_id,
        step,
        pack_token_ids([row.start for row in rows]),
        pack_token_ids([row.num_tokens for row in rows]),
        pack_token_ids(list(chain.from_iterable(row.token_ids for row in rows))),
        pack_token_ids([len(table) for table in blocks]),
        pack_token_ids(list(chain.from_iterable(blocks))),
        pack_token_ids([row.state_slot for row in rows]),
        pack_token_ids(list(chain.from_iterable(plan.state_copies))),
        pack_token_ids([row.num_logits for row in rows]),
    )


def decode_step(message: GenerateStep, bounds: CacheBounds, block_size: int) -> ReceivedStep:
    """Return the plan, for a cache of these bounds. Raises: InvalidValue when it cannot be run.

    A row out of range would read or write another sequence's memory, so nothing is taken on trust.
    """
    starts = unpack_token_ids(message.starts, "starts")
    lengths = unpack_token_ids(message.lengths, "lengths")
    counts = unpack_token_ids(message.num_blocks, "num_blocks")
    tokens = unpack_token_ids(message.tokens, "tokens")
    blocks = unpack_token_ids(message.blocks, "blocks")
    state_slots = unpack_token_ids(message.state_slots, "state_slots")
    num_logits = unpack_token_ids(message.num_logits, "num_logits")
    sizes = [len(column) for column in (starts, lengths, counts, state_slots, num_logits)]
    if not starts or len(set(sizes)) > 1:
        raise InvalidValue(
            f"step {message.step}: {sizes} starts, lengths, block counts, state slots and logits; "
            "allowed: one each for every row"
        )
    if min(lengths) < 1 or min(starts) < 0 or min(counts) < 1:
        raise InvalidValue(f"step {message.step}: a row without tokens or blocks")
    if any(not 0 <= wanted <= length for wanted, length in zip(num_logits, lengths, strict=True)):
        raise InvalidValue(f"step {message.step}: logits of more tokens than a row has")
    if sum(lengths) != len(tokens) or sum(counts) != len(blocks):
        raise InvalidValue(
            f"step {message.step}: {len(tokens)} tokens and {len(blocks)} blocks for rows of "
            f"{sum(lengths)} and {sum(counts)}"
        )
    if min(blocks) < 0 or max(blocks) >= bounds.num_blocks:
        raise InvalidValue(f"step {message.step}: a block outside of 0 to {bounds.num_blocks - 1}")
    _check_row_slots(message.step, state_slots, bounds.num_state_slots)
    rows = [
        ReceivedRow(start, end - begin, wanted, tokens[begin:end], blocks[first:last], slot)
        for start, (begin, end), (first, last), wanted, slot in zip(
            starts, _bounds(lengths), _bounds(counts), num_logits, state_slots, strict=True
        )
    ]
    for row in rows:
        if row.start + row.num_tokens > len(row.block_table) * block_size:
            raise InvalidValue(
                f"step {message.step}: {row.start + row.num_tokens} tokens in "
                f"{len(row.block_table)} blocks of {block_size}"
            )
    return ReceivedStep(rows, _state_copies(message, bounds.num_state_slots))


def _check_row_slots(step: int, slots: Sequence[int], num_slots: int) -> None:
    """Check that each row of a hybrid has a slot of its own, and no other row one."""
    allowed = range(1, num_slots + 1) if num_slots else range(NULL_SLOT, NULL_SLOT + 1)
    is_shared = num_slots > 0 and len(set(slots)) < len(slots)
    if is_shared or any(slot not in allowed for slot in slots):
        raise InvalidValue(
            f"step {step}: state slots {sorted(slots)[:10]}; allowed: one each, of {num_slots}"
        )


def _state_copies(message: GenerateStep, num_slots: int) -> list[StateCopy]:
    flat = unpack_token_ids(message.state_copies, "state_copies")
    if len(flat) % 2 or any(not 1 <= slot <= num_slots for slot in flat):
        raise InvalidValue(
            f"step {message.step}: state copies {flat[:10]}; allowed: pairs of slots, 1 to "
            f"{num_slots}"
        )
    return list(zip(flat[::2], flat[1::2], strict=True))


def _bounds(sizes: list[int]) -> list[tuple[int, int]]:
    return list(pairwise(accumulate(sizes, initial=0)))
