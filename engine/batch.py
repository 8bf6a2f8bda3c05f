"""The tensors of one step, built from the scheduler's plan, or on a worker from the leader's.

A step is one flat run of tokens: decode rows first, then prefill rows. Everything that depends on
positions only is computed here once, so that no layer repeats it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, takewhile
from typing import Protocol

import torch
from torch import Tensor


class StepRow(Protocol):
    """One sequence's share of a step: `token_ids` from position `start` on.

    The last `num_logits` of them yield logits.
    """

    @property
    def start(self) -> int: ...
    @property
    def num_tokens(self) -> int: ...
    @property
    def num_logits(self) -> int: ...
    @property
    def token_ids(self) -> Sequence[int]: ...
    @property
    def block_table(self) -> Sequence[int]: ...
    @property
    def state_slot(self) -> int: ...


@dataclass(slots=True)
class BatchRow:
    """One sequence's query tokens start..end-1 of the batch, and where its KV stands.

    The KV is read in place from `first_slot` on when the blocks are consecutive (`block_ids` is
    None), else gathered by `block_ids` (int64). `state_slot` holds a hybrid's recurrent state, of
    no meaning yet when the row `is_fresh`.
    """

    start: int
    end: int
    kv_len: int
    first_slot: int
    block_ids: Tensor | None
    state_slot: int
    is_fresh: bool  # no token of the sequence was computed before
    _mask: Tensor | None = None

    def mask(self, device: torch.device) -> Tensor | None:
        """Return (num_tokens, kv_len), True where a query may look; made by the first layer.

        None when a single query sees everything, or a prompt's first chunk is plainly causal.
        """
        num_tokens = self.end - self.start
        if self._mask is None and 1 < num_tokens < self.kv_len:
            queries = torch.arange(self.kv_len - num_tokens, self.kv_len, device=device)
            self._mask = torch.arange(self.kv_len, device=device)[None, :] <= queries[:, None]
        return self._mask


@dataclass(slots=True)
class StepBatch:
    """Device tensors, all int64: token_ids, positions, slots (num_tokens,), logit_rows.

    `slots` are the cache slots that the tokens' K and V go to; `logit_rows` the tokens whose logits
    are wanted; `state_slots` and `is_fresh` (bool) are those of the rows. The first
    `num_single_rows` rows have one token each.
    """

    token_ids: Tensor
    positions: Tensor
    slots: Tensor
    logit_rows: Tensor
    state_slots: Tensor
    is_fresh: Tensor
    rows: list[BatchRow]
    num_single_rows: int


def build_batch(
    planned_rows: Sequence[StepRow], block_size: int, device: torch.device
) -> StepBatch:
    """Return the tensors of one step."""
    token_ids: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    logit_rows: list[int] = []
    rows: list[BatchRow] = []
    for planned in planned_rows:
        begin, end = planned.start, planned.start + planned.num_tokens
        rows.append(_build_row(planned, len(token_ids), block_size, device))
        token_ids += planned.token_ids
        positions += range(begin, end)
        slots += _slots(planned.block_table, begin, end, block_size)
        logit_rows += range(len(token_ids) - planned.num_logits, len(token_ids))
    state_slots = [row.state_slot for row in rows]
    is_fresh = [int(row.is_fresh) for row in rows]
    lists = [token_ids, positions, slots, logit_rows, state_slots, is_fresh]
    packed = torch.tensor(list(chain(*lists)), dtype=torch.int64).to(device)  # one transfer for all
    parts = packed.split([len(part) for part in lists])
    return StepBatch(
        token_ids=parts[0],
        positions=parts[1],
        slots=parts[2],
        logit_rows=parts[3],
        state_slots=parts[4],
        is_fresh=parts[5].bool(),
        rows=rows,
        num_single_rows=sum(1 for _ in takewhile(lambda row: row.end - row.start == 1, rows)),
    )


def _slots(block_table: Sequence[int], begin: int, end: int, block_size: int) -> list[int]:
    return [
        block_table[position // block_size] * block_size + position % block_size
        for position in range(begin, end)
    ]


def _build_row(planned: StepRow, start: int, block_size: int, device: torch.device) -> BatchRow:
    kv_len = planned.start + planned.num_tokens
    blocks = planned.block_table[: -(-kv_len // block_size)]
    is_consecutive = blocks[-1] - blocks[0] == len(blocks) - 1 and all(
        block == blocks[0] + index for index, block in enumerate(blocks)
    )
    return BatchRow(
        start=start,
        end=start + planned.num_tokens,
        kv_len=kv_len,
        first_slot=blocks[0] * block_size,
        block_ids=None if is_consecutive else torch.tensor(blocks, device=device),
        state_slot=planned.state_slot,
        is_fresh=planned.start == 0,
    )
