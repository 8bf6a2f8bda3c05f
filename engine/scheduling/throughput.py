"""A moving average of tokens per second."""

from __future__ import annotations

from typing import Final

# Weight of the newest step: about the last twenty steps count.
_WEIGHT: Final = 0.1


class MovingRate:
    """Exponential moving average over steps; 0 before the first one."""

    def __init__(self) -> None:
        self.tokens_per_s = 0.0

    def add(self, num_tokens: int, elapsed_s: float) -> None:
        """Count one step; a step without tokens says nothing."""
        if num_tokens == 0 or elapsed_s <= 0:
            return
        rate = num_tokens / elapsed_s
        is_first = self.tokens_per_s == 0.0
        self.tokens_per_s = (
            rate if is_first else self.tokens_per_s + _WEIGHT * (rate - self.tokens_per_s)
        )
