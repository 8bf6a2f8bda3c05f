"""Streaming ids as text gives the whole text, without a broken character on the way."""

from __future__ import annotations

from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from cortexd.errors import UnsupportedArchitecture
from engine.text.detokenizer import IncrementalDetokenizer, TokenBytes
from engine.text.gguf_tokenizer import rebuild_tokenizer
from tests.engine.text.gguf_metadata import (
    SAMPLES,
    byte_level_metadata,
    sentencepiece_metadata,
    train_byte_level,
)


@cache
def _tokenizer(kind: str) -> Tokenizer:
    if kind == "llama":
        return rebuild_tokenizer(sentencepiece_metadata(), "m").tokenizer
    return rebuild_tokenizer(byte_level_metadata(train_byte_level(kind), kind), "m").tokenizer


def _stream(tokenizer: Tokenizer, ids: list[int], cuts: list[int]) -> list[str]:
    table = TokenBytes(tokenizer)
    detokenizer = IncrementalDetokenizer(table, strips_leading_space=table.strips_leading_space)
    texts, start = [], 0
    for cut in [*sorted(cut % (len(ids) + 1) for cut in cuts), len(ids)]:
        texts.append(detokenizer.push(ids[start:cut]))
        start = cut
    return [*texts, detokenizer.flush()]


@settings(max_examples=200)
@given(
    ids=st.lists(st.integers(0, 440), max_size=40),
    cuts=st.lists(st.integers(0, 40), max_size=8),
)
def test_stream_any_byte_level_ids_equals_full_decode(ids: list[int], cuts: list[int]) -> None:
    """Any ids in any split, invalid UTF-8 included, add up to the library's decode."""
    tokenizer = _tokenizer("smollm")
    assert "".join(_stream(tokenizer, ids, cuts)) == tokenizer.decode(
        ids, skip_special_tokens=False
    )


@settings(max_examples=200)
@given(
    text=st.sampled_from(SAMPLES) | st.text(max_size=20),
    cuts=st.lists(st.integers(0, 200), max_size=8),
    kind=st.sampled_from(["smollm", "llama"]),
)
def test_stream_text_in_any_split_gives_the_text(text: str, cuts: list[int], kind: str) -> None:
    """No split shows a replacement character that is not in the text."""
    tokenizer = _tokenizer(kind)
    text = text.replace("▁", "_")
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    texts = _stream(tokenizer, ids, cuts)
    assert "".join(texts) == tokenizer.decode(ids, skip_special_tokens=False)
    if kind == "smollm":
        assert "".join(texts) == text
    assert all("\ufffd" not in part for part in texts) or "\ufffd" in text


def test_stream_token_by_token_holds_a_character_back() -> None:
    """A character cut over several tokens appears with its last byte."""
    tokenizer = _tokenizer("smollm")
    ids = tokenizer.encode("\U0001f9ff", add_special_tokens=False).ids
    assert len(ids) > 1
    table = TokenBytes(tokenizer)
    detokenizer = IncrementalDetokenizer(table, strips_leading_space=False)
    assert [detokenizer.push([token]) for token in ids] == [""] * (len(ids) - 1) + ["\U0001f9ff"]


def test_flush_unfinished_character_is_one_replacement() -> None:
    """An output that ends within a character shows that once, at the end."""
    tokenizer = _tokenizer("smollm")
    ids = tokenizer.encode("\U0001f9ff", add_special_tokens=False).ids[:-1]
    detokenizer = IncrementalDetokenizer(TokenBytes(tokenizer), strips_leading_space=False)
    assert detokenizer.push(ids) == ""
    assert detokenizer.flush() == "\ufffd"
    assert detokenizer.flush() == ""


def test_sentencepiece_leading_space_is_dropped_once_unless_continuing() -> None:
    """Only the first space of the whole output goes, and none when it continues a prompt."""
    tokenizer = _tokenizer("llama")
    ids = tokenizer.encode("the the", add_special_tokens=False).ids
    table = TokenBytes(tokenizer)
    assert table.strips_leading_space
    for strips, expected in ((True, "the the"), (False, " the the")):
        detokenizer = IncrementalDetokenizer(table, strips_leading_space=strips)
        assert "".join(detokenizer.push([token]) for token in ids) == expected


def test_sentencepiece_byte_tokens_join_across_pushes() -> None:
    """Byte tokens of one character are put together; a lone one is replaced."""
    tokenizer = _tokenizer("llama")
    ids = [tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in "é".encode()]
    detokenizer = IncrementalDetokenizer(TokenBytes(tokenizer), strips_leading_space=False)
    assert [detokenizer.push([token]) for token in ids] == ["", "é"]
    assert detokenizer.push(ids[:1]) + detokenizer.flush() == "\ufffd"


def test_unknown_and_hidden_ids_are_empty() -> None:
    """Rows without a token and hidden control tokens add no text."""
    tokenizer = _tokenizer("smollm")
    end = tokenizer.token_to_id("<|im_end|>")
    table = TokenBytes(tokenizer, hidden_ids=frozenset({end}))
    assert [table[token] for token in (end, 10**6, -1, 2**40)] == [b""] * 4
    assert TokenBytes(tokenizer)[end] == b"<|im_end|>"


def test_unknown_decoder_is_refused_by_name() -> None:
    """A decoder whose bytes are not known here is named, not guessed."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.decoder = decoders.WordPiece()
    with pytest.raises(UnsupportedArchitecture, match="decoder WordPiece is not supported"):
        TokenBytes(tokenizer)
