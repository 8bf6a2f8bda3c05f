"""A double of the bus with a router, a poller and a leader behind it, driven by the test.

The leader answers each `Submit` with `reply`, one token a step; `pause_after` stops it after so
many tokens (and sets `paused`) until `resume`. Everything sent is kept in `sent`.
"""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import Callable, Sequence

from cortexd.errors import (
    ActorDown,
    CortexError,
    DeadlineExceeded,
    EngineRestarting,
    ErrorInfo,
    ModelLoading,
    ModelNotFound,
    NoHealthyNode,
)
from cortexd.ledger import Charge, Ledger, Reservation
from cortexd.messages import (
    Cancel,
    EndRequest,
    HostReport,
    LeaseReport,
    ListModels,
    Loading,
    LoadModel,
    LoadReport,
    ModelList,
    NodeView,
    Ok,
    Place,
    QueryHost,
    QueryLoading,
    QueryNode,
    ReportUsage,
    RequestFinished,
    RequestsFinished,
    Reserve,
    Route,
    Routed,
    RoutedHere,
    RoutedRemote,
    SleepModel,
    Submit,
    TokenBatch,
    UnloadModelNow,
    WakeModel,
)
from cortexd.messages.control import Message
from cortexd.messages.fleet import DeviceReport
from cortexd.messages.inference import PromptScores, SequenceDelta
from cortexd.messages.neurons import CatalogueCard, NodeStatus
from cortexd.models import (
    ModelFiles,
    ModelLimits,
    ModelSpec,
    ModelState,
    ModelStatus,
    RopeSpec,
)
from tests.doubles.text import EOS, VOCAB_SIZE
from tests.waiting import DEADLINE_S

MODEL = "org/tiny-model"
ALIAS = "tiny"
LEADER = "tiny/0"
CONTEXT = 128

FILES = ModelFiles(
    model_id=MODEL, source="path", revision="r1", format="gguf", weights=("/models/tiny.gguf",)
)
SPEC = ModelSpec(
    model_type="llama",
    architecture="llama",
    vocab_size=VOCAB_SIZE,
    hidden_size=8,
    intermediate_size=16,
    num_hidden_layers=1,
    num_attention_heads=1,
    num_key_value_heads=1,
    head_dim=8,
    rms_norm_eps=1e-5,
    max_position_embeddings=CONTEXT,
    rope=RopeSpec(),
)


