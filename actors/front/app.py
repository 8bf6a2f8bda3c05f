"""What a listener answers: its routes, request ids in and out, errors in the client's envelope."""

from __future__ import annotations

import os
import re

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from actors.front import health, models, neuron_api, sleeping
from actors.front.auth import HEARS_GATEWAYS, KeyRing, with_gateway_key, with_key
from actors.front.chat import ChatDialect
from actors.front.completions import CompletionDialect
from actors.front.count_tokens import count_tokens
from actors.front.cross_origin import ORIGIN_FIELDS, CrossOrigin
from actors.front.error_response import (
    anthropic_error_response,
    error_response,
    from_http_exception,
    set_request_id,
    speaks_anthropic,
)
from actors.front.inference import InferenceHandler
from actors.front.messages import MessagesDialect
from actors.front.responses import ResponsesDialect
from actors.front.services import FORWARDS, REQUEST_ID, SERVICES, Services
from actors.front.tokenize import detokenize, tokenize
from cortexd.errors import CortexError, Internal
from cortexd.log import event

_REQUEST_ID = re.compile(r"[A-Za-z0-9._:\-]{1,128}")
_ID_BYTES = 16
# Recorded like inference, but with no engine behind them.
_TEXT_ONLY: dict[str, Handler] = {
    "/v1/messages/count_tokens": count_tokens,
    "/tokenize": tokenize,
    "/detokenize": detokenize,
}
_MAX_LOGGED_PATH = 200


class Listener:
    """The routes of one listener: "api" or "neuron"."""

    def __init__(self, services: Services, name: str) -> None:
        self._services = services
        self._is_neuron = name == "neuron"
        self._forwards = name == "api" and services.has_neurons
        # Other hosts use the neuron's listener, pages do not.
        self._cross_origin = CrossOrigin(
            () if self._is_neuron else services.settings.gateway.allowed_origins or ()
        )
        # Bodies are read by `read_body`, which has its own limit; the library's must not be lower.
        self.app = web.Application(
            middlewares=[self._middleware()],
            client_max_size=services.settings.gateway.max_body_mib * 2**20,
        )
        self._direct: dict[str, Handler] = {
            "/v1/chat/completions": InferenceHandler(ChatDialect()).handle,
            "/v1/completions": InferenceHandler(CompletionDialect()).handle,
            "/v1/messages": InferenceHandler(MessagesDialect()).handle,
            "/v1/responses": InferenceHandler(ResponsesDialect()).handle,
        }
        recorded = self._direct | _TEXT_ONLY
        for path, handler in recorded.items():
            self.app.router.add_post(path, handler)
        self._recorded = frozenset(recorded)
        _add_routes(self.app, services.keys, is_neuron=self._is_neuron)

    def shorten(self, server: web.Server) -> None:
        """Let requests for inference past the application: its routing costs as much as ours."""
        through_app = server.request_handler
        answered, direct = self._answered, self._direct

        async def handle(request: web.BaseRequest) -> web.StreamResponse:
            handler = direct.get(request.path) if request.method == "POST" else None
            if handler is None or "Expect" in request.headers:
                return await through_app(request)
            assert isinstance(request, web.Request), "as the application makes it"
            return await answered(request, handler)

        server.request_handler = handle

    def _middleware(self) -> Middleware:
        @web.middleware
        async def answered(request: web.Request, handler: Handler) -> web.StreamResponse:
            return await self._answered(request, handler)

        return answered

    async def _answered(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        services = self._services
        request[SERVICES] = services
        request[FORWARDS] = self._forwards
        request[HEARS_GATEWAYS] = self._is_neuron
        offered = request.headers.get("x-request-id", "")
        is_usable = offered and _REQUEST_ID.fullmatch(offered)
        request[REQUEST_ID] = offered if is_usable else os.urandom(_ID_BYTES).hex()
        request[ORIGIN_FIELDS] = self._cross_origin.fields(request)
        try:
            response = self._cross_origin.preflight(request) or await handler(request)
        except CortexError as error:
            response = self._refused(request, error)
        except web.HTTPException as exception:
            response = self._refused(request, from_http_exception(exception, request))
        except ConnectionError:
            raise  # the client is gone; there is nobody to answer
        except Exception as error:
            _log_failure(services, request, error)
            response = _answer_error(request, Internal("the server failed; see its log"))
        if not response.prepared:
            set_request_id(response, request[REQUEST_ID])
            response.headers.update(request[ORIGIN_FIELDS])
            if services.is_draining:
                response.force_close()
        return response

    def _refused(self, request: web.Request, error: CortexError) -> web.Response:
        """Return an error's answer, and write the line that inference writes for itself."""
        response = _answer_error(request, error)
        if request.method != "POST" or request.path not in self._recorded:
            event(
                self._services.log,
                "http.refused",
                id=request[REQUEST_ID],
                client=request.remote or "",
                method=request.method,
                path=request.path[:_MAX_LOGGED_PATH],
                status=response.status,
                error=error.code,
            )
        return response


def _add_routes(app: web.Application, keys: KeyRing, *, is_neuron: bool) -> None:
    """Add what is not inference. What tells nothing of models or hosts asks for no key."""
    get, post = app.router.add_get, app.router.add_post
    get("/v1/models", with_key(models.list_models, keys))
    get("/v1/models/{model_id:.+}", with_key(models.get_model, keys))
    get("/livez", health.livez)
    get("/readyz", health.readyz)
    get("/version", health.version)
    if is_neuron:
        get("/health", with_gateway_key(neuron_api.health, keys))
        get("/discovery", with_gateway_key(neuron_api.discovery, keys))
        get("/models", with_gateway_key(neuron_api.list_models, keys))
        post("/models/load", with_gateway_key(neuron_api.load, keys))
        post("/models/unload", with_gateway_key(neuron_api.unload, keys))
        post("/models/sleep", with_gateway_key(sleeping.sleep, keys))
        post("/models/wake", with_gateway_key(sleeping.wake, keys))
        get("/models/{model_id:.+}/endpoint", with_gateway_key(neuron_api.endpoint, keys))
    else:
        get("/health", health.health)
        get("/", health.health)  # HEAD too: some clients probe it


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
