"""The watch over a front's event loop."""

from __future__ import annotations

import asyncio
import time

from actors.front.loop_lag import LoopLag

STALL_S = 0.1


def test_stall_is_told_and_idle_loop_is_left_alone() -> None:
    """A timer that a stall has met is as late; with nothing to watch it ends, and begins anew."""
    told: list[list[float]] = []
    is_busy = True

    async def run() -> None:
        nonlocal is_busy
        has_told = asyncio.Event()

        def tell(lags: list[float]) -> None:
            told.append(lags)
            has_told.set()

        lag = LoopLag(lambda: is_busy, tell)
        for _ in range(2):
            is_busy = True
            lag.start()
            lag.start()  # as each further request does
            time.sleep(STALL_S)  # noqa: ASYNC251 - this is the stall
            is_busy = False
            await has_told.wait()
            has_told.clear()
            assert not lag.is_running

    asyncio.run(run())
    # One timer each: it was due within the stall, with most of that to come.
    assert [len(lags) for lags in told] == [1, 1]
    assert all(lags[0] >= STALL_S / 2 for lags in told)
