"""One real actor loop against a scripted root and peer: every ending of an ask, order, bounds."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine

import pytest

from actors.actor import ActorContext, AsyncActor, handles
from actors.mailbox import MAX_RUNNING_HANDLERS
from cortexd.errors import (
    ActorDown as ActorDownError,
)
from cortexd.errors import (
    DeadlineExceeded,
    ErrorInfo,
    MailboxFull,
    ModelNotFound,
    RequestTooLarge,
)
from cortexd.messages import (
    ActorDown,
    ActorInfo,
    ActorUp,
    AdminReply,
    Bye,
    Drain,
    EndRequest,
    GroupUp,
    ListModels,
    ModelList,
    Ok,
    Ping,
    Pong,
    QueryHost,
    Ready,
    Stop,
    Welcome,
)
from cortexd.messages.control import Message
from cortexd.messages.envelope import Address, Envelope
from tests.doubles.bus import PEER, ScriptedBus, scripted
from tests.waiting import DEADLINE_S


class Echo(AsyncActor):
    """Remembers what it got; `ask` is driven by the test through `self`."""

    current: Echo

    def __init__(self, context: ActorContext) -> None:
        super().__init__(context)
        Echo.current = self
        self.log_of_events: list[object] = []
        self.release = asyncio.Event()

    @handles(EndRequest)
    def on_end_request(self, message: EndRequest, envelope: Envelope) -> None:
        """An inline handler."""
        self.log_of_events.append(message.request_id)

    @handles(QueryHost)
    async def on_query_host(self, message: QueryHost, envelope: Envelope) -> None:
        """A handler that waits until it is released."""
        await self.release.wait()

    @handles(ListModels)
    async def on_list_models(self, message: ListModels, envelope: Envelope) -> ModelList:
        """A handler that refuses."""
        raise ModelNotFound("none here")

    async def on_actor_up(self, up: ActorUp) -> None:
        """A slow callback, which must not be overtaken."""
        await asyncio.sleep(0)
        self.log_of_events.append(("up", up.sequence))

    def on_actor_down(self, down: ActorDown) -> None:
        """A quick callback."""
        self.log_of_events.append(("down", down.sequence))
        if down.incarnation == 2:
            self.release.set()


class SlowStart(Echo):
    """Does not get ready before it is released."""

    async def on_start(self) -> None:
        """Wait."""
        await self.release.wait()


class FailingStart(Echo):
    """Has a reason not to start."""

    async def on_start(self) -> None:
        """Refuse."""
        raise ModelNotFound("nothing to serve")


class Unbuildable(AsyncActor):
    """Cannot even be made."""

    def __init__(self, context: ActorContext) -> None:
        raise ZeroDivisionError("in the constructor")


def _play(scene: Callable[[ScriptedBus], Coroutine[object, object, None]]) -> None:
    async def play() -> None:
        async with scripted(Echo) as bus:
            await scene(bus)

    asyncio.run(play())


async def _ask(body: Message = Ping(), deadline_s: float = DEADLINE_S) -> Message:  # noqa: B008
    return await Echo.current.ask(PEER.name, body, deadline_s=deadline_s)


def test_ask_reply_is_returned() -> None:
    """The plain case; a second answer to the same ask is a dead letter."""

    async def scene(bus: ScriptedBus) -> None:
        asking = asyncio.create_task(_ask())
        asked = await bus.peer_hears()
        assert asked.wants_reply
        bus.send(Pong(), re=asked.id)
        bus.send(Pong(), re=asked.id)
        assert await asking == Pong()
        bus.send(Ping(), deadline_s=DEADLINE_S)
        await bus.peer_hears()
        assert bus.loop.dead_letters.snapshot() == {"expired": 1}

    _play(scene)


def test_ask_error_of_the_peer_is_raised() -> None:
    """As the class that the peer raised."""

    async def scene(bus: ScriptedBus) -> None:
        asking = asyncio.create_task(_ask())
        asked = await bus.peer_hears()
        bus.send(ModelNotFound("no").to_info(), re=asked.id)
        with pytest.raises(ModelNotFound, match="no"):
            await asking

    _play(scene)


def test_ask_without_answer_ends_at_its_deadline() -> None:
    """Also when earlier and later deadlines are open."""

    async def scene(bus: ScriptedBus) -> None:
        late = asyncio.create_task(_ask())
        for deadline_s in (0.05, 0.02, 0.0, -1.0):
            with pytest.raises(DeadlineExceeded, match=PEER.name):
                await _ask(deadline_s=deadline_s)
        late.cancel()

    _play(scene)


def test_ask_ends_when_the_peers_incarnation_is_gone() -> None:
    """At once, with the cause; later asks do not even start."""

    async def scene(bus: ScriptedBus) -> None:
        asking = asyncio.create_task(_ask())
        asked = await bus.peer_hears()
        bus.tell(ActorDown(1, PEER.name, PEER.incarnation, "", 0, "killed by SIGKILL"))
        with pytest.raises(ActorDownError, match="killed by SIGKILL"):
            await asking
        with pytest.raises(ActorDownError, match='"peer" is not running'):
            await _ask()
        bus.send(Pong(), re=asked.id)  # a voice from the grave
        bus.tell(ActorUp(2, ActorInfo(PEER.name, 2, "ready")))
        assert (await Echo.current.wait_for(PEER.name, deadline_s=DEADLINE_S)).incarnation == 2

    _play(scene)


def test_ask_to_a_peer_that_does_not_read_is_mailbox_full() -> None:
    """The queue is bounded and nothing blocks."""

    async def scene(bus: ScriptedBus) -> None:
        with pytest.raises(MailboxFull):
            _tell_many(MORE_THAN_ALL_QUEUES)
        # ZeroMQ's threads may still make a little room: what they can take has a bound, too.
        asks: list[asyncio.Task[Message]] = []
        while len(asks) < MORE_THAN_ALL_QUEUES and not (asks and asks[-1].done()):
            asks.append(asyncio.create_task(_ask()))
            await asyncio.sleep(0)
        with pytest.raises(MailboxFull):
            await asks.pop()
        for ask in asks:
            ask.cancel()
        with pytest.raises(RequestTooLarge):
            Echo.current.tell(PEER.name, AdminReply(bytes(17 * 1024 * 1024)))

    _play(scene)


# Those of both ends, and the sockets' buffers between them.
MORE_THAN_ALL_QUEUES = 20_000


def _tell_many(count: int) -> None:
    for _ in range(count):
        Echo.current.tell(PEER.name, Ping())


def test_cancelled_ask_leaves_nothing_behind() -> None:
    """Its answer is a dead letter."""

    async def scene(bus: ScriptedBus) -> None:
        asking = asyncio.create_task(_ask())
        asked = await bus.peer_hears()
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        bus.send(Pong(), re=asked.id)
        bus.send(Ping(), deadline_s=DEADLINE_S)
        await bus.peer_hears()
        assert bus.loop.dead_letters.snapshot() == {"expired": 1}

    _play(scene)


def test_wait_for_an_actor_that_never_comes_ends_at_its_deadline() -> None:
    """A bounded wait."""

    async def scene(bus: ScriptedBus) -> None:
        with pytest.raises(DeadlineExceeded, match='"nobody" was not ready within'):
            await Echo.current.wait_for("nobody", deadline_s=0.02)

    _play(scene)


def test_inline_handlers_keep_the_order_of_arrival() -> None:
    """Token batches rely on it."""

    async def scene(bus: ScriptedBus) -> None:
        for number in range(300):
            bus.send(EndRequest(str(number)))
        bus.send(EndRequest("last"), deadline_s=DEADLINE_S)
        assert (await bus.peer_hears()).body == Ok()
        assert Echo.current.log_of_events == [*map(str, range(300)), "last"]

    _play(scene)


def test_more_handlers_than_allowed_are_refused() -> None:
    """The ask over the bound is told so, the others run on."""

    async def scene(bus: ScriptedBus) -> None:
        for number in range(MAX_RUNNING_HANDLERS + 1):
            if number % 100 == 0:  # what was sent has been read: the queue has its own bound
                bus.send(Ping(), deadline_s=DEADLINE_S)
                assert (await bus.peer_hears()).body == Pong()
            bus.send(QueryHost(), deadline_s=DEADLINE_S)
        refused = await bus.peer_hears()
        assert isinstance(refused.body, ErrorInfo)
        assert refused.body.code == "mailbox_full"
        assert bus.loop.dead_letters.snapshot() == {"full": 1}
        Echo.current.release.set()
        for _ in range(MAX_RUNNING_HANDLERS):
            assert (await bus.peer_hears()).body == Ok()

    _play(scene)


def test_expired_or_unknown_messages_are_dead_letters() -> None:
    """Expired ones unread; unknown ones answered with an error."""

    async def scene(bus: ScriptedBus) -> None:
        bus.send(EndRequest("late"), deadline_s=-1.0)
        bus.send(Pong(), src=Address(PEER.name, 1))
        bus.send(ModelList([]), deadline_s=DEADLINE_S)
        answer = (await bus.peer_hears()).body
        assert isinstance(answer, ErrorInfo)
        assert "no handler for ModelList" in answer.message
        assert Echo.current.log_of_events == []
        assert bus.loop.dead_letters.snapshot() == {"expired": 1, "no_such_actor": 2}

    _play(scene)


def test_error_of_an_asked_handler_is_no_log_line(caplog: pytest.LogCaptureFixture) -> None:
    """It is an answer, and the asker's to log."""

    async def scene(bus: ScriptedBus) -> None:
        with caplog.at_level(logging.DEBUG):
            bus.send(ListModels(), deadline_s=DEADLINE_S)
            answer = (await bus.peer_hears()).body
        assert isinstance(answer, ErrorInfo)
        assert answer.code == "model_not_found"
        assert not [record for record in caplog.records if record.name == "cortexd"]

    _play(scene)


