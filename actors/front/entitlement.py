"""What a request's key lets it use: held before its dispatch, settled when its record closes."""

from __future__ import annotations

from actors.front.body import aside
from actors.front.record import RequestRecord
from actors.front.services import Services
from cortexd.token_estimate import estimate_request


async def admit(services: Services, record: RequestRecord, body: bytes) -> None:
    """Hold the least that a request will need, so that a key that is used up starts no load.

    Raises: InsufficientQuota, RateLimitExceeded, ServiceUnavailable.
    """
    if not record.principal.is_metered:
        return
    record.estimate = await aside(body, estimate_request)
    record.budget_id = services.new_lease_id()
    await hold(services, record, record.estimate.least)


async def hold(services: Services, record: RequestRecord, tokens: int) -> None:
    """Hold what a request may use at most, now that it is known. Raises: as `admit`."""
    if record.budget_id and tokens > record.held_tokens:
        await services.spending.reserve(
            record.budget_id, record.principal.key_id, tokens, record.spent
        )
        record.held_tokens = tokens
