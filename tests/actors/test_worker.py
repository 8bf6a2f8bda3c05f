"""A worker's end of the RPC, over the real codec, with a tiny hybrid on a single rank."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import msgspec
import pytest
import torch

from actors.actor import ActorContext, handlers_of
from actors.sync_actor import DEVICE_FAULT_EXIT_CODE, POISONED_EXIT_CODE
from actors.transport.codec import decode_body, encode_message
from actors.worker import Worker
from cortexd.messages import rpc
from cortexd.messages.control import Message
from cortexd.messages.envelope import Address, Envelope, Header
from cortexd.models import LoadOptions, ModelFiles, RankArgs
from cortexd.settings import Settings
from engine.cache.kv_cache import KVCache
from engine.preflight import inspect
from engine.scheduling.step_plan import PlannedRow, StepPlan
from engine.token_ids import pack_token_ids
from engine.tp.kept_states import MAX_KEPT
from engine.tp.step_codec import StepEncoder
from tests.engine.checkpoints import make_oracle
from tests.engine.doubles import make_sequence
from tests.engine.tp.ranks import saved, settings_of

EPOCH = 3
BLOCKS = pack_token_ids([1, 2])


class LoadedWorker:
    """A worker outside of a process; what is said to it goes through the codec."""

    def __init__(self, files: ModelFiles, folder: Path) -> None:
        args = RankArgs(LoadOptions(model_id="m"), files, inspect(files))
        settings = msgspec.structs.replace(Settings(), engine=settings_of())
        log = logging.getLogger("test.worker")
        packed = msgspec.msgpack.encode(args)
        self.worker = Worker(
            ActorContext("m/1", EPOCH, settings, packed, {}, log, folder, epoch=EPOCH)
        )
        self.worker.report_progress = lambda fraction, stage: None  # type: ignore[method-assign]
        self.encoder = StepEncoder("m")
        self._handlers = handlers_of(self.worker)
        for body in (
            rpc.Init("file:///nowhere"),
            rpc.LoadDenseShard("m", msgspec.json.encode(args.spec), files.weights, None),
            rpc.ClearKvCache("m", 8, 4),
        ):
            assert not isinstance(self.ask(body), rpc.Error), body

    def ask(self, body: Message, epoch: int = EPOCH) -> Message:
        """Return the worker's answer."""
        header = Header(1, 0, Address("m/0", EPOCH), Address("m/1", EPOCH), epoch)
        received = decode_body(encode_message(header, body)[1])
        answer: Any = self._handlers[type(received)](
            received, Envelope(1, 0, header.src, header.dst, epoch, 0, received)
        )
        assert isinstance(answer, Message)
        return answer

    def error(self, body: Message, epoch: int = EPOCH) -> rpc.Error:
        """Return the worker's refusal."""
        answer = self.ask(body, epoch)
        assert isinstance(answer, rpc.Error), answer
        return answer

    @property
    def cache(self) -> KVCache:
        """Its KV cache."""
        runner = self.worker._runner
        assert runner is not None
        assert runner.cache is not None
        return runner.cache

    def step(self, blocks: list[int], slot: int, num_tokens: int) -> Message:
        """Prefill a prompt."""
        sequence = make_sequence(list(range(num_tokens)))
        sequence.block_table, sequence.state_slot = blocks, slot
        plan = StepPlan([PlannedRow(sequence, 0, num_tokens, samples=True)])
        return self.ask(self.encoder.encode(plan))


@pytest.fixture
def worker(tmp_path: Path) -> LoadedWorker:
    """One that has loaded."""
    oracle = make_oracle(
        "qwen3_5_text",
        num_hidden_layers=2,
        layer_types=["linear_attention", "full_attention"],
    )
    return LoadedWorker(saved(tmp_path / "model", oracle), tmp_path)


def test_kept_state_is_that_of_its_moment_wherever_it_is_put(worker: LoadedWorker) -> None:
    """Other sequences run over the blocks and the slot meanwhile; the copy comes back whole."""
    assert worker.step([1, 2], 1, 14) == rpc.GenerateStepOk(1)
    cache = worker.cache
    assert cache.states is not None
    blocks = cache.blocks[:, [1, 2]].clone()
    states = [state[:, 1].clone() for state in cache.states.tensors]
    stored = worker.ask(rpc.SnapshotKvCache("m", 7, BLOCKS, 1))
    size = blocks.nbytes + sum(state.nbytes for state in states)
    assert stored == rpc.KvSnapshotStored(size)
    worker.step([2, 1], 1, 15)
    assert not torch.equal(cache.blocks[:, [1, 2]], blocks)
    restored = worker.ask(rpc.RestoreKvCache("m", 7, pack_token_ids([5, 3]), 4))
    assert restored == rpc.KvCacheRestored()
    # As bits: memory that nothing was written to may hold NaN, which equals nothing.
    assert torch.equal(cache.blocks[:, [5, 3]].view(torch.int32), blocks.view(torch.int32))
    for state, kept in zip(cache.states.tensors, states, strict=True):
        assert torch.equal(state[:, 4].view(torch.int32), kept.view(torch.int32))


