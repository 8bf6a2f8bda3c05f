"""A tokenizer rebuilt from GGUF metadata gives the ids of the one it was written from."""

from __future__ import annotations

import itertools
from functools import cache
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from cortexd.errors import BadModelFile, UnsupportedArchitecture
from engine.text.gguf_tokenizer import rebuild_tokenizer
from engine.text.pre_tokenizers import PRE_TOKENIZERS
from tests.engine.text.gguf_metadata import (
    SAMPLES,
    byte_level_metadata,
    sentencepiece_metadata,
    train_byte_level,
)

TEXTS = st.lists(
    st.sampled_from(["<|im_end|>", "<think>", " ", "  ", "\n", "'s", "12", "é", "e\u0301", "你好"])
    | st.text(max_size=8),
    max_size=8,
).map("".join)


@cache
def _pair(pre: str) -> tuple[Tokenizer, Tokenizer]:
    original = train_byte_level(pre)
    return original, rebuild_tokenizer(byte_level_metadata(original, pre), "m.gguf").tokenizer


@pytest.mark.parametrize("pre", ["smollm", "qwen2", "qwen35", "llama-bpe", "tekken", "gpt-2"])
def test_rebuild_byte_level_gives_the_original_ids(pre: str) -> None:
    """Text of many scripts, code, white space and control tokens tokenise as before."""
    original, rebuilt = _pair(pre)
    for text in SAMPLES:
        ids = rebuilt.encode(text, add_special_tokens=False).ids
        assert ids == original.encode(text, add_special_tokens=False).ids
        assert rebuilt.decode(ids, skip_special_tokens=False) == (
            original.decode(ids, skip_special_tokens=False)
        )


@settings(max_examples=150)
@given(text=TEXTS, pre=st.sampled_from(["smollm", "qwen2", "llama-bpe"]))
def test_rebuild_byte_level_agrees_on_any_text(text: str, pre: str) -> None:
    """Any text gives the original's ids, and decodes to itself where nothing normalises."""
    original, rebuilt = _pair(pre)
    ids = rebuilt.encode(text, add_special_tokens=False).ids
    assert ids == original.encode(text, add_special_tokens=False).ids
    if pre != "qwen2":
        assert rebuilt.decode(ids, skip_special_tokens=False) == text


def test_rebuild_marks_control_tokens_special_and_user_tokens_not() -> None:
    """Skipping special tokens drops control tokens and keeps user-defined ones."""
    _, rebuilt = _pair("smollm")
    ids = rebuilt.encode("<think>a<|im_end|>", add_special_tokens=False).ids
    assert rebuilt.decode(ids, skip_special_tokens=True) == "<think>a"


@pytest.mark.parametrize(
    ("pre", "extra", "has_bos"),
    [
        ("smollm", {}, False),
        ("llama-bpe", {}, True),
        ("llama-bpe", {"tokenizer.ggml.add_bos_token": False}, False),
        ("qwen2", {"tokenizer.ggml.add_bos_token": True}, True),
    ],
)
def test_rebuild_takes_bos_from_the_file_or_the_family(
    pre: str, extra: dict[str, Any], has_bos: bool
) -> None:
    """The begin token is added when the file says so, else as the family does."""
    metadata = byte_level_metadata(train_byte_level(pre), pre, **extra)
    bos = metadata["tokenizer.ggml.bos_token_id"]
    rebuilt = rebuild_tokenizer(metadata, "m.gguf")
    assert rebuilt.prefix_ids == ((bos,) if has_bos else ())
    assert rebuilt.suffix_ids == ()


def _merge_by_score(text: str, metadata: dict[str, Any]) -> list[int]:
    """Tokenise as SentencePiece defines it: join the best-scoring neighbours until none is left."""
    tokens, kinds = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    scores = metadata["tokenizer.ggml.scores"]
    ids = {token: index for index, token in enumerate(tokens) if kinds[index] == 1}
    pieces = list(("▁" + text).replace(" ", "▁")) if text else []
    while True:
        best = max(
            (
                (scores[ids[left + right]], -place)
                for place, (left, right) in enumerate(itertools.pairwise(pieces))
                if left + right in ids
            ),
            default=None,
        )
        if best is None:
            break
        place = -best[1]
        pieces[place : place + 2] = [pieces[place] + pieces[place + 1]]
    found: list[int] = []
    for piece in pieces:
        if piece in ids:
            found.append(ids[piece])
        else:
            found.extend(tokens.index(f"<0x{byte:02X}>") for byte in piece.encode())
    return found


