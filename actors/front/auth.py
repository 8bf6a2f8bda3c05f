"""Who sends a request: the key it shows, looked up in those that the reloader told this front.

On the neuron listener a gateway's key may say on whose behalf a request comes; the same headers
from anybody else are ignored, and never handed on.
"""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from aiohttp import web
from aiohttp.typedefs import Handler

from cortexd.errors import (
    ConfigError,
    InvalidApiKey,
    InvalidRequest,
    ModelNotAllowed,
    PermissionDenied,
    ServiceUnavailable,
)
from cortexd.keys import Key, check_key_id, key_digest
from cortexd.settings import Entitlements

ACCOUNT_HEADER: Final = "x-cortexd-account"
KEY_ID_HEADER: Final = "x-cortexd-key-id"
IDENTITY_HEADERS: Final = frozenset({ACCOUNT_HEADER, KEY_ID_HEADER})
CREDENTIAL_HEADERS: Final = frozenset({"authorization", "x-api-key"})
# The reloader reads the file as this front starts, on a busy machine seconds later; longer than
# this is an outage.
_KEYS_GRACE_S: Final = 10.0
_RETRY_AFTER_S: Final = 5.0


@dataclass(slots=True, frozen=True)
class Principal:
    """Who asks. `key` is None for anonymous requests and for those a gateway speaks for."""

    account: str = ""
    key_id: str = ""
    key: Key | None = None

    @property
    def is_metered(self) -> bool:
        """Tell whether what is used is charged here; a gateway charges its own clients."""
        return self.key is not None and not self.key.gateway

    def check_model(self, model: str) -> None:
        """Raise ModelNotAllowed unless this model is open to it."""
        if not self.may_use(model):
            raise ModelNotAllowed(
                f'the key "{self.key_id}" does not open model "{model}"', param="model"
            )

    @property
    def opens_all_models(self) -> bool:
        """Tell whether there is no model that is closed to it."""
        return self.key is None or self.key.models is None

    def may_use(self, model: str) -> bool:
        """Tell whether a model, by the name that clients use, is open to it."""
        return self.key is None or self.key.may_use(model)


ANONYMOUS: Final = Principal()
PRINCIPAL: web.RequestKey[Principal] = web.RequestKey("principal", Principal)
HEARS_GATEWAYS: web.RequestKey[bool] = web.RequestKey("hears_gateways", bool)


class KeyRing:
    """The keys in force."""

    def __init__(self, settings: Entitlements) -> None:
        self.is_used = settings.keys_file is not None
        self.is_required = self.is_used and settings.require_auth
        self._by_digest: dict[str, Key] = {}
        self._known = asyncio.Event()

    def set_keys(self, keys: list[Key]) -> None:
        """Take over the keys in force."""
        self._by_digest = {key.key_sha256: key for key in keys}
        self._known.set()

    async def identify(self, request: web.BaseRequest, *, hears_gateways: bool) -> Principal:
        """Return who asks. Raises: InvalidApiKey, ServiceUnavailable, InvalidRequest."""
        if not self.is_used:
            return ANONYMOUS
        await self._wait_for_keys()
        presented = list(_presented(request))
        key = next((key for text in presented if (key := self._find(text)) is not None), None)
        if key is None:
            if self.is_required:
                raise _refusal(has_key=bool(presented))
            return ANONYMOUS
        if key.gateway and hears_gateways:
            return _spoken_for(request, key)
        return Principal(key.account, key.key_id, key)

    async def _wait_for_keys(self) -> None:
        if self._known.is_set():
            return
        try:
            async with asyncio.timeout(_KEYS_GRACE_S):
                await self._known.wait()
        except TimeoutError:
            raise ServiceUnavailable(
                "the API keys could not be read; see the server's log",
                retry_after_s=_RETRY_AFTER_S,
            ) from None

    def _find(self, text: str) -> Key | None:
        digest = key_digest(text)
        key = self._by_digest.get(digest)
        return key if key is not None and hmac.compare_digest(key.key_sha256, digest) else None


async def authenticate(request: web.Request, keys: KeyRing) -> Principal:
    """Note in the request who sends it, and return it. Raises: as `KeyRing.identify`."""
    principal = await keys.identify(request, hears_gateways=request[HEARS_GATEWAYS])
    request[PRINCIPAL] = principal
    return principal


def with_key(handler: Handler, keys: KeyRing) -> Handler:
    """Return a handler that asks for a key first, where keys are required."""

    async def handle(request: web.Request) -> web.StreamResponse:
        await authenticate(request, keys)
        return await handler(request)

    return handle


def with_gateway_key(handler: Handler, keys: KeyRing) -> Handler:
    """Return a handler for gateways and operators alone, where keys are required."""

    async def handle(request: web.Request) -> web.StreamResponse:
        principal = await authenticate(request, keys)
        if keys.is_required and not _is_gateway(principal):
            raise PermissionDenied(
                f'the key "{principal.key_id}" does not open {request.path}; allowed: a key with '
                "gateway = true"
            )
        return await handler(request)

    return handle


def _is_gateway(principal: Principal) -> bool:
    return principal.key is None or principal.key.gateway


def _spoken_for(request: web.BaseRequest, gateway: Key) -> Principal:
    """Return whom a gateway speaks for; itself when it names nobody."""
    account = request.headers.get(ACCOUNT_HEADER, "")
    if not account:
        return Principal("", gateway.key_id, None)
    key_id = request.headers.get(KEY_ID_HEADER, account)
    try:
        check_key_id(account)
        check_key_id(key_id)
    except ConfigError as error:
        raise InvalidRequest(f"{ACCOUNT_HEADER}: {error}") from None
    return Principal(account, key_id, None)


def _presented(request: web.BaseRequest) -> Iterator[str]:
    scheme, _, text = request.headers.get("Authorization", "").partition(" ")
    if scheme.lower() == "bearer" and text.strip():
        yield text.strip()
    text = request.headers.get("x-api-key", "").strip()
    if text:
        yield text


def _refusal(*, has_key: bool) -> InvalidApiKey:
    if has_key:
        return InvalidApiKey("the API key is not known here; ask the operator for one")
    return InvalidApiKey(
        "no API key was given; send it as Authorization: Bearer KEY or as x-api-key"
    )
