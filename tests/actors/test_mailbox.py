"""Admission, asks and dead letters, without a socket or a clock."""

from __future__ import annotations

from collections import Counter

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.mailbox import AskTable, DeadLetters, Intake, Outcome
from actors.transport.codec import encode_message
from cortexd.errors import ActorDown, CortexError, DeadlineExceeded, ErrorInfo, ModelNotFound
from cortexd.messages import Ok, Ping
from cortexd.messages.envelope import Address, Envelope, Header

OWN = Address("own", 3)
PEER = Address("peer", 7)


def _intake(
    now_ns: int = 100, gone: frozenset[Address] = frozenset()
) -> tuple[Intake, DeadLetters]:
    letters = DeadLetters()
    intake = Intake(OWN, 5, letters, now_ns=lambda: now_ns, is_gone=gone.__contains__)
    return intake, letters


def _frames(header: Header) -> list[bytes]:
    return list(encode_message(header, Ping()))


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        (Header(1, 0, PEER, Address("other", 3)), "no_such_actor"),
        (Header(1, 0, PEER, Address("own", 2)), "stale_incarnation"),
        (Header(1, 0, Address("dead", 1), OWN), "stale_incarnation"),
        (Header(1, 0, PEER, OWN, epoch=4), "stale_epoch"),
        (Header(1, 0, PEER, OWN, deadline_ns=99), "expired"),
        (Header(1, 0, PEER, OWN, version=2), "bad_decode"),
    ],
)
def test_intake_misaddressed_message_is_a_counted_dead_letter(header: Header, reason: str) -> None:
    """Each refusal has its reason and keeps the header."""
    intake, letters = _intake(gone=frozenset({Address("dead", 1)}))
    assert intake.admit(_frames(header)) is None
    assert letters.snapshot() == {reason: 1}
    assert letters.recent[-1] == (reason, header)


@pytest.mark.parametrize("dst", [OWN, Address("own", 0)])
def test_intake_admits_what_is_addressed_to_it(dst: Address) -> None:
    """The exact incarnation, or whoever is current."""
    intake, letters = _intake()
    envelope = intake.admit(_frames(Header(1, 0, PEER, dst, epoch=5, deadline_ns=100)))
    assert envelope is not None
    assert envelope.body == Ping()
    assert envelope.wants_reply
    assert not letters.counts


@given(st.lists(st.binary(max_size=64), max_size=3))
def test_intake_survives_any_frames(frames: list[bytes]) -> None:
    """Garbage is a dead letter, never an exception."""
    intake, letters = _intake()
    assert intake.admit(frames) is None
    assert sum(letters.counts.values()) == 1


@given(st.binary(max_size=64))
def test_intake_survives_any_body(body: bytes) -> None:
    """A good header does not make a bad body harmless."""
    intake, letters = _intake()
    good = msgspec.msgpack.encode(Header(1, 0, PEER, OWN))
    assert intake.admit([good, body]) is None or not letters.counts


def test_intake_survives_text_that_is_no_utf8() -> None:
    """The codec reports this one fault under another name."""
    intake, letters = _intake()
    good = msgspec.msgpack.encode(Header(1, 0, PEER, OWN))
    body = b"\x94\xa5Route\xa1\xff\xa1r\xc2"
    assert intake.admit([good, body]) is None
    assert letters.counts["bad_decode"] == 1


def test_intake_undecodable_answer_ends_its_ask_with_an_error() -> None:
    """The asker need not wait for its deadline to learn that the answer is none."""
    intake, letters = _intake()
    header, _ = _frames(Header(1, 4, PEER, OWN))
    envelope = intake.admit([header, b"\xff"])
    assert envelope is not None
    assert envelope.re == 4
    assert isinstance(envelope.body, ErrorInfo)
    assert letters.snapshot() == {"bad_decode": 1}


