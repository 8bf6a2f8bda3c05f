"""Chains of prompts in both dialects, and what a node remembers of them."""

from __future__ import annotations

import json
from typing import Any

from cortexd.affinity import PrefixMemory, prefix_chain


def body(*texts: str, **fields: Any) -> bytes:
    """A chat request of these messages."""
    messages = [{"role": "user", "content": text} for text in texts]
    return json.dumps({"model": "m", "messages": messages, **fields}).encode()


def test_next_turn_begins_with_the_chain_of_the_last() -> None:
    """Whatever else the body says; another beginning shares nothing."""
    first = prefix_chain(body("a", "b", temperature=1))
    assert prefix_chain(body("a", "b", "c", "d"))[:2] == first
    assert not set(prefix_chain(body("x", "b"))) & set(first)
    assert not set(prefix_chain(body("a", "b", system="s"))) & set(first)
    assert not set(prefix_chain(body("a", "b", tools=[{"name": "t"}]))) & set(first)


def test_moving_cache_marks_do_not_break_the_chain() -> None:
    """Clients of the Messages dialect mark the end of the conversation, each turn anew."""
    block = {"type": "text", "text": "hello"}
    marked = {**block, "cache_control": {"type": "ephemeral", "ttl": "1h"}}
    chains = [
        prefix_chain(json.dumps({"messages": [{"role": "user", "content": [one]}]}).encode())
        for one in (block, marked)
    ]
    assert chains[0] == chains[1]


def test_completion_prompts_are_cut_in_blocks() -> None:
    """Whole blocks only: the last one still grows."""
    long = json.dumps({"prompt": "x" * 3000}).encode()
    longer = json.dumps({"prompt": "x" * 5000}).encode()
    assert len(prefix_chain(long)) == 2
    assert prefix_chain(longer)[:2] == prefix_chain(long)


def test_what_is_no_prompt_has_no_chain_and_a_long_one_keeps_its_ends() -> None:
    """Bad bodies are refused elsewhere; the chain is bounded."""
    for bad in (b"", b"[]", b'{"messages": 3}', b'{"messages": {}}', b"\xff", b'{"model": "m"}'):
        assert prefix_chain(bad) == []
    whole = [prefix_chain(body(*map(str, range(count)))) for count in (4, 100)]
    assert len(whole[1]) == 32
    assert whole[1][:4] == whole[0]


def test_memory_finds_the_longest_known_beginning_and_is_bounded() -> None:
    """By model; the longest unused links go first."""
    memory = PrefixMemory(max_links=4)
    memory.remember("m", [1, 2, 3])
    assert [memory.depth("m", chain) for chain in ([1, 2, 9], [3], [9, 8], [])] == [2, 1, 0, 0]
    assert memory.depth("other", [1]) == 0
    memory.remember("m", [1])
    memory.remember("m", [5, 6])
    assert len(memory) == 4
    assert (memory.depth("m", [2]), memory.depth("m", [1])) == (0, 1)
    memory.forget()
    assert memory.depth("m", [1]) == 0
