"""The tensors of one step, built from the scheduler's plan, or on a worker from the leader's.

A step is one flat run of tokens: decode rows first, then prefill rows. Everything that depends on
positions only is computed here once, so that no layer repeats it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Protocol

import torch
from torch import Tensor


class StepRow(Protocol):
    """One sequence's share of a step: `token_ids` from position `start` on."""

    @property
    def start(self) -> int: ...
    @property
    def num_tokens(self) -> int: ...
    @property
    def samples(self) -> bool: ...
    @property
    def token_ids(self) -> Sequence[int]: ...
    @property
    def block_table(self) -> Sequence[int]: ...


@dataclass(slots=True)
class BatchRow:
    """One sequence's query tokens start..end-1 of the batch, and where its KV stands.

    The KV is read in place from `first_slot` on when the blocks are consecutive (`block_ids` is
    None), else gathered by `block_ids` (int64).
    """

    start: int
    end: int
    kv_len: int
    first_slot: int
    block_ids: Tensor | None
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
    """Device tensors, all int64: token_ids, positions, slots (num_tokens,), logit_rows (num_rows,).

    `slots` are the cache slots that the tokens' K and V go to; `logit_rows` the tokens whose logits
    are wanted.
    """

    token_ids: Tensor
    positions: Tensor
    slots: Tensor
    logit_rows: Tensor
    rows: list[BatchRow]


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
        if planned.samples:
            logit_rows.append(len(token_ids) - 1)
    packed = torch.tensor(
        list(chain(token_ids, positions, slots, logit_rows)), dtype=torch.int64
    ).to(device)  # one transfer for all four
    parts = packed.split([len(token_ids), len(positions), len(slots), len(logit_rows)])
    return StepBatch(parts[0], parts[1], parts[2], parts[3], rows)


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
    )
