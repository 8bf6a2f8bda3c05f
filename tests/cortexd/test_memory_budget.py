"""What models may still take of a device."""

from __future__ import annotations

from cortexd.memory_budget import within_limit
from cortexd.memory_need import MIB, SCRATCH_BYTES
from cortexd.messages.fleet import DeviceReport
from cortexd.models import ModelState, ModelStatus

SCRATCH_MIB = {kind: size // MIB for kind, size in SCRATCH_BYTES.items()}


def device(kind: str = "cpu", index: int = 0) -> DeviceReport:
    """A device of 8000 MiB, half of it in use."""
    return DeviceReport(index, kind, kind, 8000 * MIB, 4000 * MIB)


def model(state: ModelState = "loaded", **fields: object) -> ModelStatus:
    """A model that holds 100 MiB."""
    return ModelStatus(model_id="m", state=state, memory_bytes=100 * MIB, **fields)  # type: ignore[arg-type]


def free_mib(devices: list[DeviceReport]) -> list[int]:
    """Return the free memory of each device."""
    return [(one.memory_total_bytes - one.memory_used_bytes) // MIB for one in devices]


def test_without_a_limit_only_what_loads_now_is_taken_off() -> None:
    """The device shows the rest itself."""
    assert within_limit([device()], [model()], 0) == [device()]
    coming = 100 + SCRATCH_MIB["cpu"]
    assert free_mib(within_limit([device()], [model("loading")], 0)) == [4000 - coming]


def test_limit_is_shared_by_all_models_of_the_device() -> None:
    """Free is what the limit leaves, never more than there is; unloaded ones hold nothing."""
    each = 100 + SCRATCH_MIB["cpu"]
    models = [model(), model("recovering"), model("unloaded"), model("failed")]
    (limited,) = within_limit([device()], models, 1000)
    assert limited.memory_total_bytes == 1000 * MIB
    assert free_mib([limited]) == [1000 - 2 * each]
    assert free_mib(within_limit([device()], [], 6000)) == [4000]
    assert free_mib(within_limit([device()], models, 10)) == [0]


def test_split_model_takes_its_share_of_its_own_devices() -> None:
    """On a CPU all of it is in the same memory."""
    split = model(tensor_parallel=2, devices=(1, 2))
    gpus = [device("cuda", index) for index in range(3)]
    share = 50 + SCRATCH_MIB["cuda"]
    assert free_mib(within_limit(gpus, [split], 3000)) == [3000, 3000 - share, 3000 - share]
    assert free_mib(within_limit([device()], [split], 3000)) == [
        3000 - 100 - 2 * SCRATCH_MIB["cpu"]
    ]


def test_sleeping_model_holds_what_its_processes_need_and_no_weights() -> None:
    """The limit is for others then."""
    gpu = device("cuda")
    asleep = model("sleeping", tensor_parallel=2, devices=(0, 1))
    assert free_mib(within_limit([gpu], [asleep], 3000)) == [3000 - SCRATCH_MIB["cuda"]]
    assert within_limit([gpu], [asleep], 0) == [gpu]
