"""The GGUF reader: agreement with the gguf package, and refusal of every malformed file."""

from __future__ import annotations

import os
import struct
import tracemalloc
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cortexd.errors import BadModelFile, UnsupportedArchitecture
from engine.formats.gguf import GGUFFile
from tests.engine.model_files import (
    ARRAY,
    STRING,
    UINT8,
    UINT32,
    RawTensor,
    gguf_string,
    random_blocks,
    raw_gguf,
)

TOKENS = ["<s>", "", "Ġhello", "日本語", "\n", "🙂"] * 50


def _write_sample(path: Path) -> None:
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_uint8("a.u8", 200)
    writer.add_int8("a.i8", -5)
    writer.add_uint16("a.u16", 60000)
    writer.add_int16("a.i16", -300)
    writer.add_uint32("a.u32", 1 << 31)
    writer.add_int32("a.i32", -(1 << 30))
    writer.add_uint64("a.u64", 1 << 63)
    writer.add_int64("a.i64", -(1 << 62))
    writer.add_float32("a.f32", 0.1)
    writer.add_float64("a.f64", 0.1)
    writer.add_bool("a.bool", True)
    writer.add_string("a.string", "naïve\0text")
    writer.add_array("a.ints", [1, -2, 3])
    writer.add_array("a.floats", [0.5, -1.5])
    writer.add_array("a.bools", [True, False])
    writer.add_token_list(TOKENS)
    rng = np.random.default_rng(0)
    writer.add_tensor("dense", rng.standard_normal((3, 5)).astype(np.float32))
    writer.add_tensor("cube", rng.standard_normal((2, 3, 4)).astype(np.float16))
    q4_k = gguf.GGMLQuantizationType.Q4_K
    writer.add_tensor("quantised", random_blocks(rng, q4_k, 2, 512), raw_dtype=q4_k)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A valid file with every value type and three tensors."""
    path = tmp_path_factory.mktemp("gguf") / "sample.gguf"
    _write_sample(path)
    return path


def test_metadata_equals_the_library(sample: Path) -> None:
    """Every key has the value the gguf package reads."""
    ours = GGUFFile.open(sample)
    theirs = gguf.GGUFReader(sample)
    names = [name for name in theirs.fields if not name.startswith("GGUF.")]
    assert list(ours.metadata) == names
    for name in names:
        assert ours.metadata[name] == theirs.fields[name].contents(), name
    assert ours.metadata.array_length("tokenizer.ggml.tokens") == len(TOKENS)
    assert ours.metadata.array_length("a.string") is None
    assert ours.architecture == "llama"


def test_tensors_equal_the_library(sample: Path) -> None:
    """Every tensor has the same type, place and bytes; shapes are rows first."""
    ours = GGUFFile.open(sample)
    theirs = {tensor.name: tensor for tensor in gguf.GGUFReader(sample).tensors}
    assert ours.tensors.keys() == theirs.keys()
    for name, tensor in ours.tensors.items():
        assert tensor.shape == tuple(reversed(theirs[name].shape.tolist()))
        assert tensor.ggml_type == theirs[name].tensor_type
        assert tensor.offset == theirs[name].data_offset
        assert bytes(ours.view(name)) == theirs[name].data.tobytes()


def test_close_while_a_view_is_held_keeps_the_view_valid(sample: Path) -> None:
    """Bytes handed out stay readable after close."""
    file = GGUFFile.open(sample)
    view = file.view("dense")
    before = bytes(view)
    file.release_pages()
    file.close()
    assert bytes(view) == before


def _u32_key(name: str, value: int) -> bytes:
    return gguf_string(name) + struct.pack("<II", UINT32, value)


HUGE = 1 << 62
HOSTILE: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "empty"),
    "short magic": (b"GG", "truncated"),
    "wrong magic": (raw_gguf(magic=b"PK\3\4"), "not a GGUF file"),
    "version 1": (raw_gguf(version=1), "version 1 is not supported"),
    "version 0": (raw_gguf(version=0), "version 0 is not supported"),
    "big endian": (raw_gguf(version=3 << 24), "big-endian"),
    "header only": (raw_gguf()[:20], "truncated"),
    "tensor count": (raw_gguf(num_tensors=HUGE), "tensor count .* absurd"),
    "tensor count beyond file": (raw_gguf(num_tensors=60000), "tensor count 60000 needs more"),
    "key count": (raw_gguf(num_keys=HUGE), "key count .* absurd"),
    "key count beyond file": (raw_gguf(num_keys=60000), "key count 60000 needs more"),
    "key length": (
        raw_gguf(keys=[struct.pack("<Q", HUGE) + b"x" * 20]),
        "metadata key at byte 24 has .* bytes",
    ),
    "key not utf-8": (raw_gguf(keys=[gguf_string(b"\xff") + b"\0" * 5]), "not UTF-8"),
    "duplicate key": (raw_gguf(keys=[_u32_key("k", 1)] * 2), "'k' occurs twice"),
    "unknown value type": (
        raw_gguf(keys=[gguf_string("k") + struct.pack("<I", 13)]),
        "unknown type 13",
    ),
    "string length": (
        raw_gguf(keys=[gguf_string("k") + struct.pack("<IQ", STRING, HUGE)]),
        "value of 'k' .* beyond the end",
    ),
    "array length": (
        raw_gguf(keys=[gguf_string("k") + struct.pack("<IIQ", ARRAY, UINT32, HUGE)]),
        "array 'k' .* absurd",
    ),
    "array beyond file": (
        raw_gguf(keys=[gguf_string("k") + struct.pack("<IIQ", ARRAY, UINT8, 5000)]),
        "array 'k' .* beyond the end",
    ),
    "string array beyond file": (
        raw_gguf(keys=[gguf_string("k") + struct.pack("<IIQ", ARRAY, STRING, 5000)]),
        "array 'k' .* beyond the end",
    ),
    "string inside array": (
        raw_gguf(keys=[gguf_string("k") + struct.pack("<IIQQ", ARRAY, STRING, 2, HUGE)]),
        "array 'k' .* beyond the end",
    ),
    "nested array": (
        raw_gguf(keys=[gguf_string("k") + struct.pack("<IIQ", ARRAY, ARRAY, 1)]),
        "array of arrays",
    ),
    "unknown item type": (
        raw_gguf(keys=[gguf_string("k") + struct.pack("<IIQ", ARRAY, 77, 1)]),
        "unknown item type 77",
    ),
    "alignment zero": (raw_gguf(keys=[_u32_key("general.alignment", 0)]), "general.alignment 0"),
    "alignment odd": (raw_gguf(keys=[_u32_key("general.alignment", 24)]), "general.alignment 24"),
    "alignment huge": (
        raw_gguf(keys=[_u32_key("general.alignment", 1 << 31)]),
        "not a power of two up to",
    ),
    "alignment string": (
        raw_gguf(keys=[gguf_string("general.alignment") + b"\x08\0\0\0" + gguf_string("32")]),
        "general.alignment '32'",
    ),
    "too many dims": (raw_gguf(tensors=[RawTensor(num_dims=5)]), "5 dimensions"),
    "no dims": (raw_gguf(tensors=[RawTensor(dims=())]), "0 dimensions"),
    "zero dim": (raw_gguf(tensors=[RawTensor(dims=(32, 0))]), "impossible dimensions"),
    "overflowing dims": (
        raw_gguf(tensors=[RawTensor(dims=(1 << 40, 1 << 40))]),
        "impossible dimensions",
    ),
    "partial block": (
        raw_gguf(tensors=[RawTensor(dims=(48,), type_number=2)]),
        "not a multiple of the Q4_0 block",
    ),
    "offset beyond file": (raw_gguf(tensors=[RawTensor(offset=1 << 40)]), "beyond the end"),
    "offset wraps": (raw_gguf(tensors=[RawTensor(offset=(1 << 64) - 32)]), "beyond the end"),
    "size beyond file": (raw_gguf(tensors=[RawTensor(dims=(64,))]), "beyond the end"),
    "misaligned": (raw_gguf(tensors=[RawTensor(dims=(8,), offset=8)]), "not aligned to 32"),
    "overlap": (raw_gguf(tensors=[RawTensor("a"), RawTensor("b", (8,), 0, 32)]), "'b': overlaps"),
    "duplicate tensor": (
        raw_gguf(tensors=[RawTensor("a", (8,)), RawTensor("a", (8,), 0, 32)]),
        "'a': the name occurs twice",
    ),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_open_hostile_file_is_refused_naming_file_and_cause(case: str, tmp_path: Path) -> None:
    """Every malformed header is a BadModelFile, found with next to no memory."""
    content, cause = HOSTILE[case]
    path = tmp_path / "hostile.gguf"
    path.write_bytes(content)
    tracemalloc.start()
    try:
        with pytest.raises(BadModelFile, match=cause) as caught:
            GGUFFile.open(path)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
    assert str(path) in str(caught.value)


def test_open_unknown_tensor_type_is_refused_by_number(tmp_path: Path) -> None:
    """A type newer than the table is unsupported, not a broken file."""
    path = tmp_path / "new.gguf"
    path.write_bytes(raw_gguf(tensors=[RawTensor(type_number=99)]))
    with pytest.raises(UnsupportedArchitecture, match="unknown GGML type number 99"):
        GGUFFile.open(path)


@pytest.mark.parametrize("kind", ["directory", "missing", "pipe"])
def test_open_what_is_no_file_is_refused(kind: str, tmp_path: Path) -> None:
    """Nothing blocks or leaks an OSError; a named pipe without a writer does not hang."""
    path = tmp_path / "model.gguf"
    if kind == "directory":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    with pytest.raises(BadModelFile, match=r"model\.gguf"):
        GGUFFile.open(path)


def test_string_item_not_utf8_is_refused_when_decoded(tmp_path: Path) -> None:
    """A lazily decoded array names the key and the item."""
    items = gguf_string("ok") + gguf_string(b"\xff\xfe")
    key = gguf_string("k") + struct.pack("<IIQ", ARRAY, STRING, 2) + items
    path = tmp_path / "m.gguf"
    path.write_bytes(raw_gguf(keys=[key]))
    file = GGUFFile.open(path)
    with pytest.raises(BadModelFile, match="item 1 of 'k' is not UTF-8"):
        _ = file.metadata["k"]


def test_missing_architecture_is_refused(tmp_path: Path) -> None:
    """A GGUF without general.architecture opens, and says what it lacks when asked."""
    path = tmp_path / "m.gguf"
    path.write_bytes(raw_gguf())
    with pytest.raises(BadModelFile, match=r"general\.architecture is missing"):
        _ = GGUFFile.open(path).architecture


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_open_mutated_file_raises_nothing_else(
    sample: Path, tmp_path: Path, data: st.DataObject
) -> None:
    """Random damage is refused, or leaves a file whose every part can be read."""
    content = bytearray(sample.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        position = data.draw(st.integers(0, len(content) - 1))
        value = data.draw(st.sampled_from((0, 1, 2, 7, 8, 9, 32, 127, 128, 255)))
        content[position] = value
    end = data.draw(st.one_of(st.just(len(content)), st.integers(0, len(content))))
    path = tmp_path / "mutated.gguf"
    path.write_bytes(content[:end])
    try:
        file = GGUFFile.open(path)
        for key in file.metadata:
            _ = file.metadata[key]
        for name, tensor in file.tensors.items():
            assert len(file.view(name)) == tensor.num_bytes
    except (BadModelFile, UnsupportedArchitecture) as error:
        refusal = str(error)
    else:
        return
    assert "mutated.gguf" in refusal
