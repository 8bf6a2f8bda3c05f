"""Rebuild a tokenizer from the metadata of a GGUF file.

Called by `TextModel.load` when no tokenizer.json is at hand. No state. Two kinds exist: "gpt2"
(byte-level BPE with a merge list) and "llama" (SentencePiece BPE with scores). Anything else, and
any unknown pre-tokenizer, is refused by name; inconsistent lists are a `BadModelFile`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Final

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

from cortexd.errors import BadModelFile, UnsupportedArchitecture
from engine.text.pre_tokenizers import PRE_TOKENIZERS, PreTokenizer

_PREFIX: Final = "tokenizer.ggml."
_SPACE: Final = "\u2581"  # SentencePiece writes a space as this character


class TokenKind(IntEnum):
    """Values of `tokenizer.ggml.token_type`."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True, slots=True)
class RebuiltTokenizer:
    """A tokenizer without post-processor, and the ids to put around a text on request."""

    tokenizer: Tokenizer
    prefix_ids: tuple[int, ...]
    suffix_ids: tuple[int, ...]


def rebuild_tokenizer(metadata: Mapping[str, Any], file: str) -> RebuiltTokenizer:
    """Return the tokenizer that the metadata of `file` describes.

    Raises: UnsupportedArchitecture for a kind or pre-tokenizer that is not implemented,
    BadModelFile for lists that do not fit together.
    """
    kind = metadata.get(_PREFIX + "model")
    tokens, kinds = _read_tokens(metadata, file)
    if kind == "gpt2":
        pre_tokenizer = _find_pre_tokenizer(metadata, file)
        tokenizer = _build_byte_level(metadata, file, tokens, pre_tokenizer)
        adds_bos = pre_tokenizer.adds_bos
    elif kind == "llama":
        tokenizer = _build_sentencepiece(metadata, file, tokens, kinds)
        adds_bos = True
    else:
        raise UnsupportedArchitecture(
            f'{file}: tokenizer.ggml.model "{kind}" is not supported; supported: gpt2, llama; '
            "use a checkpoint that carries tokenizer.json"
        )
    _add_tokens(tokenizer, tokens, kinds)
    bos, eos = (token_id(metadata, name, len(tokens)) for name in ("bos", "eos"))
    adds_bos = bool(metadata.get(_PREFIX + "add_bos_token", adds_bos))
    adds_eos = bool(metadata.get(_PREFIX + "add_eos_token", False))
    return RebuiltTokenizer(
        tokenizer,
        (bos,) if adds_bos and bos is not None else (),
        (eos,) if adds_eos and eos is not None else (),
    )


def token_id(metadata: Mapping[str, Any], name: str, num_tokens: int) -> int | None:
    """Return the id under `tokenizer.ggml.{name}_token_id`, None when absent or out of range.

    Some writers store -1 or 2**32 - 1 for "none", so out of range means absent.
    """
    value = metadata.get(f"{_PREFIX}{name}_token_id")
    if isinstance(value, int) and 0 <= value < num_tokens:
        return value
    return None


def _read_list(metadata: Mapping[str, Any], file: str, name: str) -> list[Any]:
    value = metadata.get(_PREFIX + name)
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        to_list = getattr(value, "tolist", None)
        if to_list is None:
            raise BadModelFile(f"{file}: {_PREFIX}{name} is missing or not an array")
        value = to_list()
    return list(value)


def _read_tokens(metadata: Mapping[str, Any], file: str) -> tuple[list[str], list[int]]:
    tokens = _read_list(metadata, file, "tokens")
    if not tokens or not all(isinstance(token, str) for token in tokens):
        raise BadModelFile(f"{file}: {_PREFIX}tokens must be a non-empty array of strings")
    # A vocabulary is a bijection here; the format's own reader names empty entries like this.
    if "" in tokens:
        tokens = [token or f"[EMPTY_{index}]" for index, token in enumerate(tokens)]
    if len(set(tokens)) != len(tokens):
        twice, _ = Counter(tokens).most_common(1)[0]
        raise BadModelFile(f"{file}: {_PREFIX}tokens holds {twice!r} more than once")
    if _PREFIX + "token_type" not in metadata:
        return tokens, [TokenKind.NORMAL] * len(tokens)
    kinds = _read_list(metadata, file, "token_type")
    if len(kinds) != len(tokens):
        raise BadModelFile(
            f"{file}: {_PREFIX}token_type has {len(kinds)} entries for {len(tokens)} tokens"
        )
    return tokens, kinds


