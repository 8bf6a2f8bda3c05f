"""Which node has seen the beginning of this conversation: hashes of its messages' bytes. Pure.

The front makes a chain, one link for each message over all before it; the router remembers for each
node the links it sent there. A node that knows a late link has the prompt's KV up to there. Two
gateways that disagree cost a prefill, nothing else.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Sequence
from hashlib import blake2b
from typing import Final

import msgspec

# Enough to find the last turns and the system prompt of the longest conversation.
_FIRST_LINKS: Final = 4
_LAST_LINKS: Final = 28
_PROMPT_BLOCK_BYTES: Final = 1024
_MAX_LINKS_PER_NODE: Final = 16_384
# Clients move these marks along with the end of the conversation.
_CACHE_MARK: Final = re.compile(rb',?\s*"cache_control"\s*:\s*\{[^{}]*\}')


class _Prompted(msgspec.Struct):
    """The parts of a request body that become its prompt, as they stand."""

    messages: msgspec.Raw = msgspec.Raw()
    prompt: msgspec.Raw = msgspec.Raw()
    system: msgspec.Raw = msgspec.Raw()
    tools: msgspec.Raw = msgspec.Raw()


def prefix_chain(body: bytes) -> list[int]:
    """Return the links of a request's prompt, first to last; [] when there is nothing to go by.

    `body` is a JSON object of any of the dialects. A long chain keeps its ends.
    """
    try:
        prompted = msgspec.json.decode(body, type=_Prompted)
        messages = msgspec.json.decode(prompted.messages or b"[]", type=list[msgspec.Raw])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return []
    parts = [bytes(message) for message in messages]
    if not parts:
        text = bytes(prompted.prompt)
        whole = len(text) - len(text) % _PROMPT_BLOCK_BYTES  # the last block is not a prefix yet
        parts = [
            text[start : start + _PROMPT_BLOCK_BYTES]
            for start in range(0, whole, _PROMPT_BLOCK_BYTES)
        ]
    digest = b""
    links = []
    head = bytes(prompted.tools) + bytes(prompted.system)
    for part in parts:
        plain = _CACHE_MARK.sub(b"", head + part) if b"cache_control" in part else head + part
        digest = blake2b(digest + plain, digest_size=8).digest()
        links.append(int.from_bytes(digest, "little", signed=True))
        head = b""
    if len(links) <= _FIRST_LINKS + _LAST_LINKS:
        return links
    return links[:_FIRST_LINKS] + links[-_LAST_LINKS:]


class PrefixMemory:
    """The links sent to one node, the latest of them."""

    def __init__(self, max_links: int = _MAX_LINKS_PER_NODE) -> None:
        self._links: OrderedDict[tuple[str, int], None] = OrderedDict()
        self._max_links = max_links

    def __len__(self) -> int:
        return len(self._links)

    def depth(self, model_id: str, chain: Sequence[int]) -> int:
        """Return how many links of the chain lead to the last one known here; 0: none is."""
        for depth in range(len(chain), 0, -1):
            if (model_id, chain[depth - 1]) in self._links:
                return depth
        return 0

    def remember(self, model_id: str, chain: Sequence[int]) -> None:
        """Keep a chain that goes to this node, in place of the longest unused ones."""
        for link in chain:
            self._links[model_id, link] = None
            self._links.move_to_end((model_id, link))
        while len(self._links) > self._max_links:
            self._links.popitem(last=False)

    def forget(self) -> None:
        """Forget all: the node came back without what it had."""
        self._links.clear()
