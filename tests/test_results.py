import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memplan.constants import Constant
from memplan.errors import SpecError
from memplan.results import (
    COMPONENTS,
    PHASES,
    Assumption,
    Components,
    Estimate,
    EstimateList,
    GpuMemory,
    HostMemory,
    ModelInfo,
    NvmeMemory,
    Phase,
    StepTime,
    Term,
    best_verdict,
    verdict_by_place,
    verdict_for,
    worst_verdict,
)

PARTS = {name: 10 * (index + 1) for index, name in enumerate(COMPONENTS)}


def gpu_memory(parts=PARTS, **changes) -> GpuMemory:
    components = Components(**parts)
    allocated = components.allocated
    reserved = allocated + components.fragmentation
    device = reserved + components.context + components.nccl
    fields = {
        "capacity": None,
        "peak_allocated": allocated,
        "peak_reserved": reserved,
        "peak_device": device,
        "low": device,
        "high": device,
        "peak_phase": "backward",
        "steady_allocated": allocated,
        "components": components,
        "phases": (Phase(name="load", allocated=0), Phase(name="backward", allocated=allocated)),
    }
    return GpuMemory(**(fields | changes))


def estimate(**changes) -> Estimate:
    fields = {
        "model": ModelInfo(id="a/b", architecture="LlamaForCausalLM", parameters=9, trainable_parameters=3, source="s"),
        "setup": {"strategy": "ddp", "seq_len": 2048, "lora_targets": ["q_proj"], "lora_rank": None},
        "cluster": {"gpus": 2, "gpu": None},
        "software": {"torch": "2.13.0"},
        "gpu": gpu_memory(),
        "host": HostMemory(capacity=None, peak=7, pinned=3, ranks=2, components={"a": 3, "b": 4}),
        "nvme": NvmeMemory(capacity=None, bytes=0, components={}),
        "step": StepTime(seconds=0.5, tokens_per_second=8192.0, flops=1e15, bound_by="compute"),
        "verdict": "unknown",
        "assumptions": (Assumption(name="context", value=5, low=4, high=6.5, source="nvidia-smi"),),
        "explanation": (Term(name="weights", formula="4 x n", filled="4 x 9", bytes=36, source="torch"),),
    }
    return Estimate(**(fields | changes))


def test_the_json_contract_of_an_estimate() -> None:
    data = json.loads(estimate().to_json())
    assert list(data) == [
        "schema_version", "model", "setup", "cluster", "software", "gpu", "host", "nvme", "step", "verdict",
        "assumptions",
    ]  # fmt: skip
    assert data["schema_version"] == 1
    assert list(data["model"]) == ["id", "architecture", "parameters", "trainable_parameters", "source"]
    assert list(data["gpu"]) == [
        "capacity", "peak_allocated", "peak_reserved", "peak_device", "low", "high", "peak_phase",
        "steady_allocated", "components", "phases",
    ]  # fmt: skip
    assert list(data["gpu"]["components"]) == [
        "weights", "gradients", "optimizer", "activations", "logits", "temporaries", "communication", "workspace",
        "fragmentation", "context", "nccl",
    ]  # fmt: skip
    assert data["gpu"]["phases"][0] == {"name": "load", "allocated": 0}
    assert list(data["host"]) == ["capacity", "peak", "pinned", "ranks", "components", "phases"]
    assert list(data["nvme"]) == ["capacity", "bytes", "components"]
    assert list(data["step"]) == ["seconds", "tokens_per_second", "flops", "bound_by"]
    assert data["assumptions"] == [{"name": "context", "value": 5, "low": 4, "high": 6.5, "source": "nvidia-smi"}]


def test_phases_of_the_contract() -> None:
    assert PHASES == ("load", "first_step", "forward", "loss", "backward", "step", "idle", "eval", "save")


@pytest.mark.parametrize(
    "value",
    [
        estimate(),
        estimate(step=None),
        estimate(footprint=12, device_map={"model.layers.0": 0, "lm_head": "cpu"}),
        estimate(kv_cache=0),
    ],
    ids=["train", "no-step", "load", "generate"],
)
def test_round_trip(value: Estimate) -> None:
    assert Estimate.from_json(value.to_json(explain=True)) == value
    assert Estimate.from_dict(value.to_dict(explain=True)) == value
    several = EstimateList(estimates=(value, value))
    assert EstimateList.from_json(several.to_json(explain=True)) == several
    without = value.model_copy(update={"explanation": (), "levers": ()})
    assert Estimate.from_json(value.to_json(indent=2)) == without


def test_fields_of_other_tasks_and_the_explanation_are_left_out() -> None:
    data = estimate(footprint=0).to_dict()
    assert data["footprint"] == 0
    assert not {"device_map", "kv_cache", "explanation", "levers"} & set(data)
    assert estimate().to_dict(explain=True)["explanation"][0]["bytes"] == 36