@settings(max_examples=150)
@given(
    st.sampled_from(SAMPLES).filter(lambda text: "<" not in text)
    | st.text(alphabet="the quickbrown foxéü你 \n", max_size=30)
    | st.text(max_size=10).filter(lambda text: "<" not in text)
)
def test_rebuild_sentencepiece_merges_by_score(text: str) -> None:
    """The derived merges give what the scores define, bytes for unknown characters."""
    metadata = _sentencepiece()
    tokenizer = rebuild_tokenizer(metadata, "m.gguf").tokenizer
    text = text.replace("▁", "")
    assert tokenizer.encode(text, add_special_tokens=False).ids == _merge_by_score(text, metadata)


@cache
def _sentencepiece() -> dict[str, Any]:
    return sentencepiece_metadata()


def test_rebuild_sentencepiece_without_space_prefix() -> None:
    """`add_space_prefix` false adds nothing before the text and strips nothing after."""
    metadata = sentencepiece_metadata(**{"tokenizer.ggml.add_space_prefix": False})
    rebuilt = rebuild_tokenizer(metadata, "m.gguf")
    assert rebuilt.prefix_ids == (1,)
    ids = rebuilt.tokenizer.encode(" the fox", add_special_tokens=False).ids
    assert rebuilt.tokenizer.decode(ids) == " the fox"


def test_rebuild_unknown_pre_tokenizer_is_refused_by_name() -> None:
    """The error names the value and all supported ones; a missing name is refused as well."""
    metadata = byte_level_metadata(train_byte_level("gpt-2"), "gpt-2")
    metadata["tokenizer.ggml.pre"] = "brand-new"
    with pytest.raises(UnsupportedArchitecture) as caught:
        rebuild_tokenizer(metadata, "m.gguf")
    assert '"brand-new"' in caught.value.message
    assert all(name in caught.value.message for name in PRE_TOKENIZERS)
    del metadata["tokenizer.ggml.pre"]
    with pytest.raises(UnsupportedArchitecture, match="pre is missing"):
        rebuild_tokenizer(metadata, "m.gguf")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"tokenizer.ggml.tokens": "no list"}, "tokens is missing or not an array"),
        ({"tokenizer.ggml.tokens": []}, "non-empty array"),
        ({"tokenizer.ggml.tokens": ["a", 3]}, "non-empty array of strings"),
        ({"tokenizer.ggml.tokens": ["a", "a"]}, "'a' more than once"),
        ({"tokenizer.ggml.token_type": [1]}, "token_type has 1 entries"),
        ({"tokenizer.ggml.merges": ["nospace"]}, "merges do not fit"),
        ({"tokenizer.ggml.merges": ["zz qq"]}, "merges do not fit"),
    ],
)
def test_rebuild_inconsistent_lists_name_file_and_key(change: dict[str, Any], text: str) -> None:
    """A vocabulary that does not fit together is a bad file, not a crash."""
    metadata = {**byte_level_metadata(train_byte_level("gpt-2"), "gpt-2"), **change}
    with pytest.raises(BadModelFile, match=text) as caught:
        rebuild_tokenizer(metadata, "some.gguf")
    assert caught.value.message.startswith("some.gguf: ")


def test_rebuild_unknown_tokenizer_kind_is_refused() -> None:
    """A tokenizer kind without an implementation is named."""
    metadata = {**sentencepiece_metadata(), "tokenizer.ggml.model": "t5"}
    with pytest.raises(UnsupportedArchitecture, match='"t5" is not supported; supported: gpt2'):
        rebuild_tokenizer(metadata, "m.gguf")
