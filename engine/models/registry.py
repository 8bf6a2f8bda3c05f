"""The architectures this engine runs. Torch-free: a model's class is imported only on demand.

Adding one is a file `engine/models/<model_type>.py` and one entry here. The pre-flight check, the
GGUF name mapping and every "unsupported architecture" error are built from this table.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, NoReturn

from cortexd.errors import UnsupportedArchitecture
from cortexd.models import ModelSpec
from engine.specs.tensor_plan import TensorPlan, decoder_plan


@dataclass(frozen=True, slots=True)
class Architecture:
    """One model family."""

    target: str  # "module:Class", imported by `load_class`
    architectures: tuple[str, ...]  # what config.json's `architectures` may say
    gguf_name: str  # what a GGUF's general.architecture says
    plan: Callable[[ModelSpec], TensorPlan]
    default_head_dim: int | None = None  # None: hidden_size / num_attention_heads
    default_max_position_embeddings: int = 2048
    default_eos_token_ids: tuple[int, ...] = ()  # when config.json says nothing
    gguf_rope_theta: float | None = None  # the GGUF key's default; None: the key is required
    has_permuted_rope_rows: bool = False  # GGUF: q/k rows are stored interleaved per head
    aliases: tuple[str, ...] = ()  # other model types: the text part of a multimodal model
    has_text_config: bool = False  # the fields may be nested under text_config
    has_qkv_bias: bool = False  # biases on q, k and v, whatever attention_bias says
    may_have_mlp_bias: bool = False
    default_partial_rotary_factor: float = 1.0
    is_hybrid: bool = False  # has Gated DeltaNet layers
    has_tiled_gguf_heads: bool = False  # GGUF: V heads are reordered
    has_experts: bool = False
    has_shared_expert: bool = False
    normalizes_experts: bool | None = None  # default of norm_topk_prob; None: always


# Draft (multi-token prediction) layers and the vision tower are not run.
_SKIPPED_PREFIXES: Final = ("mtp.", "model.mtp.", "model.visual.", "visual.")
_HYBRID_PLAN: Final = partial(
    decoder_plan, has_qk_norm=True, has_output_gate=True, ignored_prefixes=_SKIPPED_PREFIXES
)

REGISTRY: Final[dict[str, Architecture]] = {
    "llama": Architecture(
        target="engine.models.llama:LlamaForCausalLM",
        architectures=("LlamaForCausalLM",),
        gguf_name="llama",
        plan=partial(decoder_plan, has_qk_norm=False),
        default_eos_token_ids=(2,),
        gguf_rope_theta=10000.0,
        has_permuted_rope_rows=True,
        may_have_mlp_bias=True,
    ),
    "qwen2": Architecture(
        target="engine.models.qwen2:Qwen2ForCausalLM",
        architectures=("Qwen2ForCausalLM",),
        gguf_name="qwen2",
        plan=partial(decoder_plan, has_qk_norm=False),
        default_max_position_embeddings=32768,
        has_qkv_bias=True,
    ),
    "qwen3": Architecture(
        target="engine.models.qwen3:Qwen3ForCausalLM",
        architectures=("Qwen3ForCausalLM",),
        gguf_name="qwen3",
        plan=partial(decoder_plan, has_qk_norm=True),
        default_head_dim=128,
        default_max_position_embeddings=32768,
    ),
    "qwen3_moe": Architecture(
        target="engine.models.qwen3_moe:Qwen3MoeForCausalLM",
        architectures=("Qwen3MoeForCausalLM",),
        gguf_name="qwen3moe",
        plan=partial(decoder_plan, has_qk_norm=True),
        default_max_position_embeddings=32768,
        has_experts=True,
        normalizes_experts=False,
    ),
    "qwen3_next": Architecture(
        target="engine.models.qwen3_next:Qwen3NextForCausalLM",
        architectures=("Qwen3NextForCausalLM",),
        gguf_name="qwen3next",
        plan=_HYBRID_PLAN,
        default_head_dim=256,
        default_max_position_embeddings=32768,
        default_partial_rotary_factor=0.25,
        is_hybrid=True,
        has_experts=True,
        has_shared_expert=True,
        normalizes_experts=True,
    ),
    "qwen3_5": Architecture(
        target="engine.models.qwen3_5:Qwen35ForCausalLM",
        architectures=("Qwen3_5ForConditionalGeneration", "Qwen3_5ForCausalLM"),
        gguf_name="qwen35",
        plan=_HYBRID_PLAN,
        default_head_dim=256,
        default_max_position_embeddings=32768,
        aliases=("qwen3_5_text",),
        has_text_config=True,
        default_partial_rotary_factor=0.25,
        is_hybrid=True,
        has_tiled_gguf_heads=True,
    ),
    "qwen3_5_moe": Architecture(
        target="engine.models.qwen3_5_moe:Qwen35MoeForCausalLM",
        architectures=("Qwen3_5MoeForConditionalGeneration", "Qwen3_5MoeForCausalLM"),
        gguf_name="qwen35moe",
        plan=_HYBRID_PLAN,
        default_head_dim=256,
        default_max_position_embeddings=32768,
        aliases=("qwen3_5_moe_text",),
        has_text_config=True,
        default_partial_rotary_factor=0.25,
        is_hybrid=True,
        has_tiled_gguf_heads=True,
        has_experts=True,
        has_shared_expert=True,
    ),
}

MODEL_TYPE_ALIASES: Final[dict[str, str]] = {
    alias: model_type for model_type, entry in REGISTRY.items() for alias in entry.aliases
}


def supported_model_types() -> list[str]:
    """Return the model types that `config.json` may name."""
    return sorted(REGISTRY)


def supported_gguf_architectures() -> list[str]:
    """Return the names that a GGUF's general.architecture may have."""
    return sorted(entry.gguf_name for entry in REGISTRY.values())


