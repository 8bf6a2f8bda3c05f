"""Turn token ids into text piece by piece, without ever cutting a character.

`TokenBytes` is shared by all requests of a model and maps an id to the bytes it stands for;
`IncrementalDetokenizer` is one request's state: an incremental UTF-8 decoder, so a push costs the
bytes it adds. Bytes that can never become a character turn into U+FFFD, and only those.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterable
from typing import Any, Final

from tokenizers import Tokenizer

from cortexd.errors import UnsupportedArchitecture

_BYTE_TOKEN: Final = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_SPACE: Final = "\u2581"


def _byte_level_alphabet() -> dict[str, int]:
    """Return the byte each character of the GPT-2 alphabet stands for.

    Printable Latin-1 characters stand for themselves; the other 68 bytes, in order, are U+0100
    and following.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    alphabet.update({chr(0x100 + index): byte for index, byte in enumerate(others)})
    return alphabet


class TokenBytes(dict[int, bytes]):
    """The bytes of each token id, filled on first use. Unknown ids are empty."""

    def __init__(self, tokenizer: Tokenizer, *, hidden_ids: frozenset[int] = frozenset()) -> None:
        super().__init__()
        self._tokenizer = tokenizer
        self._hidden_ids = hidden_ids
        steps = _decoder_steps(tokenizer)
        kinds = [step["type"] for step in steps]
        if kinds == ["ByteLevel"]:
            self._alphabet: dict[str, int] | None = _byte_level_alphabet()
        elif "ByteFallback" in kinds and set(kinds) <= {"Replace", "ByteFallback", "Fuse", "Strip"}:
            self._alphabet = None
        else:
            raise UnsupportedArchitecture(
                f"tokenizer decoder {' + '.join(kinds) or 'none'} is not supported; supported: "
                "ByteLevel, Replace + ByteFallback + Fuse (+ Strip)"
            )
        self.strips_leading_space: Final = "Strip" in kinds

    def __missing__(self, token_id: int) -> bytes:
        token = self._tokenizer.id_to_token(token_id) if 0 <= token_id < 1 << 32 else None
        if token is None:  # padded rows of the embedding have no token; do not remember them
            return b""
        data = b"" if token_id in self._hidden_ids else self._to_bytes(token)
        self[token_id] = data
        return data

    def _to_bytes(self, token: str) -> bytes:
        if self._alphabet is not None:
            try:
                return bytes(self._alphabet[character] for character in token)
            except KeyError:  # an added token, written as plain text
                return token.encode()
        byte_token = _BYTE_TOKEN.fullmatch(token)
        if byte_token is not None:
            return bytes.fromhex(byte_token[1])
        return token.replace(_SPACE, " ").encode()


class IncrementalDetokenizer:
    """One sequence's decoder: the texts of all pushes and the flush add up to the full text."""

    def __init__(self, token_bytes: TokenBytes, *, strips_leading_space: bool) -> None:
        self._token_bytes = token_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._strips_leading_space = strips_leading_space

    def push(self, ids: Iterable[int]) -> str:
        """Return the text that these ids complete; an unfinished character is kept back."""
        table = self._token_bytes
        return self._strip(self._decoder.decode(b"".join([table[token_id] for token_id in ids])))

    def flush(self) -> str:
        """Return what is left; an unfinished character becomes U+FFFD."""
        return self._strip(self._decoder.decode(b"", final=True))

    def _strip(self, text: str) -> str:
        if not self._strips_leading_space or not text:
            return text
        self._strips_leading_space = False
        return text.removeprefix(" ")


def _decoder_steps(tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """Return the decoder's description, its nested sequences flattened."""
    if tokenizer.decoder is None:
        return []
    state = json.loads(tokenizer.decoder.__getstate__())
    return _flatten(state)


def _flatten(step: dict[str, Any]) -> list[dict[str, Any]]:
    if step["type"] != "Sequence":
        return [step]
    return [inner for outer in step["decoders"] for inner in _flatten(outer)]
