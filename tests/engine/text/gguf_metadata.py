"""Tiny tokenizers trained in memory, and the GGUF metadata a converter would write for them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, trainers

from engine.text.pre_tokenizers import PRE_TOKENIZERS

CORPUS = [
    "The quick brown fox jumps over the lazy dog, don't they? We're here: it's 2024, 12345!",
    "def main(argument):\n    return argument ** 2  # comment\n\n\nclass Thing:\n\tpass\r\n",
    "你好，世界。这是一个测试 数字 123。こんにちは世界 안녕하세요",
    "Grüße aus Köln, café, naïve, Ünïcödé — “quotes” … 🤗👩‍👩‍👧‍👦🏳️‍🌈 ½ Ⅳ",
    "   leading and     runs      of spaces \t\t tabs \n \n newline runs\n\n\n\nend   ",
    "हिन्दी भाषा में लिखा गया पाठ مرحبا بالعالم привет мир ПРИВЕТ",
] * 3
CONTROL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
USER_TOKENS = ["<think>", "</think>"]
SAMPLES = [
    *CORPUS[:6],
    "",
    " ",
    "a",
    "\n\n \n",
    "<|im_start|>user\nhi <|im_end|>\n<think> ok</think>",
    "x<|im_end|><|im_end|>y <|im_ end|>",
    "don't WON'T he'Ll 1a2b3c 1234567 ²³",
    "e\u0301 \u1e9b\u0323 \ufb01 \u200d\u200b \u00a0\u3000x",
    "🤗" * 5 + "\U0001f9d1\u200d\U0001f680",
]


def train_byte_level(pre: str, num_tokens: int = 420) -> Tokenizer:
    """Return a byte-level BPE tokenizer with the pre-tokenizer that `pre` names."""
    family = PRE_TOKENIZERS[pre]
    tokenizer = Tokenizer(models.BPE())
    if family.is_nfc:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = family.build()
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = list(_byte_alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=num_tokens, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    state = json.loads(tokenizer.to_str())
    state["model"]["ignore_merges"] = family.ignores_merges
    tokenizer = Tokenizer.from_str(json.dumps(state))
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in CONTROL_TOKENS]
    )
    tokenizer.add_tokens(
        [AddedToken(token, special=False, normalized=False) for token in USER_TOKENS]
    )
    return tokenizer


def _byte_alphabet() -> list[str]:
    from tokenizers import pre_tokenizers

    return sorted(pre_tokenizers.ByteLevel.alphabet())


def byte_level_metadata(tokenizer: Tokenizer, pre: str, **extra: Any) -> dict[str, Any]:
    """Return the metadata of a byte-level tokenizer, as a converter writes it."""
    state = json.loads(tokenizer.to_str())
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    kinds = [3 if token in CONTROL_TOKENS else 4 if token in USER_TOKENS else 1 for token in tokens]
    merges = [" ".join(pair) for pair in state["model"]["merges"]]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": tokens.index("<|im_start|>"),
        "tokenizer.ggml.eos_token_id": tokens.index("<|im_end|>"),
        **extra,
    }


def sentencepiece_metadata(**extra: Any) -> dict[str, Any]:
    """Return the metadata of a small SentencePiece BPE vocabulary with byte tokens."""
    trained = Tokenizer(models.BPE())
    trainer = trainers.BpeTrainer(vocab_size=260, show_progress=False)
    trained.train_from_iterator(["▁" + text.replace(" ", "▁") for text in CORPUS], trainer)
    state = json.loads(trained.to_str())["model"]
    merged = ["".join(pair) for pair in state["merges"]]
    characters = [token for token in state["vocab"] if len(token) == 1]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    kinds = [2, 3, 3, *[6] * 256]
    scores = [0.0] * len(tokens)
    for rank, token in enumerate([*merged, *characters]):
        if token not in tokens:
            tokens.append(token)
            kinds.append(1)
            scores.append(-float(rank))
    tokens.append("<think>")
    kinds.append(4)
    scores.append(0.0)
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        **extra,
    }


def write_gguf(path: Path, metadata: dict[str, Any]) -> Path:
    """Write a GGUF file that holds this metadata and one small tensor."""
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in metadata.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)
    writer.add_tensor("token_embd.weight", np.zeros((2, 32), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