def test_a_list_has_the_contracts_shape_and_the_best_verdict() -> None:
    several = EstimateList(estimates=(estimate(verdict="does-not-fit"), estimate(verdict="tight")))
    assert list(several.to_dict()) == ["schema_version", "estimates"]
    assert several.verdict == "tight"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peak_allocated": 1}, "weights .. workspace sum to 360, but peak_allocated is 1"),
        ({"peak_reserved": 1}, r"peak_allocated \+ fragmentation sum to 450, but peak_reserved is 1"),
        ({"peak_device": 1}, r"peak_reserved \+ context \+ nccl sum to 660, but peak_device is 1"),
        ({"low": 661}, "peak_device 660 is outside low 661"),
        ({"high": 659}, "high 659"),
        ({"phases": (Phase(name="load", allocated=1),)}, "the largest phase sum to 1"),
        ({"steady_allocated": 3}, "the largest phase of a step sum to 360, but steady_allocated is 3"),
        ({"capacity": -1}, "greater than or equal to 0"),
        ({"capacity": 1.0}, "valid integer"),
    ],
)
def test_a_result_that_breaks_its_sums_cannot_be_made(changes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gpu_memory(**changes)


@given(st.fixed_dictionaries({name: st.integers(0, 2**45) for name in COMPONENTS}))
def test_parts_sum_to_totals(parts: dict[str, int]) -> None:
    gpu = gpu_memory(parts)
    assert gpu.peak_device == sum(parts.values())
    assert gpu.peak_allocated <= gpu.peak_reserved <= gpu.peak_device


def test_host_and_nvme_sum_too() -> None:
    with pytest.raises(ValueError, match="host components sum to 3, but peak is 4"):
        HostMemory(capacity=None, peak=4, pinned=0, ranks=1, components={"a": 3})
    with pytest.raises(ValueError, match="pinned 4 exceeds peak 3"):
        HostMemory(capacity=None, peak=3, pinned=4, ranks=1, components={"a": 3})
    with pytest.raises(ValueError, match="nvme components sum to 3, but bytes is 4"):
        NvmeMemory(capacity=None, bytes=4, components={"a": 3})


def test_from_json_names_what_is_wrong() -> None:
    data = estimate().to_dict()
    data["gpu"]["low"] = "much"
    with pytest.raises(SpecError, match=r"^gpu\.low: 'much' is refused"):
        Estimate.from_dict(data)
    with pytest.raises(SpecError, match="is not JSON"):
        Estimate.from_json("{")
    with pytest.raises(SpecError, match="Estimate: 3 is refused"):
        Estimate.from_json("3")
    with pytest.raises(SpecError, match=r"^schema_version: 2 is not a choice"):
        Estimate.from_dict(estimate().to_dict() | {"schema_version": 2})


def test_verdicts() -> None:
    assert [verdict_for(10, 20, capacity) for capacity in (21, 20, 19, 10, 9, 0, None)] == [
        "fits", "fits", "tight", "tight", "does-not-fit", "does-not-fit", "unknown",
    ]  # fmt: skip
    with pytest.raises(ValueError, match="low 2 exceeds high 1"):
        verdict_for(2, 1, 3)
    assert worst_verdict(["fits", "does-not-fit", "unknown"]) == "does-not-fit"
    assert worst_verdict(["fits", "unknown"]) == "unknown"
    assert best_verdict(["tight", "does-not-fit"]) == "tight"


def test_every_place_that_holds_something_has_a_verdict() -> None:
    host = HostMemory(capacity=9, peak=10, pinned=0, ranks=1, components={"optimizer": 10})
    nvme = NvmeMemory(capacity=None, bytes=0, components={})
    gpu = gpu_memory()
    assert verdict_by_place(gpu, host, nvme)["host"] == "does-not-fit"
    assert "nvme" not in verdict_by_place(gpu, host, nvme)
    full = NvmeMemory(capacity=10, bytes=10, components={"weights": 10})
    empty = HostMemory(capacity=None, peak=0, pinned=0, ranks=1, components={})
    assert list(verdict_by_place(gpu, empty, full)) == ["gpu", "nvme"]
    assert verdict_by_place(gpu, empty, full)["nvme"] == "fits"


def test_results_can_be_keys() -> None:
    one = estimate(device_map={"": 0}, host=HostMemory(capacity=9, peak=2, pinned=0, ranks=1, components={"a": 2}))
    same = Estimate.from_json(one.to_json(explain=True))
    assert {one: "found"}[same] == "found"
    assert len({one, same, estimate()}) == 2
    with pytest.raises(TypeError, match="frozen"):
        one.host.components["a"] = 3


def test_a_constant_becomes_an_assumption_with_its_unit() -> None:
    constant = Constant("context", 500, 400, 600, "MiB", "nvidia-smi")
    assert Assumption.of(constant) == Assumption(
        name="context (MiB)", value=500, low=400, high=600, source="nvidia-smi"
    )


def test_to_dataframe_has_a_row_per_component() -> None:
    frame = estimate().to_dataframe()
    assert frame[frame.place == "gpu"]["bytes"].sum() == 660
    assert set(frame["place"]) == {"gpu", "host"}
