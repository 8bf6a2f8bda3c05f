"""ModelSpec from config.json and from GGUF: values, defaults, and refusals that say why."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, Qwen3Config

from cortexd.errors import BadModelFile, CortexError, UnsupportedArchitecture
from cortexd.models import ModelFiles, ModelSpec, RopeSpec
from engine.formats.mapped_file import MappedFile
from engine.models.registry import REGISTRY, supported_model_types
from engine.preflight import inspect
from engine.specs.spec import spec_from_config
from tests.engine.model_files import (
    config_of,
    family_spec,
    random_dense,
    write_gguf,
    write_safetensors,
)

LLAMA = ModelSpec(
    model_type="llama",
    architecture="LlamaForCausalLM",
    vocab_size=96,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    rms_norm_eps=1e-5,
    max_position_embeddings=128,
    rope=RopeSpec(theta=50000.0),
    eos_token_ids=(2,),
)


def _config(**changes: Any) -> dict[str, Any]:
    return {**config_of(LLAMA), **changes}


def test_config_round_trip_gives_the_spec() -> None:
    """What a configuration says is what the spec holds."""
    assert spec_from_config(_config()) == LLAMA


@pytest.mark.parametrize("config_class", [LlamaConfig, Qwen3Config])
def test_config_saved_by_transformers_is_read_alike(config_class: type, tmp_path: Path) -> None:
    """Every dimension equals the attribute transformers computes with."""
    original = config_class(
        vocab_size=100,
        hidden_size=48,
        num_attention_heads=6,
        num_key_value_heads=3,
        num_hidden_layers=2,
        tie_word_embeddings=True,
        eos_token_id=[3, 4],
        bos_token_id=1,
    )
    original.save_pretrained(tmp_path)
    spec = spec_from_config(json.loads((tmp_path / "config.json").read_text()))
    for field in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
                  "num_attention_heads", "num_key_value_heads", "head_dim", "rms_norm_eps",
                  "max_position_embeddings", "tie_word_embeddings", "attention_bias"):  # fmt: skip
        assert getattr(spec, field) == getattr(original, field), field
    assert spec.rope == RopeSpec(theta=original.rope_parameters["rope_theta"])
    assert spec.eos_token_ids == (3, 4)
    assert spec.bos_token_id == 1


LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
LLAMA3_SPEC = RopeSpec(
    rope_type="llama3", theta=500000.0, factor=8.0, original_max_position_embeddings=8192
)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3}}, LLAMA3_SPEC),
        (
            {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **LLAMA3}},
            LLAMA3_SPEC,
        ),
        (
            {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2}},
            RopeSpec(
                rope_type="linear",
                theta=500000.0,
                factor=2.0,
                original_max_position_embeddings=128,
            ),
        ),
        ({"rope_theta": 123.0, "rope_scaling": None}, RopeSpec(theta=123.0)),
        ({}, RopeSpec(theta=10000.0)),
    ],
    ids=["nested llama3", "flat llama3", "old linear", "flat default", "absent"],
)
def test_config_rope_forms_are_read(changes: dict[str, Any], expected: RopeSpec) -> None:
    """New nested and old flat forms give the same rope."""
    config = _config()
    del config["rope_parameters"]
    assert spec_from_config({**config, **changes}).rope == expected


def test_eos_is_the_union_of_both_files() -> None:
    """config.json's and generation_config.json's end tokens are joined without repeats."""
    spec = spec_from_config(_config(eos_token_id=5), {"eos_token_id": [7, 5]})
    assert spec.eos_token_ids == (5, 7)


def test_unknown_model_type_names_everything_and_the_way_out() -> None:
    """The error holds model_type, architectures, the supported set and the file to write."""
    config = _config(model_type="foo_moe", architectures=["FooForCausalLM"])
    with pytest.raises(UnsupportedArchitecture) as caught:
        spec_from_config(config, file="/m/config.json")
    text = str(caught.value)
    for part in ("/m/config.json", "foo_moe", "FooForCausalLM", "engine/models/foo_moe.py",
                 "engine/models/registry.py", *supported_model_types()):  # fmt: skip
        assert part in text
    assert caught.value.details["supported"] == sorted(REGISTRY)


REFUSED: dict[str, tuple[dict[str, Any], type[CortexError], str]] = {
    "missing model_type": ({"model_type": None}, BadModelFile, "model_type is missing"),
    "model_type a number": ({"model_type": 3}, BadModelFile, "model_type is 3"),
    "another head": (
        {"architectures": ["LlamaForSequenceClassification"]},
        UnsupportedArchitecture,
        "LlamaForSequenceClassification.*only as LlamaForCausalLM",
    ),
    "architectures no list": ({"architectures": "x"}, BadModelFile, "architectures is 'x'"),
    "hidden_size missing": ({"hidden_size": None}, BadModelFile, "hidden_size is missing"),
    "hidden_size negative": ({"hidden_size": -3}, BadModelFile, "hidden_size is -3"),
    "hidden_size huge": ({"hidden_size": 10**30}, BadModelFile, "hidden_size is an integer"),
    "hidden_size a string": ({"hidden_size": "32"}, BadModelFile, "hidden_size is '32'"),
    "hidden_size true": ({"hidden_size": True}, BadModelFile, "hidden_size is True"),
    "no layers": ({"num_hidden_layers": 0}, BadModelFile, "num_hidden_layers is 0"),
    "heads not divisible": ({"num_key_value_heads": 3}, BadModelFile, "not a multiple"),
    "head_dim underivable": (
        {"head_dim": None, "hidden_size": 33},
        BadModelFile,
        "head_dim is not given",
    ),
    "head_dim odd": ({"head_dim": 7}, BadModelFile, "head_dim = 7 is odd"),
    "eps zero": ({"rms_norm_eps": 0}, BadModelFile, "rms_norm_eps is 0"),
    "eps nan": ({"rms_norm_eps": float("nan")}, BadModelFile, "rms_norm_eps is nan"),
    "tied a number": ({"tie_word_embeddings": 1}, BadModelFile, "tie_word_embeddings is 1"),
    "eos beyond vocab": ({"eos_token_id": 96}, BadModelFile, "eos_token_id is 96"),
    "eos a string": ({"eos_token_id": "</s>"}, BadModelFile, "eos_token_id is '</s>'"),
    "activation": ({"hidden_act": "gelu"}, UnsupportedArchitecture, "hidden_act = 'gelu'"),
    "activation unhashable": ({"hidden_act": ["x"]}, UnsupportedArchitecture, "hidden_act"),
    "sliding window": (
        {"use_sliding_window": True, "sliding_window": 64},
        UnsupportedArchitecture,
        "use_sliding_window = True",
    ),
    "sliding layers": (
        {"layer_types": ["full_attention", "sliding_attention"]},
        UnsupportedArchitecture,
        "layer_types",
    ),
    "layer_types length": ({"layer_types": ["full_attention"]}, BadModelFile, "layer_types has 1"),
    "quantised": (
        {"quantization_config": {"quant_method": "awq"}},
        UnsupportedArchitecture,
        "quantization_config",
    ),
    "dtype": ({"dtype": "float8_e4m3fn"}, BadModelFile, "dtype 'float8_e4m3fn'"),
    "rope no object": ({"rope_parameters": 3}, BadModelFile, "rope_parameters is 3"),
    "rope type": (
        {"rope_parameters": {"rope_type": "longrope"}},
        UnsupportedArchitecture,
        "rope type 'longrope' .*supported: default, linear, llama3, yarn",
    ),
    "yarn variant": (
        {"rope_parameters": {"rope_type": "yarn", "factor": 2, "mscale": 0.7}},
        UnsupportedArchitecture,
        "rope parameters: mscale is not supported for yarn",
    ),
    "yarn untruncated": (
        {"rope_parameters": {"rope_type": "yarn", "factor": 2, "truncate": False}},
        UnsupportedArchitecture,
        "truncate = false is not supported",
    ),
    "rope per layer": (
        {"rope_parameters": {"full_attention": {"rope_theta": 1.0}}},
        UnsupportedArchitecture,
        "differ by layer type",
    ),
    "theta zero": ({"rope_parameters": {"rope_theta": 0}}, BadModelFile, "rope_theta is 0"),
    "theta too large for float": (
        {"rope_parameters": {"rope_theta": 10**400}},
        BadModelFile,
        "rope_theta is an integer beyond",
    ),
    "factor missing": (
        {"rope_parameters": {"rope_type": "linear"}},
        BadModelFile,
        "factor is missing",
    ),
    "bands reversed": (
        {"rope_parameters": {"rope_type": "llama3", **LLAMA3, "low_freq_factor": 4.0}},
        BadModelFile,
        "must be below high_freq_factor",
    ),
    "partial rotary": (
        {"rope_parameters": {"partial_rotary_factor": 0.1}},
        BadModelFile,
        "rotates 0 elements",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_config_unusable_is_refused_naming_the_field(case: str) -> None:
    """Each hostile or unsupported value has its own message, with the file's name."""
    changes, error_class, cause = REFUSED[case]
    with pytest.raises(error_class, match=cause) as caught:
        spec_from_config(_config(**changes), file="/m/config.json")
    assert str(caught.value).startswith("/m/config.json")


_JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["default", "llama3", "llama", "full_attention"]),
    lambda children: (
        st.lists(children, max_size=3)
        | st.dictionaries(
            st.sampled_from(["rope_type", "rope_theta", "factor", "x"]), children, max_size=3
        )
    ),
    max_leaves=5,
)


@settings(max_examples=300)
@given(
    changes=st.dictionaries(
        st.sampled_from([*config_of(LLAMA), "rope_scaling", "rope_theta", "eos_token_id",
                         "layer_types", "hidden_act", "dtype", "use_sliding_window"]),
        _JSON,
        max_size=4,
    )
)  # fmt: skip
def test_config_of_arbitrary_values_raises_nothing_else(changes: dict[str, Any]) -> None:
    """Any JSON is a spec or one of the two errors, with a message of bounded length."""
    try:
        spec_from_config(_config(**changes))
    except (BadModelFile, UnsupportedArchitecture) as error:
        refusal = str(error)
    else:
        return
    assert len(refusal) < 1000


def _f32(tensors: dict[str, Any]) -> dict[str, Any]:
    return {name: (tensor.numpy(), 0) for name, tensor in tensors.items()}


def _written(
    path: Path, spec: ModelSpec = LLAMA, extra: dict[str, Any] | None = None
) -> ModelFiles:
    return write_gguf(path / "tiny.gguf", spec, _f32(random_dense(spec)), extra)


