"""The collectives over gloo and shared memory: sums, parts side by side, an end to waiting."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from engine.kernels import cpu as native
from engine.tp.comm import Comm
from tests.engine.tp.ranks import CPU, joined
from tests.waiting import DEADLINE_S

Joined = Callable[..., list[Any]]


@pytest.fixture(params=["gloo", "shared memory"])
def ranks(request: pytest.FixtureRequest) -> Joined:
    """Run work on every rank of a new group, whose tensors travel so."""
    is_shared = request.param == "shared memory"
    assert native.available() or not is_shared, native.status()

    def run(
        world_size: int, work: Callable[[Comm], Any], timeout_s: float = DEADLINE_S
    ) -> list[Any]:
        def prepared(comm: Comm) -> Any:
            comm.share_memory(is_possible=is_shared)
            assert comm.backend == request.param
            return work(comm)

        return joined(world_size, prepared, timeout_s)

    return run


def test_bfloat16_is_added_up_in_float32(ranks: Joined) -> None:
    """Three terms whose bfloat16 running sum would lose the small ones."""

    def work(comm: Comm) -> torch.Tensor:
        value = 256.0 if comm.rank == 0 else 1.0
        return comm.all_reduce(torch.full((2, 2), value, dtype=torch.bfloat16))

    for total in ranks(3, work):
        assert total.dtype == torch.bfloat16
        assert total.eq(258.0).all()


def test_many_sums_of_every_size_are_right_on_every_rank(ranks: Joined) -> None:
    """In pieces where they are large; no rank reads what another writes for the next one."""
    shapes = [(1, 7), (0, 5), (3, 400_000), (1, 1), (2, 300_001), (64, 64)] * 3

    def term(shape: tuple[int, int], rank: int, number: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(100 * number + rank)
        return torch.randint(-99, 99, shape, generator=generator).float()

    def work(comm: Comm) -> list[bool]:
        found = []
        for number, shape in enumerate(shapes):
            total = comm.all_reduce(term(shape, comm.rank, number))
            found.append(total.equal(sum(term(shape, rank, number) for rank in range(3))))
        return found

    assert ranks(3, work) == [[True] * len(shapes)] * 3


def test_uneven_columns_arrive_in_order_on_rank_zero(ranks: Joined) -> None:
    """The last rank may have fewer."""

    def work(comm: Comm) -> torch.Tensor:
        columns = comm.shard.vocabulary(10)
        part = torch.arange(10.0).expand(2, -1)[:, columns]
        return comm.gather_columns(part, comm.shard.vocabulary_part(10), 10)

    results = ranks(3, work)
    assert results[0].equal(torch.arange(10.0).expand(2, -1))
    assert [tuple(part.shape) for part in results[1:]] == [(2, 0), (2, 0)]


def test_large_columns_arrive_in_pieces(ranks: Joined) -> None:
    """Logits of a prompt are larger than any slot."""
    whole = torch.arange(700_000.0).view(7, -1)

    def work(comm: Comm) -> torch.Tensor:
        columns = comm.shard.vocabulary(100_000)
        return comm.gather_columns(
            whole[:, columns], comm.shard.vocabulary_part(100_000), 100_000
        ).clone()

    assert ranks(2, work)[0].equal(whole)


def test_sanity_and_broadcast(ranks: Joined) -> None:
    """Every rank sees the world size and rank 0's values."""

    def work(comm: Comm) -> tuple[int, float]:
        value = comm.broadcast(torch.tensor([float(comm.rank + 5)]))
        return comm.sanity_sum(CPU), float(value)

    assert ranks(2, work) == [(2, 5.0), (2, 5.0)]


def test_rank_that_never_comes_is_given_up(ranks: Joined) -> None:
    """A collective ends with an error at its deadline."""

    def work(comm: Comm) -> None:
        if comm.rank == 0:
            comm.all_reduce(torch.zeros(1))

    missing, absent = ranks(2, work, timeout_s=2.0)
    assert isinstance(missing, RuntimeError)
    assert absent is None


def test_rank_that_cannot_share_memory_leaves_all_with_gloo() -> None:
    """They agree, whatever each of them could do."""

    def work(comm: Comm) -> tuple[str, float]:
        comm.share_memory(is_possible=comm.rank == 0)
        return comm.backend, float(comm.all_reduce(torch.ones(1)))

    assert joined(2, work) == [("gloo", 2.0), ("gloo", 2.0)]


def test_world_of_one_needs_no_group() -> None:
    """The same calls, and the tensors themselves."""
    comm, tensor = Comm(), torch.ones(2, 3)
    comm.share_memory(is_possible=True)
    assert comm.all_reduce(tensor) is tensor
    assert comm.gather_columns(tensor, 3, 3) is tensor
    assert comm.sanity_sum(CPU) == 1
