"""The leader's RPC against scripted workers, over the real codec, intake and ask table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import pytest

from actors.mailbox import AskTable, DeadLetters, Intake, Outcome
from actors.rank_group import Deadlines, RankGroup, leave_meeting_place, meeting_address
from actors.sync_asks import SyncAsk
from actors.transport.codec import decode_body, encode_message
from cortexd.errors import (
    CortexError,
    DeadlineExceeded,
    Internal,
    ModelLoadFailed,
    UnsupportedArchitecture,
)
from cortexd.messages import rpc
from cortexd.messages.control import Message, Ok
from cortexd.messages.envelope import Address, Header
from engine.cache.kv_cache import CacheSize
from engine.scheduling.step_plan import PlannedRow, StepPlan
from tests.engine.doubles import make_sequence

EPOCH = 3
LEADER = Address("model/0", EPOCH)
SECOND_NS = 1_000_000_000
Frames = tuple[bytes, bytes]
Script = Callable[[Message, Header], list[Frames]]


def answering(*bodies: Message, epoch: int = EPOCH, incarnation: int = EPOCH) -> Script:
    """Return a worker that gives these answers to every request."""

    def script(request: Message, header: Header) -> list[Frames]:
        src = Address(header.dst.name, incarnation)
        return [encode_message(Header(9, header.id, src, LEADER, epoch), body) for body in bodies]

    return script


def stepping(request: Message, header: Header) -> list[Frames]:
    """Be a worker as it should be, for steps."""
    assert isinstance(request, rpc.GenerateStep)
    return answering(rpc.GenerateStepOk(request.step))(request, header)


def garbage(body: bytes) -> Script:
    """Return a worker whose answer's body is this."""

    def script(request: Message, header: Header) -> list[Frames]:
        frames = encode_message(Header(9, header.id, header.dst, LEADER, EPOCH), Ok())
        return [(frames[0], body)]

    return script


class ScriptedAsker:
    """Delivers requests to scripts at once; time passes only while it waits for answers."""

    def __init__(self, *workers: Script) -> None:
        self.workers = {f"model/{rank}": script for rank, script in enumerate(workers, start=1)}
        self.now_ns = SECOND_NS
        self.letters = DeadLetters()
        self.table = AskTable()
        self.requests: list[Message] = []
        self.unread: list[Frames] = []
        self._last_id = 0
        self._intake = Intake(
            LEADER, EPOCH, self.letters, now_ns=lambda: self.now_ns, is_gone=lambda _: False
        )

    def begin_ask(self, dst: Address, body: Message, *, deadline_s: float) -> SyncAsk:
        """Send through the codec."""
        self._last_id += 1
        ask = SyncAsk(dst)
        deadline_ns = self.now_ns + int(deadline_s * SECOND_NS)
        self.table.open(self._last_id, dst, deadline_ns, ask.end)
        header = Header(self._last_id, 0, LEADER, dst, EPOCH, deadline_ns)
        _, frame = encode_message(header, body)
        self.requests.append(body)
        self.unread += self.workers[dst.name](decode_body(frame), header)  # type: ignore[arg-type]
        return ask

    def collect(self, asks: Sequence[SyncAsk]) -> list[Outcome]:
        """Take in what came, then let the deadlines pass."""
        unread, self.unread = self.unread, []
        for frames in unread:
            envelope = self._intake.admit(list(frames))
            if envelope is not None and not self.table.resolve(envelope):
                self.letters.add("expired", None)
        while any(ask.outcome is None for ask in asks):
            assert self.table.next_deadline_ns is not None, "an ask without a deadline"
            self.now_ns = self.table.next_deadline_ns
            self.table.expire(self.now_ns)
        return [ask.outcome for ask in asks if ask.outcome is not None]


def group_of(*workers: Script) -> tuple[RankGroup, ScriptedAsker]:
    """Return a leader's group over scripted workers."""
    asker = ScriptedAsker(*workers)
    deadlines = Deadlines(start_s=30, load_s=600, step_s=5)
    return RankGroup(asker, LEADER, len(workers) + 1, deadlines, model_id="m"), asker


def plan() -> StepPlan:
    """Return a step of one row."""
    sequence = make_sequence([5, 6, 7])
    sequence.block_table = [1]
    return StepPlan([PlannedRow(sequence, 0, 3, samples=True)])


def step(group: RankGroup) -> None:
    """Run one step of nothing."""
    group.begin_step(plan())
    group.end_step()


def test_ping_takes_each_rank_for_what_it_says() -> None:
    """Ranks and world size must agree; the devices are kept."""
    group, _ = group_of(answering(rpc.Pong(1, 3, "cpu")), answering(rpc.Pong(2, 3, "cpu")))
    group.ping()
    assert group.devices == ["cpu", "cpu"]
    group, _ = group_of(answering(rpc.Pong(1, 3, "cpu")), answering(rpc.Pong(1, 3, "cpu")))
    with pytest.raises(Internal, match="rank 2 of 3 says it is 1 of 3"):
        group.ping()


