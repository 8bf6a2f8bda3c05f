"""The safetensors reader: agreement with the library, and refusal of every malformed file."""

from __future__ import annotations

import json
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from cortexd.errors import BadModelFile
from engine.formats.safetensors import DTYPE_BITS, SafetensorsFile, read_index


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A valid file with several dtypes and metadata."""
    path = tmp_path_factory.mktemp("st") / "sample.safetensors"
    tensors = {
        "a": torch.arange(6, dtype=torch.float32).view(2, 3),
        "b": torch.arange(4, dtype=torch.bfloat16),
        "c": torch.tensor(3, dtype=torch.int64),
        "empty": torch.empty(0, 4, dtype=torch.float16),
    }
    save_file(tensors, path, metadata={"format": "pt"})
    return path


def test_tensors_equal_the_library(sample: Path) -> None:
    """Names, dtypes, shapes and bytes are what the library reads."""
    ours = SafetensorsFile.open(sample)
    with safe_open(sample, "pt") as theirs:
        assert set(ours.tensors) == set(theirs.keys())
        for name, tensor in ours.tensors.items():
            other = theirs.get_slice(name)
            assert tensor.dtype == other.get_dtype()
            assert list(tensor.shape) == other.get_shape()
            assert (
                tensor.num_bytes * 8 == theirs.get_tensor(name).numel() * DTYPE_BITS[tensor.dtype]
            )
            flat = theirs.get_tensor(name).reshape(-1)
            assert bytes(ours.view(name)) == flat.view(torch.uint8).numpy().tobytes()


def _file(header: Any, data: bytes = b"\0" * 8, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def _entry(**changes: Any) -> dict[str, Any]:
    return {"t": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **changes}}


DUPLICATE = b'{"t":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"t":{}}'
HOSTILE: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "empty"),
    "seven bytes": (b"\0" * 7, "7 bytes"),
    "header beyond file": (_file(b"{}", b"", 1000), "truncated"),
    "header beyond limit": (_file(b"{}", b"", 1 << 62), "over the limit"),
    "bad json": (_file(b"{nope}"), "header is not valid JSON"),
    "not utf-8": (_file(b'{"\xff":1}'), "header is not valid JSON"),
    "not an object": (_file(b"[]", b""), "JSON list, not an object"),
    "deep nesting": (_file(b'{"t":' * 100_000), "not valid JSON"),
    "long integer": (_file(b'{"t":' + b"9" * 5000 + b"}"), "not valid JSON"),
    "entry not an object": (_file({"t": 3}), "its entry is not an object"),
    "unknown dtype": (_file(_entry(dtype="Q4")), "unknown dtype 'Q4'"),
    "dtype missing": (_file({"t": {"shape": [2], "data_offsets": [0, 8]}}), "unknown dtype None"),
    "dtype unhashable": (_file(_entry(dtype=["F32"])), "unknown dtype"),
    "negative dimension": (_file(_entry(shape=[-2])), "shape"),
    "boolean dimension": (_file(_entry(shape=[True, 2])), "shape"),
    "float dimension": (_file(_entry(shape=[2.0])), "shape"),
    "shape no list": (_file(_entry(shape=2)), "shape"),
    "too many dimensions": (_file(_entry(shape=[1] * 9)), "shape"),
    "overflowing shape": (_file(_entry(shape=[1 << 60, 1 << 60])), "absurdly large"),
    "size mismatch": (_file(_entry(shape=[3])), "does not take the 8 bytes"),
    "dtype mismatch": (_file(_entry(dtype="F16")), "does not take the 8 bytes"),
    "offsets reversed": (_file(_entry(data_offsets=[8, 0])), "not a pair"),
    "one offset": (_file(_entry(data_offsets=[0])), "not a pair"),
    "negative offset": (_file(_entry(data_offsets=[-8, 0])), "not a pair"),
    "offsets beyond file": (_file(_entry(data_offsets=[8, 16])), "beyond the file"),
    "huge offsets": (_file(_entry(data_offsets=[0, 1 << 70])), "beyond the file"),
    "overlap": (_file({**_entry(), "u": _entry()["t"]}), "overlaps"),
    "hole": (_file(_entry(data_offsets=[8, 16]), b"\0" * 16), "leaves a hole"),
    "trailing bytes": (_file(_entry(), b"\0" * 9), "belong to no tensor"),
    "duplicate name": (_file(DUPLICATE), 'names "t" twice'),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_open_hostile_file_is_refused_naming_file_and_cause(case: str, tmp_path: Path) -> None:
    """Every malformed header is a BadModelFile, found with memory in proportion to the file."""
    content, cause = HOSTILE[case]
    path = tmp_path / "hostile.safetensors"
    path.write_bytes(content)
    tracemalloc.start()
    try:
        with pytest.raises(BadModelFile, match=cause) as caught:
            SafetensorsFile.open(path)
        assert tracemalloc.get_traced_memory()[1] < (1 << 20) + 10 * len(content)
    finally:
        tracemalloc.stop()
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 1000


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_open_mutated_file_raises_nothing_else(
    sample: Path, tmp_path: Path, data: st.DataObject
) -> None:
    """Random damage is refused, or leaves a file that the library reads alike."""
    content = bytearray(sample.read_bytes())
    header_end = 8 + struct.unpack("<Q", content[:8])[0]
    for _ in range(data.draw(st.integers(1, 3))):
        position = data.draw(st.integers(0, header_end - 1))
        content[position] = data.draw(st.sampled_from(b'\0"0129,:[]{}-.eF' + b"\xff"))
    end = data.draw(st.one_of(st.just(len(content)), st.integers(0, len(content))))
    path = tmp_path / "mutated.safetensors"
    path.write_bytes(content[:end])
    ours, refusal = None, ""
    try:
        ours = SafetensorsFile.open(path)
    except BadModelFile as error:
        refusal = str(error)
    if ours is None:
        assert "mutated.safetensors" in refusal
        return
    with safe_open(path, "pt") as theirs:
        assert set(theirs.keys()) == set(ours.tensors)
    for name, tensor in ours.tensors.items():
        assert len(ours.view(name)) == tensor.num_bytes


INDEXES: dict[str, tuple[bytes, str]] = {
    "bad json": (b"{", "index is not valid JSON"),
    "no weight map": (b"{}", '"weight_map" is missing'),
    "empty weight map": (b'{"weight_map":{}}', '"weight_map" is missing, empty'),
    "shard is a number": (b'{"weight_map":{"a":1}}', '"a" is said to be in 1'),
    "shard escapes": (b'{"weight_map":{"a":"../x.safetensors"}}', "beside the index"),
    "shard of another kind": (b'{"weight_map":{"a":"x.bin"}}', "beside the index"),
    "duplicate name": (
        b'{"weight_map":{"a":"x.safetensors","a":"y.safetensors"}}',
        'names "a" twice',
    ),
}


@pytest.mark.parametrize("case", INDEXES)
def test_read_index_malformed_is_refused(case: str, tmp_path: Path) -> None:
    """An index is refused with its file name and the cause."""
    content, cause = INDEXES[case]
    path = tmp_path / "model.safetensors.index.json"
    path.write_bytes(content)
    with pytest.raises(BadModelFile, match=cause) as caught:
        read_index(path)
    assert str(path) in str(caught.value)
