"""The input of a decode step in tensors that never move, so that a captured graph can read them.

Made by `engine.decode_steps`, one per batch bucket. All integers of a step lie in one tensor and
all floats in another, each with a pinned host copy: two transfers a step. Two host copies take
turns, since one is still being read while the next step is filled in. Rows beyond a step's own are
padding: a token at position 0 of the null block, with the null state slot, which no sequence holds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from engine.batch import PagedRows, StepBatch
from engine.cache.block_pool import NULL_BLOCK
from engine.cache.slot_pool import NULL_SLOT
from engine.sampling.device_sampler import SamplingTensors
from engine.scheduling.step_plan import PlannedRow

_INTEGERS: Final = (
    *("token_ids", "positions", "slots", "kv_lens", "state_slots", "is_fresh"),
    *("top_ks", "seeds"),
)
_FLOATS: Final = ("temperatures", "top_ps", "min_ps")


class _HostCopy:
    """One host image of a step, with numpy views to write through."""

    def __init__(self, num_rows: int, max_blocks: int, *, is_pinned: bool) -> None:
        count = num_rows * (len(_INTEGERS) + max_blocks)
        self.integers = torch.zeros(count, dtype=torch.int64, pin_memory=is_pinned)
        self.floats = torch.zeros(
            len(_FLOATS) * num_rows, dtype=torch.float32, pin_memory=is_pinned
        )
        columns = self.integers.numpy()
        heads = columns[: num_rows * len(_INTEGERS)].reshape(len(_INTEGERS), num_rows)
        self.columns = dict(zip(_INTEGERS, heads, strict=True))
        self.tables = columns[num_rows * len(_INTEGERS) :].reshape(num_rows, max_blocks)
        floats = self.floats.numpy().reshape(len(_FLOATS), num_rows)
        self.settings = dict(zip(_FLOATS, floats, strict=True))


class StepBuffers:
    """See the module's text. `batch` and `sampling` are views that a forward pass reads."""

    def __init__(
        self, num_rows: int, max_blocks: int, block_size: int, device: torch.device
    ) -> None:
        self.num_rows = num_rows
        self._block_size = block_size
        is_pinned = device.type == "cuda"
        self._host = [_HostCopy(num_rows, max_blocks, is_pinned=is_pinned) for _ in range(2)]
        self._turn = 0
        self._integers = self._host[0].integers.to(device, copy=True)
        self._floats = self._host[0].floats.to(device, copy=True)
        heads = self._integers[: num_rows * len(_INTEGERS)].view(len(_INTEGERS), num_rows)
        columns = dict(zip(_INTEGERS, heads, strict=True))
        floats = dict(zip(_FLOATS, self._floats.view(len(_FLOATS), num_rows), strict=True))
        rows = PagedRows(
            block_tables=self._integers[num_rows * len(_INTEGERS) :].view(num_rows, max_blocks),
            kv_lens=columns["kv_lens"],
            query_starts=torch.arange(num_rows + 1, device=device),
            query_lens=[1] * num_rows,
            max_kv_len=max_blocks * block_size,
        )
        self.batch = StepBatch(
            token_ids=columns["token_ids"],
            positions=columns["positions"],
            slots=columns["slots"],
            logit_rows=torch.arange(num_rows, device=device),
            state_slots=columns["state_slots"],
            is_fresh=columns["is_fresh"],
            rows=[],
            num_single_rows=num_rows,
            _single_rows=rows,
        )
        # The token that is drawn stands where the next one is computed: kv_lens counts up to there.
        self.sampling = SamplingTensors(
            temperatures=floats["temperatures"],
            top_ps=floats["top_ps"],
            min_ps=floats["min_ps"],
            top_ks=columns["top_ks"],
            seeds=columns["seeds"],
            positions=columns["kv_lens"],
        )

    def fill(self, rows: Sequence[PlannedRow], token_ids: Tensor | None) -> None:
        """Write decode rows, and padding behind them, without waiting for the device.

        `token_ids` (num_rows,) int64 on the device are those of a step whose tokens the host does
        not know yet; None: the sequences have them.
        """
        assert len(rows) <= self.num_rows, f"{len(rows)} rows in a bucket of {self.num_rows}"
        host = self._host[self._turn]
        self._turn = 1 - self._turn
        for index, row in enumerate(rows):
            self._fill_row(host, index, row, has_token=token_ids is None)
        self._pad(host, len(rows))
        self._integers.copy_(host.integers, non_blocking=True)
        self._floats.copy_(host.floats, non_blocking=True)
        if token_ids is not None:
            # A row without a token has failed; what it computes is thrown away.
            self.batch.token_ids.copy_(token_ids.clamp(min=0))

    def _fill_row(self, host: _HostCopy, index: int, row: PlannedRow, *, has_token: bool) -> None:
        sequence, submit, position = row.sequence, row.sequence.submit, row.start
        table, size = row.block_table, self._block_size
        columns, settings = host.columns, host.settings
        columns["token_ids"][index] = row.token_ids[0] if has_token else 0
        columns["positions"][index] = position
        columns["slots"][index] = table[position // size] * size + position % size
        columns["kv_lens"][index] = position + 1
        columns["state_slots"][index] = row.state_slot
        columns["is_fresh"][index] = position == 0
        columns["top_ks"][index] = submit.top_k
        columns["seeds"][index] = (sequence.seed + 2**63) % 2**64 - 2**63
        num_blocks = position // size + 1
        host.tables[index, :num_blocks] = table[:num_blocks]
        settings["temperatures"][index] = submit.temperature
        settings["top_ps"][index] = submit.top_p
        settings["min_ps"][index] = submit.min_p

    def _pad(self, host: _HostCopy, begin: int) -> None:
        for column in host.columns.values():
            column[begin:] = 0
        host.columns["kv_lens"][begin:] = 1
        host.columns["state_slots"][begin:] = NULL_SLOT
        host.columns["is_fresh"][begin:] = 1
        host.tables[begin:, 0] = NULL_BLOCK
        for column in host.settings.values():
            column[begin:] = 0
