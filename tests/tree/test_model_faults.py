"""A daemon whose model has a fault: who is told, and who is not harmed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from tests.tree.daemon import Daemon
from tests.tree.tiny_model import make_tiny_model

pytestmark = pytest.mark.tree
BAD_LETTER = "Z"


@pytest.fixture(scope="module")
def faulty_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that cannot stand one letter, and that samples greedily unless told otherwise."""
    directory = make_tiny_model(tmp_path_factory.mktemp("models") / "faulty", seed=3)
    weights = load_file(directory / "model.safetensors")
    letter = Tokenizer.from_file(str(directory / "tokenizer.json")).token_to_id(BAD_LETTER)
    weights["model.embed_tokens.weight"][letter] = torch.nan
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "generation_config.json").write_text(json.dumps({"top_k": 1}))
    return directory


@pytest.fixture(scope="module")
def faulty(faulty_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """A daemon that serves the faulty model."""
    with Daemon(tmp_path_factory.mktemp("daemon"), "--model", str(faulty_model)) as running:
        running.wait_loaded(str(faulty_model))
        yield running


def never_say(letter: str, model: Path) -> dict[str, float]:
    """Return a logit_bias, since a random model may choose any letter."""
    return {str(Tokenizer.from_file(str(model / "tokenizer.json")).token_to_id(letter)): -100.0}


def test_request_whose_logits_are_not_finite_fails_alone(
    faulty: Daemon, faulty_model: Path
) -> None:
    """The bad request gets an error that names it; others beside it and after it are answered."""
    unsaid = never_say(BAD_LETTER, faulty_model)

    def ask(text: str) -> tuple[int, str]:
        status, answer = faulty.chat(str(faulty_model), text, max_tokens=16, logit_bias=unsaid)
        if status != 200:
            return status, answer["error"]["message"]
        return status, answer["choices"][0]["message"]["content"]

    good = ["the quick brown fox", "jumps over", "the lazy dog " * 9]
    expected = [ask(text) for text in good]
    assert [status for status, _ in expected] == [200, 200, 200]
    with ThreadPoolExecutor(4) as pool:
        *answers, failed = pool.map(ask, [*good, f"the quick brown {BAD_LETTER}"])
    assert answers == expected
    assert failed[0] == 500
    assert "NaN or infinity" in failed[1]
    assert [ask(text) for text in good] == expected
    assert all(actor["restarts"] == 0 for actor in faulty.actors().values())


def test_defaults_of_generation_config_hold_end_to_end(faulty: Daemon, faulty_model: Path) -> None:
    """With top_k = 1 in the model's file, a request without any setting is greedy."""
    messages = [{"role": "user", "content": "the quick brown fox"}]
    unsaid = never_say(BAD_LETTER, faulty_model)
    body: dict[str, object] = {"model": str(faulty_model), "messages": messages, "max_tokens": 16}
    body["logit_bias"] = unsaid

    def text(**fields: object) -> str:
        status, answer = faulty.post("/v1/chat/completions", {**body, **fields})
        assert status == 200, answer
        return str(answer["choices"][0]["message"]["content"])

    greedy = text(temperature=0)
    assert text() == greedy
    other = {"top_k": 0, "temperature": 2.0}
    assert len({text(**other) for _ in range(3)} - {greedy}) > 0
