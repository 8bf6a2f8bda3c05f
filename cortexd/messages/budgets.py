"""Fronts ↔ the owner of the budgets."""

from __future__ import annotations

import msgspec

from cortexd.keys import Key
from cortexd.messages.control import Message


class KeysChanged(Message, frozen=True, tag="KeysChanged"):
    """Reloader → fronts and budgets: the API keys in force; may be those they have."""

    keys: list[Key]


class Reserve(Message, frozen=True, tag="Reserve"):
    """Front → budgets: this request may use so many tokens. Answer `Ok`, or why it may not.

    Said again for the same request, the amount is changed. The reservation ends with a final
    `UsageEntry`, the front's death, or when it is not reported for `ABANDONED_AFTER_S`.
    """

    request_id: str
    key_id: str
    tokens: int


class UsageEntry(msgspec.Struct, frozen=True, array_like=True):
    """What one request has used so far; `is_final`: and it has ended."""

    request_id: str
    prompt_tokens: int
    completion_tokens: int
    is_final: bool = False


class ReportUsage(Message, frozen=True, tag="ReportUsage"):
    """Front → budgets, once a second and at the end of a request: all it has reserved. `Ok`."""

    entries: list[UsageEntry]
