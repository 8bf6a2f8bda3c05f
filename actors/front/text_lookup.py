"""Finds the text side of a model for what needs no engine: counting and tokenising.

A model whose files are known is not loaded for it; one that was never fetched is routed to, as a
request for an answer would be, and its lease ends at once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from actors.front.queries import known_models
from actors.front.record import RequestRecord
from actors.front.routing import route
from actors.front.services import Services
from cortexd.models import ModelFiles, ModelLimits

if TYPE_CHECKING:
    from engine.text.text_model import TextModel


async def text_model_of(
    services: Services, record: RequestRecord, model: str
) -> tuple[TextModel, ModelLimits | None]:
    """Return a local model's text side, and its limits if an engine has derived them.

    `record` learns the model. Raises: ModelNotAllowed, and what a request for an answer would.
    """
    record.principal.check_model(model)
    files, limits = await _files(services, record, model)
    return await services.text_models.get(files), limits


async def _files(
    services: Services, record: RequestRecord, model: str
) -> tuple[ModelFiles, ModelLimits | None]:
    known = await known_models(services)
    model_id = known.aliases.get(model, model)
    for status in known.models:
        if status.model_id == model_id:
            record.model = model_id
        if status.model_id == model_id and status.files is not None:
            return status.files, status.limits
    lease_id = services.new_lease_id()
    try:
        wait_s = services.settings.gateway.unary_load_wait_s
        routed = await route(
            services.bus, model, lease_id, wait_s=wait_s, account=record.principal.account
        )
        return routed.files, routed.limits
    finally:
        services.leases.end(lease_id)
