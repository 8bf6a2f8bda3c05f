"""What a waiting stream is told of the load it waits for, as one comment line."""

from __future__ import annotations

from typing import Final

from actors.front.services import Services
from cortexd.errors import CortexError
from cortexd.messages import Loading, QueryLoading

# Shorter than any keep-alive period: a late answer must not make the silence longer.
_DEADLINE_S: Final = 0.5
_MAX_STAGE_CHARACTERS: Final = 120


async def load_note(services: Services, model: str) -> bytes:
    """Return the comment line, b"" when nothing is known to load."""
    try:
        loading = await services.bus.ask("router", QueryLoading(model), deadline_s=_DEADLINE_S)
    except CortexError:
        return b""
    assert isinstance(loading, Loading), "the router answers QueryLoading with Loading"
    if loading.stage is None:
        return b""
    # A node's words: nothing of them may end the line or open an event.
    stage = "".join(filter(str.isprintable, loading.stage))[:_MAX_STAGE_CHARACTERS]
    text = f": loading stage={stage}"
    if loading.progress:
        text += f" {100 * loading.progress:.0f}%"
    if loading.eta_s is not None:
        text += f" eta={loading.eta_s:.0f}s"
    return text.encode() + b"\n"
