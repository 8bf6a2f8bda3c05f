"""The layers whose results need other ranks: partial sums, looked-up rows, parts of the logits.

Made by `Weights` in place of the plain ones when a model is split; the models do not notice.
"""

from __future__ import annotations

import torch
from torch import Tensor

from engine.kernels import cpu as native
from engine.layers.embedding import Embedding
from engine.layers.linear import Linear
from engine.layers.sparse_mlp import SparseMLP
from engine.tp.comm import Comm


class RowParallelLinear(Linear):
    """Each rank multiplies its input features; the results are added up. Rank 0 holds the bias."""

    def __init__(self, local: Linear, comm: Comm) -> None:
        self.in_features = local.in_features
        self._products = local._products
        self._comm = comm

    @property
    def packed_parts(self) -> list[native.PackedLinear] | None:
        """None: a native whole-step call cannot stop for a collective."""
        return None

    def __call__(self, x: Tensor) -> Tensor:
        """Map this rank's x (num_tokens, in_features) to the whole (num_tokens, out_features)."""
        return self._comm.all_reduce(super().__call__(x))


class SplitSparseMLP(SparseMLP):
    """Each rank has a part of every expert; what a token gets is added up once, over all of them.

    So the number of collectives does not depend on where the router sends the tokens.
    """

    def __init__(self, local: SparseMLP, comm: Comm) -> None:
        super().__init__(
            local.router,
            local.experts,
            local.shared,
            num_chosen=local.num_chosen,
            normalizes=local.normalizes,
        )
        self._comm = comm

    def __call__(self, hidden: Tensor) -> Tensor:
        """Return the whole (num_tokens, hidden_size)."""
        return self._comm.all_reduce(super().__call__(hidden))


class GatheredHead(Linear):
    """Each rank makes the logits of its part of the vocabulary; rank 0 gets them all."""

    def __init__(self, local: Linear, comm: Comm, vocab_size: int) -> None:
        self.in_features = local.in_features
        self._products = local._products
        self._comm = comm
        self._vocab_size = vocab_size
        self._part_size = comm.shard.vocabulary_part(vocab_size)

    @property
    def packed_parts(self) -> list[native.PackedLinear] | None:
        """None: a native whole-step call cannot stop for a collective."""
        return None

    def __call__(self, x: Tensor) -> Tensor:
        """Return (num_rows, vocab_size) on rank 0, and no columns on the others."""
        part = super().__call__(x)
        return self._comm.gather_columns(part, self._part_size, self._vocab_size)


class VocabParallelEmbedding(Embedding):
    """Each rank looks up the tokens of its part of the vocabulary; the rows are added up."""

    def __init__(self, local: Embedding, comm: Comm, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.hidden_size = local.hidden_size
        self._local = local
        self._comm = comm
        self._ids = comm.shard.vocabulary(vocab_size)

    @property
    def num_bytes(self) -> int:
        """Bytes of weights this rank holds."""
        return self._local.num_bytes

    def __call__(self, ids: Tensor) -> Tensor:
        """Map token ids (num_tokens,) int64 to (num_tokens, hidden_size), on every rank."""
        is_local = (ids >= self._ids.start) & (ids < self._ids.stop)
        rows = self._local(torch.where(is_local, ids - self._ids.start, 0))
        return self._comm.all_reduce(rows.masked_fill(~is_local[:, None], 0))

    def as_linear(self) -> Linear:
        """Return the output head that shares this rank's rows."""
        return GatheredHead(self._local.as_linear(), self._comm, self.vocab_size)
