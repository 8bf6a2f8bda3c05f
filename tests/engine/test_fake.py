"""The fake engine."""

from __future__ import annotations

from collections import defaultdict

import pytest

from cortexd import errors
from engine.engine import Engine
from engine.fake import FAIL, RAISE, FakeEngine, checksum_token
from tests.engine.doubles import make_submit
from tests.engine.driving import Outcome, collect


def run(engine: FakeEngine) -> dict[int, Outcome]:
    """Step to the end."""
    outcomes: dict[int, Outcome] = defaultdict(Outcome)
    while engine.has_work:
        collect(outcomes, engine.step())
    return outcomes


def test_streams_carry_the_checksums_of_their_own_prompts() -> None:
    """Each sequence gets its own tokens, whoever else runs."""
    engine = FakeEngine()
    prompts = {index: [index, 5, 6] for index in range(4)}
    for index, prompt in prompts.items():
        engine.submit("front.0", make_submit(prompt, sequence_id=index, max_tokens=3 + index))
    for index, outcome in run(engine).items():
        expected = [checksum_token(prompts[index], step) for step in range(3 + index)]
        assert outcome.token_ids == expected
        assert outcome.finish_reason == "length"
        assert outcome.deltas[0].num_prompt_tokens == 3


def test_special_prompts_make_trouble() -> None:
    """One fails its sequence, one the step."""
    engine = FakeEngine()
    engine.submit("front.0", make_submit([FAIL], sequence_id=1))
    engine.submit("front.0", make_submit([1], sequence_id=2, max_tokens=1))
    outcomes = run(engine)
    assert outcomes[1].error is not None
    assert outcomes[1].error.code == errors.NonFiniteLogits.code
    assert outcomes[2].finish_reason == "length"
    engine.submit("front.0", make_submit([RAISE]))
    with pytest.raises(RuntimeError, match="told to raise"):
        engine.step()


def test_cancel_and_limits_behave_as_the_real_ones() -> None:
    """Cancellation is told once; an owner that is gone is told nothing; limits are checked."""
    engine = FakeEngine(context=8)
    engine.submit("front.0", make_submit([1], sequence_id=1))
    engine.submit("front.1", make_submit([1], sequence_id=1))
    engine.cancel("front.0", 1)
    engine.cancel("front.0", 1)
    engine.cancel_owner("front.1")
    steps = engine.step()
    assert [delta.finish_reason for delta in steps["front.0"]] == ["cancelled"]
    assert "front.1" not in steps
    assert not engine.has_work
    with pytest.raises(errors.ContextLengthExceeded, match="maximum context length is 8 tokens"):
        engine.submit("front.0", make_submit([1] * 8))


def test_fake_has_all_public_names_of_the_real_engine() -> None:
    """A leader that runs with one runs with the other."""
    public = {name for name in vars(Engine) if not name.startswith("_")}
    assert public <= {name for name in vars(FakeEngine) if not name.startswith("_")}
    fake = FakeEngine()
    for name in ("limits", "memory_bytes", "device_name", "dtype_name", "backend_name"):
        assert hasattr(fake, name)
    assert fake.report("m").model_id == "m"
