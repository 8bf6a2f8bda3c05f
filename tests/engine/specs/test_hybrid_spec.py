"""Specs of hybrids and of models with experts: what is read, and what is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import Qwen3_5Config, Qwen3_5MoeConfig, Qwen3MoeConfig, Qwen3NextConfig

from cortexd.errors import BadModelFile, CortexError, UnsupportedArchitecture
from cortexd.models import LinearAttentionSpec, MoeSpec, RopeSpec
from engine.models.registry import REGISTRY
from engine.preflight import inspect
from engine.specs.spec import spec_from_config
from tests.engine.checkpoints import make_oracle, save_oracle
from tests.engine.model_files import family_spec, random_dense, write_gguf
from tests.engine.specs.test_spec import LLAMA


def saved(config: Any, folder: Path) -> dict[str, Any]:
    """Return what transformers writes for a configuration."""
    config.save_pretrained(folder)
    document: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return document


def test_published_sizes_of_qwen3_5_are_read(tmp_path: Path) -> None:
    """The 27B model's nested configuration, with what multimodal ones have around it."""
    text = {
        "hidden_size": 5120,
        "intermediate_size": 17408,
        "num_hidden_layers": 64,
        "num_attention_heads": 24,
        "num_key_value_heads": 4,
        "linear_num_value_heads": 48,
        "eos_token_id": 248044,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e7,
            "partial_rotary_factor": 0.25,
            "mrope_section": [11, 11, 10],
            "mrope_interleaved": True,
        },
    }
    document = saved(Qwen3_5Config(text_config=text), tmp_path)
    document["text_config"].update(
        attn_output_gate=True, mamba_ssm_dtype="float32", mtp_num_hidden_layers=1
    )
    spec = spec_from_config(document, {"eos_token_id": [248046, 248044]})
    assert spec.attention_layers == tuple(range(3, 64, 4))
    assert len(spec.linear_layers) == 48
    assert spec.linear_attention == LinearAttentionSpec(
        num_key_heads=16, num_value_heads=48, key_head_dim=128, value_head_dim=128
    )
    assert spec.rope == RopeSpec(theta=1e7, partial_rotary_factor=0.25)
    assert (spec.head_dim, spec.vocab_size, spec.eos_token_ids) == (256, 248320, (248044, 248046))
    # 64 KiB of KV per token in bf16, and 151 + 2.95 MB of state.
    assert spec.kv_bytes_per_token(2) == 65536
    assert spec.state_bytes_per_sequence(2) == 48 * (48 * 128 * 128 * 4 + 3 * 10240 * 2)


def test_experts_are_read_as_transformers_computes_them(tmp_path: Path) -> None:
    """Defaults and renormalisation differ by family."""
    plain = spec_from_config(saved(Qwen3MoeConfig(mlp_only_layers=[2]), tmp_path))
    assert plain.moe == MoeSpec(
        num_experts=128,
        num_experts_per_tok=8,
        intermediate_size=768,
        norm_topk_prob=False,
        dense_layers=(2,),
    )
    hybrid = spec_from_config(saved(Qwen3NextConfig(), tmp_path))
    assert hybrid.moe is not None
    assert (hybrid.moe.norm_topk_prob, hybrid.moe.shared_intermediate_size) == (True, 512)
    nested = spec_from_config(saved(Qwen3_5MoeConfig(), tmp_path))
    assert nested.moe is not None
    assert (nested.moe.norm_topk_prob, nested.intermediate_size) == (True, 512)
    every_third = {**saved(Qwen3MoeConfig(num_hidden_layers=7), tmp_path), "decoder_sparse_step": 3}
    assert spec_from_config(every_third).moe.dense_layers == (0, 1, 3, 4, 6)  # type: ignore[union-attr]


def test_what_both_levels_say_is_taken_from_the_right_one(tmp_path: Path) -> None:
    """Tying is the whole model's, end tokens the text part's, a missing dtype the other's."""
    document = saved(Qwen3_5Config(), tmp_path)
    document["tie_word_embeddings"] = True
    document["text_config"].update(tie_word_embeddings=False, eos_token_id=7, dtype=None)
    document.update(eos_token_id=9, dtype="float16")
    spec = spec_from_config(document)
    assert (spec.tie_word_embeddings, spec.eos_token_ids) == (True, (7,))
    assert spec.torch_dtype == "float16"


