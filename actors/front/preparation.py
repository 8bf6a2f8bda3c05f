"""Everything before the first token is asked for: route, text model, prompts, context check."""

from __future__ import annotations

import asyncio
import hashlib
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec

import cortexd
from actors.front.entitlement import hold
from actors.front.prompt_part import PromptPart
from actors.front.record import RequestRecord
from actors.front.request import InferenceRequest, Prompt
from actors.front.routing import route
from actors.front.sampling import (
    bad_word_ids,
    build_submit,
    check_prompt_ids,
    check_token_ids,
    model_defaults,
    pack_ids,
    tokens_to_generate,
)
from actors.front.services import Services
from cortexd.errors import EngineRestarting
from cortexd.log import event
from cortexd.messages import HeldLease, Routed, Submit
from cortexd.openai import SamplingFields

if TYPE_CHECKING:
    from engine.text.answer_format import AnswerFormat
    from engine.text.text_model import TextModel

# Tokenising runs at one or two million characters a second: up to here it holds the loop, and with
# it every other stream, for a few milliseconds at most.
_INLINE_CHARACTERS = 4096
# The router may answer a moment before the registry names the leader, or after it died.
_LEADER_GRACE_S = 5.0
_LEADER_PAUSE_S = 0.01


@dataclass(slots=True, frozen=True)
class TokenisedPrompt:
    """One prompt as packed int32, its length, how many tokens may follow it, how to read those.

    `text` is a legacy prompt as the client wrote it, if it did not send token ids; `grammar` is
    what the answer must be, "" when it is free.
    """

    packed: bytes
    text: str | None
    num_tokens: int
    max_tokens: int
    answer_format: AnswerFormat | None
    grammar: str


