"""Reads a request body within its size limit and its time limit, and works on large ones aside."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeVar

from aiohttp import web

from cortexd.errors import InvalidRequest, RequestTimeout, RequestTooLarge

# A client that sends nothing for this long is gone, whatever its link.
_IDLE_TIMEOUT_S = 30.0
_TOTAL_TIMEOUT_S = 300.0
# After its first seconds a body must have come at this rate, or it is only there to hold a place.
_GRACE_S = 30.0
_MIN_BYTES_PER_S = 1024
# From here on, what is done with a body in Python may take so long that other streams would wait
# for it, and with the largest one the supervisor would take the process for hung.
_LARGE_BYTES = 256 * 1024

_Result = TypeVar("_Result")


def is_large(body: bytes) -> bool:
    """Tell whether a body is to be worked on in a thread."""
    return len(body) > _LARGE_BYTES


async def aside(body: bytes, work: Callable[[bytes], _Result]) -> _Result:
    """Return what `work` makes of a body, without holding up the loop. Raises: what it raises."""
    return await asyncio.to_thread(work, body) if is_large(body) else work(body)


async def read_body(request: web.Request, max_bytes: int) -> bytes:
    """Return the whole (decompressed) body.

    Raises: RequestTooLarge (declared, or counted while reading), RequestTimeout, InvalidRequest.
    """
    declared = request.content_length
    if declared is not None and declared > max_bytes:
        raise _too_large(max_bytes)
    content = request.content
    if content.is_eof() and content.exception() is None:
        whole = content.read_nowait()  # it came along with the head, as most do
        if len(whole) > max_bytes:
            raise _too_large(max_bytes)
        return whole
    chunks = bytearray()
    clock = asyncio.get_running_loop().time
    started = clock()
    try:
        async with asyncio.timeout_at(started + _GRACE_S) as limit:
            while True:
                async with asyncio.timeout(_IDLE_TIMEOUT_S):
                    chunk = await content.readany()
                if not chunk:
                    return bytes(chunks)
                chunks += chunk
                if len(chunks) > max_bytes:
                    raise _too_large(max_bytes)
                earned_s = _GRACE_S + len(chunks) / _MIN_BYTES_PER_S
                limit.reschedule(started + min(earned_s, _TOTAL_TIMEOUT_S))
    except TimeoutError:
        raise RequestTimeout(
            f"the request body was not complete after {clock() - started:.0f} s "
            f"({len(chunks)} bytes came)"
        ) from None
    except web.RequestPayloadError as error:
        raise InvalidRequest(f"the request body cannot be read: {error}") from None


def _too_large(max_bytes: int) -> RequestTooLarge:
    return RequestTooLarge(
        f"the request body is over {max_bytes} bytes (gateway.max_body_mib)", max_bytes=max_bytes
    )
