"""Routes and the one middleware: request ids in and out, every error in the client's envelope."""

from __future__ import annotations

import re
import uuid

from aiohttp import web
from aiohttp.typedefs import Handler

from actors.front import health, models, neuron_api
from actors.front.chat import ChatDialect
from actors.front.completions import CompletionDialect
from actors.front.count_tokens import count_tokens
from actors.front.error_response import (
    anthropic_error_response,
    error_response,
    from_http_exception,
    set_request_id,
    speaks_anthropic,
)
from actors.front.inference import InferenceHandler
from actors.front.messages import MessagesDialect
from actors.front.services import FORWARDS, REQUEST_ID, SERVICES, Services
from cortexd.errors import CortexError, Internal
from cortexd.log import event

_REQUEST_ID = re.compile(r"[A-Za-z0-9._:\-]{1,128}")


def build_app(services: Services, listener: str) -> web.Application:
    """Return the application of one listener: "api" or "neuron"."""
    # Bodies are read by `read_body`, which has its own limit; the library's must not be lower.
    app = web.Application(
        middlewares=[_envelope_middleware],
        client_max_size=services.settings.gateway.max_body_mib * 2**20,
    )
    app[SERVICES] = services
    app[FORWARDS] = listener == "api" and services.has_neurons
    app.router.add_post("/v1/chat/completions", InferenceHandler(ChatDialect()).handle)
    app.router.add_post("/v1/completions", InferenceHandler(CompletionDialect()).handle)
    app.router.add_post("/v1/messages", InferenceHandler(MessagesDialect()).handle)
    app.router.add_post("/v1/messages/count_tokens", count_tokens)
    app.router.add_get("/v1/models", models.list_models)
    app.router.add_get("/v1/models/{model_id:.+}", models.get_model)
    app.router.add_get("/livez", health.livez)
    app.router.add_get("/readyz", health.readyz)
    app.router.add_get("/version", health.version)
    if listener == "neuron":
        app.router.add_get("/health", neuron_api.health)
        app.router.add_get("/discovery", neuron_api.discovery)
        app.router.add_get("/models", neuron_api.list_models)
        app.router.add_post("/models/load", neuron_api.load)
        app.router.add_post("/models/unload", neuron_api.unload)
        app.router.add_get("/models/{model_id:.+}/endpoint", neuron_api.endpoint)
    else:
        app.router.add_get("/health", health.health)
        app.router.add_get("/", health.health)  # HEAD too: some clients probe it
    return app


@web.middleware
async def _envelope_middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
    services = request.app[SERVICES]
    offered = request.headers.get("x-request-id", "")
    request[REQUEST_ID] = offered if _REQUEST_ID.fullmatch(offered) else uuid.uuid4().hex
    try:
        response = await handler(request)
    except CortexError as error:
        response = _answer_error(request, error)
    except web.HTTPException as exception:
        response = _answer_error(request, from_http_exception(exception, request))
    except ConnectionError:
        raise  # the client is gone; there is nobody to answer
    except Exception as error:
        _log_failure(services, request, error)
        response = _answer_error(request, Internal("the server failed; see its log"))
    if not response.prepared:
        set_request_id(response, request[REQUEST_ID])
        if services.is_draining:
            response.force_close()
    return response


def _answer_error(request: web.Request, error: CortexError) -> web.Response:
    if speaks_anthropic(request):
        return anthropic_error_response(error, request[REQUEST_ID])
    return error_response(error)


def _log_failure(services: Services, request: web.Request, error: Exception) -> None:
    event(
        services.log,
        "http.failed",
        40,
        exc_info=True,
        id=request[REQUEST_ID],
        method=request.method,
        path=request.path,
        error=repr(error),
    )