def test_registry_callbacks_come_in_order() -> None:
    """A slow one delays those after it."""

    async def scene(bus: ScriptedBus) -> None:
        bus.tell(ActorUp(1, ActorInfo("a", 1, "ready")))
        bus.tell(ActorDown(2, "a", 1, "", 0, "x"))
        bus.tell(ActorUp(3, ActorInfo("a", 2, "ready")))
        bus.tell(GroupUp(4, "g", 1, "g/0"))
        bus.tell(ActorDown(5, "a", 2, "", 0, "x"))
        bus.send(EndRequest("end"), deadline_s=DEADLINE_S)
        await bus.peer_hears()
        await asyncio.wait_for(Echo.current.release.wait(), DEADLINE_S)
        events = [event for event in Echo.current.log_of_events if event != "end"]
        assert events == [("up", 1), ("down", 2), ("up", 3), ("down", 5)]

    _play(scene)


def test_lost_registry_event_ends_the_process() -> None:
    """A stale view is worse than a restart."""

    async def play() -> None:
        async with scripted(Echo, is_stopped=False) as bus:
            bus.tell(ActorUp(2, ActorInfo("a", 1, "ready")))
            async with asyncio.timeout(DEADLINE_S):
                assert await bus.exit_code == 1

    asyncio.run(play())


