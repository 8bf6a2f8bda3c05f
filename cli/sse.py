"""Read a server-sent-event stream of the OpenAI API, with the standard library only."""

from __future__ import annotations

import json
from collections.abc import Generator, Iterable, Iterator
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from typing import Final
from urllib.parse import urlsplit

from cli.exit_code import CommandError
from cortexd.address import check_endpoint
from cortexd.errors import (
    CortexError,
    ErrorInfo,
    Internal,
    InvalidApiKey,
    ModelNotFound,
    NotRunning,
)

CONNECT_TIMEOUT_S: Final = 10.0
# The daemon sends a keep-alive every second; a longer silence means that it is gone.
SILENCE_TIMEOUT_S: Final = 60.0
# Where the user's key stands: on a command line everybody on the machine could read it.
KEY_VARIABLE: Final = "CORTEXD_API_KEY"
_MAX_BODY_BYTES: Final = 16 << 20
Document = dict[str, object]


class ApiClient:
    """A client of one server's OpenAI-compatible API; each call has its own connection."""

    def __init__(self, url: str, api_key: str = "") -> None:
        """Raises: ConfigError when `url` is not http(s)://host[:port]."""
        check_endpoint(url)
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self.url = url.rstrip("/")
        self._parts = urlsplit(self.url)

    def get(self, path: str) -> Document:
        """GET a JSON object. Raises: CommandError, CortexError (NotRunning included)."""
        connection = self._connect()
        try:
            connection.request("GET", self._parts.path + path, headers=self._headers)
            response = connection.getresponse()
            body = response.read(_MAX_BODY_BYTES)
        except (OSError, HTTPException) as error:
            raise self._unreachable(error) from error
        finally:
            connection.close()
        document = _object(body)
        if response.status != 200:
            raise _refusal(document, response.status)
        return document

    def stream(self, path: str, body: Document) -> Generator[Document, None, None]:
        """POST and yield the JSON object of each event; closing the iterator ends the request.

        Raises: CommandError, NotRunning, and what an error status or error event stands for.
        """
        connection = self._connect()
        try:
            connection.request(
                "POST",
                self._parts.path + path,
                json.dumps(body).encode(),
                {
                    "Content-Type": "application/json",
                    "Accept": "text/event-stream",
                    **self._headers,
                },
            )
            response = connection.getresponse()
            if response.status != 200:
                raise _refusal(_object(response.read(_MAX_BODY_BYTES)), response.status)
            yield from events(response)
        except (OSError, HTTPException) as error:
            raise self._unreachable(error) from error
        finally:
            connection.close()

    def _connect(self) -> HTTPConnection:
        kind = HTTPSConnection if self._parts.scheme == "https" else HTTPConnection
        connection = kind(self._parts.hostname or "", self._parts.port, timeout=CONNECT_TIMEOUT_S)
        try:
            connection.connect()
        except OSError as error:
            raise self._unreachable(error) from error
        connection.sock.settimeout(SILENCE_TIMEOUT_S)
        return connection

    def _unreachable(self, error: Exception) -> CommandError | NotRunning:
        if isinstance(error, ConnectionRefusedError):
            return NotRunning(
                f"not running: nothing answers at {self.url}; start it with: cortexd start"
            )
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        return CommandError(f"no answer from {self.url}: {reason or 'the connection broke'}")


def events(lines: Iterable[bytes]) -> Iterator[Document]:
    """Yield the JSON object of each event until `[DONE]`.

    Raises: CortexError for an error event, Internal when the stream ends before `[DONE]`.
    """
    data: list[str] = []
    for raw in lines:
        line = raw.decode(errors="replace").rstrip("\r\n")
        if line.startswith("data:"):
            data.append(line[5:].removeprefix(" "))
            continue
        if line or not data:  # a comment, another field, or nothing to dispatch
            continue
        text = "\n".join(data)
        data = []
        if text == "[DONE]":
            return
        document = _object(text.encode())
        if "error" in document:
            raise error_in(document, 500)
        yield document
    raise Internal("the answer broke off; the daemon may have been stopped (see: cortexd status)")


def error_in(document: Document, status: int) -> CortexError:
    """Return the exception that an OpenAI error object, or a bare status, stands for."""
    error = document.get("error")
    if not isinstance(error, dict):
        return Internal(f"the server answered with HTTP status {status}")
    code, message = error.get("code"), error.get("message")
    text = message if isinstance(message, str) else f"HTTP status {status}"
    if not isinstance(code, str):
        return ModelNotFound(text) if status == 404 else Internal(text)
    return ErrorInfo(code, text).to_exception()


def _refusal(document: Document, status: int) -> CortexError:
    """Return the error of a request, which says how to give the key that is asked for."""
    error = error_in(document, status)
    if isinstance(error, InvalidApiKey):
        return InvalidApiKey(f"{error.message}; this command reads it from ${KEY_VARIABLE}")
    return error


def _object(body: bytes) -> Document:
    try:
        document = json.loads(body)
    except ValueError:
        return {}
    return document if isinstance(document, dict) else {}