@dataclass(slots=True, frozen=True)
class Prepared:
    """A request that is ready to be submitted."""

    routed: Routed
    text_model: TextModel
    defaults: SamplingFields
    prompts: list[TokenisedPrompt]
    bad_words: list[bytes]
    lease_id: str
    account: str
    fingerprint: str

    def max_tokens(self, request: InferenceRequest) -> int:
        """Return the most tokens that prompts and answers can come to."""
        answers = request.choices_per_prompt
        return sum(prompt.num_tokens + prompt.max_tokens * answers for prompt in self.prompts)

    def answer_format(self, request: InferenceRequest, choice_index: int) -> AnswerFormat | None:
        """Return how to read one choice, None when all of it is text."""
        return self.prompts[choice_index // request.choices_per_prompt].answer_format

    def submit(self, request: InferenceRequest, choice_index: int, sequence_id: int) -> Submit:
        """Return the message that starts one choice."""
        prompt_index, answer_index = divmod(choice_index, request.choices_per_prompt)
        prompt = self.prompts[prompt_index]
        submit = build_submit(
            request,
            self.defaults,
            request_id=self.lease_id,
            sequence_id=sequence_id,
            answer_index=answer_index,
            prompt=prompt.packed,
            max_tokens=prompt.max_tokens,
            eos_token_ids=self.text_model.eos_token_ids,
            grammar=prompt.grammar,
            bad_words=self.bad_words,
        )
        return msgspec.structs.replace(
            submit, cache_salt=_tenant_salt(self.account, submit.cache_salt)
        )

    def prompt_part(self, request: InferenceRequest, prompt_index: int) -> PromptPart | None:
        """Return what is to be told of a prompt, None when it is nothing."""
        if not request.is_echoed and request.num_prompt_logprobs < 0:
            return None
        prompt = self.prompts[prompt_index]
        return PromptPart(
            self.text_model,
            prompt.packed,
            prompt.text,
            is_echoed=request.is_echoed,
            echo_top=request.echo_top,
            map_top=request.num_prompt_logprobs,
        )


async def prepare(
    services: Services,
    request: InferenceRequest,
    record: RequestRecord,
    lease_id: str,
    *,
    wait_s: float,
) -> Prepared:
    """Return the request ready to submit to a leader that lives at this moment.

    `record` learns the model as soon as the router knows it.

    Raises: ModelNotFound, ModelLoading, ContextLengthExceeded, InvalidRequest, EngineRestarting.
    """
    loop = asyncio.get_running_loop()
    deadline = loop.time() + wait_s
    grace_until: float | None = None
    while True:
        patience_s = max(deadline - loop.time(), 0.0)
        routed = await route(
            services.bus,
            request.model,
            lease_id,
            wait_s=patience_s,
            account=record.principal.account,
        )
        account = record.principal.account
        services.leases.hold(HeldLease(lease_id, routed.model_id, account=account))
        record.place(services, routed.model_id)
        record.cold_start = record.cold_start or routed.cold_start
        prepared = await _prepare_for(services, request, routed, record, lease_id)
        await hold(services, record, prepared.max_tokens(request))
        if services.bus.incarnation_of(routed.leader) == routed.incarnation:
            return prepared
        services.leases.end(lease_id)
        grace_until = grace_until or loop.time() + _LEADER_GRACE_S
        if loop.time() > grace_until:
            raise EngineRestarting(f'the engine of model "{routed.model_id}" is restarting')
        await asyncio.sleep(_LEADER_PAUSE_S)


async def _prepare_for(
    services: Services,
    request: InferenceRequest,
    routed: Routed,
    record: RequestRecord,
    lease_id: str,
) -> Prepared:
    text_model = await services.text_models.get(routed.files)
    check_token_ids(request.fields, routed.spec.vocab_size)
    prompts = []
    for index, (ids, answer_format) in enumerate(await tokenise(request, text_model)):
        check_prompt_ids(ids, routed.spec.vocab_size)
        max_tokens = tokens_to_generate(
            request, len(ids), routed.limits, routed.defaults.get("max_tokens")
        )
        sent = request.prompts[index] if request.prompts else None
        text = sent if isinstance(sent, str) else None
        grammar = ""
        if request.structure is not None:
            grammar = await services.grammars.write(request.structure, answer_format)
        prompts.append(
            TokenisedPrompt(pack_ids(ids), text, len(ids), max_tokens, answer_format, grammar)
        )
    return Prepared(
        routed,
        text_model,
        _defaults(services, routed, text_model),
        prompts,
        bad_word_ids(request.fields, text_model),
        lease_id,
        record.principal.account,
        _fingerprint(routed),
    )


async def tokenise(
    request: InferenceRequest, text_model: TextModel
) -> list[tuple[list[int], AnswerFormat | None]]:
    """Return each prompt's token ids and how to read its answer.

    Begin and end tokens are added as the request wants it, else to prompts, and not to
    conversations, whose template has written them. Long ones, and templates that take their time,
    are done in a thread, so streams go on.

    Raises: InvalidRequest, TemplateRenderFailed.
    """
    # Light, but part of the text side, which a front imports with its first model only.
    from engine.text.render_time import SlowTemplateError, quick_render

    if request.tools is None and _num_characters(request) <= _INLINE_CHARACTERS:
        with suppress(SlowTemplateError), quick_render():
            return _tokenise_now(request, text_model)
    return await asyncio.to_thread(_tokenise_now, request, text_model)


def _tokenise_now(
    request: InferenceRequest, text_model: TextModel
) -> list[tuple[list[int], AnswerFormat | None]]:
    adds = request.fields.add_special_tokens
    if request.messages is None:
        adds = adds is not False
        return [(_encode_prompt(prompt, text_model, adds), None) for prompt in request.prompts]
    text = text_model.render_chat(
        request.messages, tools=request.tools, template_kwargs=request.template_kwargs
    )
    text += request.prefill
    ids = text_model.encode(text, add_special_tokens=adds is True)
    return [(ids, text_model.answer_format(text, request.tools))]


def _encode_prompt(prompt: Prompt, text_model: TextModel, add_special_tokens: bool) -> list[int]:
    if isinstance(prompt, str):
        return text_model.encode(prompt, add_special_tokens=add_special_tokens)
    return prompt


def _num_characters(request: InferenceRequest) -> int:
    texts = [prompt for prompt in request.prompts if isinstance(prompt, str)]
    for message in request.messages or []:
        content = message.get("content") or ""
        texts += [content] if isinstance(content, str) else [part["text"] for part in content]
    return sum(map(len, texts))


def _defaults(services: Services, routed: Routed, text_model: TextModel) -> SamplingFields:
    try:
        return model_defaults({**text_model.default_sampling, **routed.defaults})
    except msgspec.ValidationError as error:
        event(services.log, "model.bad_defaults", 30, model=routed.model_id, error=str(error))
        return SamplingFields()


def _tenant_salt(account: str, salt: str) -> str:
    """Return what keeps an account's cached prefixes from others, within it by the client's salt.

    No salt of a client can be that of an account: how fast an answer begins tells what is cached.
    """
    if account:
        return f"account {account}:{salt}"
    return f"client {salt}" if salt else ""


def _fingerprint(routed: Routed) -> str:
    """Return a name for what computes the answer: same files and program, same name."""
    files = routed.files
    identity = f"{cortexd.__version__}|{files.model_id}|{files.revision}|{files.quant}"
    return "fp_" + hashlib.blake2b(identity.encode(), digest_size=6).hexdigest()
