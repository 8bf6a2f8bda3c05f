"""Token budgets: what each key has spent, and what its running requests have reserved. Pure.

A request reserves the most it may use before it is dispatched and settles to what it did use, so
the sum of both never exceeds the cap however many run at once. A reservation ends exactly once: by
its last usage report, by the end of who holds it, or when nobody reports it any more. Times are
seconds since the epoch, so that windows survive a restart; the caller keeps them from running back.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final

from cortexd.errors import Detail, InsufficientQuota, RateLimitExceeded
from cortexd.keys import Key

# A rolling window is counted in this many parts: spent tokens come back at most one part late.
_PARTS: Final = 60
# Who holds a reservation reports it every second.
ABANDONED_AFTER_S: Final = 15.0


@dataclass(slots=True)
class Reservation:
    """What one running request may still use, and what it has used so far, in tokens."""

    key_id: str
    holder: str  # the front, "name.incarnation"
    tokens: int
    heard_at: float
    prompt_tokens: int = 0
    completion_tokens: int = 0


@dataclass(slots=True, frozen=True)
class Charge:
    """What a settled request cost its key."""

    key_id: str
    prompt_tokens: int
    completion_tokens: int


@dataclass(slots=True)
class Spending:
    """What one key has spent, by the time its parts of the window began."""

    parts: dict[float, int] = field(default_factory=dict)
    reserved: int = 0

    @property
    def spent(self) -> int:
        """Return the tokens that count now."""
        return sum(self.parts.values())


class Ledger:
    """All keys' budgets."""

    def __init__(self) -> None:
        self.reservations: dict[str, Reservation] = {}
        self._keys: dict[str, Key] = {}
        self._spending: dict[str, Spending] = {}

    def __repr__(self) -> str:
        return f"Ledger({len(self._keys)} keys, {len(self.reservations)} reservations)"

    @property
    def keys(self) -> list[Key]:
        """Return the keys in force."""
        return list(self._keys.values())

    def key(self, key_id: str) -> Key | None:
        """Return a key in force."""
        return self._keys.get(key_id)

    def set_keys(self, keys: Iterable[Key]) -> None:
        """Take over the keys in force; what a key has spent stays with its id."""
        self._keys = {key.key_id: key for key in keys}
        for key_id, spending in self._spending.items():
            parts, spending.parts = spending.parts, {}
            for start, tokens in parts.items():
                self.restore(key_id, start, tokens)

    def reserve(self, request_id: str, reservation: Reservation, now: float) -> None:
        """Reserve, or change the amount of the same request's reservation.

        Raises: RateLimitExceeded with the time after which it would fit, InsufficientQuota when no
        waiting helps. Nothing is changed then.
        """
        spending = self._current(reservation.key_id, now)
        held = self._held(request_id)
        key = self._keys.get(reservation.key_id)
        if key is not None and key.hard_cap is not None:
            left = key.hard_cap - spending.spent - spending.reserved + held
            if reservation.tokens > left:
                raise self._refusal(key, reservation.tokens, left, now)
        self.take_over(request_id, reservation)

    def take_over(self, request_id: str, reservation: Reservation) -> None:
        """Hold a reservation that was granted before, whatever the cap is now."""
        spending = self._spending.setdefault(reservation.key_id, Spending())
        spending.reserved += reservation.tokens - self._held(request_id)
        self.reservations[request_id] = reservation

    def report(
        self, request_id: str, prompt_tokens: int, completion_tokens: int, now: float
    ) -> bool:
        """Note what a request has used so far; return whether that is news."""
        reservation = self.reservations.get(request_id)
        if reservation is None:
            return False
        reservation.heard_at = now
        used = (prompt_tokens, completion_tokens)
        is_news = used != (reservation.prompt_tokens, reservation.completion_tokens)
        reservation.prompt_tokens, reservation.completion_tokens = used
        return is_news

    def settle(self, request_id: str, now: float) -> Charge | None:
        """End a reservation and charge what it has used; None when it has ended already."""
        reservation = self.reservations.pop(request_id, None)
        if reservation is None:
            return None
        used = reservation.prompt_tokens + reservation.completion_tokens
        spending = self._current(reservation.key_id, now)
        spending.reserved -= reservation.tokens
        self.restore(reservation.key_id, now, used)
        return Charge(reservation.key_id, reservation.prompt_tokens, reservation.completion_tokens)

    def restore(self, key_id: str, at: float, tokens: int) -> None:
        """Add tokens that were spent at a time."""
        spending = self._spending.setdefault(key_id, Spending())
        width = self._part_s(key_id)
        start = at - at % width if width else at if key_id not in self._keys else 0.0
        if tokens:
            spending.parts[start] = spending.parts.get(start, 0) + tokens

    def held_by(self, holder: str) -> list[str]:
        """Return the requests of one front."""
        return [name for name, one in self.reservations.items() if one.holder == holder]

    def abandoned(self, now: float) -> list[str]:
        """Return the requests that nobody has reported for too long."""
        return [
            name
            for name, one in self.reservations.items()
            if now - one.heard_at > ABANDONED_AFTER_S
        ]

    def spending(self, key_id: str, now: float) -> Spending:
        """Return what a key has spent and reserved."""
        return self._current(key_id, now)

    def all_parts(self, now: float) -> list[tuple[str, float, int]]:
        """Return what `restore` needs to make an equal ledger: key id, time, tokens."""
        return [
            (key_id, start, tokens)
            for key_id in self._spending
            for start, tokens in self._current(key_id, now).parts.items()
        ]

    def _held(self, request_id: str) -> int:
        held = self.reservations.get(request_id)
        return 0 if held is None else held.tokens

    def _current(self, key_id: str, now: float) -> Spending:
        """Return a key's spending without what its window has left behind."""
        spending = self._spending.setdefault(key_id, Spending())
        key = self._keys.get(key_id)
        if key is not None and key.window is not None and key.window.seconds is not None:
            begin = now - key.window.seconds - self._part_s(key_id)
            for start in [start for start in spending.parts if start <= begin]:
                del spending.parts[start]
        return spending

    def _part_s(self, key_id: str) -> float:
        key = self._keys.get(key_id)
        seconds = key.window.seconds if key is not None and key.window is not None else None
        return seconds / _PARTS if seconds is not None else 0.0

    def _refusal(
        self, key: Key, wanted: int, left: int, now: float
    ) -> RateLimitExceeded | InsufficientQuota:
        cap = key.hard_cap or 0
        left = max(left, 0)
        details: dict[str, Detail] = {"limit": cap, "remaining": left, "requested": wanted}
        text = (
            f"this request may use up to {wanted} tokens; of the {cap} of this key {left} are left"
        )
        seconds = key.window.seconds if key.window is not None else None
        if seconds is None or wanted > cap:
            way_out = "lower the answer's maximum length" if wanted > cap else "its owner can add"
            return InsufficientQuota(
                f"{text}; {way_out}", param=None, retry_after_s=None, **details
            )
        reset_s = self._fits_after_s(key.key_id, seconds, wanted - left, now)
        details["reset_s"] = round(reset_s, 1)
        return RateLimitExceeded(
            f"{text} in {seconds} s", param=None, retry_after_s=reset_s, **details
        )

    def _fits_after_s(self, key_id: str, seconds: int, missing: int, now: float) -> float:
        """Return when enough of what was spent has left the window, at least a second."""
        parts = self._spending[key_id].parts
        for start in sorted(parts):
            missing -= parts[start]
            if missing <= 0:
                return max(start + self._part_s(key_id) + seconds - now, 1.0)
        return 1.0  # what is missing is only reserved: running requests give it back
