"""The longest sequence a model should be offered: what memory holds and prefill gets through. Pure.

Memory decides when the cache is sized. Speed is measured while the model runs, so the limit that is
advertised follows it; what the cache can hold stays the engine's own bound.
"""

from __future__ import annotations

from typing import Final

from cortexd.settings import Engine as EngineSettings

# Limits that were derived, not given, are whole multiples, so that they do not creep.
STEP: Final = 1024
# However slow prefill is, this much is offered: chats and small documents.
LEAST_CONTEXT: Final = 4096


def rounded(context: int) -> int:
    """Return a derived limit in whole steps; one below a step is kept as it is."""
    return context // STEP * STEP if context >= STEP else context


def offered_context(context: int, prefill_tok_s: float, settings: EngineSettings) -> int:
    """Return how much of `context` tokens is prefilled within `engine.target_prefill_s`.

    `prefill_tok_s` is 0 until it was measured; the configured guess counts until then.
    """
    if not settings.target_prefill_s:
        return context
    rate = prefill_tok_s or settings.bootstrap_prefill_tok_s
    ceiling = max(rounded(int(settings.target_prefill_s * rate)), LEAST_CONTEXT)
    return min(context, ceiling)
