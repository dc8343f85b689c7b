"""``memplan measure --diff``: the blocks of a snapshot and those of the estimate's timeline, beside each other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.introspect.test_measure import T5, TINY
from tests.scripts import script

from memplan import case, estimator, measuring
from memplan.catalog.gpus import find_gpu
from memplan.introspect.measurement import Measured, Measurement, align, fullest_phase
from memplan.introspect.worker import blocks_at_peak
from memplan.render.measured import measured_text
from memplan.specs.hardware import ClusterSpec
from memplan.specs.software import SoftwareSpec
from memplan.specs.strategy import Strategy
from memplan.specs.training import TrainingSpec

BLOCKS = st.lists(st.tuples(st.integers(1, 4).map(lambda n: 512 * n), st.integers(0, 5), st.sampled_from("abc")))


@given(BLOCKS, BLOCKS)
def test_differences_add_up_to_that_of_the_totals(ours: Any, theirs: Any) -> None:
    rows = align(ours, theirs)
    totals = [sum(nbytes * count for nbytes, count, _ in side) for side in (ours, theirs)]
    assert sum(row.difference for row in rows) == totals[0] - totals[1]
    assert [abs(row.difference) for row in rows] == sorted((abs(row.difference) for row in rows), reverse=True)
    assert all(row.estimated != row.measured for row in rows)
    assert align(ours, [(nbytes, count, "other") for nbytes, count, _ in ours]) == ()


def test_what_one_side_has_keeps_its_names() -> None:
    (row, other) = align([(512, 2, "weights"), (512, 1, "moments"), (1024, 1, "x")], [(512, 1, "a.py:1")])
    assert (row.bytes, row.estimated, row.measured, row.names, row.sites) == (
        512, 3, 1, ("2 x weights", "1 x moments"), ("1 x a.py:1",)
    )  # fmt: skip
    assert (other.difference, other.sites) == (1024, ())


STRATEGIES = [
    Strategy(),
    Strategy(kind="ddp"),
    Strategy(kind="zero2", offload_optimizer="cpu"),
    Strategy(kind="zero3"),
    Strategy(kind="fsdp"),
]


@pytest.mark.parametrize("strategy", STRATEGIES, ids=lambda each: each.kind)
@pytest.mark.parametrize("accumulated", [1, 3])
def test_blocks_are_those_of_the_phase(strategy: Strategy, accumulated: int) -> None:
    ranks = 1 if strategy.kind == "single" else 4
    training = TrainingSpec(seq_len=64, micro_batch_size=2, grad_accum_steps=accumulated)
    cluster = ClusterSpec(gpu=find_gpu("H200"), gpus=ranks)
    specs = (case.model_spec(TINY), training, cluster, strategy, SoftwareSpec())
    expected = estimator.estimate(*specs, replay=False)
    told = {phase.name: phase.allocated for phase in expected.gpu.phases}
    for phase in ("forward", "loss", "backward", "step", "idle"):
        blocks = estimator.alive_blocks(*specs, phase)
        assert sum(each.bytes * each.number for each in blocks) == told[phase], phase
        apart = sum(each.bytes for each in blocks if each.name.endswith("not told apart"))
        assert phase == "step" or apart <= 0.01 * told[phase]


@pytest.mark.parametrize(
    ("config", "training"),
    [
        (TINY, {"seq_len": 96, "micro_batch_size": 2}),
        (TINY, {"seq_len": 64, "lora": {"rank": 4}, "gradient_checkpointing": True}),
        (T5, {"seq_len": 40, "mixed_precision": "no", "grad_accum_steps": 2}),
    ],
    ids=["autocast", "lora", "t5"],
)
def test_a_real_run_has_the_blocks_of_the_estimate(config: Any, training: Any, tmp_path: Path) -> None:
    found = measuring.measure(config, training, {"gpu": "cpu"}, snapshot=True)
    assert found.measurement.status == "ok", found.measurement.message
    assert found.blocks is not None
    assert found.measurement.blocks is not None
    measured = sum(nbytes * count for nbytes, count, _ in found.measurement.blocks)
    phase = fullest_phase(found.measurement)
    assert measured == found.measurement.phases[phase]["allocated"]
    largest = max(abs(row.difference) for row in found.blocks)
    assert largest <= 0.005 * measured  # scalars, and tokens of the next batch
    assert Measured.from_json(found.to_json()) == found
    assert "one side has more" in measured_text(found)
    assert measuring.estimate_again(found.measurement, blocks=True).blocks == found.blocks
    line = {"row": {"model": "this", "training": training}, "measurement": found.measurement.to_dict()}
    (tmp_path / "rows.jsonl").write_text(json.dumps(line) + "\n")
    archived = script("benchmarks/replay.py")
    assert "one side has more" in archived.differences(tmp_path, "this")
    assert archived.differences(tmp_path, "that") == ""


def snapshot(*events: tuple[str, int, int, str]) -> dict[str, Any]:
    """As torch.cuda.memory._snapshot() has it: (action, address, bytes asked for, file)."""
    trace = [
        {
            "action": action, "addr": address, "size": size, "stream": 0, "time_us": number, "compile_context": "N/A",
            "frames": [
                {"filename": "/lib/torch/nn/functional.py", "line": 1, "name": "linear"},
                {"filename": file, "line": 7, "name": "forward"},
            ],
        }
        for number, (action, address, size, file) in enumerate(events)
    ]  # fmt: skip
    return {"segments": [], "device_traces": [trace], "allocator_settings": {}, "external_annotations": []}


def test_a_snapshot_of_cuda_is_read() -> None:
    model = "/lib/transformers/models/llama/modeling_llama.py"
    taken = snapshot(
        ("segment_alloc", 1000, 2 << 20, model),
        ("free_completed", 7, 9999, model),  # made before the history began
        ("alloc", 1000, 500, model),
        ("alloc", 2000, 1000, model),
        ("free_requested", 2000, 1000, model),
        ("free_completed", 2000, 1000, model),
        ("alloc", 2000, 1025, "/lib/torch/optim/adam.py"),
        ("alloc", 4000, 1, "/somewhere/else.py"),
        ("free_requested", 1000, 500, model),
        ("free_completed", 1000, 500, model),
        ("alloc", 1000, 512, model),
    )
    taken = json.loads(json.dumps(taken))
    llama = "transformers/models/llama/modeling_llama.py:7 forward"
    blocks = blocks_at_peak(taken)
    assert blocks == [[1536, 1, "torch/optim/adam.py:7 forward"], [512, 1, llama], [512, 1, "linear"]]
    rows = align([(512, 3, "weights: 8")], [tuple(block) for block in blocks])
    assert [row.difference for row in rows] == [-1536, 512]


def test_the_fullest_phase_is_one_that_repeats() -> None:
    seen = Measurement(
        status="ok", message="", memplan="0", taken="", model={}, asked={}, setup={}, cluster={}, device={},
        versions={}, group="none", weights="random",
        phases={"first_step": {"allocated": 9}, "backward": {"allocated": 9}, "idle": {"allocated": 3}},
    )  # fmt: skip
    assert fullest_phase(seen) == "backward"
