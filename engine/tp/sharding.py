"""Which part of every tensor a rank holds, and which world sizes a model can be split into.

One rule per tensor name. Matrices that make heads or intermediate features are split by rows, those
that consume them by columns (their partial sums are added up), the vocabulary by rows; the rest is
on every rank. Pure and torch-free: the pre-flight check asks here before a process is started.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import msgspec

from cortexd.errors import InvalidValue, UnsupportedArchitecture
from cortexd.models import ModelSpec

MAX_WORLD_SIZE: Final = 64
# Rows of the vocabulary are dealt out in multiples of this where that leaves no rank without any.
_VOCAB_ALIGNMENT: Final = 64
# Model types whose every tensor has a rule below.
SHARDED_MODEL_TYPES: Final = frozenset({"llama", "qwen2", "qwen3"})

Region = tuple[slice, ...]  # one slice per dimension of the stored tensor


class Rule(enum.Enum):
    """How one tensor is split."""

    REPLICATED = "replicated"
    ROWS = "rows"  # contiguous, equal parts
    KV_ROWS = "kv_rows"  # by KV head; one head on several ranks when there are more ranks
    COLUMNS = "columns"  # of the input; the outputs are partial sums
    VOCABULARY = "vocabulary"  # rows, the last part may be smaller


_RULES: Final[dict[str, Rule]] = {
    "embed_tokens": Rule.VOCABULARY,
    "lm_head": Rule.VOCABULARY,
    "q_proj": Rule.ROWS,
    "k_proj": Rule.KV_ROWS,
    "v_proj": Rule.KV_ROWS,
    "o_proj": Rule.COLUMNS,
    "gate_proj": Rule.ROWS,
    "up_proj": Rule.ROWS,
    "down_proj": Rule.COLUMNS,
    "q_norm": Rule.REPLICATED,
    "k_norm": Rule.REPLICATED,
    "norm": Rule.REPLICATED,
    "input_layernorm": Rule.REPLICATED,
    "post_attention_layernorm": Rule.REPLICATED,
}


def rule_of(name: str) -> Rule:
    """Return the rule of a canonical tensor name; a bias goes with its matrix's output."""
    module, _, kind = name.rpartition(".")
    rule = _RULES[module.rpartition(".")[2]]
    return Rule.REPLICATED if kind == "bias" and rule is Rule.COLUMNS else rule


@dataclass(frozen=True, slots=True)
class Shard:
    """One rank's share of a model."""

    rank: int = 0
    world_size: int = 1

    @property
    def is_whole(self) -> bool:
        """Whether this is the whole model."""
        return self.world_size == 1

    def kv_heads(self, num_kv_heads: int) -> slice:
        """Return the KV heads that this rank's query heads read."""
        if self.world_size > num_kv_heads:
            head = self.rank * num_kv_heads // self.world_size
            return slice(head, head + 1)
        return self._part(num_kv_heads)

    def vocabulary(self, vocab_size: int) -> slice:
        """Return this rank's token ids; all parts but the last have the same size."""
        part = self.vocabulary_part(vocab_size)
        begin = min(self.rank * part, vocab_size)
        return slice(begin, min(begin + part, vocab_size))

    def vocabulary_part(self, vocab_size: int) -> int:
        """Return the token ids per rank, of which only the last rank may have fewer."""
        part = -(-vocab_size // self.world_size)
        aligned = -(-part // _VOCAB_ALIGNMENT) * _VOCAB_ALIGNMENT
        return aligned if (self.world_size - 1) * aligned < vocab_size else part

    def local_spec(self, spec: ModelSpec) -> ModelSpec:
        """Return the sizes of this rank's layers; the vocabulary stays the whole one."""
        if self.is_whole:
            return spec
        heads = self.kv_heads(spec.num_key_value_heads)
        return msgspec.structs.replace(
            spec,
            num_attention_heads=spec.num_attention_heads // self.world_size,
            num_key_value_heads=heads.stop - heads.start,
            intermediate_size=spec.intermediate_size // self.world_size,
        )

    def regions(self, name: str, shape: tuple[int, ...], spec: ModelSpec) -> list[Region]:
        """Return which parts of a stored tensor this rank reads, to be joined along dimension 0."""
        whole = tuple(slice(0, size) for size in shape)
        match rule_of(name):
            case Rule.REPLICATED:
                return [whole]
            case Rule.ROWS:
                return [(self._part(shape[0]), *whole[1:])]
            case Rule.KV_ROWS:
                heads = self.kv_heads(spec.num_key_value_heads)
                per_head = shape[0] // spec.num_key_value_heads
                rows = slice(heads.start * per_head, heads.stop * per_head)
                return [(rows, *whole[1:])]
            case Rule.COLUMNS:
                return [(*whole[:-1], self._part(shape[-1]))]
            case Rule.VOCABULARY:
                return [(self.vocabulary(shape[0]), *whole[1:])]

    def _part(self, size: int) -> slice:
        part = size // self.world_size
        return slice(self.rank * part, (self.rank + 1) * part)


def check_world_size(spec: ModelSpec, world_size: int) -> None:
    """Check that a model can be split so. Raises: UnsupportedArchitecture, InvalidValue.

    The error names the first quantity that does not divide, and the world sizes that do.
    """
    if world_size == 1:
        return
    if spec.model_type not in SHARDED_MODEL_TYPES:
        raise UnsupportedArchitecture(
            f"tensor_parallel = {world_size} is not supported for model_type {spec.model_type}; "
            f"supported: {', '.join(sorted(SHARDED_MODEL_TYPES))}; use tensor_parallel = 1",
            model_type=spec.model_type,
        )
    fault = next(_faults(spec, world_size), None)
    if fault is not None:
        raise InvalidValue(
            f"tensor_parallel = {world_size}: {fault}; allowed for this model: "
            f"{_listing(allowed_world_sizes(spec))}",
            param="tensor_parallel",
        )


def allowed_world_sizes(spec: ModelSpec) -> list[int]:
    """Return the world sizes that divide every quantity of the model."""
    sizes = range(1, MAX_WORLD_SIZE + 1)
    return [size for size in sizes if next(_faults(spec, size), None) is None]


def _faults(spec: ModelSpec, world_size: int) -> Iterator[str]:
    for quantity, value in (
        ("num_attention_heads", spec.num_attention_heads),
        ("intermediate_size", spec.intermediate_size),
    ):
        if value % world_size:
            yield f"{quantity} = {value} is not a multiple of it"
    num_kv_heads = spec.num_key_value_heads
    if num_kv_heads % world_size and world_size % num_kv_heads:
        yield f"num_key_value_heads = {num_kv_heads} is neither a multiple nor a divisor of it"
    if (world_size - 1) * -(-spec.vocab_size // world_size) >= spec.vocab_size:
        yield f"vocab_size = {spec.vocab_size} leaves a rank without tokens"


def _listing(sizes: list[int]) -> str:
    return ", ".join(map(str, sizes))
