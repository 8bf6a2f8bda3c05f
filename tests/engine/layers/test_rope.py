"""Rotary embedding against transformers' own tables and rotation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from cortexd import errors
from cortexd.models import RopeSpec
from engine.layers.rope import RotaryEmbedding, inverse_frequencies

HEAD_DIM = 64
CPU = torch.device("cpu")
SPECS: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 4.0},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 256,
    },
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 256},
}


@pytest.mark.parametrize("rope_type", SPECS)
def test_rotation_equals_transformers(rope_type: str) -> None:
    """Q and K come out the same for every supported type."""
    parameters = {"rope_type": rope_type, "rope_theta": 50_000.0, **SPECS[rope_type]}
    config = LlamaConfig(
        hidden_size=HEAD_DIM,
        num_attention_heads=1,
        max_position_embeddings=1024,
        rope_parameters=dict(parameters),
    )
    positions = torch.tensor([0, 1, 17, 255, 900])
    heads = torch.randn(5, 3, HEAD_DIM, generator=torch.Generator().manual_seed(0))
    cos, sin = LlamaRotaryEmbedding(config)(heads, positions[None])
    expected, _ = apply_rotary_pos_emb(
        heads.transpose(0, 1)[None], heads.transpose(0, 1)[None], cos, sin
    )
    spec = RopeSpec(rope_type=rope_type, theta=50_000.0, **SPECS[rope_type])
    rope = RotaryEmbedding(spec, HEAD_DIM, torch.float32, CPU)
    rope.rotate_(heads, rope.tables(positions))
    torch.testing.assert_close(heads, expected[0].transpose(0, 1), atol=1e-6, rtol=0)


def test_partial_rotation_leaves_the_rest_of_a_head() -> None:
    """Only the first rotary_dim elements turn, as if the head were that small."""
    heads = torch.randn(4, 2, HEAD_DIM, generator=torch.Generator().manual_seed(1))
    before = heads.clone()
    positions = torch.arange(4)
    partial = RotaryEmbedding(RopeSpec(partial_rotary_factor=0.25), HEAD_DIM, torch.float32, CPU)
    partial.rotate_(heads, partial.tables(positions))
    small = before[..., :16].clone()
    whole = RotaryEmbedding(RopeSpec(), 16, torch.float32, CPU)
    whole.rotate_(small, whole.tables(positions))
    assert torch.equal(heads[..., 16:], before[..., 16:])
    assert torch.equal(heads[..., :16], small)


def test_unknown_type_is_refused_by_name() -> None:
    """The error names the type and the supported ones."""
    with pytest.raises(errors.UnsupportedArchitecture, match=r'"longrope".*default, linear'):
        inverse_frequencies(RopeSpec(rope_type="longrope"), HEAD_DIM)