HYBRID_REFUSED: dict[str, tuple[dict[str, Any], type[CortexError], str]] = {
    "no full attention": (
        {"layer_types": ["linear_attention"] * 32},
        BadModelFile,
        "layer_types gives none of the 32 layers full attention",
    ),
    "interval beyond layers": (
        {"layer_types": None, "full_attention_interval": 33},
        BadModelFile,
        "full_attention_interval gives none",
    ),
    "interval zero": (
        {"layer_types": None, "full_attention_interval": 0},
        BadModelFile,
        "full_attention_interval is 0",
    ),
    "layer_types length": (
        {"layer_types": ["full_attention"] * 3},
        BadModelFile,
        "layer_types has 3 entries",
    ),
    "layer type unknown": (
        {"layer_types": ["mamba"] * 32},
        UnsupportedArchitecture,
        "layer_types .*only full_attention, linear_attention",
    ),
    "layer_types no list": ({"layer_types": "full_attention"}, BadModelFile, "a list of strings"),
    "heads not divisible": (
        {"linear_num_value_heads": 24, "linear_num_key_heads": 16},
        BadModelFile,
        "linear_num_value_heads = 24 is not a multiple of linear_num_key_heads = 16",
    ),
    "heads negative": ({"linear_num_key_heads": -1}, BadModelFile, "linear_num_key_heads is -1"),
    "heads missing": ({"linear_num_key_heads": None}, BadModelFile, "is missing"),
    "head size huge": ({"linear_key_head_dim": 1 << 20}, BadModelFile, "linear_key_head_dim is"),
    "kernel one": ({"linear_conv_kernel_dim": 1}, BadModelFile, "linear_conv_kernel_dim is 1"),
    "no gate": ({"attn_output_gate": False}, UnsupportedArchitecture, "attn_output_gate = False"),
    "another text model": ({"model_type": "llama"}, BadModelFile, "text_config.model_type is"),
    "rope type": (
        {"rope_parameters": {"rope_type": "longrope"}},
        UnsupportedArchitecture,
        "rope type 'longrope'",
    ),
    "rotates nothing": (
        {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.001}},
        BadModelFile,
        "rotates 0 elements",
    ),
    "experts negative": ({"num_experts": -4}, BadModelFile, "num_experts is -4"),
    "experts absurd": ({"num_experts": 4096, "num_hidden_layers": 1000, "layer_types": None},
                       BadModelFile, "num_experts = 4096 in 1000 layers is absurd"),
    "more chosen than there are": (
        {"num_experts": 4, "num_experts_per_tok": 5},
        BadModelFile,
        "num_experts_per_tok is 5",
    ),
    "expert size a float": ({"moe_intermediate_size": 1.5}, BadModelFile, "is 1.5"),
    "dense layer beyond": ({"mlp_only_layers": [32]}, BadModelFile, "mlp_only_layers is"),
    "step zero": ({"decoder_sparse_step": 0}, BadModelFile, "decoder_sparse_step is 0"),
    "quantised": (
        {"quantization_config": {"quant_method": "fp8"}},
        UnsupportedArchitecture,
        "quantization_config",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def nested(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A valid configuration with everything in it: hybrid layers, experts, text_config."""
    config = Qwen3_5MoeConfig(text_config={"num_hidden_layers": 32})
    return saved(config, tmp_path_factory.mktemp("config"))


@pytest.mark.parametrize("case", HYBRID_REFUSED)
def test_unusable_field_is_refused_by_name(case: str, nested: dict[str, Any]) -> None:
    """Each hostile value has its own message, with the file and the field."""
    changes, error_class, cause = HYBRID_REFUSED[case]
    document = {**nested, "text_config": {**nested["text_config"], **changes}}
    with pytest.raises(error_class, match=cause) as caught:
        spec_from_config(document, file="/m/config.json")
    assert str(caught.value).startswith("/m/config.json")
    assert len(str(caught.value)) < 1000


_VALUE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3)
    | st.sampled_from(["linear_attention", "full_attention", "default", "yarn"]),
    lambda children: st.lists(children, max_size=3)
    | st.dictionaries(st.sampled_from(["rope_type", "factor", "x"]), children, max_size=2),
    max_leaves=4,
)  # fmt: skip


@settings(max_examples=200)
@given(data=st.data())
def test_arbitrary_fields_raise_nothing_else(nested: dict[str, Any], data: st.DataObject) -> None:
    """Any JSON in any field is a spec or one of the two errors."""
    fields = st.sampled_from(sorted(nested["text_config"]))
    changes = data.draw(st.dictionaries(fields, _VALUE, max_size=4))
    where = data.draw(st.sampled_from(["text", "top", "both"]))
    document = dict(nested)
    if where != "top":
        document["text_config"] = {**nested["text_config"], **changes}
    if where != "text":
        document.update(changes)
    try:
        spec = spec_from_config(document)
    except (BadModelFile, UnsupportedArchitecture):
        return
    assert spec.attention_layers


def test_vision_and_draft_tensors_are_skipped_and_others_are_not(tmp_path: Path) -> None:
    """What is not run may be there; anything else unknown is named as the file spells it."""
    files = save_oracle(make_oracle("qwen3_5", seed=1), tmp_path / "m")
    path = Path(files.weights[0])
    tensors = load_file(path)
    assert any(name.startswith("model.visual.") for name in tensors)
    save_file({**tensors, "mtp.fc.weight": torch.zeros(2, 2)}, path)
    inspect(files)
    name = "model.language_model.layers.0.linear_attn.in_proj_z.weight"
    missing = {key: tensor for key, tensor in tensors.items() if key != name}
    save_file({**missing, "model.language_model.extra": torch.zeros(1)}, path)
    with pytest.raises(BadModelFile, match=rf"{name}\) missing.*language_model\.extra\) unexp"):
        inspect(files)


GGUF_REFUSED: dict[str, tuple[str, int, str]] = {
    "value heads": ("qwen35moe.ssm.time_step_rank", 3, "ssm.inner_size = 32 is not"),
    "groups": ("qwen35moe.ssm.group_count", 3, "not a multiple of qwen35moe.ssm.group_count"),
    "interval": ("qwen35moe.full_attention_interval", 9, "full_attention_interval gives none"),
    "drafts": ("qwen35moe.nextn_predict_layers", 2, "leaves none of the qwen35moe.block_count"),
    "experts": ("qwen35moe.expert_count", 0, "expert_count is 0"),
    "experts used": ("qwen35moe.expert_used_count", 5, "expert_used_count is 5"),
}


@pytest.mark.parametrize("case", GGUF_REFUSED)
def test_gguf_unusable_key_is_refused_by_name(case: str, tmp_path: Path) -> None:
    """Each hostile value of a hybrid's header names the file and the key."""
    key, value, cause = GGUF_REFUSED[case]
    spec = family_spec(LLAMA, "qwen3_5_moe")
    tensors = {name: (tensor.numpy(), 0) for name, tensor in random_dense(spec).items()}
    files = write_gguf(tmp_path / "m.gguf", spec, tensors, {key: value})
    with pytest.raises(BadModelFile, match=cause) as caught:
        inspect(files)
    assert "m.gguf" in str(caught.value)


def test_every_family_is_read_from_gguf_with_draft_blocks(tmp_path: Path) -> None:
    """Blocks behind the layers are counted out, and their tensors are skipped."""
    for model_type in sorted(REGISTRY):
        base = family_spec(LLAMA, model_type)
        if base.linear_attention is None:
            continue
        spec = msgspec.structs.replace(base, num_draft_layers=1)
        tensors = {name: (tensor.numpy(), 0) for name, tensor in random_dense(spec).items()}
        draft = {"blk.2.nextn.eh_proj.weight": tensors["model.norm.weight"]}
        files = write_gguf(tmp_path / f"{model_type}.gguf", spec, {**tensors, **draft})
        assert inspect(files).num_hidden_layers == 2
