"""What is known of one inference request at its end: one record for metrics, one log line."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from actors.front.auth import ANONYMOUS, Principal
from actors.front.services import Services
from actors.open_requests import OpenRequest
from cortexd.errors import (
    ContextLengthExceeded,
    CortexError,
    InvalidRequest,
    RequestTimeout,
    RequestTooLarge,
)
from cortexd.log import event
from cortexd.messages import RequestFinished
from cortexd.metrics import UNKNOWN_MODEL
from cortexd.token_estimate import TokenEstimate

CLIENT_GONE_STATUS = 499
_WITHOUT_QUOTES = (ContextLengthExceeded, RequestTooLarge, RequestTimeout)


@dataclass(slots=True)
class RequestRecord:
    """Filled in on the way; after `begin`, `close` is called exactly once, whatever the ending."""

    request_id: str
    route: str
    client: str = ""
    principal: Principal = ANONYMOUS
    model: str = UNKNOWN_MODEL
    node: str | None = None  # None: this host
    status: int = 0
    error_code: str | None = None
    error_message: str | None = None
    finish_reason: str | None = None
    is_stream: bool = False
    cold_start: bool = False
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    is_estimated: bool = False  # a node told no counts: those of the answer were made here
    num_resubmits: int = 0
    num_comments: int = 0
    num_keepalive_events: int = 0
    started: float = field(default_factory=time.monotonic)
    submitted: float | None = None
    first_token: float | None = None
    last_token: float | None = None
    # Of the budget, when the key has one.
    budget_id: str = ""
    held_tokens: int = 0
    estimate: TokenEstimate | None = None
    progress: Callable[[], tuple[int, int]] | None = None  # prompt and answer tokens while it runs
    _slot: int | None = None  # among this front's open requests

    def begin(self, services: Services) -> None:
        """Enter the request among the open ones."""
        self._slot = services.reports.begin(self._opened(services))

    def place(self, services: Services, model: str, node: str | None = None) -> None:
        """Note which model it is for, and which other node serves it."""
        self.model, self.node = model, node
        if self._slot is not None:
            services.reports.update(self._slot, self._opened(services))

    def note_submitted(self) -> None:
        """Note when it was first handed to what answers it."""
        if self.submitted is None:
            self.submitted = time.monotonic()

    def fail(self, error: CortexError, *, status: int | None = None) -> None:
        """Note how it failed; `status` when the client saw another one than the error's own."""
        if self.model == UNKNOWN_MODEL and error.model is not None:
            self.model = error.model
        self.error_code = error.code
        # The message of a bad request quotes it, and prompts do not belong in the log.
        is_quoting = isinstance(error, InvalidRequest) and not isinstance(error, _WITHOUT_QUOTES)
        self.error_message = error.param if is_quoting else error.message
        self.status = error.http_status if status is None else status

    def note_ending(self, error: BaseException | None) -> None:
        """Note what left the handler, if that is an error."""
        if isinstance(error, CortexError):
            self.fail(error)
        elif isinstance(error, asyncio.CancelledError | ConnectionError):
            self.status = CLIENT_GONE_STATUS
            self.error_code = "request_cancelled"
            self.error_message = "the client went away"
        elif error is not None:
            self.status = 500
            self.error_code = "internal_error"
            self.error_message = repr(error)

    def spent(self) -> tuple[int, int]:
        """Return the tokens of prompt and answer that have been used so far.

        A node that was cut off has told no counts: its prompt is then estimated.
        """
        prompt, completion = self.prompt_tokens, self.completion_tokens
        if self.progress is not None:
            prompt, completion = self.progress()
        is_whole = self.status == 200 and self.error_code is None
        is_answered = completion > 0 or is_whole or self.status == CLIENT_GONE_STATUS
        was_sent_on = self.node is not None and self.submitted is not None
        if not prompt and self.estimate is not None and was_sent_on and is_answered:
            prompt = self.estimate.prompt
        return prompt, completion

    def close(self, services: Services) -> None:
        """Settle the budget, write the log line and tell metrics."""
        self._estimate_unseen(services.answer_speeds)
        if self.budget_id:
            services.spending.end(self.budget_id, *self.spent())
        duration_s = time.monotonic() - self.started
        wait_s = None if self.submitted is None else self.submitted - self.started
        ttft_s = None if self.first_token is None else self.first_token - self.started
        decode_s = None
        if self.first_token is not None and self.last_token is not None:
            decode_s = self.last_token - self.first_token
        event(
            services.log,
            "request.finished",
            id=self.request_id,
            client=self.client,
            account=self.principal.account or None,
            key=self.principal.key_id or None,
            route=self.route,
            model=self.model,
            node=self.node or services.node,
            stream=self.is_stream,
            status=self.status,
            error=self.error_code,
            message=self.error_message,
            finish=self.finish_reason,
            cold=self.cold_start,
            wait_ms=_milliseconds(wait_s),
            ttft_ms=_milliseconds(ttft_s),
            total_ms=_milliseconds(duration_s),
            prompt_tokens=self.prompt_tokens,
            cached_tokens=self.cached_tokens,
            completion_tokens=self.completion_tokens,
            estimated=self.is_estimated,
            resubmits=self.num_resubmits,
        )
        self._tell(services, duration_s, wait_s, ttft_s, decode_s)

    def _estimate_unseen(self, speeds: dict[tuple[str, str], float]) -> None:
        """Count what a node wrote of a whole answer whose client left before it came.

        The node's counts come with the answer, so the speed of the last one must do. Only where
        tokens are charged: else leaving in time would cost nothing, whatever the device did.
        """
        if self.node is None or self.is_stream or self.submitted is None:
            return
        where, elapsed_s = (self.model, self.node), time.monotonic() - self.submitted
        if self.completion_tokens:
            speeds[where] = self.completion_tokens / max(elapsed_s, 1e-3)
        elif self.status == CLIENT_GONE_STATUS and self.estimate is not None:
            written = int(speeds.get(where, 0.0) * elapsed_s)
            self.completion_tokens = min(written, self.estimate.total - self.estimate.prompt)
            self.is_estimated = True

    def _opened(self, services: Services) -> OpenRequest:
        return OpenRequest(self.request_id, self.route, self.model, self.node or services.node)

    def _tell(
        self,
        services: Services,
        duration_s: float,
        wait_s: float | None,
        ttft_s: float | None,
        decode_s: float | None,
    ) -> None:
        finished = RequestFinished(
            request_id=self.request_id,
            model=self.model,
            node=self.node or services.node,
            route=self.route,
            status=self.status,
            error_code=self.error_code,
            finish_reason=self.finish_reason,
            stream=self.is_stream,
            cold_start=self.cold_start,
            duration_s=duration_s,
            ttft_s=ttft_s,
            decode_s=decode_s,
            prompt_tokens=self.prompt_tokens,
            cached_tokens=self.cached_tokens,
            completion_tokens=self.completion_tokens,
            account=self.principal.account,
            key_id=self.principal.key_id,
            wait_s=wait_s,
            num_retries=self.num_resubmits,
            num_comments=self.num_comments,
            num_keepalive_events=self.num_keepalive_events,
        )
        assert self._slot is not None, "a record that is closed was begun"
        services.reports.end(self._slot, finished)


def _milliseconds(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * 1000, 2)
