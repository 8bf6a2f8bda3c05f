"""Local models: a file, a directory, and clear errors for what is neither."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest

from cortexd.errors import BadModelFile, CortexError, InvalidValue, ModelSourceError
from cortexd.models import ModelFiles
from cortexd.settings import Store
from engine.sources import resolve


def _resolve(path: Path, quant: str | None = None) -> ModelFiles:
    return resolve(str(path), quant, Store(), path / "unused", lambda *_: None, threading.Event())


def _fill(directory: Path, *names: str, **contents: object) -> Path:
    for name in names:
        (directory / name).write_bytes(b"12345678")
    for name, content in contents.items():
        (directory / f"{name}.json").write_text(json.dumps(content))
    return directory


def test_file_is_taken_as_it_is(tmp_path: Path) -> None:
    """A .gguf file is the model; its quant comes from the name."""
    path = _fill(tmp_path, "Some-Model.q4_k_m.gguf", "tokenizer.json") / "Some-Model.q4_k_m.gguf"
    files = _resolve(path)
    assert files.weights == (str(path),)
    assert (files.format, files.source, files.quant) == ("gguf", "path", "q4_k_m")
    assert (files.size_bytes, files.tokenizer, files.config) == (8, None, None)


def test_directory_with_one_safetensors_file(tmp_path: Path) -> None:
    """All companions are found beside the weights."""
    names = (
        *("model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"),
        *("chat_template.jinja", "generation_config.json", "README.md"),
    )
    files = _resolve(_fill(tmp_path, *names))
    assert files.weights == (str(tmp_path / "model.safetensors"),)
    assert files.format == "safetensors"
    assert [files.config, files.tokenizer, files.tokenizer_config] == [
        str(tmp_path / name) for name in names[1:4]
    ]
    assert [files.chat_template, files.generation_config] == [
        str(tmp_path / name) for name in names[4:6]
    ]


def test_directory_with_shards_follows_the_index(tmp_path: Path) -> None:
    """The index says which shards belong to the model, in order."""
    shards = [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    index = {"weight_map": {"b": shards[1], "a": shards[0], "c": shards[1]}}
    directory = _fill(tmp_path, *shards, "other.safetensors", "config.json")
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    files = _resolve(directory)
    assert files.weights == tuple(str(tmp_path / name) for name in shards)
    assert files.size_bytes == 16
    (tmp_path / shards[1]).unlink()
    with pytest.raises(ModelSourceError, match=f"lacks {shards[1]}"):
        _resolve(directory)


@pytest.mark.parametrize(
    ("index", "text"),
    [
        ("{", "not valid JSON"),
        ("[]", "weight_map is missing"),
        ('{"weight_map": {}}', "weight_map is missing or empty"),
        ('{"weight_map": {"a": "../../etc/passwd.safetensors"}}', "is no shard file name"),
        ('{"weight_map": {"a": 3}}', "is no shard file name"),
    ],
)
def test_directory_with_a_bad_index_is_named(tmp_path: Path, index: str, text: str) -> None:
    """A broken or hostile index is refused by name."""
    directory = _fill(tmp_path, "a.safetensors", "config.json")
    (directory / "model.safetensors.index.json").write_text(index)
    with pytest.raises(BadModelFile, match=text) as caught:
        _resolve(directory)
    assert "model.safetensors.index.json" in caught.value.message


def test_directory_dense_wins_over_gguf_unless_a_quant_is_asked(tmp_path: Path) -> None:
    """Both formats in one directory: the quant decides."""
    directory = _fill(tmp_path, "model.safetensors", "config.json", "m-Q4_0.gguf")
    assert _resolve(directory).format == "safetensors"
    files = _resolve(directory, "q4_0")
    assert (files.format, files.config) == ("gguf", None)


@pytest.mark.parametrize(("quant", "tag"), [("Q4K", "q4_k"), ("q8_0", "q8_0"), (None, None)])
def test_directory_dense_alone_is_quantised_at_load(
    tmp_path: Path, quant: str | None, tag: str | None
) -> None:
    """Without GGUF files a quant is what the safetensors become."""
    files = _resolve(_fill(tmp_path, "model.safetensors", "config.json"), quant)
    assert (files.format, files.quant) == ("safetensors", tag)


def test_file_that_is_a_part_brings_all_parts(tmp_path: Path) -> None:
    """Naming any part of a split GGUF means the whole, and nothing else in its directory."""
    names = [f"m-Q8_0-0000{number}-of-00003.gguf" for number in (1, 2, 3)]
    _fill(tmp_path, *names, "m-Q4_0-00001-of-00001.gguf", "other-Q8_0.gguf")
    for name in names:
        files = _resolve(tmp_path / name)
        assert files.weights == tuple(str(tmp_path / part) for part in names)
        assert files.quant == "Q8_0"


def test_directory_gguf_keeps_the_tokenizer_beside_it(tmp_path: Path) -> None:
    """A tokenizer.json beside the only GGUF file is preferred to its metadata."""
    directory = _fill(tmp_path, "m-Q4_0.gguf", "tokenizer.json", "mmproj-F16.gguf")
    assert _resolve(directory).tokenizer == str(tmp_path / "tokenizer.json")


@pytest.mark.parametrize(
    ("quant", "expected"),
    [
        ("q4_k_m", "m-Q4_K_M.gguf"),
        ("Q8_0", "m.Q8_0.gguf"),
        ("ud-q4_k_xl", "m-UD-Q4_K_XL.gguf"),
        ("bf16", "m-BF16.gguf"),
        ("k_m", "m-Q4_K_M.gguf"),
    ],
)
def test_quant_is_matched_without_case(tmp_path: Path, quant: str, expected: str) -> None:
    """The exact tag in any case, else an unambiguous part of the name."""
    _fill(tmp_path, "m-Q4_K_M.gguf", "m-Q4_K_S.gguf", "m.Q8_0.gguf", "m-BF16.gguf")
    _fill(tmp_path, "m-UD-Q4_K_XL.gguf")
    assert _resolve(tmp_path, quant).weights == (str(tmp_path / expected),)


def test_quant_shards_of_one_gguf_are_one_choice(tmp_path: Path) -> None:
    """The parts of a split file come together, in order."""
    names = [f"m-Q4_0-0000{n}-of-00003.gguf" for n in (1, 2, 3)]
    files = _resolve(_fill(tmp_path, *reversed(names)))
    assert files.weights == tuple(str(tmp_path / name) for name in names)
    assert files.quant == "Q4_0"


@pytest.mark.parametrize(
    ("names", "quant", "error", "text"),
    [
        ((), None, ModelSourceError, "holds neither safetensors"),
        (("a.safetensors",), None, ModelSourceError, "holds neither safetensors"),
        (("config.json",), None, ModelSourceError, "holds neither safetensors"),
        (
            ("a.safetensors", "b.safetensors", "config.json"),
            None,
            ModelSourceError,
            "2 safetensors files and no model.safetensors.index.json",
        ),
        (("m-Q4_0.gguf", "m-Q8_0.gguf"), None, InvalidValue, "one of: Q4_0, Q8_0"),
        (
            ("m-Q4_0.gguf", "m-Q8_0.gguf"),
            "Q8_1",
            InvalidValue,
            'no quant "Q8_1"; available: Q4_0, Q8_0; nearest: Q8_0',
        ),
        (("m-Q4_K_S.gguf", "m-Q4_K_M.gguf"), "q4_k", InvalidValue, "fits several files"),
        (
            ("model.safetensors", "config.json"),
            "q4_k_m",
            InvalidValue,
            "has no GGUF files, and quant .* can be quantised to .*: q4_0, .*q6_k",
        ),
    ],
)
def test_directory_that_does_not_decide_is_refused(
    tmp_path: Path, names: tuple[str, ...], quant: str | None, error: type[CortexError], text: str
) -> None:
    """Nothing is guessed: the error lists what there is."""
    with pytest.raises(error, match=text):
        _resolve(_fill(tmp_path, *names), quant)


def test_path_that_is_no_model_is_refused(tmp_path: Path) -> None:
    """A missing path, and a file of another kind, say what to give instead."""
    with pytest.raises(BadModelFile, match="does not exist"):
        _resolve(tmp_path / "absent")
    path = _fill(tmp_path, "model.safetensors") / "model.safetensors"
    with pytest.raises(InvalidValue, match="give the directory"):
        _resolve(path)
