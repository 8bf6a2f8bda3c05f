"""`python -m bench exactness`: how far the engine is from transformers, as a table.

Rows are architectures in stored formats, columns the ways of computing a prompt; each figure is the
largest absolute difference of the logits after the last token. Models, formats and ways are those
of the tests (`tests/engine/stored_models.py`, `ways.py`), which is why transformers must be there.
"""

from __future__ import annotations

import importlib.util
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.engine.stored_models import StoredModel

ARCHITECTURES = (
    "llama", "qwen2", "qwen3", "qwen3_5", "qwen3_next", "qwen3_moe", "qwen3_5_moe",
)  # fmt: skip
HYBRIDS = ("qwen3_5", "qwen3_next", "qwen3_5_moe")
TOLERANCE = 1e-4
PROMPTS = ("random", "one token repeated")
# Column → the ways of tests/engine/ways.py that it is the worst of.
COLUMNS = {
    "one pass": ("in_one_pass",),
    "chunked": ("in_uneven_chunks", "in_chunks_of_64"),
    "by token": ("token_by_token",),
    "batched": ("among_others", "after_another"),
    "cached": ("after_a_hit",),
    "preempted": ("after_preemption",),
    "snapshot": ("after_a_snapshot",),
}
# Formats whose kernels round activations: their own single pass is what the other ways must equal.
KERNEL_FORMATS = ("safetensors f32", "safetensors bf16", "GGUF q8_0")
Row = dict[str, float | None]


def main(arguments: list[str]) -> int:
    """Print the table of all architectures, or of those named; 1 when a figure is too large."""
    unknown = [name for name in arguments if name not in ARCHITECTURES]
    if unknown:
        print(f"no architecture {unknown[0]}; there are: {', '.join(ARCHITECTURES)}")
        return 2
    if missing := [name for name in ("transformers", "gguf") if not importlib.util.find_spec(name)]:
        print(
            f"{', '.join(missing)} is not installed; this compares with it: "
            "pip install -c constraints.txt -e '.[test]'"
        )
        return 2
    # Read when transformers is imported.
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    print("Largest |logit difference| to transformers (float32, same stored values), torch path:")
    _print_head()
    is_exact = _print_exact_rows(arguments or ARCHITECTURES)
    print()
    print("CPU kernels: one pass to transformers, the other ways to that pass:")
    _print_head()
    for architecture in arguments or ARCHITECTURES:
        for stored_as in KERNEL_FORMATS:
            for activations in ("exact", "rounded"):
                row = kernel_row(architecture, stored_as, activations)
                _print_row(architecture, f"{stored_as}, {activations}", row)
    print()
    print(f"every figure of the first table below {TOLERANCE:g}: {'yes' if is_exact else 'NO'}")
    return 0 if is_exact else 1


def exact_row(architecture: str, stored_as: str) -> Row:
    """Return the differences to transformers; None where a column does not apply."""
    with tempfile.TemporaryDirectory(prefix="cx-exact-") as directory:
        model = _store(architecture, stored_as, directory, "reference")
        return {column: _worst(architecture, model, column) for column in COLUMNS}


def kernel_row(architecture: str, stored_as: str, activations: str) -> Row:
    """Return the difference of one pass to transformers, and of the other ways to that pass.

    `activations`: whether the kernels round them ("rounded") or not ("exact").
    """
    with tempfile.TemporaryDirectory(prefix="cx-exact-") as directory:
        model = _store(architecture, stored_as, directory, "auto")
        model.settings["activations"] = activations
        return {
            column: _worst(architecture, model, column, is_relative=column != "one pass")
            for column in COLUMNS
        }


def _print_exact_rows(architectures: Sequence[str]) -> bool:
    """Print the rows of all formats; return whether all are exact."""
    from tests.engine.stored_models import FORMATS

    is_exact = True
    for architecture in architectures:
        for stored_as in FORMATS:
            row = exact_row(architecture, stored_as)
            _print_row(architecture, stored_as, row)
            is_exact &= all(value is None or value < TOLERANCE for value in row.values())
    return is_exact


def _print_head() -> None:
    print(f"| Architecture | Format | {' | '.join(COLUMNS)} |")
    print(f"|{'---|' * (len(COLUMNS) + 2)}")


def _print_row(architecture: str, stored_as: str, row: Row) -> None:
    figures = " | ".join("-" if value is None else f"{value:.1e}" for value in row.values())
    print(f"| {architecture} | {stored_as} | {figures} |", flush=True)


def _store(architecture: str, stored_as: str, directory: str, backend: str) -> StoredModel:
    import torch

    from tests.engine.stored_models import store_model

    torch.set_num_threads(1)  # tiny matrices
    return store_model(architecture, stored_as, Path(directory) / "model", backend=backend)


def _worst(
    architecture: str, model: StoredModel, column: str, *, is_relative: bool = False
) -> float | None:
    from tests.engine.checkpoints import oracle_logits
    from tests.engine.driving import max_difference
    from tests.engine.ways import PROMPTS as TEXTS
    from tests.engine.ways import WAYS

    if column == "snapshot" and architecture not in HYBRIDS:
        return None
    worst = 0.0
    for prompt in [TEXTS[name] for name in PROMPTS]:
        expected = oracle_logits(model.oracle, prompt)
        if is_relative:
            expected = WAYS["in_one_pass"](model.load, prompt)
        for way in COLUMNS[column]:
            worst = max(worst, max_difference(WAYS[way](model.load, prompt), expected))
    return worst