class Fleet:
    """The other actors, as one front sees them."""

    def __init__(self) -> None:
        self.sent: list[tuple[str, Message]] = []
        self.finished: list[RequestFinished] = []  # what metrics got
        self.reply: Sequence[int] = b"Hello, world!"  # token ids
        self.replies: list[Sequence[int]] = []  # taken first, one per Submit
        self.finish_reason = "stop"
        self.delta_error: CortexError | None = None
        self.num_cached_tokens = 0
        self.scores_prompts = True
        self.pause_after: int | None = None
        self.paused = asyncio.Event()
        self.load_error: CortexError | None = None
        self.replicas: list[RoutedRemote] = []  # remote ones, in the order of choice
        self.loading = Loading()
        self.catalogue: list[CatalogueCard] = []
        self.nodes: list[NodeStatus] = []
        self.is_draining = False
        self.is_asleep = False
        self.is_due = False
        self.num_queued = 0  # at the router
        self.has_failed = False
        self.defaults: dict[str, float] = {}
        self.lost_nodes: set[str] = set()
        self.in_flight: dict[str, int] = {}  # by node, as the polls say
        self.placing = asyncio.Event()  # cleared: the model loads at its node
        self.placing.set()
        self.host_answers = True
        self.context = CONTEXT
        self.spec = SPEC
        self.incarnations: dict[str, int | None] = {
            "router": 1,
            LEADER: 1,
            "poller": 1,
            "budgets": 1,
        }
        self.ledger = Ledger()
        self.charges: list[Charge] = []
        self.epoch = 1
        self.on_batch: Callable[[TokenBatch], None] = lambda batch: None
        self._resume = asyncio.Event()
        self._loaded = asyncio.Event()
        self._loaded.set()
        self._changed = asyncio.Event()
        self._running: dict[int, asyncio.Task[None]] = {}

    # The bus

    def tell(self, name: str, body: Message) -> None:
        """Keep the message; a leader acts on Submit and Cancel."""
        if name in self.incarnations and self.incarnations[name] is None:
            raise ActorDown(f"{name} is down")
        self.sent.append((name, body))
        if isinstance(body, RequestsFinished):
            self.finished += body.requests
        self._changed.set()
        if isinstance(body, Submit):
            self._running[body.sequence_id] = asyncio.ensure_future(self._generate(body))
        if isinstance(body, Cancel) and body.sequence_id in self._running:
            self._running.pop(body.sequence_id).cancel()

    async def ask(self, name: str, body: Message, *, deadline_s: float) -> Message:
        """Answer as router and poller do."""
        self.sent.append((name, body))
        self._changed.set()
        if self.incarnations.get(name) is None:
            raise ActorDown(f"{name} is down")
        if isinstance(body, Route):
            try:
                async with asyncio.timeout(deadline_s):
                    return await self._route(body)
            except TimeoutError:
                raise DeadlineExceeded("no answer from router") from None
        if isinstance(body, Place):
            await self.placing.wait()
            return self._place(body)
        if isinstance(body, QueryLoading):
            return self.loading
        if isinstance(body, QueryNode):
            return NodeView(body.node not in self.lost_nodes, self.in_flight.get(body.node))
        if isinstance(body, QueryHost) and not self.host_answers:
            raise ActorDown("poller did not answer")
        return self._answer(body)

    def incarnation_of(self, name: str) -> int | None:
        """Return the incarnation of an actor that is up."""
        return self.incarnations.get(name)

    # What tests do to it

    def begin_loading(self) -> None:
        """Make the model cold."""
        self._loaded.clear()

    def finish_loading(self) -> None:
        """Let waiting routes go."""
        self._loaded.set()

    def resume(self) -> None:
        """Let the leader go on for good."""
        self.pause_after = None
        self._resume.set()

    def kill_leader(self) -> EngineRestarting:
        """End the leader's incarnation; the caller tells the front, as the root would."""
        for task in self._running.values():
            task.cancel()
        self._running.clear()
        self.incarnations[LEADER] = None
        self.paused.clear()
        return EngineRestarting("the engine of this model ended (killed); try again")

    def revive_leader(self) -> None:
        """Bring the group back under a new epoch."""
        self.epoch += 1
        self.incarnations[LEADER] = self.epoch

    def all_sent(self, kind: type[Message]) -> list[Message]:
        """Return the messages of one type, in order."""
        return [body for _, body in self.sent if isinstance(body, kind)]

    async def wait_for(self, kind: type[Message], count: int = 1) -> list[Message]:
        """Wait until so many messages of one type were told."""
        async with asyncio.timeout(DEADLINE_S):
            while len(self.all_sent(kind)) < count:
                self._changed.clear()
                await self._changed.wait()
        return self.all_sent(kind)

    async def wait_for_finished(self, count: int = 1) -> list[RequestFinished]:
        """Wait until metrics has heard of so many ended requests."""
        async with asyncio.timeout(DEADLINE_S):
            while len(self.finished) < count:
                self._changed.clear()
                await self._changed.wait()
        return self.finished

    async def wait_for_charge(self, count: int = 1) -> Charge:
        """Wait until so many requests were settled; return the last one's charge."""
        async with asyncio.timeout(DEADLINE_S):
            while len(self.charges) < count:
                self._changed.clear()
                await self._changed.wait()
        return self.charges[-1]

    @property
    def submits(self) -> list[Submit]:
        """Return what the leader was asked to run."""
        return [body for _, body in self.sent if isinstance(body, Submit)]

    def open_leases(self) -> set[str]:
        """Return leases that were asked for and not ended."""
        opened = {body.request_id for _, body in self.sent if isinstance(body, Route | Place)}
        ended = {body.request_id for _, body in self.sent if isinstance(body, EndRequest)}
        for body in self.all_sent(LeaseReport):
            assert isinstance(body, LeaseReport), "asked for by its type"
            opened |= {lease.request_id for lease in body.begun}
            ended |= {lease.request_id for lease in body.ended}
        return opened - ended

    @property
    def num_running(self) -> int:
        """Return how many sequences the leader still runs."""
        return len(self._running)

    # The actors

    async def _route(self, body: Route) -> Routed:
        if body.model not in {MODEL, ALIAS}:
            raise ModelNotFound(f'model "{body.model}" is not known here', param="model")
        if self.load_error is not None:
            raise self.load_error
        is_cold = not self._loaded.is_set()
        if is_cold and not body.wait:
            raise ModelLoading("loading", retry_after_s=7.2, progress=0.5)
        await self._loaded.wait()
        return Routed(
            MODEL,
            LEADER,
            self.incarnations[LEADER] or 0,
            self.epoch,
            FILES,
            self.spec,
            ModelLimits(context=self.context, output=self.context),
            is_cold,
            self.defaults,
        )

    def _place(self, body: Place) -> RoutedHere | RoutedRemote:
        if self.load_error is not None:
            raise self.load_error
        if body.model in {MODEL, ALIAS}:
            return RoutedHere(MODEL)
        for replica in self.replicas:
            if replica.node not in body.exclude:
                return replica
        raise NoHealthyNode("no node answers; retry later", retry_after_s=5)

    def _budget(self, body: Reserve | ReportUsage) -> Message:
        if isinstance(body, Reserve):
            reservation = Reservation(body.key_id, "front.0.1", body.tokens, 0.0)
            self.ledger.reserve(body.request_id, reservation, 0.0)
            return Ok()
        for entry in body.entries:
            self.ledger.report(entry.request_id, entry.prompt_tokens, entry.completion_tokens, 0.0)
            charge = self.ledger.settle(entry.request_id, 0.0) if entry.is_final else None
            if charge is not None:
                self.charges.append(charge)
        self._changed.set()
        return Ok()

    def _answer(self, body: Message) -> Message:
        if isinstance(body, Reserve | ReportUsage):
            return self._budget(body)
        if isinstance(body, ListModels):
            state: ModelState = "loaded" if self._loaded.is_set() else "loading"
            if self.is_asleep:
                state = "sleeping"
            if self.has_failed:
                state = "failed"
            limits = ModelLimits(context=self.context, output=self.context)
            status = ModelStatus(
                model_id=MODEL,
                state=state,
                files=FILES if state != "loading" else None,
                limits=limits,
                memory_bytes=5 * 2**20,
                loaded_at=1.7e9,
                leader=LEADER if state != "loading" else None,
                progress=0.25 if state == "loading" else None,
                is_due=self.is_due,
                queue_depth=self.num_queued,
            )
            return ModelList(
                [status],
                {ALIAS: MODEL},
                nodes=self.nodes,
                catalogue=self.catalogue,
                is_draining=self.is_draining,
            )
        if isinstance(body, QueryHost):
            device = DeviceReport(0, "test cpu", "cpu", 8 * 2**30, 2 * 2**30, 12.5)
            load = LoadReport(MODEL, 2, 1, 3, 10, 100.0, 20.0, 0, 5, 6, 7)
            return HostReport("host", "Linux", "6.1", None, [device], [load])
        if isinstance(body, LoadModel | UnloadModelNow | SleepModel | WakeModel):
            if self.load_error is not None:
                raise self.load_error
            return Ok()
        raise AssertionError(f"nobody answers {body}")

    async def _generate(self, submit: Submit) -> None:
        prompt = array("i", submit.prompt_token_ids)
        tokens = list(self.replies.pop(0) if self.replies else self.reply)
        reason = self.finish_reason
        if len(tokens) >= submit.max_tokens:
            tokens, reason = tokens[: submit.max_tokens], "length"
        if self.delta_error is not None:
            self._send(submit, [], error=self.delta_error.to_info(), finish_reason="error")
            return
        self._send(submit, [])
        await self._send_scores(submit, prompt)
        for position, token in enumerate(tokens):
            await self._pause_at(position)
            self._send(submit, [token])
            await asyncio.sleep(0)
        await self._pause_at(len(tokens))
        self._running.pop(submit.sequence_id, None)
        self._send(submit, [], finish_reason=reason)

    async def _send_scores(self, submit: Submit, prompt: array[int]) -> None:
        """Score the prompt's tokens from the second on, one a step: each is the second best."""
        count = submit.num_prompt_logprobs if self.scores_prompts else -1
        await asyncio.sleep(0)
        for _ in prompt[1:] if count >= 0 else []:
            top_ids = [ord("a") + rank for rank in range(count)]
            tops = [-0.125 - rank for rank in range(count)]
            scores = PromptScores([-0.75], [2], [top_ids], [tops])
            delta = SequenceDelta(submit.sequence_id, [], prompt_scores=scores)
            self.on_batch(TokenBatch(self.epoch, 1, [delta]))
            await asyncio.sleep(0)

    async def _pause_at(self, position: int) -> None:
        if position == self.pause_after:
            self.paused.set()
            await self._resume.wait()

    def _send(
        self,
        submit: Submit,
        tokens: list[int],
        *,
        finish_reason: str | None = None,
        error: ErrorInfo | None = None,
    ) -> None:
        wanted = submit.num_logprobs
        delta = SequenceDelta(
            submit.sequence_id,
            tokens,
            finish_reason=finish_reason,
            logprobs=[-0.5] * len(tokens) if wanted >= 0 else [],
            top_ids=[[ord("a") + rank for rank in range(wanted)] for _ in tokens],
            top_logprobs=[[-0.5 - rank for rank in range(wanted)] for _ in tokens],
            num_prompt_tokens=len(array("i", submit.prompt_token_ids)),
            num_cached_tokens=self.num_cached_tokens,
            error=error,
        )
        self.on_batch(TokenBatch(self.epoch, 1, [delta]))


assert EOS < VOCAB_SIZE, "the end token is part of the vocabulary"
