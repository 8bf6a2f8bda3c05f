"""What an actor does with messages before and after its handlers: admission, asks, dead letters.

Pure: clocks and completions are handed in. `Intake` decides which received frames become an
envelope, `AskTable` ends every ask exactly once, `DeadLetters` counts what could not be delivered.
Used by every actor loop and by the root.
"""

from __future__ import annotations

import heapq
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Literal

import msgspec

from actors.transport.codec import decode_body, decode_header
from cortexd.errors import ActorDown, CortexError, DeadlineExceeded, ErrorInfo, Internal
from cortexd.messages.control import Message
from cortexd.messages.envelope import HEADER_VERSION, Address, Envelope, Header

DeadLetterReason = Literal[
    "no_such_actor", "full", "expired", "stale_incarnation", "stale_epoch", "bad_decode"
]
Outcome = Message | CortexError
_KEPT_HEADERS: Final = 256
# Handlers of one actor that run at once; above it a message is refused, not queued without bound.
MAX_RUNNING_HANDLERS: Final = 1000


class DeadLetters:
    """Counts undeliverable messages by reason and keeps the last headers."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.recent: deque[tuple[DeadLetterReason, Header | None]] = deque(maxlen=_KEPT_HEADERS)

    def __repr__(self) -> str:
        return f"DeadLetters({dict(self.counts)})"

    def add(self, reason: DeadLetterReason, header: Header | None) -> None:
        """Count one dead letter; `header` is None when it could not be read."""
        self.counts[reason] += 1
        self.recent.append((reason, header))

    def snapshot(self) -> dict[str, int]:
        """Return the counts by reason."""
        return dict(self.counts)  # one step, since a beat thread may call it


class Intake:
    """Admits received frames for one incarnation, or counts them as dead letters."""

    def __init__(
        self,
        own: Address,
        epoch: int,
        dead_letters: DeadLetters,
        *,
        now_ns: Callable[[], int],
        is_gone: Callable[[Address], bool],
        on_undecodable: Callable[[Header], None] | None = None,
    ) -> None:
        """`on_undecodable` hears of requests whose sender would else wait in vain."""
        self._own = own
        self._epoch = epoch
        self._dead_letters = dead_letters
        self._now_ns = now_ns
        self._is_gone = is_gone
        self._on_undecodable = on_undecodable

    def admit(self, frames: list[bytes]) -> Envelope | None:
        """Return the message of [header, body] frames; a dead letter is counted, never raised.

        The body of an expired or misaddressed message is not decoded. An answer that cannot be
        decoded becomes an error answer, which ends its ask.
        """
        try:
            header_frame, body_frame = frames
            header = decode_header(header_frame)
        except (ValueError, msgspec.MsgspecError):
            self._dead_letters.add("bad_decode", None)
            return None
        reason = self._refusal(header)
        if reason is not None:
            self._dead_letters.add(reason, header)
            return None
        try:
            body = decode_body(body_frame)
        except (msgspec.MsgspecError, RecursionError) as error:
            self._dead_letters.add("bad_decode", header)
            if header.re == 0:
                if header.deadline_ns and self._on_undecodable is not None:
                    self._on_undecodable(header)
                return None
            body = Internal(f"{header.src} sent what is no answer: {error}").to_info()
        return Envelope(
            header.id, header.re, header.src, header.dst, header.epoch, header.deadline_ns, body
        )

    def _refusal(self, header: Header) -> DeadLetterReason | None:
        if header.version != HEADER_VERSION:
            return "bad_decode"
        if header.dst.name != self._own.name:
            return "no_such_actor"
        if header.dst.incarnation not in (0, self._own.incarnation) or self._is_gone(header.src):
            return "stale_incarnation"
        if self._epoch and header.epoch and header.epoch != self._epoch:
            return "stale_epoch"
        if header.deadline_ns and header.deadline_ns < self._now_ns():
            return "expired"
        return None


@dataclass(slots=True, frozen=True)
class _Ask:
    dst: Address
    deadline_ns: int
    complete: Callable[[Outcome], None]


class AskTable:
    """Open asks by id; each ends once: reply, peer's error, deadline, peer down, or discarded."""

    def __init__(self) -> None:
        self._asks: dict[int, _Ask] = {}
        self._deadlines: list[tuple[int, int]] = []

    def __len__(self) -> int:
        return len(self._asks)

    def __repr__(self) -> str:
        return f"AskTable({len(self._asks)} open)"

    @property
    def next_deadline_ns(self) -> int | None:
        """Return the earliest deadline of an open ask."""
        while self._deadlines and self._deadlines[0][1] not in self._asks:
            heapq.heappop(self._deadlines)
        return self._deadlines[0][0] if self._deadlines else None

    def open(
        self, ask_id: int, dst: Address, deadline_ns: int, complete: Callable[[Outcome], None]
    ) -> None:
        """Enter an ask; `complete` is called at most once."""
        assert ask_id not in self._asks, f"ask id {ask_id} is used twice"
        self._asks[ask_id] = _Ask(dst, deadline_ns, complete)
        heapq.heappush(self._deadlines, (deadline_ns, ask_id))

    def discard(self, ask_id: int) -> None:
        """Forget an ask without completing it: it was not sent, or its caller has gone."""
        self._asks.pop(ask_id, None)

    def resolve(self, envelope: Envelope) -> bool:
        """Complete the ask this answers; return False for an answer that nobody awaits."""
        ask = self._asks.get(envelope.re)
        if ask is None or ask.dst != envelope.src:
            return False
        del self._asks[envelope.re]
        body = envelope.body
        ask.complete(body.to_exception() if isinstance(body, ErrorInfo) else body)
        return True

    def fail_peer(self, gone: Address, reason: str) -> None:
        """End all asks to an incarnation that is gone."""
        for ask_id in [key for key, ask in self._asks.items() if ask.dst == gone]:
            self._asks.pop(ask_id).complete(ActorDown(f'actor "{gone.name}" is gone: {reason}'))

    def expire(self, now_ns: int) -> None:
        """End all asks whose deadline has passed."""
        while (deadline_ns := self.next_deadline_ns) is not None and deadline_ns <= now_ns:
            ask = self._asks.pop(heapq.heappop(self._deadlines)[1])
            ask.complete(
                DeadlineExceeded(f'no answer from actor "{ask.dst.name}" within its deadline')
            )
