"""The collectives over gloo: sums, parts side by side, and an end to waiting."""

from __future__ import annotations

import torch

from engine.tp.comm import Comm
from tests.engine.tp.ranks import CPU, joined


def test_bfloat16_is_added_up_in_float32() -> None:
    """Three terms whose bfloat16 running sum would lose the small ones."""

    def work(comm: Comm) -> torch.Tensor:
        value = 256.0 if comm.rank == 0 else 1.0
        return comm.all_reduce(torch.full((2, 2), value, dtype=torch.bfloat16))

    for total in joined(3, work):
        assert total.dtype == torch.bfloat16
        assert total.eq(258.0).all()


def test_uneven_columns_arrive_in_order_on_rank_zero() -> None:
    """The last rank may have fewer."""

    def work(comm: Comm) -> torch.Tensor:
        columns = comm.shard.vocabulary(10)
        part = torch.arange(10.0).expand(2, -1)[:, columns]
        return comm.gather_columns(part, comm.shard.vocabulary_part(10), 10)

    results = joined(3, work)
    assert results[0].equal(torch.arange(10.0).expand(2, -1))
    assert [tuple(part.shape) for part in results[1:]] == [(2, 0), (2, 0)]


def test_sanity_and_broadcast() -> None:
    """Every rank sees the world size and rank 0's values."""

    def work(comm: Comm) -> tuple[int, float]:
        value = comm.broadcast(torch.tensor([float(comm.rank + 5)]))
        return comm.sanity_sum(CPU), float(value)

    assert joined(2, work) == [(2, 5.0), (2, 5.0)]


def test_rank_that_never_comes_is_given_up() -> None:
    """A collective ends with an error at its deadline."""

    def work(comm: Comm) -> None:
        if comm.rank == 0:
            comm.all_reduce(torch.zeros(1))

    missing, absent = joined(2, work, timeout_s=0.3)
    assert isinstance(missing, RuntimeError)
    assert absent is None


def test_world_of_one_needs_no_group() -> None:
    """The same calls, and the tensors themselves."""
    comm, tensor = Comm(), torch.ones(2, 3)
    assert comm.all_reduce(tensor) is tensor
    assert comm.gather_columns(tensor, 3, 3) is tensor
    assert comm.sanity_sum(CPU) == 1
