"""Structured output through the real engine: whatever the model, the answer follows its grammar."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import pytest
import torch

from cortexd.models import ModelFiles
from engine.engine import Engine
from engine.grammar.schema import checked_schema
from engine.grammar.source import choice, grammar, json_value, regex
from engine.sources.local import resolve_path
from engine.text.text_model import TextModel
from tests.engine.checkpoints import load_engine
from tests.engine.doubles import make_submit
from tests.engine.driving import OWNER, Outcome, run_to_end
from tests.tree.tiny_model import make_tiny_model

torch.set_num_threads(1)

PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "kind": {"enum": ["a", "bc", None, 7]},
        "tags": {"type": "array", "items": {"type": "boolean"}, "maxItems": 3},
        "parent": {"anyOf": [{"$ref": "#/$defs/ref"}, {"type": "null"}]},
    },
    "required": ["name", "age", "kind", "tags", "parent"],
    "additionalProperties": False,
    "$defs": {
        "ref": {
            "type": "object",
            "properties": {"id": {"type": "string", "pattern": "^[a-f0-9]{4}$"}},
            "required": ["id"],
            "additionalProperties": False,
        }
    },
}
PERSON_GRAMMAR = grammar(json_value(PERSON))
SAMPLED: dict[str, Any] = {"temperature": 1.3, "max_tokens": 400, "grammar": PERSON_GRAMMAR}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> ModelFiles:
    """One tiny random model with a tokenizer."""
    directory = make_tiny_model(tmp_path_factory.mktemp("grammar") / "tiny", seed=3)
    return resolve_path(directory, None, "test/tiny")


@pytest.fixture(scope="module")
def text_model(files: ModelFiles) -> TextModel:
    """Its text side."""
    return TextModel.load(files)


@pytest.fixture
def engine(files: ModelFiles) -> Engine:
    """Its engine, with room for a few sequences."""
    return load_engine(files, kv_cache_mib=4)


def run(engine: Engine, *submits: dict[str, Any]) -> list[Outcome]:
    """Run sequences together; return their outcomes in order."""
    for index, fields in enumerate(submits):
        engine.submit(OWNER, make_submit([5, 6, 7, 8 + index % 3], sequence_id=index, **fields))
    outcomes = run_to_end(engine)
    return [outcomes[index] for index in range(len(submits))]


def document(outcome: Outcome, text_model: TextModel) -> Any:
    """Return the JSON an outcome spells; it must be whole."""
    assert outcome.error is None
    assert outcome.finish_reason == "stop"
    return json.loads(text_model.decode(outcome.token_ids))


@pytest.mark.parametrize("seed", range(6))
def test_random_model_always_writes_what_the_schema_wants(
    engine: Engine, text_model: TextModel, seed: int
) -> None:
    """The schema holds for sampled answers of a model that knows nothing."""
    checked = checked_schema(PERSON, "schema")
    assert checked == PERSON
    fields = {**SAMPLED, "seed": seed}
    for outcome in run(engine, fields, {**fields, "temperature": 0.0}, {**fields, "top_k": 3}):
        jsonschema.validate(document(outcome, text_model), PERSON)


def test_settings_go_with_a_grammar(engine: Engine, text_model: TextModel) -> None:
    """Penalties, log probabilities, min_tokens and ignore_eos neither break nor outlive it."""
    outcomes = run(
        engine,
        {**SAMPLED, "seed": 1, "repetition_penalty": 1.5, "frequency_penalty": 1.0},
        {**SAMPLED, "seed": 2, "num_logprobs": 2},
        {**SAMPLED, "seed": 3, "min_tokens": 399},
        {**SAMPLED, "seed": 4, "ignore_eos": True},
    )
    for outcome in outcomes:
        jsonschema.validate(document(outcome, text_model), PERSON)
    scores = [score for delta in outcomes[1].deltas for score in delta.logprobs]
    assert len(scores) == len(outcomes[1].token_ids)


def test_end_is_allowed_exactly_when_the_grammar_accepts(
    engine: Engine, text_model: TextModel
) -> None:
    """With every end token favoured, an answer ends at the first place where it may, not before."""
    ends = dict.fromkeys(text_model.eos_token_ids, 100.0)
    [outcome] = run(
        engine, {"max_tokens": 50, "logit_bias": ends, "grammar": grammar(regex("ab{3,}"))}
    )
    assert text_model.decode(outcome.token_ids) == "abbb"
    assert outcome.finish_reason == "stop"
    fields = {"max_tokens": 9, "logit_bias": ends, "grammar": grammar(regex("b+")), "min_tokens": 5}
    held, endless = run(engine, fields, {**fields, "ignore_eos": True})
    assert (text_model.decode(held.token_ids), held.finish_reason) == ("bbbbb", "stop")
    assert (text_model.decode(endless.token_ids), endless.finish_reason) == ("b" * 9, "length")


def test_answer_does_not_depend_on_neighbours_or_preemption(files: ModelFiles) -> None:
    """Alone, or among others and preempted for want of blocks: the same seeded answers."""
    submits: list[dict[str, Any]] = [{**SAMPLED, "max_tokens": 60, "seed": n} for n in range(4)]
    submits.append({"temperature": 1.0, "max_tokens": 60, "ignore_eos": True, "seed": 9})
    roomy = load_engine(files, kv_cache_mib=4)
    together = [outcome.token_ids for outcome in run(roomy, *submits)]
    assert roomy.report("m").num_preemptions == 0
    for number in (0, 4):
        engine = load_engine(files, kv_cache_mib=4)
        prompt = [5, 6, 7, 8 + number % 3]
        engine.submit(OWNER, make_submit(prompt, **submits[number]))
        assert run_to_end(engine)[1].token_ids == together[number]
    crowded = load_engine(files, max_model_len=72)
    pool = crowded.scheduler.pool
    pool.allocate(pool.num_free - 16)
    pool.num_blocks = 17
    outcomes = run(crowded, *submits)
    assert crowded.report("m").num_preemptions > 0
    assert [outcome.token_ids for outcome in outcomes] == together


def test_bad_grammar_fails_its_request_only(engine: Engine) -> None:
    """What the compiler refuses is the client's error; the others go on."""
    bad, good = run(engine, {"grammar": "start: /[/"}, {"max_tokens": 3, "ignore_eos": True})
    assert bad.error is not None
    assert bad.error.code == "invalid_value"
    assert len(good.token_ids) == 3


def test_row_without_any_allowed_token_says_why(engine: Engine, text_model: TextModel) -> None:
    """A grammar and bad_words that leave nothing fail the request, not as broken logits."""
    [a] = text_model.encode("a", add_special_tokens=False)
    [outcome] = run(engine, {"grammar": grammar(choice(["a"])), "bad_words": [[a]]})
    assert outcome.error is not None
    assert "grammar" in outcome.error.message


def test_sequence_that_waits_for_its_grammar_can_be_cancelled(engine: Engine) -> None:
    """Nothing of it is left, and the engine is idle again."""
    engine.submit(OWNER, make_submit([1, 2], sequence_id=1, grammar=PERSON_GRAMMAR))
    assert engine.has_work
    engine.cancel(OWNER, 1)
    outcomes = run_to_end(engine)
    assert outcomes[1].finish_reason == "cancelled"
    assert not engine.has_work
