"""The gated delta rule, in float32: one token at a time, and 64 tokens at a time.

Both compute the same recurrence per value head, S (key_dim, value_dim):
S <- exp(g) S;  d = beta (v - S^T k);  S <- S + k d^T;  o = S^T q.
Queries and keys come normalised and scaled. No state of its own: the caller passes S and keeps what
comes back.

Source: "Gated Delta Networks" (arXiv 2412.06464), chunked form with the UT transform.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

CHUNK_SIZE: Final = 64


class DeltaInputs(NamedTuple):
    """What a run of tokens brings, float32: one row per token, then one per value head.

    `query`, `key` (num_tokens, num_heads, key_dim), `value` (num_tokens, num_heads, value_dim),
    `decay` (a logarithm, at most 0) and `beta` (num_tokens, num_heads).
    """

    query: Tensor
    key: Tensor
    value: Tensor
    decay: Tensor
    beta: Tensor

    def tokens(self, begin: int, end: int) -> DeltaInputs:
        """Return the tokens begin..end-1 as views."""
        return DeltaInputs(*(part[begin:end] for part in self))


def recurrent_delta_rule(inputs: DeltaInputs, state: Tensor) -> tuple[Tensor, Tensor]:
    """Advance many sequences by one token each.

    The inputs' tokens are of different sequences, `state` is (num_tokens, num_heads, key_dim,
    value_dim). Returns the output (num_tokens, num_heads, value_dim) and the new state.
    """
    query, key, value, decay, beta = inputs
    decayed = state * decay.exp()[..., None, None]
    remembered = (key.unsqueeze(-2) @ decayed).squeeze(-2)
    delta = beta.unsqueeze(-1) * (value - remembered)
    state = decayed.add_(key.unsqueeze(-1) * delta.unsqueeze(-2))
    return (query.unsqueeze(-2) @ state).squeeze(-2), state


def chunk_delta_rule(inputs: DeltaInputs, state: Tensor) -> tuple[Tensor, Tensor]:
    """Advance one sequence by many tokens; `state` is (num_heads, key_dim, value_dim).

    Returns the output (num_tokens, num_heads, value_dim) and the new state.
    """
    num_tokens, _, value_dim = inputs.value.shape
    # -> (num_heads, num_chunks, CHUNK_SIZE, ...)
    query, key, value = (_chunked(part) for part in inputs[:3])
    decay, beta = (_chunked(part.unsqueeze(-1)).squeeze(-1) for part in inputs[3:])
    total = decay.cumsum(-1)
    # Masked before exp: above the diagonal the difference is positive and may overflow.
    later = torch.ones(CHUNK_SIZE, CHUNK_SIZE, dtype=torch.bool, device=key.device).triu(1)
    pairwise = (total.unsqueeze(-1) - total.unsqueeze(-2)).masked_fill(later, -torch.inf).exp()
    weighted_key = beta.unsqueeze(-1) * key
    # (I + L) [U | W] = [beta V | beta exp(G) K]; the solver reads only below the diagonal.
    # Substitution, never an inverse by powers of L: those explode when keys repeat.
    system = (weighted_key @ key.mT) * pairwise
    right = torch.cat(
        [beta.unsqueeze(-1) * value, total.exp().unsqueeze(-1) * weighted_key], dim=-1
    )
    solved = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)
    new_values, seen_keys = solved.split([value_dim, key.shape[-1]], dim=-1)
    within = (query @ key.mT) * pairwise
    query_from_start = query * total.exp().unsqueeze(-1)
    key_to_end = key * (total[..., -1:] - total).exp().unsqueeze(-1)
    to_end = total[..., -1].exp()[..., None, None]
    outputs = []
    for chunk in range(value.shape[1]):
        written = new_values[:, chunk] - seen_keys[:, chunk] @ state
        outputs.append(query_from_start[:, chunk] @ state + within[:, chunk] @ written)
        state = to_end[:, chunk] * state + key_to_end[:, chunk].mT @ written
    # (num_heads, num_chunks * CHUNK_SIZE, value_dim) -> (num_tokens, num_heads, value_dim)
    return torch.cat(outputs, dim=1)[:, :num_tokens].transpose(0, 1), state


def _chunked(tokens: Tensor) -> Tensor:
    """Cut (num_tokens, num_heads, size) into (num_heads, num_chunks, CHUNK_SIZE, size).

    The last chunk is filled up with zeros: beta, g, k and v of zero leave S as it is.
    """
    num_tokens, num_heads, size = tokens.shape
    heads_first = functional.pad(tokens.transpose(0, 1), (0, 0, 0, -num_tokens % CHUNK_SIZE))
    return heads_first.reshape(num_heads, -1, CHUNK_SIZE, size)