@pytest.mark.parametrize("model_type", sorted(REGISTRY))
@pytest.mark.parametrize("tied", [False, True])
def test_gguf_gives_the_same_spec(model_type: str, tied: bool, tmp_path: Path) -> None:
    """Dimensions, tying and end tokens are found in the header alone."""
    spec = msgspec.structs.replace(family_spec(LLAMA, model_type), tie_word_embeddings=tied)
    keys = {"tokenizer.ggml.eos_token_id": 5, "tokenizer.ggml.eot_token_id": 6}
    found = inspect(_written(tmp_path, spec, keys))
    expected = msgspec.structs.replace(
        spec,
        eos_token_ids=(5, 6),
        torch_dtype="float32",
        rms_norm_eps=found.rms_norm_eps,
    )
    assert found == expected
    assert found.rms_norm_eps == pytest.approx(spec.rms_norm_eps, rel=1e-6)


def test_gguf_yarn_is_read(tmp_path: Path) -> None:
    """Scaling keys become the rope spec."""
    keys = {
        "llama.rope.scaling.type": "yarn",
        "llama.rope.scaling.factor": 4.0,
        "llama.rope.scaling.original_context_length": 32,
    }
    rope = inspect(_written(tmp_path, extra=keys)).rope
    assert (rope.rope_type, rope.factor, rope.original_max_position_embeddings) == ("yarn", 4.0, 32)


