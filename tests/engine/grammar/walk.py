"""Write random texts that a grammar allows, token by token, as a model that knows nothing would."""

from __future__ import annotations

import random

import numpy as np

from engine.grammar.matcher import Vocabulary, compile_grammar

# Bytes, and some tokens that run across the borders of a grammar's parts.
PIECES = [
    *(b'": ', b'"}', b'{"', b"}\n", b"</", b"</think>", b"\n</parameter>\n"),
    *(b"<tool_call>", b"</tool_call>", b"<function=", b"[TOOL_CALLS]"),
]
VOCABULARY = Vocabulary([*(bytes([value]) for value in range(256)), *PIECES], 256 + len(PIECES))


def random_text(grammar: str, seed: int, *, max_tokens: int = 3000) -> str:
    """Return a whole text of the grammar; printable tokens are more likely than others."""
    chance = random.Random(seed)
    matcher = compile_grammar(grammar, VOCABULARY).copy()
    written = b""
    for _ in range(max_tokens):
        allowed = np.flatnonzero(matcher.allowed)
        if matcher.may_end and (not len(allowed) or chance.random() < 0.3):
            return written.decode()
        closing = [token for token in allowed if token >= 256 or token in b'"}]<\n']
        pool = closing if closing and chance.random() < 0.3 else allowed
        token = int(chance.choice(list(pool)))
        matcher.advance(token)
        written += bytes([token]) if token < 256 else PIECES[token - 256]
    raise AssertionError(f"no end after {max_tokens} tokens: {written[-200:]!r}")
