"""Each family cuts text where its models' own tokenizer.json cuts it."""

from __future__ import annotations

import pytest

from engine.text.pre_tokenizers import PRE_TOKENIZERS

TEXT = "I'll DON'T pay $12345 in 2024:\n\n  ok"
HINDI = "हिन्दी"  # letters and combining marks


def _cut(pre: str, text: str) -> list[str]:
    """Return the pieces as they stand in the text."""
    spans = [span for _, span in PRE_TOKENIZERS[pre].build().pre_tokenize_str(text)]
    return [text[begin:end] for begin, end in spans]


@pytest.mark.parametrize(
    ("pre", "expected"),
    [
        (
            "gpt-2",
            "I|'ll| DON|'|T| pay| $|12345| in| 2024|:|\n\n | ok",
        ),
        (
            "smollm",
            "I|'ll| DON|'|T| pay| $|1|2|3|4|5| in| |2|0|2|4|:|\n\n | ok",
        ),
        (
            "qwen2",
            "I|'ll| DON|'T| pay| $|1|2|3|4|5| in| |2|0|2|4|:\n\n| | ok",
        ),
        (
            "llama-bpe",
            "I|'ll| DON|'T| pay| $|123|45| in| |202|4|:\n\n| | ok",
        ),
        (
            "tekken",
            "I|'ll| DON|'T| pay| $|1|2|3|4|5| in| |2|0|2|4|:\n\n| | ok",
        ),
    ],
)
def test_cut_contractions_digits_and_newlines(pre: str, expected: str) -> None:
    """The families differ in upper-case contractions, groups of digits and newlines."""
    assert _cut(pre, TEXT) == expected.split("|")


def test_cut_combining_marks_stay_with_letters_from_qwen35_on() -> None:
    """Older patterns cut a Hindi word at its vowel signs, the newer one does not."""
    assert _cut("qwen35", HINDI) == [HINDI]
    assert len(_cut("qwen2", HINDI)) > 1


def test_cut_tekken_separates_words_at_a_capital() -> None:
    """Camel case falls apart into words."""
    assert _cut("tekken", "camelCase HTTPServer") == ["camel", "Case", " HTTPServer"]


@pytest.mark.parametrize("pre", sorted(PRE_TOKENIZERS))
def test_cut_loses_nothing(pre: str) -> None:
    """The pieces put together are the text, for every family."""
    for text in (TEXT, HINDI, " \t\n\r\n x\u3000y\u00a0 ", "a\u0301🤗½Ⅳ"):
        spans = [span for _, span in PRE_TOKENIZERS[pre].build().pre_tokenize_str(text)]
        covered = {index for begin, end in spans for index in range(begin, end)}
        assert covered == set(range(len(text)))