def test_intake_undecodable_request_is_reported_for_an_answer() -> None:
    """One that awaits an answer, that is; any other is only counted."""
    refused: list[Header] = []
    intake = Intake(
        OWN,
        5,
        DeadLetters(),
        now_ns=lambda: 100,
        is_gone=lambda _: False,
        on_undecodable=refused.append,
    )
    asked = Header(1, 0, PEER, OWN, deadline_ns=200)
    for header in (asked, Header(2, 0, PEER, OWN)):
        frame, _ = _frames(header)
        assert intake.admit([frame, b"\xff"]) is None
    assert refused == [asked]


def test_dead_letters_keep_a_bounded_tail() -> None:
    """Counters go on, headers do not pile up."""
    letters = DeadLetters()
    for number in range(1000):
        letters.add("full", Header(number, 0, PEER, OWN))
    assert letters.snapshot() == {"full": 1000}
    assert len(letters.recent) == 256


def _answer(ask_id: int, src: Address, body: Ok | ErrorInfo) -> Envelope:
    return Envelope(1, ask_id, src, OWN, 0, 0, body)


def test_ask_table_answer_of_another_incarnation_is_not_taken() -> None:
    """Only who was asked may answer."""
    table, outcomes = AskTable(), []
    table.open(1, PEER, 100, outcomes.append)
    assert not table.resolve(_answer(1, Address("peer", 8), Ok()))
    assert table.resolve(_answer(1, PEER, Ok()))
    assert not table.resolve(_answer(1, PEER, Ok()))
    assert outcomes == [Ok()]


def test_ask_table_peers_error_is_raised_as_its_class() -> None:
    """The error's class survives the wire."""
    table, outcomes = AskTable(), []
    table.open(1, PEER, 100, outcomes.append)
    table.resolve(_answer(1, PEER, ModelNotFound("no such model").to_info()))
    assert isinstance(outcomes[0], ModelNotFound)


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("open"), st.integers(1, 3), st.integers(1, 50)),
        st.tuples(st.just("reply"), st.integers(1, 30), st.integers(1, 3)),
        st.tuples(st.just("down"), st.integers(1, 3), st.just(0)),
        st.tuples(st.just("time"), st.integers(1, 20), st.just(0)),
        st.tuples(st.just("discard"), st.integers(1, 30), st.just(0)),
    ),
    max_size=60,
)


@given(STEPS)
def test_ask_table_every_ask_ends_exactly_once(steps: list[tuple[str, int, int]]) -> None:
    """Whatever the order of replies, deaths, deadlines and cancellations."""
    table = AskTable()
    now_ns = 0
    endings: Counter[int] = Counter()
    outcomes: dict[int, Outcome] = {}
    asked: dict[int, tuple[Address, int]] = {}
    discarded: set[int] = set()

    def complete(ask_id: int, outcome: Outcome) -> None:
        endings[ask_id] += 1
        outcomes[ask_id] = outcome

    for kind, first, second in steps:
        if kind == "open":
            ask_id = len(asked) + 1
            asked[ask_id] = (Address("peer", first), now_ns + second)
            table.open(
                ask_id, *asked[ask_id], complete=lambda outcome, key=ask_id: complete(key, outcome)
            )
        elif kind == "reply":
            table.resolve(_answer(first, Address("peer", second), Ok()))
        elif kind == "down":
            table.fail_peer(Address("peer", first), "killed")
        elif kind == "discard":
            if first in asked and not endings[first]:
                discarded.add(first)
            table.discard(first)
        else:
            now_ns += first
            table.expire(now_ns)
        still_open = asked.keys() - endings.keys() - discarded
        assert len(table) == len([key for key in still_open if endings[key] == 0])
        assert table.next_deadline_ns == min(
            (asked[key][1] for key in still_open if endings[key] == 0), default=None
        )
    table.expire(now_ns + 1000)
    for ask_id in asked:
        assert endings[ask_id] == (0 if ask_id in discarded else 1)
    for outcome in outcomes.values():
        assert isinstance(outcome, Ok | ActorDown | DeadlineExceeded)
        assert isinstance(outcome, CortexError | Ok)
    assert len(table) == 0