def model_type_of_gguf(gguf_architecture: str, file: str) -> str:
    """Return the registry key of a GGUF architecture. Raises UnsupportedArchitecture."""
    for model_type, entry in REGISTRY.items():
        if entry.gguf_name == gguf_architecture:
            return model_type
    refuse_architecture(
        file,
        f'general.architecture "{gguf_architecture}"',
        gguf_architecture,
        supported_gguf_architectures(),
    )


def check_model_type(model_type: str, architectures: list[str], file: str) -> Architecture:
    """Return the registry entry for what `config.json` names. Raises UnsupportedArchitecture."""
    named = ", ".join(architectures) or "none"
    subject = f'model_type "{model_type}" (architectures: {named})'
    entry = REGISTRY.get(model_type)
    if entry is None:
        refuse_architecture(file, subject, model_type, supported_model_types())
    if architectures and not set(architectures) & set(entry.architectures):
        raise UnsupportedArchitecture(
            f"{file}: {subject}: this engine runs {model_type} only as "
            f"{', '.join(entry.architectures)}; another head or variant needs its own entry in "
            "engine/models/registry.py",
            model_type=model_type,
            supported=supported_model_types(),
        )
    return entry


def refuse_architecture(file: str, subject: str, name: str, supported: list[str]) -> NoReturn:
    """Raise UnsupportedArchitecture, saying what is supported and how to add the missing one."""
    printable = "".join(c if c.isalnum() or c in "_-." else "_" for c in name[:64])
    raise UnsupportedArchitecture(
        f"{file}: unsupported {subject}; supported: {', '.join(supported)}; to add it, write "
        f"engine/models/{printable}.py and register it in engine/models/registry.py",
        model_type=name[:64],
        supported=supported,
    )


def load_class(model_type: str) -> type[Any]:
    """Import and return the model class of a registered type (this imports torch)."""
    module, _, class_name = REGISTRY[model_type].target.partition(":")
    loaded: type[Any] = getattr(importlib.import_module(module), class_name)
    return loaded