def test_init_is_sent_before_the_leader_joins_itself() -> None:
    """The leader would wait in the rendezvous for workers that know of none."""
    group, asker = group_of(answering(rpc.InitOk()))

    def join(address: str) -> str:
        assert asker.requests == [rpc.Init("file:///x")]
        return f"joined {address}"

    assert group.join("file:///x", join) == "joined file:///x"


def test_leader_that_cannot_join_still_drains_the_workers() -> None:
    """No answer is left unread for the next request to trip over."""
    group, asker = group_of(answering(rpc.InitOk()))

    def join(address: str) -> str:
        raise DeadlineExceeded("nobody came")

    with pytest.raises(DeadlineExceeded, match="nobody came"):
        group.join("file:///x", join)
    assert not asker.unread


def test_sanity_check_needs_the_world_size_on_every_rank() -> None:
    """A wrong sum on one rank ends the load."""
    right, wrong = answering(rpc.NcclSanityResult(3)), answering(rpc.NcclSanityResult(2))
    group, _ = group_of(right, right)
    group.check_sanity(lambda: 3)
    group, _ = group_of(right, wrong)
    with pytest.raises(ModelLoadFailed, match=r"\[3, 3, 2\]"):
        group.check_sanity(lambda: 3)


def test_load_tells_the_least_free_memory_and_the_bytes_read() -> None:
    """The smallest rank decides on the cache."""
    group, _ = group_of(
        answering(rpc.LoadDenseShardOk(10, 500)), answering(rpc.LoadDenseShardOk(11, 300))
    )
    group.begin_load(b"{}", ("/w",), None)
    assert group.shards_loaded(400) == 300
    assert group.read_bytes == [10, 11]


@pytest.mark.parametrize(
    ("kind", "raised"),
    [
        ("load_failed", ModelLoadFailed),
        ("unsupported_arch", UnsupportedArchitecture),
        ("bad_request", Internal),
    ],
)
def test_worker_error_is_raised_as_its_kind(kind: rpc.ErrorKind, raised: type[CortexError]) -> None:
    """The rank and its own words are in the message."""
    group, _ = group_of(answering(rpc.Error(kind, "no room")))
    with pytest.raises(raised, match="rank 1: no room"):
        group.make_cache(CacheSize(8, 56))


def test_step_is_acknowledged_by_every_worker() -> None:
    """Steps count up; all workers get the same plan."""
    group, asker = group_of(stepping, stepping)
    step(group)
    step(group)
    assert group.step == 2
    assert asker.requests[0] == asker.requests[1] != asker.requests[2]
    assert asker.letters.snapshot() == {}


@pytest.mark.parametrize(
    ("worker", "text"),
    [
        (answering(rpc.GenerateStepOk(7)), "acknowledged step 7 instead of 1"),
        (answering(rpc.KvCacheCleared(0)), "answered KvCacheCleared instead of GenerateStepOk"),
        (answering(rpc.Error("forward_failed", "boom")), "rank 1: boom"),
        (answering(Ok()), "answered Ok instead of GenerateStepOk"),
        (answering(), "within its deadline"),
        (answering(rpc.GenerateStepOk(1), epoch=EPOCH - 1), "within its deadline"),
        (answering(rpc.GenerateStepOk(1), incarnation=EPOCH - 1), "within its deadline"),
        (garbage(b"\xff\xff"), "no answer"),
        (garbage(b""), "no answer"),
        (garbage(msgspec.msgpack.encode(["generate_step_ok"])), "no answer"),
        (garbage(msgspec.msgpack.encode(["generate_step_maybe", 1])), "no answer"),
        (garbage(msgspec.msgpack.encode(["generate_step_ok", 1, 2])), "no answer"),
    ],
)
def test_step_fails_on_a_worker_that_does_not_answer_as_it_should(
    worker: Script, text: str
) -> None:
    """Late, garbled, of another epoch, or simply wrong: never taken for an ack."""
    group, asker = group_of(worker, stepping)
    with pytest.raises(Internal, match=text):
        step(group)
    assert not asker.unread, "the good worker's ack was not drained"


def test_second_answer_to_one_request_is_a_dead_letter() -> None:
    """It cannot be taken for the next request's answer."""

    def twice(request: Message, header: Header) -> list[Frames]:
        return stepping(request, header) * 2

    group, asker = group_of(twice)
    step(group)
    step(group)
    assert asker.letters.snapshot() == {"expired": 2}


def test_meeting_place_is_new_and_old_ones_go(tmp_path: Path) -> None:
    """A killed leader leaves its file; the next epoch removes it."""
    old = Path(meeting_address(tmp_path, Address("model/0", 1)).removeprefix("file://"))
    old.touch()
    address = meeting_address(tmp_path, LEADER)
    assert not old.exists()
    Path(address.removeprefix("file://")).touch()
    leave_meeting_place(address)
    assert not list(tmp_path.iterdir())
