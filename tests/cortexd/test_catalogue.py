"""The model catalogue: keys, classes, aliases, errors."""

from __future__ import annotations

from pathlib import Path

import pytest

from cortexd.catalogue import Catalogue, alias_warnings, load_catalogue
from cortexd.demo import DEMO_ALIAS, DEMO_MODEL, served_catalogue
from cortexd.errors import ConfigError
from cortexd.settings import DefaultModel, Settings


def load(tmp_path: Path, text: str) -> Catalogue:
    """Load a catalogue with this text."""
    path = tmp_path / "models.toml"
    path.write_text(text)
    return load_catalogue(str(path))


def test_demo_model_brings_its_name_and_sampling_unless_the_file_says_otherwise(
    tmp_path: Path,
) -> None:
    """At the API's temperature of 1 the smallest model talks nonsense to whoever tries it first."""
    path = tmp_path / "models.toml"
    path.write_text("")
    settings = Settings(models_config=str(path), default_models=[DefaultModel(model_id=DEMO_MODEL)])
    catalogue = served_catalogue(settings)
    model = catalogue.model(catalogue.aliases[DEMO_ALIAS])
    assert model is not None
    assert model.policy.defaults == {"temperature": 0.2, "top_p": 0.9}
    path.write_text(f'[[models]]\nid = "{DEMO_MODEL}"\ndefaults = {{top_k = 5}}')
    (model,) = served_catalogue(settings).models
    assert model.policy.defaults == {"top_k": 5}


def test_every_key_of_the_reference_is_read(tmp_path: Path) -> None:
    """All keys are accepted, with their defaults where they are left out."""
    catalogue = load(
        tmp_path,
        """
        [[models]]
        id = "org/big"
        harness = "candle"
        quant = "q6k"
        vram_mb = 30000
        min_devices = 2
        min_device_vram_mb = 22000
        pinned_on = ["beast", "benjy"]
        residency_priority = 7
        source = "hf"
        limit = { context = 32768, input = 30000, output = 2768 }
        cost = { input = 0.0, output = 1, cache_read = 0.1, cache_write = 0.2 }
        capabilities = ["text", "vision"]
        [[models]]
        id = "org/small"
        [aliases]
        "tier/fast" = "org/small"
        """,
    )
    big, small = catalogue.models
    assert (big.vram_mb, big.min_devices, big.pinned_on) == (30000, 2, ["beast", "benjy"])
    assert big.cost is not None
    assert (big.cost.input, big.cost.output) == (0.0, 1.0)
    assert big.limit is not None
    assert big.limit.context == 32768
    assert (small.harness, small.min_devices, small.capabilities) == ("torch", 1, [])
    assert catalogue.resolve("tier/fast") == "org/small"
    assert catalogue.resolve("org/other") == "org/other"
    assert catalogue.model("org/small") is small
    assert catalogue.model("tier/fast") is None


def test_priority_defaults_by_pinning(tmp_path: Path) -> None:
    """100 by default, 1000 for a pinned model, or what is said."""
    catalogue = load(
        tmp_path,
        """
        models = [
          { id = "a/plain" },
          { id = "a/pinned", pinned_on = ["x"] },
          { id = "a/said", pinned_on = ["x"], residency_priority = 5 },
        ]
        """,
    )
    assert catalogue.priorities() == {"a/plain": 100, "a/pinned": 1000, "a/said": 5}


def test_no_catalogue_is_empty_and_a_missing_one_an_error(tmp_path: Path) -> None:
    """Only a catalogue that nobody asked for may be absent."""
    assert load_catalogue(None) == Catalogue()
    with pytest.raises(
        ConfigError, match=r"models.toml: does not exist; write it .* leave models_config out"
    ):
        load_catalogue(str(tmp_path / "models.toml"))


def test_local_paths_are_relative_to_the_catalogue(tmp_path: Path) -> None:
    """A local model has the name under which the settings know it."""
    catalogue = load(tmp_path, '[[models]]\nid = "./a.gguf"\n[aliases]\nx = "./a.gguf"')
    assert catalogue.models[0].id == str(tmp_path / "a.gguf")
    assert catalogue.aliases == {"x": str(tmp_path / "a.gguf")}


def test_alias_to_unknown_model_is_a_warning(tmp_path: Path) -> None:
    """A remote neuron may offer it later; a model of default_models is known."""
    catalogue = load(tmp_path, '[aliases]\na = "org/here"\nb = "org/away"')
    (warning,) = alias_warnings(catalogue, ["org/here"])
    assert warning.startswith('alias "b" means "org/away", which is no model here')


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[[models]]\nvram_mb = 1", ":1: models[0] lacks its id; add id = "),
        ('[[models]]\nid = "a/b"\nvram_gb = 1', ":3: models[0].vram_gb is an unknown key; did you "
         'mean "vram_mb"?'),
        ('[[models]]\nid = "a/b"\nmin_devices = 0', ":3: models[0].min_devices must be an integer"),
        ('[[models]]\nid = "a/b"\npinned_on = [""]', ":3: models[0].pinned_on[0] must be "
         "a non-empty string"),
        ('[[models]]\nid = "a/b"\npinned_on = ["x", "x"]', ":3: models[0].pinned_on names a "),
        ('[[models]]\nid = "a/b"\ncost = {input = -1, output = 1}', ":3: models[0].cost.input must "
         "be a number >= 0"),
        ('[[models]]\nid = "a/b"\ncost = {input = 1}', ":3: models[0].cost lacks its output"),
        ('[[models]]\nid = "a/b"\n[[models]]\nid = "a/b"', ':4: models[1].id = "a/b" is also '),
        ('[[models]]\nid = "ab"', ':2: models[0].id: model id "ab" has no slash'),
        ('[aliases]\n\nx = 1', ":3: aliases.x must be a string, not 1"),
        ('[aliases]\nx = "y"', ':2: alias "x": model id "y" has no slash'),
        ('[aliases]\nx = "t/y"\n"t/y" = "a/b"', ':2: alias "x" means the alias "t/y"; allowed: a '),
        ('[[models]]\nid = "a/b"\n[aliases]\n"a/b" = "c/d"', ':4: alias "a/b" is also the '),
        ('[aliases]\n"" = "c/d"', ":2: aliases has an empty name"),
        ("[[models]\n", ":1: not valid TOML: "),
    ],
)  # fmt: skip
def test_error_names_file_line_and_key(tmp_path: Path, text: str, expected: str) -> None:
    """Errors have the quality of those of cortex.toml."""
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text)
    assert f"{tmp_path}/models.toml{expected}" in str(caught.value)
