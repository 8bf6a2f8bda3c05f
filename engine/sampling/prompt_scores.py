"""Log-probabilities of a prompt's own tokens.

Called by the engine with the logits of one row's tokens, which it gets in bounded pieces.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from cortexd.messages.inference import PromptScores

# Rows taken to float32 at a time: a few copies of 32 rows of a 152k vocabulary are 60 MB.
_SLICE: Final = 32


def score_tokens(logits: Tensor, token_ids: list[int], num_top: int) -> PromptScores:
    """Return how likely each of `token_ids` is under its row of `logits` (num_tokens, vocab_size).

    The scores end before the first row that is not finite.
    """
    scores = PromptScores([], [], [], [])
    for begin in range(0, len(token_ids), _SLICE):
        wanted = token_ids[begin : begin + _SLICE]
        if not _add(scores, logits[begin : begin + len(wanted)], wanted, num_top):
            break
    return scores


def _add(scores: PromptScores, logits: Tensor, token_ids: list[int], num_top: int) -> bool:
    """Add the finite rows of a slice; return whether that is all of them."""
    logprobs = logits.float().log_softmax(-1)
    # A row's sum is finite only if all of its logits are.
    is_finite = logprobs.sum(-1).isfinite().tolist()
    count = is_finite.index(False) if False in is_finite else len(is_finite)
    chosen = logprobs.gather(1, torch.tensor(token_ids, device=logits.device)[:, None])
    scores.logprobs.extend(chosen[:count, 0].tolist())
    # Equally likely tokens share the better rank.
    scores.ranks.extend(((logprobs > chosen).sum(-1) + 1)[:count].tolist())
    values, ids = logprobs.topk(min(num_top, logprobs.shape[1]))
    scores.top_ids.extend(ids[:count].tolist())
    scores.top_logprobs.extend(values[:count].tolist())
    return count == len(is_finite)
