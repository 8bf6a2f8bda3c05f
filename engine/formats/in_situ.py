"""Which types a dense safetensors model can be quantised to while it is loaded. Torch-free.

Used by the model sources, to tell a wanted quantisation from a file's, and by the loader.
"""

from __future__ import annotations

from typing import Final

from engine.formats.ggml import GGMLType

# As users write them, without case, "_" and "-": q4_k, Q4K and q4-k are one.
_TYPES: Final = {
    "q40": GGMLType.Q4_0,
    "q41": GGMLType.Q4_1,
    "q50": GGMLType.Q5_0,
    "q51": GGMLType.Q5_1,
    "q80": GGMLType.Q8_0,
    "q8": GGMLType.Q8_0,
    "q4k": GGMLType.Q4_K,
    "q5k": GGMLType.Q5_K,
    "q6k": GGMLType.Q6_K,
}
# For rows that are no multiple of 256: types of blocks of 32 with as many bits or more.
_SMALL_BLOCKS: Final = {
    GGMLType.Q4_K: GGMLType.Q5_0,
    GGMLType.Q5_K: GGMLType.Q5_1,
    GGMLType.Q6_K: GGMLType.Q8_0,
}


def in_situ_type(quant: str) -> GGMLType | None:
    """Return the type that `quant` names; None for one that needs a file made with it."""
    return _TYPES.get(quant.lower().replace("_", "").replace("-", ""))


def in_situ_names() -> list[str]:
    """Return the names of all types, for error texts."""
    return [ggml_type.name.lower() for ggml_type in sorted(set(_TYPES.values()))]


def type_for_columns(wanted: GGMLType, num_columns: int) -> GGMLType | None:
    """Return `wanted`, or a type of smaller blocks when rows of that length need one.

    None when the rows fit no block at all, and so must stay dense.
    """
    for ggml_type in (wanted, _SMALL_BLOCKS.get(wanted)):
        if ggml_type is not None and num_columns % ggml_type.block_elements == 0:
            return ggml_type
    return None