def _find_pre_tokenizer(metadata: Mapping[str, Any], file: str) -> PreTokenizer:
    name = metadata.get(_PREFIX + "pre")
    pre_tokenizer = PRE_TOKENIZERS.get(name) if isinstance(name, str) else None
    if pre_tokenizer is None:
        named = "is missing" if name is None else f'"{name}" is not supported'
        raise UnsupportedArchitecture(
            f"{file}: tokenizer.ggml.pre {named}; supported: {', '.join(sorted(PRE_TOKENIZERS))}; "
            "use a checkpoint that carries tokenizer.json, or one converted again with a current "
            "converter"
        )
    return pre_tokenizer


def _build_byte_level(
    metadata: Mapping[str, Any], file: str, tokens: list[str], pre_tokenizer: PreTokenizer
) -> Tokenizer:
    merges = [tuple(merge.split(" ", 1)) for merge in _read_list(metadata, file, "merges")]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    try:
        model = models.BPE(vocabulary, merges, ignore_merges=pre_tokenizer.ignores_merges)
    except Exception as error:  # the library raises bare Exception and TypeError
        raise BadModelFile(f"{file}: {_PREFIX}merges do not fit the tokens: {error}") from error
    tokenizer = Tokenizer(model)
    if pre_tokenizer.is_nfc:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizer.build()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _build_sentencepiece(
    metadata: Mapping[str, Any], file: str, tokens: list[str], kinds: list[int]
) -> Tokenizer:
    scores = _read_list(metadata, file, "scores")
    if len(scores) != len(tokens):
        raise BadModelFile(
            f"{file}: {_PREFIX}scores has {len(scores)} entries for {len(tokens)} tokens"
        )
    vocabulary = {token: index for index, token in enumerate(tokens)}
    unknown = token_id(metadata, "unknown", len(tokens))
    if unknown is None and TokenKind.UNKNOWN in kinds:
        unknown = kinds.index(TokenKind.UNKNOWN)
    model = models.BPE(
        vocabulary,
        _derive_merges(tokens, kinds, scores),
        unk_token=None if unknown is None else tokens[unknown],
        fuse_unk=True,
        byte_fallback=True,
    )
    tokenizer = Tokenizer(model)
    adds_space = bool(metadata.get(_PREFIX + "add_space_prefix", True))
    escape = normalizers.Replace(" ", _SPACE)
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if adds_space:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), escape])
        steps.append(decoders.Strip(" ", 1, 0))
    else:
        tokenizer.normalizer = normalizers.Sequence([escape])
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


def _derive_merges(
    tokens: list[str], kinds: list[int], scores: list[float]
) -> list[tuple[str, str]]:
    """Return the merge list equal to "join the neighbours whose union scores best".

    Each way to cut a normal piece into two normal pieces is a merge; its rank is the piece's
    score. Cuts of one piece are ranked by their parts' own place, which never changes the result
    but for pieces that overlap themselves.
    """
    ids = {token: index for index, token in enumerate(tokens) if kinds[index] == TokenKind.NORMAL}
    ranked = [
        (-scores[index], index, ids[token[:cut]], ids[token[cut:]])
        for token, index in ids.items()
        for cut in range(1, len(token))
        if token[:cut] in ids and token[cut:] in ids
    ]
    ranked.sort()
    return [(tokens[left], tokens[right]) for _, _, left, right in ranked]


def _add_tokens(tokenizer: Tokenizer, tokens: list[str], kinds: list[int]) -> None:
    """Mark control tokens as special and user-defined ones as plain added tokens."""
    special = [TokenKind.CONTROL, TokenKind.UNKNOWN]
    tokenizer.add_special_tokens(
        [
            AddedToken(token, special=True, normalized=False)
            for token, kind in zip(tokens, kinds, strict=True)
            if kind in special
        ]
    )
    tokenizer.add_tokens(
        [
            AddedToken(token, special=False, normalized=False)
            for token, kind in zip(tokens, kinds, strict=True)
            if kind == TokenKind.USER_DEFINED
        ]
    )
