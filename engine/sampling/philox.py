"""Counter-based random numbers: one uniform per (seed, position), the same on every machine.

A sequence's draw depends on nothing but its seed and its number of tokens, so neither the batch it
runs in nor the device changes its text.
Source: Philox4x32-10 of Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).
"""

from __future__ import annotations

from typing import Final

_MASK: Final = 0xFFFFFFFF
_MULTIPLIERS: Final = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS: Final = (0x9E3779B9, 0xBB67AE85)
_ROUNDS: Final = 10

Words = tuple[int, int, int, int]


def philox4x32(counter: Words, key: tuple[int, int]) -> Words:
    """Return the four 32-bit words of one counter."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        first = _MULTIPLIERS[0] * c0
        second = _MULTIPLIERS[1] * c2
        c0, c1 = (second >> 32) ^ c1 ^ k0, second & _MASK
        c2, c3 = (first >> 32) ^ c3 ^ k1, first & _MASK
        k0 = (k0 + _KEY_STEPS[0]) & _MASK
        k1 = (k1 + _KEY_STEPS[1]) & _MASK
    return c0, c1, c2, c3


def uniform(seed: int, position: int) -> float:
    """Return a number in [0, 1) with 53 random bits; `seed` is taken modulo 2**64."""
    counter = (position & _MASK, (position >> 32) & _MASK, 0, 0)
    first, second, _, _ = philox4x32(counter, (seed & _MASK, (seed >> 32) & _MASK))
    return ((first << 32 | second) >> 11) * 2.0**-53
