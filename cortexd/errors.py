"""Every error that crosses a process, or reaches a user, as one flat set of classes.

A leaf module: it imports nothing of ours. Each class fixes the stable `code`, the OpenAI error
`type`, the HTTP status and whether a retry can help; the message names the subject, the bad value,
what is allowed and what to do. Actors send errors as `ErrorInfo`; `ErrorInfo.to_exception` restores
the class from its code.
"""

from __future__ import annotations

from typing import ClassVar

import msgspec

Detail = str | int | float | bool | None | list[str]


class ErrorInfo(msgspec.Struct, frozen=True, array_like=True, tag="ErrorInfo"):
    """An error on the wire: what `CortexError` holds, without the class."""

    code: str
    message: str
    param: str | None = None
    retry_after_s: float | None = None
    details: dict[str, Detail] = {}
    model: str | None = None

    def to_exception(self) -> CortexError:
        """Return the exception of the class that owns this code (`Internal` when unknown)."""
        error_class = ERRORS_BY_CODE.get(self.code, Internal)
        error = error_class(
            self.message, param=self.param, retry_after_s=self.retry_after_s, **self.details
        )
        error.model = self.model
        return error


class CortexError(Exception):
    """Base of all errors a user, a client or another actor may see."""

    code: ClassVar[str] = "internal_error"
    type: ClassVar[str] = "api_error"
    http_status: ClassVar[int] = 500
    retriable: ClassVar[bool] = False

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        retry_after_s: float | None = None,
        **details: Detail,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s
        self.details = details
        # Which of the models that are known here a request was for: told to logs and metrics only.
        self.model: str | None = None

    def to_info(self) -> ErrorInfo:
        """Return the wire form."""
        return ErrorInfo(
            self.code, self.message, self.param, self.retry_after_s, self.details, self.model
        )


class Internal(CortexError):
    """A fault of ours; the log holds the traceback."""


class ConfigError(CortexError):
    """The configuration cannot be used; nothing was started."""

    code = "config_error"
    type = "invalid_request_error"
    http_status = 400


class InvalidRequest(CortexError):
    """The caller sent something that no retry will make right."""

    code = "invalid_request"
    type = "invalid_request_error"
    http_status = 400


class InvalidJson(InvalidRequest):
    """The body is not JSON, or not a JSON object."""

    code = "invalid_json"


class MissingParameter(InvalidRequest):
    """A required field is absent."""

    code = "missing_required_parameter"


class InvalidType(InvalidRequest):
    """A field has the wrong JSON type."""

    code = "invalid_type"


class InvalidValue(InvalidRequest):
    """A field has the right type and a value outside its range."""

    code = "invalid_value"


class UnsupportedParameter(InvalidRequest):
    """A field or value that is known to the API and not supported here."""

    code = "unsupported_parameter"


class TemplateRenderFailed(InvalidRequest):
    """The model's chat template leaves out what the request needs it to say, such as tools."""

    code = "template_render_failed"
    http_status = 422


class ContextLengthExceeded(InvalidRequest):
    """Prompt (plus requested output) does not fit; details hold `max` and `prompt_len`."""

    code = "context_length_exceeded"


class RequestTooLarge(InvalidRequest):
    """The HTTP body, or a message, is over its limit."""

    code = "request_too_large"
    http_status = 413


class MethodNotAllowed(InvalidRequest):
    """The path exists, this HTTP method on it does not."""

    code = "method_not_allowed"
    http_status = 405


class RequestTimeout(InvalidRequest):
    """The client did not finish sending its request in time."""

    code = "request_timeout"
    http_status = 408


class WrongModality(InvalidRequest):
    """The model is not made for this endpoint, such as an embedding model for a chat."""

    code = "wrong_modality"
    http_status = 422


class NotFound(CortexError):
    """No such route, actor or operation."""

    code = "not_found"
    type = "invalid_request_error"
    http_status = 404


class ModelNotFound(CortexError):
    """No neuron has or can load this model."""

    code = "model_not_found"
    type = "invalid_request_error"
    http_status = 404


class ModelNotFeasible(CortexError):
    """The model is known and no node can ever hold it."""

    code = "model_not_feasible"
    type = "invalid_request_error"
    http_status = 404


class NoHealthyNode(CortexError):
    """A node that could serve this model exists and does not answer."""

    code = "no_healthy_node"
    http_status = 503
    retriable = True


class UpstreamUnavailable(CortexError):
    """A node could not be reached, or ended before its answer began."""

    code = "upstream_unavailable"
    http_status = 502
    retriable = True


class UpstreamInterrupted(CortexError):
    """A node ended in the middle of its answer."""

    code = "upstream_interrupted"
    http_status = 502
    retriable = True


class UpstreamStalled(UpstreamInterrupted):
    """A node fell silent in the middle of its answer."""

    code = "upstream_stalled"
    http_status = 504


class UpstreamProtocol(UpstreamInterrupted):
    """A node sent what is no stream of its dialect."""

    code = "upstream_protocol"


class ModelMismatch(UpstreamUnavailable):
    """A node does not have the model that was seen there; another process may have its address."""

    code = "model_mismatch"