@pytest.mark.parametrize(
    ("blocks", "slot"),
    [
        ([], 1),
        ([8], 1),
        ([-1], 1),
        ([1, 1], 1),
        ([1], 0),
        ([1], 5),
    ],
)
def test_snapshot_of_what_is_not_there_is_refused(
    worker: LoadedWorker, blocks: list[int], slot: int
) -> None:
    """And nothing is kept."""
    packed = pack_token_ids(blocks)
    assert worker.error(rpc.SnapshotKvCache("m", 1, packed, slot)).kind == "snapshot_failed"
    assert worker.error(rpc.SnapshotKvCache("m", 1, b"\1", 1)).kind == "snapshot_failed"
    assert worker.error(rpc.RestoreKvCache("m", 1, BLOCKS, 1)).kind == "snapshot_not_found"


def test_snapshots_are_strictly_counted(worker: LoadedWorker) -> None:
    """An id is used once, a copy fits its blocks, there is a limit, and a new cache has none."""
    ask, error = worker.ask, worker.error
    for number in range(MAX_KEPT):
        assert isinstance(ask(rpc.SnapshotKvCache("m", number, BLOCKS, 1)), rpc.KvSnapshotStored)
    assert error(rpc.SnapshotKvCache("m", 0, BLOCKS, 1)).kind == "snapshot_failed"
    assert "at most that many" in error(rpc.SnapshotKvCache("m", 99, BLOCKS, 1)).message
    assert "2 blocks, not 1" in error(rpc.RestoreKvCache("m", 0, BLOCKS[:4], 1)).message
    assert error(rpc.RestoreKvCache("m", 0, BLOCKS, 9)).kind == "restore_failed"
    assert ask(rpc.DropKvSnapshot("m", 0)) == rpc.KvSnapshotDropped()
    assert ask(rpc.DropKvSnapshot("m", 0)) == rpc.KvSnapshotDropped()
    assert error(rpc.RestoreKvCache("m", 0, BLOCKS, 1)).kind == "snapshot_not_found"
    assert isinstance(ask(rpc.ClearKvCache("m", 8, 4)), rpc.KvCacheCleared)
    assert error(rpc.RestoreKvCache("m", 1, BLOCKS, 1)).kind == "snapshot_not_found"


@pytest.mark.parametrize(
    "body",
    [
        rpc.SnapshotKvCache("m", 1, BLOCKS, 1),
        rpc.RestoreKvCache("m", 1, BLOCKS, 1),
        rpc.DropKvSnapshot("m", 1),
        rpc.ClearKvCache("m", 8, 4),
        rpc.UnloadModel("m"),
    ],
)
def test_request_of_another_epoch_or_model_is_refused(worker: LoadedWorker, body: Message) -> None:
    """A leader that is no more, or a mix-up, changes nothing."""
    assert "epoch 2" in worker.error(body, epoch=EPOCH - 1).message
    other = msgspec.structs.replace(body, model_id="other")
    assert worker.error(other).kind == "bad_request"


@pytest.mark.parametrize("num_state_slots", [0, -1])
def test_cache_without_the_slots_a_hybrid_needs_is_refused(
    worker: LoadedWorker, num_state_slots: int
) -> None:
    """It would fail at the first step, in a collective."""
    assert worker.error(rpc.ClearKvCache("m", 8, num_state_slots)).kind == "bad_request"


@pytest.mark.parametrize(
    ("error", "kind", "exit_code"),
    [
        (torch.OutOfMemoryError("no memory"), "forward_failed", POISONED_EXIT_CODE),
        (ValueError("a bug"), "forward_failed", POISONED_EXIT_CODE),
        (
            RuntimeError("CUDA error: an illegal memory access"),
            "forward_failed",
            DEVICE_FAULT_EXIT_CODE,
        ),
        (None, "bad_request", POISONED_EXIT_CODE),  # the same step a second time
    ],
)
def test_step_that_cannot_be_run_is_answered_and_ends_the_rank(
    worker: LoadedWorker,
    error: Exception | None,
    kind: str,
    exit_code: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The other ranks are in its collectives already: they must not wait for their deadline."""
    answers: list[Message] = []

    def leave(code: int) -> NoReturn:
        raise SystemExit(code)

    monkeypatch.setattr(os, "_exit", leave)
    monkeypatch.setattr(worker.worker, "reply", lambda envelope, body: answers.append(body))
    monkeypatch.setattr(worker.worker, "_report_fatal", lambda info: None)
    if error is None:
        worker.step([1, 2], 1, 14)
        worker.encoder = StepEncoder("m")
    else:
        runner = worker.worker._runner
        assert runner is not None
        monkeypatch.setattr(runner.loaded.model, "forward", _raising(error))
    with pytest.raises(SystemExit) as caught:
        worker.step([1, 2], 1, 14)
    assert caught.value.code == exit_code
    assert [(type(answer), getattr(answer, "kind", "")) for answer in answers] == [
        (rpc.Error, kind)
    ]


def _raising(error: Exception) -> Callable[..., NoReturn]:
    def forward(*_: object) -> NoReturn:
        raise error

    return forward
