"""The one owner of the API keys' budgets: reserves, settles, and remembers across crashes.

Fronts ask `Reserve` before they dispatch a request and send `ReportUsage` once a second and at its
end. State: `cortexd.ledger`, with every change in a journal (`actors.ledger_file`) before it is
answered. Whoever dies, a request is charged what it had reported: at most the last second's tokens
are lost, and nothing stays reserved. Runs only where a keys file is configured.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Iterable
from typing import Final

import msgspec

from actors.actor import AsyncActor, handles
from actors.ledger_file import LedgerFile, Line, Reserved, Used
from cortexd.errors import ActorDown as ActorDownError
from cortexd.errors import CortexError, InvalidApiKey, MailboxFull, NotFound, ServiceUnavailable
from cortexd.ledger import Ledger, Reservation
from cortexd.log import event
from cortexd.messages import (
    ActorDown,
    ActorUp,
    AdminCommand,
    AdminReply,
    Gauges,
    KeysChanged,
    Measured,
    Ok,
    ReportUsage,
    Reserve,
    Sample,
)
from cortexd.messages.control import Message
from cortexd.messages.envelope import Envelope
from cortexd.metrics import (
    BUDGET_LIMIT,
    BUDGET_REFUSALS,
    BUDGET_RESERVED,
    BUDGET_SPENT,
    SPEND,
    SPEND_COMPLETION,
    SPEND_PROMPT,
)
from cortexd.paths import state_dir

_PERIOD_S: Final = 1.0


class Budgets(AsyncActor):
    """Reserve and settle."""

    async def on_start(self) -> None:
        """Serve once the keys are known: the reloader tells them."""
        self._ledger = Ledger()
        self._file = LedgerFile(state_dir(self.context.settings))
        self._has_keys = False
        # Within one life time never runs back; across lives the wall clock is all there is.
        self._epoch_s = time.time() - time.monotonic()
        self._ticking = asyncio.create_task(self._tick_forever())

    async def on_stop(self) -> None:
        """Bring the journal to the disk."""
        self._ticking.cancel()
        with contextlib.suppress(OSError):
            await asyncio.to_thread(self._file.sync)
        self._file.close()

    @handles(KeysChanged)
    def on_keys_changed(self, message: KeysChanged, envelope: Envelope) -> None:
        """Take over the keys; with the first ones, what was spent before."""
        self._ledger.set_keys(message.keys)
        if not self._has_keys:
            self._file.replay(self._ledger)
            if self._file.num_bad_lines:
                event(self.log, "budgets.bad_lines", 40, lines=self._file.num_bad_lines)
            self._rewrite()
            self._has_keys = True
            self._release_the_dead()
        self._show()

    @handles(Reserve)
    def on_reserve(self, message: Reserve, envelope: Envelope) -> Ok:
        """Grant tokens, or say why not."""
        self._check_keys()
        key = self._ledger.key(message.key_id)
        if key is None:
            raise InvalidApiKey(f'the key "{message.key_id}" was revoked')
        now = self._now()
        holder = f"{envelope.src.name}.{envelope.src.incarnation}"
        reservation = Reservation(message.key_id, holder, message.tokens, now)
        try:
            self._ledger.reserve(message.request_id, reservation, now)
        except CortexError as error:
            labels = {"account": key.account, "key": key.key_id, "code": error.code}
            self._measure([BUDGET_REFUSALS.sample(1, **labels)])
            raise
        self._append([Reserved(now, message.request_id, message.key_id, holder, message.tokens)])
        return Ok()

    @handles(ReportUsage)
    def on_report_usage(self, message: ReportUsage, envelope: Envelope) -> Ok:
        """Note what requests have used, and charge those that ended."""
        self._check_keys()
        now = self._now()
        lines: list[Line] = []
        for entry in message.entries:
            counts = (entry.prompt_tokens, entry.completion_tokens)
            is_news = self._ledger.report(entry.request_id, *counts, now)
            if is_news or entry.is_final:
                lines.append(Used(now, entry.request_id, *counts, entry.is_final))
        self._append(lines)
        self._settle(entry.request_id for entry in message.entries if entry.is_final)
        return Ok()

    @handles(AdminCommand)
    async def on_admin(self, message: AdminCommand, envelope: Envelope) -> AdminReply:
        """Answer `keys`: what each key may spend and has spent, in tokens."""
        if message.op != "keys" or message.args:
            raise NotFound(f'unknown operation "{message.op}"; the budgets know keys, no arguments')
        now = self._now()
        entries = []
        for key in self._ledger.keys:
            spending = self._ledger.spending(key.key_id, now)
            entries.append(
                {
                    "key_id": key.key_id,
                    "account_id": key.account,
                    "hard_cap": key.hard_cap,
                    "spent": spending.spent,
                    "reserved": spending.reserved,
                }
            )
        return AdminReply(msgspec.json.encode({"keys": entries}))

    def on_actor_up(self, up: ActorUp) -> None:
        """Tell a new metrics actor what stands."""
        if up.actor.name == "metrics":
            self._show()

    def on_actor_down(self, down: ActorDown) -> None:
        """Settle what a dead front held, to what it had reported."""
        self._end(self._ledger.held_by(f"{down.name}.{down.incarnation}"))

    def _check_keys(self) -> None:
        if not self._has_keys:
            raise ServiceUnavailable("the keys have not been read yet", retry_after_s=1)

    def _release_the_dead(self) -> None:
        """Settle what fronts held that died while nobody watched."""
        alive = {f"{peer.name}.{peer.incarnation}" for peer in self.peers.all()}
        for holder in {one.holder for one in self._ledger.reservations.values()} - alive:
            self._end(self._ledger.held_by(holder))

    def _end(self, request_ids: list[str]) -> None:
        now = self._now()
        held = self._ledger.reservations
        self._append(
            Used(now, name, held[name].prompt_tokens, held[name].completion_tokens, True)
            for name in request_ids
        )
        self._settle(request_ids)

    def _settle(self, request_ids: Iterable[str]) -> None:
        samples: list[Sample] = []
        for request_id in request_ids:
            charge = self._ledger.settle(request_id, self._now())
            key = None if charge is None else self._ledger.key(charge.key_id)
            if charge is None or key is None:
                continue
            labels = {"account": key.account, "key": key.key_id}
            samples += [
                SPEND.sample(charge.prompt_tokens + charge.completion_tokens, **labels),
                SPEND_PROMPT.sample(charge.prompt_tokens, **labels),
                SPEND_COMPLETION.sample(charge.completion_tokens, **labels),
            ]
        if samples:
            self._measure(samples)

    async def _tick_forever(self) -> None:
        while True:
            await asyncio.sleep(_PERIOD_S)
            try:
                await self._tick()
            except Exception as error:
                event(self.log, "budgets.failed", 40, exc_info=True, error=repr(error))

    async def _tick(self) -> None:
        if not self._has_keys:
            return
        abandoned = self._ledger.abandoned(self._now())
        if abandoned:
            event(self.log, "budgets.abandoned", 30, requests=len(abandoned))
            self._end(abandoned)
        if self._file.is_long:
            self._rewrite()
        self._show()
        await asyncio.to_thread(self._file.sync)

    def _show(self) -> None:
        now = self._now()
        samples: list[Sample] = []
        for key in self._ledger.keys:
            labels = {"account": key.account, "key": key.key_id}
            spending = self._ledger.spending(key.key_id, now)
            if key.hard_cap is not None:
                samples.append(BUDGET_LIMIT.sample(key.hard_cap, **labels))
            samples.append(BUDGET_SPENT.sample(spending.spent, **labels))
            samples.append(BUDGET_RESERVED.sample(spending.reserved, **labels))
        self._tell_metrics(Gauges(samples))

    def _measure(self, samples: list[Sample]) -> None:
        self._tell_metrics(Measured(samples))

    def _tell_metrics(self, message: Message) -> None:
        with contextlib.suppress(ActorDownError, MailboxFull):
            self.tell("metrics", message)

    def _append(self, lines: Iterable[Line]) -> None:
        """Write to the journal; a full disk stops the remembering, not the service."""
        try:
            self._file.append(lines)
        except OSError as error:
            event(self.log, "budgets.not_remembered", 40, error=str(error))

    def _rewrite(self) -> None:
        try:
            self._file.rewrite(self._ledger, self._now())
        except OSError as error:
            event(self.log, "budgets.not_remembered", 40, error=str(error))

    def _now(self) -> float:
        return self._epoch_s + time.monotonic()
