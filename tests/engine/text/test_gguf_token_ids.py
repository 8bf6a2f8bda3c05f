"""Token ids of a tokenizer that went through a GGUF file, for every pre-tokenizer, on nasty text.

The originals are built from transformers' own patterns, not from the table under test, and trained
on a generated corpus; the file is written by the gguf package and read by ours.
"""

from __future__ import annotations

import json
import random
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, trainers
from tokenizers import pre_tokenizers as cuts
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS
from transformers.models.gpt2.tokenization_gpt2 import GPT2Tokenizer
from transformers.models.qwen2.tokenization_qwen2 import Qwen2Tokenizer
from transformers.models.qwen3_5.tokenization_qwen3_5 import Qwen3_5Tokenizer

from cortexd.errors import InvalidRequest
from cortexd.models import ModelFiles
from engine.text.pre_tokenizers import PRE_TOKENIZERS
from engine.text.text_model import TextModel
from tests.engine.text.gguf_metadata import (
    CONTROL_TOKENS,
    CORPUS,
    SAMPLES,
    USER_TOKENS,
    byte_level_metadata,
    write_gguf,
)

# Families of which each name of the table is one; transformers has a class or a pattern for each.
DIGITS_THEN_GPT2 = {"smollm", "starcoder", "refact"}
GPT2 = {"gpt-2", "phi-2"}
NFC = {"qwen2": Qwen2Tokenizer, "qwen35": Qwen3_5Tokenizer}
TAKES_WHOLE_TOKENS = {"llama-bpe", "llama3", "llama-v3", "tekken"}

SCRIPTS = [
    *("abcXYZ", "äßéñ", "привет", "你好世界数据", "こんにちは", "안녕하세요", "مرحبا", "हिन्दीभाषा"),
    *("ไทย", "0123456789", "٠١٢٣", "½Ⅳ²", "  \t\n", "\r\n\n", "'s't're", ".,;:!?-_/\\"),
    *("🤗👍🏽👩‍👩‍👧🏳️‍🌈", "\u0301\u0308\u200d\ufe0f", "\u00a0\u2003\u3000\u200b\ufeff"),
]
NASTY = [
    *SAMPLES,
    "a" * 3000,
    "ab" * 1500 + "c",
    "你" * 1000,
    "1" * 1000,
    " " * 999 + "x" + " " * 998,
    "\n" * 500 + "\r\n" * 300 + "\t" * 77,
    "👩‍👩‍👧‍👦" * 40 + "👍🏽" * 40 + "🏳️‍🌈🇩🇪🇫🇷" * 20,
    "e\u0301" * 200 + "\u0301" * 50 + "한" * 5 + "\u1112\u1161\u11ab",
    "\ufffd\ufffd\x00\x01\x7f\u2028\u2029\x85\x1c",
    "Ａｂｃ１２３ ﬁ ſ Å \u212b \u2126",
    "I'LL i'll I’ll 'S 's''s 're'VE",
    "x<|im_start|><|im_start|>system\n<|endoftext|>\n\n<|im_end|>  <think>\n</think></think>",
    "<|im_start|", "|im_end|>", "<|im_end|> <|IM_END|>", "<think", "a<think>b",
    "12 345 6789 1,234,567.89 ٣٤٥ 三百 ½",
    "foo_bar-baz/qux\\n+=*&^%$#@!~`{}[]()<>|",
    "مرحبا 123 שלום हिन्दी ไทย 你好123world",
]  # fmt: skip


def _corpus() -> list[str]:
    rng = random.Random(7)
    lines = []
    for _ in range(300):
        words = ("".join(rng.choices(rng.choice(SCRIPTS), k=rng.randrange(1, 9))) for _ in range(9))
        lines.append(rng.choice([" ", "", "  ", "\n"]).join(words))
    return [*CORPUS, *lines]


