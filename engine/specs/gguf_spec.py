"""What a GGUF header says of a model, as a checked ModelSpec. Pure and torch-free.

Every number is range-checked where it is read. What the engine does not compute is refused by name.
"""

from __future__ import annotations

from cortexd.errors import BadModelFile, UnsupportedArchitecture
from cortexd.models import ModelSpec
from engine.formats.gguf_model import GGUFModel
from engine.models.registry import REGISTRY, model_type_of_gguf
from engine.specs.fields import Fields
from engine.specs.hybrid_spec import (
    linear_attention_from_gguf,
    linear_layers_from_gguf,
    moe_from_gguf,
)
from engine.specs.rope_spec import check_rotary_dim, rope_from_gguf
from engine.specs.spec import (
    MAX_HEAD_DIM,
    MAX_HEADS,
    MAX_LAYERS,
    MAX_POSITIONS,
    MAX_VOCAB,
    MAX_WIDTH,
    check_heads,
)


def spec_from_gguf(gguf: GGUFModel) -> ModelSpec:
    """Return the spec that a GGUF header describes.

    `tie_word_embeddings` and the bias flags follow from which tensors are there. Raises:
    UnsupportedArchitecture, BadModelFile; both name the file and the key.
    """
    model_type = model_type_of_gguf(gguf.architecture, gguf.path)
    entry = REGISTRY[model_type]
    prefix = f"{gguf.architecture}."
    metadata = gguf.metadata
    fields = Fields(metadata, gguf.path)
    num_layers, num_draft_layers = _num_layers(fields, prefix)
    moe = moe_from_gguf(fields, prefix, gguf.tensors, num_layers) if entry.has_experts else None
    linear_layers: tuple[int, ...] = ()
    linear_attention = None
    if entry.is_hybrid:
        linear_layers = linear_layers_from_gguf(fields, prefix, num_layers)
        linear_attention = linear_attention_from_gguf(
            fields, prefix, has_tiled_heads=entry.has_tiled_gguf_heads
        )
    full_layer = next(i for i in range(num_layers) if i not in linear_layers)
    hidden_size = fields.integer(f"{prefix}embedding_length", maximum=MAX_WIDTH)
    heads_key, kv_key = f"{prefix}attention.head_count", f"{prefix}attention.head_count_kv"
    num_heads = fields.uniform_integer(heads_key, maximum=MAX_HEADS)
    num_kv_heads = fields.uniform_integer(kv_key, maximum=MAX_HEADS, default=num_heads)
    check_heads(gguf.path, num_heads, num_kv_heads, heads_key, kv_key)
    head_dim = _gguf_head_dim(fields, prefix, hidden_size, num_heads)
    rope = rope_from_gguf(fields, prefix, head_dim, default_theta=entry.gguf_rope_theta)
    check_rotary_dim(gguf.path, head_dim, rope)
    if entry.has_permuted_rope_rows and rope.partial_rotary_factor != 1.0:
        raise UnsupportedArchitecture(
            f"{gguf.path}: {prefix}rope.dimension_count must be the head size {head_dim}; partly "
            f"rotated heads are not supported for {model_type}"
        )
    vocab_size = _gguf_vocab_size(gguf)
    has_qkv_bias = f"blk.{full_layer}.attn_q.bias" in gguf.tensors
    has_output_bias = f"blk.{full_layer}.attn_output.bias" in gguf.tensors
    return ModelSpec(
        model_type=model_type,
        architecture=gguf.architecture,
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=fields.uniform_integer(
            f"{prefix}feed_forward_length",
            maximum=MAX_WIDTH,
            default=None if moe is None else moe.intermediate_size,
        ),
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_kv_heads,
        head_dim=head_dim,
        rms_norm_eps=fields.number(
            f"{prefix}attention.layer_norm_rms_epsilon", minimum=0.0, maximum=1.0
        ),
        max_position_embeddings=fields.integer(f"{prefix}context_length", maximum=MAX_POSITIONS),
        rope=rope,
        tie_word_embeddings="output.weight" not in gguf.tensors,
        attention_bias=has_qkv_bias and has_output_bias,
        qkv_bias=has_qkv_bias and not has_output_bias,
        mlp_bias="blk.0.ffn_gate.bias" in gguf.tensors,
        torch_dtype=_gguf_dtype(gguf),
        eos_token_ids=_gguf_eos(fields, vocab_size),
        bos_token_id=next(iter(fields.token_ids("tokenizer.ggml.bos_token_id", vocab_size)), None),
        linear_layers=linear_layers,
        linear_attention=linear_attention,
        moe=moe,
        num_draft_layers=num_draft_layers,
        has_folded_weights=entry.is_hybrid,
    )


def _num_layers(fields: Fields, prefix: str) -> tuple[int, int]:
    """Return how many layers there are, and how many multi-token-prediction blocks after them."""
    count_key, draft_key = f"{prefix}block_count", f"{prefix}nextn_predict_layers"
    num_blocks = fields.integer(count_key, maximum=MAX_LAYERS)
    num_drafts = fields.integer(draft_key, minimum=0, maximum=MAX_LAYERS, default=0)
    if num_drafts >= num_blocks:
        raise BadModelFile(
            f"{fields.file}: {draft_key} = {num_drafts} leaves none of the {count_key} = "
            f"{num_blocks} blocks"
        )
    return num_blocks - num_drafts, num_drafts


def _gguf_head_dim(fields: Fields, prefix: str, hidden_size: int, num_heads: int) -> int:
    key = f"{prefix}attention.key_length"
    if fields.values.get(key) is None and hidden_size % num_heads:
        raise BadModelFile(
            f"{fields.file}: {key} is not given and {prefix}embedding_length {hidden_size} is not "
            f"a multiple of the {num_heads} attention heads"
        )
    head_dim = fields.integer(key, maximum=MAX_HEAD_DIM, default=hidden_size // num_heads)
    value_key = f"{prefix}attention.value_length"
    value_dim = fields.integer(value_key, maximum=MAX_HEAD_DIM, default=head_dim)
    if value_dim != head_dim or head_dim % 2:
        raise BadModelFile(
            f"{fields.file}: {key} = {head_dim} and {value_key} = {value_dim}; they must be equal "
            "and even"
        )
    return head_dim


def _gguf_vocab_size(gguf: GGUFModel) -> int:
    """Return the rows of the embedding, which must agree with the token list."""
    embedding = gguf.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise BadModelFile(f"{gguf.path}: tensor token_embd.weight is missing or not a matrix")
    rows = embedding.shape[0]
    num_tokens = gguf.metadata.array_length("tokenizer.ggml.tokens")
    if rows > MAX_VOCAB or (num_tokens is not None and num_tokens > rows):
        raise BadModelFile(
            f"{gguf.path}: token_embd.weight has {rows} rows; tokenizer.ggml.tokens has "
            f"{num_tokens} entries; at most {MAX_VOCAB} rows are accepted"
        )
    return rows


def _gguf_dtype(gguf: GGUFModel) -> str:
    """Return the number type the weights were made from, as far as the file tells."""
    by_type = {"F32": "float32", "F16": "float16"}
    return by_type.get(gguf.tensors["token_embd.weight"].ggml_type.name, "bfloat16")


def _gguf_eos(fields: Fields, vocab_size: int) -> tuple[int, ...]:
    names = ("eos", "eot", "eom")
    ids = [i for n in names for i in fields.token_ids(f"tokenizer.ggml.{n}_token_id", vocab_size)]
    return tuple(dict.fromkeys(ids))