GGUF_REFUSED: dict[str, tuple[dict[str, Any], type[CortexError], str]] = {
    "rope type": (
        {"llama.rope.scaling.type": "longrope"},
        UnsupportedArchitecture,
        "rope type 'longrope'",
    ),
    "partly rotated": (
        {"llama.rope.dimension_count": 4},
        UnsupportedArchitecture,
        "rope.dimension_count",
    ),
    "rotary beyond head": (
        {"llama.rope.dimension_count": 10},
        BadModelFile,
        "rope.dimension_count is 10",
    ),
    "eos beyond vocab": (
        {"tokenizer.ggml.eos_token_id": 1000},
        BadModelFile,
        "eos_token_id is 1000",
    ),
}


@pytest.mark.parametrize("case", GGUF_REFUSED)
def test_gguf_unusable_is_refused_naming_the_key(case: str, tmp_path: Path) -> None:
    """Keys that cannot be used are named, with the file."""
    keys, error_class, cause = GGUF_REFUSED[case]
    with pytest.raises(error_class, match=cause) as caught:
        inspect(_written(tmp_path, extra=keys))
    assert "tiny.gguf" in str(caught.value)


def test_gguf_file_is_opened_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Walking over a vocabulary takes longer than all other checks together."""
    files = _written(tmp_path, extra={})
    opened: list[str] = []
    real_open = MappedFile.__init__

    def count(mapped: MappedFile, path: str | Path) -> None:
        opened.append(str(path))
        real_open(mapped, path)

    monkeypatch.setattr(MappedFile, "__init__", count)
    inspect(files)
    assert opened == list(files.weights)


def test_gguf_unknown_architecture_is_refused(tmp_path: Path) -> None:
    """The GGUF name, the supported names and the file to write are in the message."""
    spec = msgspec.structs.replace(LLAMA, model_type="mamba")
    files = write_gguf(tmp_path / "m.gguf", spec, {})
    with pytest.raises(UnsupportedArchitecture, match=r'"mamba".*llama, qwen2.*models/mamba\.py'):
        inspect(files)


def test_gguf_theta_has_a_default_for_llama_only(tmp_path: Path) -> None:
    """A missing rope.freq_base is 10000 for llama, and a fault for qwen3."""
    for model_type in ("llama", "qwen3"):
        spec = msgspec.structs.replace(LLAMA, model_type=model_type)
        path = tmp_path / f"{model_type}.gguf"
        files = write_gguf(path, spec, _f32(random_dense(spec)))
        path.write_bytes(path.read_bytes().replace(b"rope.freq_base", b"rope.freq_bass"))
        if model_type == "llama":
            assert inspect(files).rope.theta == 10000.0
        else:
            with pytest.raises(BadModelFile, match=r"qwen3\.rope\.freq_base is missing"):
                inspect(files)


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        (b"{", "not valid JSON"),
        (b"[1]", "a JSON list, not an object"),
        (b"\xff\xfe", "not UTF-8"),
        (b"{" * 100_000, "not valid JSON"),
        (b'{"a":' * 100_000, "not valid JSON"),
        (None, "cannot be read"),
    ],
)
def test_inspect_malformed_config_file_is_refused(
    content: bytes | None, cause: str, tmp_path: Path
) -> None:
    """A config.json that is no JSON object says so, naming the file."""
    files = write_safetensors(tmp_path, LLAMA, random_dense(LLAMA))
    config = tmp_path / "config.json"
    config.unlink()
    if content is not None:
        config.write_bytes(content)
    with pytest.raises(BadModelFile, match=cause) as caught:
        inspect(files)
    assert str(config) in str(caught.value)


def test_inspect_without_config_is_refused(tmp_path: Path) -> None:
    """Safetensors without a config.json cannot be understood."""
    files = write_safetensors(tmp_path, LLAMA, random_dense(LLAMA))
    with pytest.raises(BadModelFile, match=r"no config\.json"):
        inspect(msgspec.structs.replace(files, config=None))