class UpstreamError(CortexError):
    """A node answered with an error that is no error object."""

    code = "upstream_error"
    http_status = 502


class InvalidApiKey(CortexError):
    """No key was given, or one that is not known here."""

    code = "invalid_api_key"
    type = "invalid_request_error"
    http_status = 401


class ModelNotAllowed(CortexError):
    """The key does not open this model."""

    code = "model_not_allowed"
    type = "invalid_request_error"
    http_status = 403


class PermissionDenied(CortexError):
    """The key does not open this path."""

    code = "permission_denied"
    type = "invalid_request_error"
    http_status = 403


class InsufficientQuota(CortexError):
    """The key's budget is used up, and waiting does not help; details hold the figures."""

    code = "insufficient_quota"
    type = "insufficient_quota"
    http_status = 429


class RateLimitExceeded(CortexError):
    """The key's budget of the current window is used up; details hold the figures."""

    code = "rate_limit_exceeded"
    type = "rate_limit_error"
    http_status = 429
    retriable = True


class ServiceUnavailable(CortexError):
    """What checks keys or budgets does not answer: nothing is known of the key itself."""

    code = "service_unavailable"
    http_status = 503
    retriable = True


class CudaUnavailable(CortexError):
    """This host has GPUs that cannot be used; on its CPU models would be far too slow."""

    code = "cuda_unavailable"
    http_status = 503
    retriable = True


class ModelAlreadyLoaded(CortexError):
    """A load was asked for a model that is loaded or loading with other options."""

    code = "model_already_loaded"
    type = "invalid_request_error"
    http_status = 409


class UnsupportedArchitecture(CortexError):
    """The checkpoint's architecture or a tensor type has no implementation here."""

    code = "unsupported_architecture"
    type = "invalid_request_error"
    http_status = 422


class BadModelFile(CortexError):
    """A model file is truncated, hostile or inconsistent; the message names the file."""

    code = "bad_model_file"
    type = "invalid_request_error"
    http_status = 422


class ModelSourceError(CortexError):
    """A model could not be fetched (network, registry, missing revision, checksum)."""

    code = "model_source_error"
    http_status = 502


class RegistryUnreachable(ModelSourceError):
    """A model is not on disk and its registry did not answer: later it may."""

    code = "registry_unreachable"
    http_status = 503
    retriable = True


class InsufficientDisk(CortexError):
    """Not enough disk for a download; the message names the path and both sizes."""

    code = "insufficient_disk"
    http_status = 507


class InsufficientMemory(CortexError):
    """The model does not fit; the message says needed and available bytes."""

    code = "insufficient_memory"
    http_status = 507


class ModelLoading(CortexError):
    """The model is on its way; details hold progress."""

    code = "model_loading"
    http_status = 503
    retriable = True


class ModelLoadFailed(CortexError):
    """A load ended in an error; the message holds the cause."""

    code = "model_load_failed"
    http_status = 503
    retriable = True


class EngineRestarting(CortexError):
    """The engine group of this model died and is coming back."""

    code = "engine_restarting"
    http_status = 503
    retriable = True


class NonFiniteLogits(CortexError):
    """This row's logits held NaN or infinity; only this request failed."""

    code = "non_finite_logits"


class Overloaded(CortexError):
    """A queue is at its bound."""

    code = "queue_full"
    type = "rate_limit_error"
    http_status = 429
    retriable = True


class QueueTimeout(CortexError):
    """A request waited for a free seat as long as it may."""

    code = "queue_timeout"
    http_status = 503
    retriable = True


class DeadlineExceeded(CortexError):
    """No answer came before the deadline."""

    code = "deadline_exceeded"
    http_status = 504
    retriable = True


class ActorDown(CortexError):
    """The addressed actor (or that incarnation of it) is gone."""

    code = "actor_down"
    http_status = 503
    retriable = True


class MailboxFull(CortexError):
    """The addressed actor does not keep up."""

    code = "mailbox_full"
    http_status = 503
    retriable = True


class NodeDraining(CortexError):
    """An operator lets this host finish what runs; it takes nothing new."""

    code = "node_draining"
    http_status = 503
    retriable = True


class ShuttingDown(CortexError):
    """The daemon is draining."""

    code = "server_shutting_down"
    http_status = 503
    retriable = True


class AlreadyRunning(CortexError):
    """Another daemon holds the runtime directory; details hold its `pid`."""

    code = "already_running"
    type = "invalid_request_error"
    http_status = 409


class NotRunning(CortexError):
    """No daemon listens on the admin socket."""

    code = "not_running"
    http_status = 503


class Cancelled(CortexError):
    """The client went away, or an operator cancelled."""

    code = "request_cancelled"
    http_status = 499


class SlowClient(Cancelled):
    """The client did not read its stream, and was dropped."""

    code = "slow_client"


def _all_subclasses(root: type[CortexError]) -> list[type[CortexError]]:
    children = root.__subclasses__()
    return children + [leaf for child in children for leaf in _all_subclasses(child)]


ERRORS_BY_CODE: dict[str, type[CortexError]] = {
    error_class.code: error_class for error_class in _all_subclasses(CortexError)
}
