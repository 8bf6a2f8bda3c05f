"""The check of a model before any process is started or weight byte read.

Called by the store with freshly resolved files. Reads config.json or the GGUF header, and the
headers of all weight files; answers the ModelSpec or an error that names the file and the fault.
Torch-free.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

from cortexd.errors import BadModelFile, InvalidValue
from cortexd.models import ModelFiles, ModelSpec, WeightBytes
from engine.formats.checkpoint import Checkpoint, CheckpointTensor
from engine.formats.checkpoint_check import check_plan
from engine.formats.gguf_model import GGUFModel
from engine.loading.memory_check import weigh
from engine.models.registry import REGISTRY
from engine.specs.gguf_spec import spec_from_gguf
from engine.specs.spec import spec_from_config
from engine.specs.stored_layout import with_stored_layout
from engine.tp.sharding import (
    Shard,
    allowed_world_sizes,
    check_world_size,
    makes_partial_sums,
)

MAX_CONFIG_BYTES: Final = 16 * 1024 * 1024


def inspect(files: ModelFiles) -> ModelSpec:
    """Return what the model is, having checked that every tensor it needs is there and fits.

    Raises: UnsupportedArchitecture, BadModelFile.
    """
    return inspect_and_weigh(files)[0]


def inspect_and_weigh(files: ModelFiles) -> tuple[ModelSpec, WeightBytes]:
    """Return what the model is, as `inspect` does, and what its weights will take."""
    spec, checkpoint = _open(files)
    try:
        spec = with_stored_layout(spec, checkpoint)
        plan = REGISTRY[spec.model_type].plan(spec)
        check_plan(checkpoint, plan, spec)
        tensors = {name: checkpoint[name] for name in plan.required}
        quant = None if checkpoint.is_gguf else files.quant
        weights = weigh(tensors, quant, is_tied=spec.tie_word_embeddings)
    finally:
        checkpoint.close()
    return spec, weights


def check_tensor_parallel(files: ModelFiles, spec: ModelSpec, world_size: int) -> None:
    """Check that the model can be split over `world_size` ranks; looks at headers only.

    Raises: InvalidValue naming what does not divide and the sizes that do, UnsupportedArchitecture.
    """
    check_world_size(spec, world_size)
    checkpoint = Checkpoint.open(files)
    try:
        _check_block_boundaries(checkpoint, spec, world_size)
    finally:
        checkpoint.close()


def _check_block_boundaries(checkpoint: Checkpoint, spec: ModelSpec, world_size: int) -> None:
    """Refuse to cut a quantised row inside of a block."""
    for name in REGISTRY[spec.model_type].plan(spec).required:
        tensor = checkpoint[name]
        if tensor.ggml_type is None or _cuts_between_blocks(name, tensor, spec, world_size):
            continue
        allowed = [
            size
            for size in allowed_world_sizes(spec)
            if _cuts_between_blocks(name, tensor, spec, size)
        ]
        raise InvalidValue(
            f"{checkpoint.path}: tensor_parallel = {world_size}: {tensor.name} has rows of "
            f"{tensor.shape[-1]} numbers in {tensor.type_name} blocks of "
            f"{tensor.ggml_type.block_elements}, which cannot be cut into {world_size} parts; "
            f"allowed for it: {', '.join(map(str, allowed))} (or safetensors files)",
            param="tensor_parallel",
        )


def _cuts_between_blocks(
    name: str, tensor: CheckpointTensor, spec: ModelSpec, world_size: int
) -> bool:
    assert tensor.ggml_type is not None, f"{name} passed the plan"
    block = tensor.ggml_type.block_elements
    if block == 1 or not makes_partial_sums(name):
        return True
    parts = [Shard(rank, world_size).part(name, tensor.shape, spec) for rank in range(world_size)]
    ends = [end for part in parts if part for cut in part.ranges for end in (cut.start, cut.stop)]
    return all(end % block == 0 for end in ends)


def _open(files: ModelFiles) -> tuple[ModelSpec, Checkpoint]:
    """Return what the model says it is, and its open files.

    A GGUF file is opened once, since walking over a large vocabulary takes most of the time.
    """
    if files.format != "gguf":
        return _spec_of_config(files), Checkpoint.open(files)
    model = GGUFModel.open(files.weights)
    try:
        return spec_from_gguf(model), Checkpoint.of_gguf(model)
    except BaseException:
        model.close()
        raise


def _spec_of_config(files: ModelFiles) -> ModelSpec:
    if files.config is None:
        raise BadModelFile(
            f'model "{files.model_id}" has no config.json beside its safetensors files'
        )
    generation_file = files.generation_config
    return spec_from_config(
        read_json_object(files.config),
        None if generation_file is None else read_json_object(generation_file),
        file=files.config,
        generation_file=generation_file or "",
    )


def read_json_object(path: str) -> dict[str, Any]:
    """Return a small JSON file that holds an object. Raises BadModelFile."""
    try:
        if (size := Path(path).stat().st_size) > MAX_CONFIG_BYTES:
            raise BadModelFile(f"{path}: {size} bytes; at most {MAX_CONFIG_BYTES} are accepted")
        text = Path(path).read_text("utf-8")
    except OSError as error:
        raise BadModelFile(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise BadModelFile(f"{path}: not UTF-8 text") from None
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadModelFile(f"{path}: not valid JSON: {str(error)[:120]}") from None
    if not isinstance(document, dict):
        raise BadModelFile(f"{path}: a JSON {type(document).__name__}, not an object")
    return document
