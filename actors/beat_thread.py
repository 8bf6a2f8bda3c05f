"""The heartbeat of a rank: a thread with a socket of its own.

An engine step or a load may take longer than a beat, so the main thread cannot beat for itself;
the step counter in the beat shows whether that thread still works.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from typing import Final

from actors.actor import ActorContext
from actors.transport.codec import encode_message
from actors.transport.sockets import ControlLink, Transport
from cortexd.errors import MailboxFull
from cortexd.messages.control import Beat
from cortexd.messages.envelope import ROOT, Header

# Told apart from the actor's own control link by the end of its identity.
BEAT_SUFFIX: Final = ".beat"


def start_beating(context: ActorContext, take_beat: Callable[[], Beat]) -> None:
    """Send `take_beat()` to the root every heartbeat period, until the process ends."""
    thread = threading.Thread(
        target=_beat_forever, args=(context, take_beat), name="beat", daemon=True
    )
    thread.start()


def _beat_forever(context: ActorContext, take_beat: Callable[[], Beat]) -> None:
    control = ControlLink(Transport(), context.runtime_dir, f"{context.address}{BEAT_SUFFIX}")
    period_s = context.settings.supervision.heartbeat_ms / 1000
    beat_id = 0
    while True:
        beat_id += 1
        with contextlib.suppress(MailboxFull):  # the root is busy: the next beat will do
            control.send(encode_message(Header(beat_id, 0, context.address, ROOT), take_beat()))
        time.sleep(period_s)
