"""Whether a checkpoint holds exactly the tensors that an architecture's plan asks for.

Used by the pre-flight check and again by the loader. Pure: looks at headers only.
"""

from __future__ import annotations

from collections.abc import Iterable

from cortexd.errors import BadModelFile, UnsupportedArchitecture
from cortexd.models import ModelSpec
from engine.formats.checkpoint import Checkpoint, CheckpointTensor, listing
from engine.formats.ggml import RUNNABLE_TYPES, type_names
from engine.formats.gguf_names import ROPE_FACTORS
from engine.specs.tensor_plan import TensorPlan


def check_plan(checkpoint: Checkpoint, plan: TensorPlan, spec: ModelSpec) -> None:
    """Check every name, shape and type of the checkpoint against the plan.

    Raises: BadModelFile listing up to ten missing, unexpected or misshapen tensors;
    UnsupportedArchitecture naming the tensor types that cannot run.
    """
    expected = {checkpoint.file_name(name): shape for name, shape in plan.required.items()}
    ignored = {checkpoint.file_name(name) for name in plan.ignored}
    faults = []
    missing = [name for name in expected if name not in checkpoint.tensors]
    if missing:
        faults.append(f"{listing('tensor', missing)} missing")
    unexpected = [
        name
        for name in checkpoint.tensors
        if name not in expected
        and name not in ignored
        and not plan.is_ignored(name)
        and not (checkpoint.is_gguf and name == ROPE_FACTORS)
    ]
    if unexpected:
        faults.append(f"{listing('tensor', unexpected)} unexpected")
    if checkpoint.rope_factors is not None:
        expected[ROPE_FACTORS] = (spec.head_dim // 2,)
    present = [name for name in expected if name in checkpoint.tensors]
    misshapen = [
        f"{name} is {list(checkpoint.tensors[name].shape)}, not {list(expected[name])}"
        for name in present
        if _without_ones(checkpoint.tensors[name].shape) != _without_ones(expected[name])
    ]
    if misshapen:
        faults.append(f"{listing('shape', misshapen)} wrong")
    if faults:
        raise BadModelFile(
            f"{checkpoint.path}: the weights do not fit a {spec.model_type} of this configuration: "
            + "; ".join(faults)
        )
    _check_types([checkpoint.tensors[name] for name in present], checkpoint.path)


def _without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape less dimensions of one, which GGUF converters drop and GGML cannot tell."""
    return tuple(size for size in shape if size != 1)


def _check_types(tensors: Iterable[CheckpointTensor], path: str) -> None:
    refused = [f"{tensor.name} ({tensor.type_name})" for tensor in tensors if not _can_run(tensor)]
    if refused:
        raise UnsupportedArchitecture(
            f"{path}: {listing('tensor', refused)} of a type that cannot run here; supported: "
            f"{type_names(RUNNABLE_TYPES)} (vectors: F32, F16, BF16)"
        )


def _can_run(tensor: CheckpointTensor) -> bool:
    if tensor.ggml_type is None:
        return False
    return len(tensor.shape) > 1 or tensor.ggml_type.block_elements == 1
