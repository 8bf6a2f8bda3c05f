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

from engine.cache.block_pool import NULL_BLOCK


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

    The KV stands in `blocks`; it is read in place from `first_slot` on when they are consecutive
    (`block_ids` is None), else gathered by `block_ids`. `state_slot` holds a hybrid's recurrent
    state, of no meaning yet when the row `is_fresh`.
    """

    start: int
    end: int
    kv_len: int
    blocks: Sequence[int]
    first_slot: int
    is_consecutive: bool
    state_slot: int
    is_fresh: bool  # no token of the sequence was computed before
    device: torch.device
    _block_ids: Tensor | None = None
    _mask: Tensor | None = None

    @property
    def block_ids(self) -> Tensor | None:
        """The blocks as int64 on the device, unless consecutive; made by the first layer."""
        if self._block_ids is None and not self.is_consecutive:
            self._block_ids = torch.tensor(self.blocks, device=self.device)
        return self._block_ids

    def mask(self) -> Tensor | None:
        """Return (num_tokens, kv_len), True where a query may look; made by the first layer.

        None when a single query sees everything, or a prompt's first chunk is plainly causal.
        """
        num_tokens = self.end - self.start
        if self._mask is None and 1 < num_tokens < self.kv_len:
            queries = torch.arange(self.kv_len - num_tokens, self.kv_len, device=self.device)
            seen = torch.arange(self.kv_len, device=self.device)
            self._mask = seen[None, :] <= queries[:, None]
        return self._mask


@dataclass(slots=True)
class PagedRows:
    """Rows as kernels read them, int64 on the device.

    `block_tables` (num_rows, max_blocks), filled up with the null block; `kv_lens` (num_rows,);
    row i has the query tokens query_starts[i]..query_starts[i + 1]-1, counted from the first token
    of the first row. Host numbers: `query_lens`, and no row sees more than `max_kv_len` tokens.
    """

    block_tables: Tensor
    kv_lens: Tensor
    query_starts: Tensor
    query_lens: list[int]
    max_kv_len: int
    _chunks: Tensor | None = None

    def chunks(self, size: int) -> Tensor:
        """Cut the rows into chunks of `size` tokens, always the same; return (2, num_chunks).

        For each chunk its row, and its first token counted from the row's; made by the first layer.
        """
        if self._chunks is None:
            pairs = [
                (row, first)
                for row, length in enumerate(self.query_lens)
                for first in range(0, length, size)
            ]
            chunks = torch.tensor(pairs, dtype=torch.int64).T.contiguous()
            self._chunks = chunks.to(self.kv_lens.device)
        return self._chunks

    @classmethod
    def of(cls, rows: Sequence[BatchRow]) -> PagedRows:
        """Return the rows' tables, in one transfer."""
        width = max(len(row.blocks) for row in rows)
        flat = [row.kv_len for row in rows]
        flat += [row.start - rows[0].start for row in rows]
        flat.append(rows[-1].end - rows[0].start)
        for row in rows:
            flat += row.blocks
            flat += [NULL_BLOCK] * (width - len(row.blocks))
        count = len(rows)
        packed = torch.tensor(flat, dtype=torch.int64).to(rows[0].device)
        kv_lens, query_starts, tables = packed.split([count, count + 1, count * width])
        return cls(
            block_tables=tables.view(count, width),
            kv_lens=kv_lens,
            query_starts=query_starts,
            query_lens=[row.end - row.start for row in rows],
            max_kv_len=max(row.kv_len for row in rows),
        )


@dataclass(slots=True)
class StepBatch:
    """Device tensors, all int64: token_ids, positions, slots (num_tokens,), logit_rows.

    `slots` are the cache slots that the tokens' K and V go to; `logit_rows` the tokens whose logits
    are wanted; `state_slots` and `is_fresh` (bool) are those of the rows. The first
    `num_single_rows` rows have one token each, the others form runs.
    """

    token_ids: Tensor
    positions: Tensor
    slots: Tensor
    logit_rows: Tensor
    state_slots: Tensor
    is_fresh: Tensor
    rows: list[BatchRow]
    num_single_rows: int
    # The same rows as kernels read them; made by the first layer that asks.
    _single_rows: PagedRows | None = None
    _run_rows: PagedRows | None = None

    @property
    def single_rows(self) -> PagedRows | None:
        """The rows of one token as kernels read them; None without any."""
        if self._single_rows is None and self.num_single_rows:
            self._single_rows = PagedRows.of(self.rows[: self.num_single_rows])
        return self._single_rows

    @property
    def run_rows(self) -> PagedRows | None:
        """The other rows as kernels read them; None without any."""
        if self._run_rows is None and len(self.rows) > self.num_single_rows:
            self._run_rows = PagedRows.of(self.rows[self.num_single_rows :])
        return self._run_rows


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
        blocks=blocks,
        first_slot=blocks[0] * block_size,
        is_consecutive=is_consecutive,
        state_slot=planned.state_slot,
        is_fresh=planned.start == 0,
        device=device,
    )