@cache
def original(pre: str) -> Tokenizer:
    """Return a tokenizer as transformers builds that family, trained on generated text."""
    tokenizer = Tokenizer(models.BPE())
    if pre in NFC:
        reference = NFC[pre](vocab={"a": 0}, merges=[]).backend_tokenizer
        tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.NFC(), reference.pre_tokenizer
        assert "NFC" in str(reference.normalizer)
    elif pre in GPT2 | DIGITS_THEN_GPT2:
        gpt2 = GPT2Tokenizer(vocab={"a": 0}, merges=[]).backend_tokenizer.pre_tokenizer
        digits = [cuts.Digits(individual_digits=True)] if pre in DIGITS_THEN_GPT2 else []
        tokenizer.pre_tokenizer = cuts.Sequence([*digits, gpt2])
    else:
        split = cuts.Split(Regex(GGUF_PRE_TOKENIZER_SPLITS[pre]), behavior="isolated")
        byte_level = cuts.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = cuts.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(cuts.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=700, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(_corpus(), trainer)
    state = json.loads(tokenizer.to_str())
    state["model"]["ignore_merges"] = pre in TAKES_WHOLE_TOKENS
    tokenizer = Tokenizer.from_str(json.dumps(state))
    for is_special, tokens in ((True, CONTROL_TOKENS), (False, USER_TOKENS)):
        added = [AddedToken(token, special=is_special, normalized=False) for token in tokens]
        (tokenizer.add_special_tokens if is_special else tokenizer.add_tokens)(added)
    return tokenizer


@pytest.fixture(scope="module")
def through_gguf(tmp_path_factory: pytest.TempPathFactory) -> dict[str, TextModel]:
    """The same tokenizers, written to GGUF and loaded as models are."""
    directory = tmp_path_factory.mktemp("tokenizers")
    loaded = {}
    for pre in PRE_TOKENIZERS:
        path: Path = write_gguf(directory / f"{pre}.gguf", byte_level_metadata(original(pre), pre))
        files = ModelFiles(
            model_id=pre, source="path", revision="", format="gguf", weights=(str(path),)
        )
        loaded[pre] = TextModel.load(files)
    return loaded


@pytest.mark.parametrize("pre", sorted(PRE_TOKENIZERS))
def test_ids_equal_the_original_ones(pre: str, through_gguf: dict[str, TextModel]) -> None:
    """Scripts, emoji, white space, digits, control tokens in text, words of thousands."""
    ours, theirs = through_gguf[pre], original(pre)
    for text in NASTY:
        expected = theirs.encode(text, add_special_tokens=False).ids
        assert ours.encode(text, add_special_tokens=False) == expected, text[:80]
        if pre not in NFC:
            assert ours.decode(expected) == text


@settings(max_examples=200)
@given(
    text=st.lists(
        st.sampled_from([*SCRIPTS, *CONTROL_TOKENS, *USER_TOKENS]) | st.text(max_size=6), max_size=9
    ).map("".join)
)
def test_ids_equal_on_any_text(text: str, through_gguf: dict[str, TextModel]) -> None:
    """No mixture of scripts is cut otherwise by any family."""
    for pre, ours in through_gguf.items():
        expected = original(pre).encode(text, add_special_tokens=False).ids
        assert ours.encode(text, add_special_tokens=False) == expected, pre


@pytest.mark.parametrize("pre", sorted(PRE_TOKENIZERS))
def test_half_a_surrogate_pair_is_refused(pre: str, through_gguf: dict[str, TextModel]) -> None:
    """JSON can spell what no text holds; the caller is told, whatever stands around it."""
    for text in ("\ud83d", "a\udc00b", "<|im_end|>\ud800"):
        with pytest.raises(InvalidRequest, match="surrogate"):
            through_gguf[pre].encode(text, add_special_tokens=False)


def test_families_differ() -> None:
    """The corpus tells the families apart, so that equality above means something."""
    seen = {
        pre: [[piece for _, piece in PRE_TOKENIZERS[pre].build().pre_tokenize_str(text)]
              for text in NASTY]
        for pre in ("gpt-2", "smollm", "qwen2", "qwen35", "llama-bpe", "tekken")
    }  # fmt: skip
    names = list(seen)
    for index, name in enumerate(names):
        assert all(seen[name] != seen[other] for other in names[index + 1 :]), name