def test_messages_before_ready_wait_and_follow_in_order() -> None:
    """A start may take its time; what arrived meanwhile is not lost."""

    async def play() -> None:
        async with scripted(SlowStart, is_welcome=False) as bus:
            bus.tell(Welcome(0, [ActorInfo(PEER.name, PEER.incarnation, "ready")]))
            for number in range(3):
                bus.send(EndRequest(str(number)))
            bus.send(Ping(), deadline_s=DEADLINE_S)
            assert (await bus.peer_hears()).body == Pong()
            assert Echo.current.log_of_events == []
            Echo.current.release.set()
            await bus.root_hears(Ready)
            assert Echo.current.log_of_events == ["0", "1", "2"]

    asyncio.run(play())


def test_failed_start_tells_the_root_why() -> None:
    """The class of the error survives, and the process ends as soon as the root has read it."""

    async def play() -> None:
        async with scripted(FailingStart, is_welcome=False, is_stopped=False) as bus:
            bus.tell(Welcome(0, []))
            error = await bus.root_hears(ErrorInfo)
            assert error.to_exception().message == "nothing to serve"
            bus.tell(Stop())
            async with asyncio.timeout(DEADLINE_S):
                assert await bus.exit_code == 1

    asyncio.run(play())


def test_failed_start_waits_for_a_root_that_gets_its_turn_late() -> None:
    """On a busy machine; an error that the root misses would be taken for a crash."""

    async def play() -> None:
        async with scripted(FailingStart, is_welcome=False, is_stopped=False) as bus:
            bus.tell(Welcome(0, []))
            await bus.root_hears(ErrorInfo)
            await asyncio.sleep(0.7)  # its turn comes late: that is the subject
            assert not bus.exit_code.done()
            bus.tell(Stop())
            assert await bus.exit_code == 1

    asyncio.run(play())


def test_failing_constructor_is_a_failed_start() -> None:
    """Its cause reaches the root as well."""

    async def play() -> None:
        async with scripted(Unbuildable, is_welcome=False, is_stopped=False) as bus:
            bus.tell(Welcome(0, []))
            error = await bus.root_hears(ErrorInfo)
            assert error.message == "ZeroDivisionError: in the constructor"
            bus.tell(Stop())
            await bus.exit_code

    asyncio.run(play())


def test_drain_is_answered_when_done_and_stop_says_bye() -> None:
    """The order in which the root ends an actor."""

    async def play() -> None:
        async with scripted(Echo, is_stopped=False) as bus:
            bus.tell(Drain(1.0))
            bus.tell(Stop())
            await bus.root_hears(Bye)
            async with asyncio.timeout(DEADLINE_S):
                assert await bus.exit_code == 0

    asyncio.run(play())
