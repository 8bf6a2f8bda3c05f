"""A running request: from the router's answer to the last token, and everything it holds.

`Generation` is a context manager. Inside, `next` gives the outputs of all choices as they come;
leaving it, however that happens (end, error, client gone, deadline), cancels what still runs in the
engine and ends the lease at the router. It never awaits on the way out, so nothing can stop it.
"""

from __future__ import annotations

import asyncio
import time
from functools import partial
from types import TracebackType

from actors.front.choice import Choice, ChoiceOutput
from actors.front.preparation import Prepared, prepare
from actors.front.record import RequestRecord
from actors.front.request import InferenceRequest
from actors.front.sequences import MAX_PENDING_TOKENS, DeltaQueue, RunningSequence
from actors.front.services import Services
from cortexd.errors import (
    ActorDown,
    DeadlineExceeded,
    EngineRestarting,
    MailboxFull,
    Overloaded,
)
from cortexd.messages import Cancel
from cortexd.messages.control import Message
from cortexd.messages.inference import SequenceDelta
from cortexd.openai import CompletionTokensDetails, PromptTokensDetails, Usage
from engine.text.stop_strings import StopStrings

_MAX_RESUBMITS = 1


class Generation:
    """Run one request.

    `may_resubmit`: when the engine dies, start over (once) instead of failing; only for a client
    that has not been sent a byte.
    """

    def __init__(
        self,
        services: Services,
        request: InferenceRequest,
        record: RequestRecord,
        lease_id: str,
        *,
        load_wait_s: float,
        may_resubmit: bool,
    ) -> None:
        self.fingerprint: str | None = None
        self._services = services
        self._request = request
        self._record = record
        self._first_lease_id = lease_id
        self._lease_id = lease_id
        self._may_resubmit = may_resubmit
        loop = asyncio.get_running_loop()
        self._clock = loop.time
        self._deadline = loop.time() + services.settings.gateway.request_timeout_s
        self._load_deadline = loop.time() + load_wait_s
        self._preparing: asyncio.Task[Prepared] | None = None
        self._queue = self._new_queue()
        self._choices: list[Choice] = []
        self._prompt_tokens = 0
        self._leader = ""
        self._running: dict[int, int] = {}  # choice index → sequence id
        self._holds_lease = False

    def __enter__(self) -> Generation:
        self._record.progress = self._counts
        self._start()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._release()
        usage = self.usage()
        record = self._record
        record.progress = None
        record.prompt_tokens = usage.prompt_tokens
        record.completion_tokens = usage.completion_tokens
        record.cached_tokens = usage.prompt_tokens_details.cached_tokens
        if self._choices:
            record.finish_reason = self._choices[0].finish_reason

    @property
    def is_finished(self) -> bool:
        """Tell whether every choice has ended and been handed out.

        What is cancelled, because its client is too far behind, runs no more and has not ended.
        """
        return bool(self._choices) and all(choice.finish_reason for choice in self._choices)

    @property
    def is_submitted(self) -> bool:
        """Tell whether the prompt has been counted and its answers asked for."""
        return bool(self._choices)

    @property
    def num_resubmits(self) -> int:
        """Return how often the request was started over."""
        return self._record.num_resubmits

    def usage(self) -> Usage:
        """Return token counts so far; a prompt counts once however many answers it has."""
        completion_tokens = sum(choice.num_tokens for choice in self._choices)
        reasoning_tokens = sum(choice.num_reasoning_tokens for choice in self._choices)
        cached_tokens = sum(
            choice.num_cached_tokens for choice in self._choices if choice.is_first_answer
        )
        return Usage(
            prompt_tokens=self._prompt_tokens,
            completion_tokens=completion_tokens,
            total_tokens=self._prompt_tokens + completion_tokens,
            prompt_tokens_details=PromptTokensDetails(cached_tokens),
            completion_tokens_details=(
                CompletionTokensDetails(reasoning_tokens) if reasoning_tokens else None
            ),
        )

    def _counts(self) -> tuple[int, int]:
        usage = self.usage()
        return usage.prompt_tokens, usage.completion_tokens

    async def next(self, timeout_s: float) -> list[ChoiceOutput]:
        """Return new outputs, [] when there are none within `timeout_s`.

        Raises: whatever ends the request early, as a CortexError.
        """
        give_up = min(self._clock() + timeout_s, self._deadline)
        while True:
            try:
                outputs = await self._next_outputs(give_up)
            except EngineRestarting:
                if not self._may_resubmit or self._record.num_resubmits >= _MAX_RESUBMITS:
                    raise
                self._record.num_resubmits += 1
                self._release()
                self._start()
                continue
            if outputs or self.is_finished:
                return outputs
            if self._clock() >= self._deadline:
                raise DeadlineExceeded(
                    "the request took longer than "
                    f"{self._services.settings.gateway.request_timeout_s:g} s "
                    "(gateway.request_timeout_s)"
                )
            if self._clock() >= give_up:
                return []

    async def _next_outputs(self, give_up: float) -> list[ChoiceOutput]:
        if self._preparing is not None and not await self._finish_preparing(give_up):
            return []
        return self._push(await self._queue.get(give_up - self._clock()))

    # Starting

    def _start(self) -> None:
        self._queue = self._new_queue()
        self._choices = []
        resubmits = self._record.num_resubmits
        self._lease_id = self._first_lease_id + (f"+{resubmits}" if resubmits else "")
        self._holds_lease = True
        self._preparing = asyncio.create_task(
            prepare(
                self._services,
                self._request,
                self._record,
                self._lease_id,
                wait_s=max(self._load_deadline - self._clock(), 0.0),
            )
        )

    async def _finish_preparing(self, give_up: float) -> bool:
        """Wait for the route and the prompts, then submit; False when it is not time yet."""
        assert self._preparing is not None, "called while preparing"
        preparing = self._preparing

        def end() -> None:
            _cancel(preparing)

        self._services.tell_of_end(end)
        try:
            await asyncio.wait({preparing}, timeout=max(give_up - self._clock(), 0.0))
        finally:
            self._services.forget_end(end)
        if not preparing.done():
            return False
        if preparing.cancelled() and self._services.ending is not None:
            raise self._services.ending
        prepared = self._preparing.result()
        self._preparing = None
        self._submit(prepared)
        return True

    def _submit(self, prepared: Prepared) -> None:
        routed = prepared.routed
        self._record.submitted = time.monotonic()
        self.fingerprint = prepared.fingerprint
        self._prompt_tokens = sum(prompt.num_tokens for prompt in prepared.prompts)
        self._leader = routed.leader
        answers = self._request.choices_per_prompt
        stop = self._request.stop
        parts = [prepared.prompt_part(self._request, n) for n in range(len(prepared.prompts))]
        for index in range(len(prepared.prompts) * answers):
            answer_format = prepared.answer_format(self._request, index)
            choice = Choice(
                index,
                prepared.text_model,
                StopStrings(stop) if stop else None,
                parser=answer_format.parser() if answer_format is not None else None,
                wants_scores=self._request.num_logprobs >= 0,
                is_first_answer=index % answers == 0,
                continues_text=self._request.continues_text,
                ends_at_tool_call=self._request.is_single_tool_call,
                call_ending=self._request.call_ending,
                min_tokens=self._request.fields.min_tokens or 0,
                prompt_part=parts[index // answers],
            )
            self._choices.append(choice)
            sequence_id = self._services.sequences.open(
                RunningSequence(self._queue, index, routed.leader, routed.incarnation, routed.epoch)
            )
            self._running[index] = sequence_id
            self._tell_leader(prepared.submit(self._request, index, sequence_id))

    def _tell_leader(self, message: Message) -> None:
        try:
            self._services.bus.tell(self._leader, message)
        except ActorDown as error:
            raise EngineRestarting(f"the engine is restarting: {error.message}") from None
        except MailboxFull as error:
            raise Overloaded(f"the engine does not keep up: {error.message}") from None

    # Running

    def _push(self, items: list[tuple[int, SequenceDelta]]) -> list[ChoiceOutput]:
        """Give each delta to its choice; return what became ready, in order of arrival."""
        touched: dict[int, Choice] = {}
        num_tokens = 0
        for index, delta in items:
            choice = self._choices[index]
            choice.push(delta)
            num_tokens += len(delta.token_ids)
            if choice.finish_reason is not None:
                self._end_choice(choice)
            touched[index] = choice
            if delta.prompt_scores is not None:
                # The other answers to this prompt may have waited for it.
                for sibling in range(index, index + self._request.choices_per_prompt):
                    touched.setdefault(sibling, self._choices[sibling])
        if num_tokens:
            now = time.monotonic()
            self._record.first_token = self._record.first_token or now
            self._record.last_token = now
        outputs = [choice.take() for choice in touched.values()]
        return [output for output in outputs if output is not None]

    def _end_choice(self, choice: Choice) -> None:
        sequence_id = self._running.pop(choice.index, None)
        if sequence_id is None:
            return
        if choice.was_stopped_here:
            self._cancel(sequence_id)
        else:
            self._services.sequences.close(sequence_id)

    # Ending

    def _release(self) -> None:
        """Cancel what runs and end the lease."""
        if self._preparing is not None:
            if not self._preparing.done():
                self._preparing.cancel()
            elif not self._preparing.cancelled():
                self._preparing.exception()  # seen: it ends the request elsewhere or nobody waits
            self._preparing = None
        self._cancel_running()
        if self._holds_lease:
            self._holds_lease = False
            self._services.leases.end(self._lease_id)

    def _cancel_running(self) -> None:
        for sequence_id in self._running.values():
            self._cancel(sequence_id)
        self._running.clear()

    def _cancel(self, sequence_id: int) -> None:
        services = self._services
        services.sequences.cancel(sequence_id, partial(services.note_cancelled, self._record.model))
        services.tell_quietly(self._leader, Cancel(sequence_id))

    def _new_queue(self) -> DeltaQueue:
        answers = self._request.choices_per_prompt * max(1, len(self._request.prompts))
        return DeltaQueue(MAX_PENDING_TOKENS * answers, self._cancel_running)


def _cancel(task: asyncio.Task[Prepared]) -> None:
    task.cancel()
