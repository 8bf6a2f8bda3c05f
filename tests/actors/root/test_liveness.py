"""When a child is silent, hung, or only slow, with a clock of our own."""

from __future__ import annotations

from hypothesis import example, given
from hypothesis import strategies as st

from actors.root.liveness import Hung, Liveness
from cortexd.messages.control import Beat, Progress
from cortexd.settings import Supervision

SUPERVISION = Supervision(
    suspect_after_s=2.0, kill_after_s=5.0, step_timeout_s=30.0, load_stall_timeout_s=10.0
)


def _liveness(*, is_rank: bool = False) -> Liveness:
    return Liveness(SUPERVISION, start_timeout_s=8.0, beats_while_starting=not is_rank, now_s=0.0)


def _beat(steps: int = 0, *, busy: bool = False) -> Beat:
    return Beat(0.0, 0, 0, steps, busy)


def test_liveness_silence_is_suspect_then_hung() -> None:
    """A beat in between makes it well again."""
    liveness = _liveness()
    liveness.ready(0.0)
    assert liveness.health(1.9) == "fine"
    assert liveness.health(2.0) == "silent"
    liveness.beat(_beat(), 4.0)
    assert liveness.health(5.9) == "fine"
    assert liveness.health(9.0) == Hung("silent for 5.0 s")


def test_liveness_start_deadline_moves_with_progress_only() -> None:
    """The same report twice is no progress."""
    liveness = _liveness(is_rank=True)
    liveness.progress(Progress(0.1, "loading"), 7.0)
    assert liveness.health(16.9) == "fine"
    liveness.progress(Progress(0.1, "loading"), 16.0)
    assert liveness.health(17.0) == Hung("did not get ready in time")
    liveness.progress(Progress(0.2, "loading"), 16.5)
    assert liveness.health(17.0) == "fine"


def test_liveness_loading_rank_may_be_silent() -> None:
    """It may hold the interpreter while it loads; a light actor may not."""
    rank, light = _liveness(is_rank=True), _liveness()
    for one in (rank, light):
        one.hello(0.0)
    assert rank.health(6.0) == "fine"
    assert isinstance(light.health(6.0), Hung)


def test_liveness_busy_rank_must_count_steps() -> None:
    """Idle ranks and ranks that move are well, however long."""
    liveness = _liveness(is_rank=True)
    liveness.ready(0.0)
    for second in range(1, 100):
        liveness.beat(_beat(second, busy=True), float(second))
        assert liveness.health(second + 0.5) == "fine"
    for second in range(100, 200):
        liveness.beat(_beat(99), float(second))
        assert liveness.health(second + 0.5) == "fine"
    verdicts = []
    for second in range(200, 240):
        liveness.beat(_beat(99, busy=True), float(second))
        verdicts.append(liveness.health(float(second)))
    assert verdicts[29] == "fine"
    assert verdicts[30] == Hung("step 100 does not end")


def test_liveness_silence_is_forgiven_when_nobody_listened() -> None:
    """A root that was itself stopped blames no one."""
    liveness = _liveness()
    liveness.ready(0.0)
    liveness.forgive_silence(100.0)
    assert liveness.health(101.0) == "fine"


# At 5.685 s the silence is 2 s but for a rounding.
@example(
    [(1.167, False, False)] * 2
    + [(0.615, False, False), (0.736, True, False)]
    + [(2.0, False, False)]
)
@given(st.lists(st.tuples(st.floats(0.01, 3.0), st.booleans(), st.booleans()), max_size=40))
def test_liveness_next_check_misses_no_verdict(steps: list[tuple[float, bool, bool]]) -> None:
    """Between now and the next check the verdict stays what it is."""
    liveness = _liveness()
    liveness.ready(0.0)
    now_s = 0.0
    for wait_s, is_beating, is_busy in steps:
        now_s += wait_s
        if is_beating:
            liveness.beat(_beat(0, busy=is_busy), now_s)
        verdict = liveness.health(now_s)
        if isinstance(verdict, Hung):
            return
        just_before_s = now_s + liveness.next_check_s(now_s) - 0.02
        if just_before_s > now_s:
            assert liveness.health(just_before_s) == verdict
