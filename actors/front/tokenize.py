"""`POST /tokenize` and `POST /detokenize`, as vLLM has them, by the model's own tokenizer.

Only tokenizer and template are needed, so a model whose files are known is not loaded. A
conversation becomes the very prompt that a chat with these fields would have.
"""

from __future__ import annotations

import asyncio
from typing import Final

from aiohttp import web

from actors.front.body import aside
from actors.front.chat import ChatDialect
from actors.front.decode import decode_body
from actors.front.preparation import tokenise
from actors.front.record import RequestRecord
from actors.front.request import InferenceRequest
from actors.front.services import Services
from actors.front.text_lookup import text_model_of
from actors.front.text_only import answer_text_only
from actors.front.validate import check_chat
from cortexd.errors import InvalidValue, MissingParameter, UnsupportedParameter
from cortexd.tokenize import DetokenizeAnswer, DetokenizeRequest, TokenizeAnswer, TokenizeRequest

_INSTEAD: Final = {
    "content": "send the text as prompt, and the model's name as model",
    "add_special": "send add_special_tokens",
    "with_pieces": "send return_token_strs",
    "parse_special": "leave it out; control tokens in the text are read as such",
}


async def tokenize(request: web.Request) -> web.StreamResponse:
    """Answer the tokens of a text or of a conversation."""
    return await answer_text_only(request, ChatDialect(), _tokenize)


async def detokenize(request: web.Request) -> web.StreamResponse:
    """Answer the text of tokens, control tokens spelled out."""
    return await answer_text_only(request, ChatDialect(), _detokenize)


async def _tokenize(services: Services, record: RequestRecord, body: bytes) -> TokenizeAnswer:
    fields, wanted = await aside(body, _read)
    text_model, limits = await text_model_of(services, record, wanted.model)
    ((ids, _),) = await tokenise(wanted, text_model)
    strs = [text_model.token_text(token) or "" for token in ids]
    return TokenizeAnswer(
        count=len(ids),
        max_model_len=None if limits is None else limits.context,
        tokens=ids,
        token_strs=strs if fields.return_token_strs else None,
    )


def _read(body: bytes) -> tuple[TokenizeRequest, InferenceRequest]:
    fields = decode_body(body, TokenizeRequest)
    return fields, _checked(fields)


def _checked(fields: TokenizeRequest) -> InferenceRequest:
    """Return what is to be tokenised. Raises: InvalidRequest's children."""
    for name, instead in _INSTEAD.items():
        if getattr(fields, name) is not None:
            raise UnsupportedParameter(
                f"{name} is llama-server's and is not supported here; {instead}", param=name
            )
    if fields.stream:
        raise UnsupportedParameter("stream is not supported here; leave it out", param="stream")
    if fields.prompt is None:
        if fields.messages is None:
            raise MissingParameter("prompt is missing, and so is messages", param="prompt")
        return check_chat(fields)
    if fields.messages is not None:
        raise InvalidValue("prompt and messages are both given; send one", param="messages")
    return InferenceRequest(
        kind="completion",
        model=_named(fields.model),
        fields=fields,
        max_tokens=None,
        stop=(),
        num_logprobs=-1,
        prompts=[fields.prompt],
    )


async def _detokenize(services: Services, record: RequestRecord, body: bytes) -> DetokenizeAnswer:
    fields = await aside(body, lambda body: decode_body(body, DetokenizeRequest))
    model = _named(fields.model)
    ids = fields.tokens
    if ids is None:
        raise MissingParameter("tokens is missing", param="tokens")
    text_model, _ = await text_model_of(services, record, model)

    def text() -> str:
        for token in sorted(set(ids)):
            if text_model.token_text(token) is None:
                raise InvalidValue(f'model "{model}" has no token {token}', param="tokens")
        return text_model.decode(ids)

    return DetokenizeAnswer(prompt=await asyncio.to_thread(text))


def _named(model: str | None) -> str:
    if model is None:
        raise MissingParameter("model is missing", param="model")
    return model
