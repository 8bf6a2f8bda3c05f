"""This front's side of the budgets: reserves for its requests, and reports what they use.

Every second, and whenever a request ends, one message tells the budgets actor what all requests
with a reservation have used. Ends are told until they are acknowledged, so neither a lost message
nor a restart of the owner loses what was spent or leaves anything reserved.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import Final

from actors.front.bus import Bus
from cortexd.errors import (
    ActorDown,
    CortexError,
    DeadlineExceeded,
    MailboxFull,
    ServiceUnavailable,
)
from cortexd.messages import ReportUsage, Reserve, UsageEntry

Counts = Callable[[], tuple[int, int]]

_OWNER: Final = "budgets"
_PERIOD_S: Final = 1.0
_ASK_DEADLINE_S: Final = 2.0
# A killed owner is back within tens of milliseconds, on a busy machine within seconds; longer than
# this is an outage.
_GRACE_S: Final = 10.0
_PAUSE_S: Final = 0.02
_RETRY_AFTER_S: Final = 5.0
# Ends that an owner in outage has not heard of; beyond it the oldest are given up.
_MAX_ENDED: Final = 65_536


class Spending:
    """All reservations of one front."""

    def __init__(self, bus: Bus) -> None:
        self.num_lost = 0
        self._bus = bus
        self._open: dict[str, Counts] = {}
        self._ended: list[UsageEntry] = []
        self._wake = asyncio.Event()
        self._told = asyncio.Event()
        self._reporting: asyncio.Task[None] | None = None

    async def reserve(self, request_id: str, key_id: str, tokens: int, counts: Counts) -> None:
        """Reserve tokens, or change the amount of the same request's reservation.

        `counts` tells at any time what prompt and answer have used. Whatever comes of it, `end`
        must follow. Raises: InsufficientQuota, RateLimitExceeded, InvalidApiKey (revoked),
        ServiceUnavailable.
        """
        self._open[request_id] = counts
        if self._reporting is None:
            self._reporting = asyncio.create_task(self._report_forever())
        loop = asyncio.get_running_loop()
        give_up = loop.time() + _GRACE_S
        while True:
            try:
                await self._bus.ask(
                    _OWNER, Reserve(request_id, key_id, tokens), deadline_s=_ASK_DEADLINE_S
                )
                return
            except (ActorDown, MailboxFull, DeadlineExceeded, ServiceUnavailable) as error:
                if loop.time() >= give_up:
                    raise ServiceUnavailable(
                        f"the owner of the budgets does not answer: {error.message}",
                        retry_after_s=_RETRY_AFTER_S,
                    ) from None
                await asyncio.sleep(_PAUSE_S)

    def end(self, request_id: str, prompt_tokens: int, completion_tokens: int) -> None:
        """Settle a request to what it has used. Nothing here waits."""
        if self._open.pop(request_id, None) is None:
            return
        self._ended.append(UsageEntry(request_id, prompt_tokens, completion_tokens, is_final=True))
        if len(self._ended) > _MAX_ENDED:
            del self._ended[0]
            self.num_lost += 1
        self._wake.set()

    async def close(self, deadline_s: float) -> None:
        """Tell the last ends, as far as the time allows."""
        if self._reporting is None:
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(deadline_s):
                while self._ended:
                    self._told.clear()
                    await self._told.wait()
        self._reporting.cancel()

    async def _report_forever(self) -> None:
        loop = asyncio.get_running_loop()
        told_all_at = 0.0
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_PERIOD_S):
                    await self._wake.wait()
            self._wake.clear()
            ended = self._ended.copy()
            entries = ended.copy()
            if loop.time() - told_all_at >= _PERIOD_S:
                told_all_at = loop.time()
                entries += [UsageEntry(name, *counts()) for name, counts in self._open.items()]
            if not entries:
                continue
            try:
                await self._bus.ask(_OWNER, ReportUsage(entries), deadline_s=_ASK_DEADLINE_S)
            except CortexError:
                self._wake.set()  # not heard: told again
                await asyncio.sleep(_PAUSE_S)
            else:
                told = set(ended)
                self._ended = [entry for entry in self._ended if entry not in told]
                self._told.set()
