"""What an exception in a step means: run less, fail the step's requests, or end the process.

Used by the engine. A shortage of memory is answered with smaller steps. Any other error is taken
for one of the batch: its requests fail and the engine goes on, unless the device is lost, the ranks
may have parted, or the same thing happens to one step after the other.
"""

from __future__ import annotations

from typing import Final, Literal

import torch

from engine import device as devices

# One bad request may take a neighbour along and be sent again; three steps in a row without a good
# one between them are no accident of a batch.
MAX_FAULTS_IN_A_ROW: Final = 3

Verdict = Literal["shrink", "fail", "end"]


class StepFaults:
    """Counts the steps that failed since the last good one."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._num_in_a_row = 0

    def __repr__(self) -> str:
        return f"<StepFaults: {self._num_in_a_row} in a row>"

    def clear(self) -> None:
        """Note a good step."""
        self._num_in_a_row = 0

    def judge(self, error: Exception, *, is_in_lockstep: bool) -> Verdict:
        """Return what to do about an error; `is_in_lockstep`: no other rank is inside the step.

        Ranks inside a step may be at different collectives: going on would hang them.
        """
        if not is_in_lockstep or devices.is_device_poisoned(error):
            return "end"
        if devices.is_out_of_memory(error):
            return "shrink"
        self._num_in_a_row += 1
        if self._num_in_a_row >= MAX_FAULTS_IN_A_ROW or not devices.is_alive(self._device):
            return "end"
        return "fail"
