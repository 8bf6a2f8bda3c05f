"""All text work for one model: chat template, tokenizer, detokeniser, end tokens, defaults.

Loaded by a front (no torch here) from the files of a resolved model; read-only afterwards, so
requests may share it. Fails with `BadModelFile` or `UnsupportedArchitecture` naming the file.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from cortexd.errors import BadModelFile, InvalidRequest
from cortexd.models import ModelFiles
from engine.formats.gguf import GGUFFile
from engine.text.answer_format import (
    AnswerFormat,
    answer_format,
    marker_tokens,
    reasoning_markers,
)
from engine.text.call_style import CallStyle, read_call_style
from engine.text.chat_template import ChatTemplate
from engine.text.detokenizer import IncrementalDetokenizer, TokenBytes
from engine.text.gguf_tokenizer import rebuild_tokenizer
from engine.text.model_metadata import (
    declared_end_tokens,
    read_chat_templates,
    read_json,
    read_sampling_defaults,
    read_special_tokens,
    template_origin,
)
from engine.text.tokenizer_check import check_tokenizer


class TextModel:
    """What a front needs to know of one model."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        chat_template: ChatTemplate,
        *,
        prefix_ids: Sequence[int] = (),
        suffix_ids: Sequence[int] = (),
        end_token_ids: Iterable[int] = (),
        default_sampling: Mapping[str, float | int] | None = None,
    ) -> None:
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self._chat_template = chat_template
        self._prefix_ids = list(prefix_ids)
        self._suffix_ids = list(suffix_ids)
        added = tokenizer.get_added_tokens_decoder()
        self.special_token_ids = frozenset(index for index, token in added.items() if token.special)
        self._added_tokens = frozenset(token.content for token in added.values())
        self._token_bytes = TokenBytes(tokenizer)
        self._visible_bytes = TokenBytes(tokenizer, hidden_ids=self.special_token_ids)
        markers = marker_tokens(self._added_tokens)
        marker_ids = {index for index, token in added.items() if token.content in markers}
        self._marked_bytes = TokenBytes(tokenizer, hidden_ids=self.special_token_ids - marker_ids)
        self.default_sampling = dict(default_sampling or {})
        self.vocab_size = tokenizer.get_vocab_size(with_added_tokens=True)
        self.eos_token_ids = tuple(sorted({*end_token_ids, *self._turn_end_ids()}))
        # Runs the template: here, where models are loaded, and not where they are listed.
        self.can_call_tools = chat_template.renders_tools

    @classmethod
    def load(cls, files: ModelFiles) -> TextModel:
        """Return the text side of a model whose files are on disk.

        Raises: BadModelFile, UnsupportedArchitecture.
        """
        metadata: Mapping[str, Any] = {}
        gguf = GGUFFile.open(files.weights[0]) if files.format == "gguf" else None
        try:
            if gguf is not None:
                metadata = gguf.metadata
            return cls._load(files, metadata)
        finally:
            if gguf is not None:
                gguf.close()

    @classmethod
    def _load(cls, files: ModelFiles, metadata: Mapping[str, Any]) -> TextModel:
        prefix_ids: tuple[int, ...] = ()
        suffix_ids: tuple[int, ...] = ()
        if files.tokenizer is not None:
            tokenizer = _read_tokenizer(files.tokenizer)
        elif files.format == "gguf":
            rebuilt = rebuild_tokenizer(metadata, files.weights[0])
            tokenizer = rebuilt.tokenizer
            prefix_ids, suffix_ids = rebuilt.prefix_ids, rebuilt.suffix_ids
        else:
            raise BadModelFile(
                f'model "{files.model_id}" has no tokenizer.json beside {files.weights[0]}'
            )
        tokenizer_config = read_json(files.tokenizer_config)
        generation_config = read_json(files.generation_config)
        special_tokens = read_special_tokens(tokenizer_config, metadata, tokenizer)
        check_tokenizer(files, tokenizer, special_tokens)
        template = ChatTemplate(
            read_chat_templates(files, tokenizer_config, metadata),
            special_tokens,
            files.model_id,
            template_origin(files, tokenizer_config),
        )
        return cls(
            tokenizer,
            template,
            prefix_ids=prefix_ids,
            suffix_ids=suffix_ids,
            end_token_ids=declared_end_tokens(
                [read_json(files.config), generation_config], metadata, special_tokens, tokenizer
            ),
            default_sampling=read_sampling_defaults(generation_config),
        )

    def render_chat(
        self,
        messages: list[dict[str, Any]],
        *,
        tools: list[dict[str, Any]] | None = None,
        template_kwargs: dict[str, Any] | None = None,
    ) -> str:
        """Return the prompt for a conversation, the assistant's turn opened.

        Raises: InvalidRequest when the model has no template, or the template refuses;
        TemplateRenderFailed when it leaves the tools out; SlowTemplateError in `quick_render`.
        """
        text = self._chat_template.render(messages, tools=tools, template_kwargs=template_kwargs)
        self._chat_template.check_tools(text, tools or [])
        return text

    def answer_format(self, prompt: str, tools: list[dict[str, Any]] | None) -> AnswerFormat | None:
        """Return how to read the answer to a rendered prompt, None when all of it is text.

        `tools` are those the model may call. The answer must be decoded with its markers shown.
        """
        style = self._call_style if tools else None
        return answer_format(self._added_tokens, prompt, tools, style)

    @cached_property
    def _call_style(self) -> CallStyle:
        template = self._chat_template
        return read_call_style(
            template.call_example, template.tool_prompt or "", self._added_tokens
        )

    @property
    def can_reason(self) -> bool:
        """Tell whether the model has tokens around its reasoning."""
        return reasoning_markers(self._added_tokens) is not None

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Return the token ids of `text`; control tokens spelled out in it become control tokens.

        Chat prompts hold their begin token already: pass `add_special_tokens=False` for them.
        Raises: InvalidRequest for text that is not Unicode (half of a surrogate pair).
        """
        try:
            encoding = self._tokenizer.encode(text, add_special_tokens=add_special_tokens)
        except TypeError as error:  # the library takes such text for another type
            raise InvalidRequest(
                "the text holds half of a surrogate pair, which is no character", param="prompt"
            ) from error
        ids: list[int] = encoding.ids
        if add_special_tokens:
            return self._prefix_ids + ids + self._suffix_ids
        return ids

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """Return the text of `ids`; bytes that are no UTF-8 become U+FFFD."""
        detokenizer = self.detokenizer(skip_special_tokens=skip_special_tokens)
        return detokenizer.push(ids) + detokenizer.flush()

    def detokenizer(
        self,
        *,
        skip_special_tokens: bool = True,
        shows_markers: bool = False,
        continues_text: bool = False,
    ) -> IncrementalDetokenizer:
        """Return a decoder for one sequence.

        SentencePiece texts begin with a space that decoding drops; `continues_text` keeps it, for
        an output that continues a prompt in mid-sentence. `shows_markers` shows those special
        tokens that an answer parser needs.
        """
        table = self._visible_bytes if skip_special_tokens else self._token_bytes
        if skip_special_tokens and shows_markers:
            table = self._marked_bytes
        return IncrementalDetokenizer(
            table, strips_leading_space=table.strips_leading_space and not continues_text
        )

    def token_text(self, token_id: int) -> str | None:
        """Return a token as the vocabulary writes it, None for an id that is no token."""
        text: str | None = self._tokenizer.id_to_token(token_id)
        return text

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes one token stands for (a part of a character, perhaps)."""
        return self._token_bytes[token_id]

    def shown_tokens(self) -> list[bytes]:
        """Return the bytes each token adds to an answer, b"" for those that never show."""
        return [self._marked_bytes[token_id] for token_id in range(self.vocab_size)]

    def _turn_end_ids(self) -> list[int]:
        """Return the control token, if any, that the template writes after an answer."""
        tail = self._chat_template.text_after_answer()
        ids: list[int] = self._tokenizer.encode(tail.lstrip(), add_special_tokens=False).ids
        return [token for token in ids[:1] if token in self.special_token_ids]


def _read_tokenizer(path: str) -> Tokenizer:
    try:
        return Tokenizer.from_str(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise BadModelFile(f"{path}: cannot be read: {error.strerror}") from error
    except Exception as error:  # the library raises bare Exception
        raise BadModelFile(f"{path}: not a tokenizer this version can read: {error}") from error
