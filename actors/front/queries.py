"""Short questions to other actors on behalf of an HTTP client: an answer in seconds, or 503."""

from __future__ import annotations

from actors.front.services import Services
from cortexd.errors import ActorDown, DeadlineExceeded
from cortexd.messages import HostReport, ListModels, ModelList, QueryHost
from cortexd.messages.control import Message

# They answer at once from memory, on a busy machine later; this long a hung one lives.
_DEADLINE_S = 5.0


async def known_models(services: Services) -> ModelList:
    """Return what the router knows. Raises: ActorDown (503)."""
    answer = await _ask(services, "router", ListModels())
    assert isinstance(answer, ModelList), "the router answers ListModels with ModelList"
    return answer


async def host_report(services: Services) -> HostReport:
    """Return the poller's last look at this host. Raises: ActorDown (503)."""
    answer = await _ask(services, "poller", QueryHost())
    assert isinstance(answer, HostReport), "the poller answers QueryHost with HostReport"
    return answer


async def _ask(services: Services, name: str, message: Message) -> Message:
    try:
        return await services.bus.ask(name, message, deadline_s=_DEADLINE_S)
    except DeadlineExceeded:
        raise ActorDown(
            f"{name} did not answer within {_DEADLINE_S:g} s", retry_after_s=2
        ) from None
