"""Archived measurements, replayed without a GPU; and the judge itself, on an archive that is made up."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.scripts import script

from memplan import api, case
from memplan.introspect.measurement import Boundary, Measurement
from memplan.results import Estimate
from memplan.units import GiB

replay: Any = script("benchmarks/replay.py")


@pytest.fixture(scope="module")
def archives() -> dict[Path, Any]:
    return {folder: replay.replay(folder) for folder in replay.folders()}


@pytest.mark.parametrize("folder", replay.folders(), ids=lambda folder: folder.name)
def test_every_archive_is_within_its_targets(folder: Path, archives: dict[Path, Any]) -> None:
    archive = archives[folder]
    assert archive.runs or archive.boundaries
    assert replay.complaints(archive) == []


def test_the_docs_show_the_archives(archives: dict[Path, Any]) -> None:
    generate = script("docs/generate_accuracy.py")
    page = generate.block(generate.PAGE.read_text(encoding="utf-8"), "archives")
    assert page == generate.archives(replay, list(archives.values())), generate.__doc__
    assert all(f"### {folder.name}\n" in page for folder in archives)


def test_the_cpu_archive_covers_the_families_and_has_rows_held_out(archives: dict[Path, Any]) -> None:
    runs = [run for folder, archive in archives.items() if folder.name.startswith("cpu") for run in archive.runs]
    families = {run.row["model"]["model_type"] for run in runs}
    assert len(families) >= 39
    assert len([run for run in runs if run.row["holdout"]]) >= 13
    assert all(run.measurement.status == "ok" for run in runs)


MODEL = "Qwen/Qwen2.5-0.5B"


def as_measured(found: Estimate, cluster: dict[str, Any], row: dict[str, Any], **fields: Any) -> dict[str, Any]:
    """A measurement that has exactly what was estimated."""
    gpu = found.gpu
    phases = {each.name: {"allocated": each.allocated, "host": GiB} for each in gpu.phases}
    phases["forward"]["allocated"] = max(phases["forward"]["allocated"], phases["loss"]["allocated"])
    fake = cluster["gpus"] > 1
    phases[gpu.peak_phase] |= {
        "reserved": gpu.peak_reserved,
        "device": gpu.peak_device - (gpu.components.nccl if fake else 0),
    }
    measurement = Measurement(
        status="ok", message="", memplan="0.1.0", taken="2026-11-21T00:00:00+00:00",
        model={"id": MODEL, "config": dict(case.model_spec(MODEL).config) | {"model_type": "qwen2"}},
        asked={"training": row["training"], "cluster": cluster, "strategy": row.get("strategy", {})},
        setup=found.setup, cluster=found.cluster, device={"name": "NVIDIA H200", "counted": "difference"},
        versions={"torch": "2.11.0+cu130", "cuda": "13.0"}, group="fake" if fake else "none", weights="random",
        phases=phases, ran={"skipped_steps": 0}, step_seconds=(0.1, 0.1),
    )  # fmt: skip
    return measurement.model_copy(update=fields).to_dict()


ROWS: list[dict[str, Any]] = [
    {"model": MODEL, "training": {"seq_len": 512, "micro_batch_size": 2}, "holdout": True},
    {"model": MODEL, "training": {"seq_len": 300, "gradient_checkpointing": True}, "holdout": False},
    {"model": MODEL, "training": {"seq_len": 256}, "gpus": 8, "strategy": {"kind": "zero3"}, "holdout": True},
]
CAP = 24


def lines() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for row in ROWS:
        cluster = {"gpu": "H200", "gpus": row.get("gpus", 1)}
        result = api.estimate(
            row["model"], row["training"], cluster, row.get("strategy"), software="torch=2.11,cuda=13.0"
        )
        found.append({"row": row, "alongside": 0, "measurement": as_measured(result, cluster, row)})
    return [*found, died(64), boundary()]


def died(size: int) -> dict[str, Any]:
    """A run on a smaller GPU that ran out of memory."""
    row = {"model": MODEL, "training": {"seq_len": 1024, "micro_batch_size": size}, "cap": CAP, "holdout": False}
    cluster = {"gpu": "H200", "gpus": 1, "gpu_memory": CAP * GiB}
    result = api.estimate(row["model"], row["training"], cluster)  # type: ignore[arg-type]
    fields = {
        "status": "out-of-memory",
        "cap": CAP * GiB,
        "phases": {"load": {"allocated": result.gpu.phases[0].allocated}},
    }
    return {"row": row, "alongside": 3, "measurement": as_measured(result, cluster, row, **fields)}


def boundary() -> dict[str, Any]:
    """The largest micro-batch that is said to fit is the one that runs."""
    row = {"model": MODEL, "training": {"seq_len": 1024}, "cap": CAP, "boundary": "micro-batch", "holdout": False}
    cluster = {"gpu": "H200", "gpus": 1, "gpu_memory": CAP * GiB}

    def estimated(size: int) -> Estimate:
        return api.estimate(MODEL, {"seq_len": 1024, "micro_batch_size": size}, cluster)

    largest = next(size for size in range(1, 99) if estimated(size + 1).verdict != "fits")
    found = Boundary(
        option="micro_batch_size", step=1, predicted=largest, measured=largest, tried=(), estimate=estimated(largest),
        measurement=None,
    )  # fmt: skip
    return {"row": row, "alongside": 1, "boundary": found.to_dict()}


@pytest.fixture(scope="module")
def made_up() -> str:
    return json.dumps(lines())


def judged(tmp_path: Path, found: list[dict[str, Any]]) -> list[str]:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in found))
    complaints: list[str] = replay.complaints(replay.replay(tmp_path))
    return complaints


def test_what_is_exact_has_nothing_against_it(made_up: str, tmp_path: Path) -> None:
    found = judged(tmp_path, json.loads(made_up))
    # The interval of a context that nobody has measured is wider than the target, of so small a model.
    assert [line for line in found if "wide in the median" not in line and "are tight" not in line] == []
    archive = replay.replay(tmp_path)
    assert len(replay.summary(archive)) == 10
    assert [run.inside for run in archive.runs] == [True, True, True, None]
    sharded = archive.runs[2]
    assert sharded.estimate.gpu.components.nccl > 0
    assert sharded.errors["device"] == 0


def test_the_page_sets_apart_what_was_held_out_and_tells_what_is_wrong(made_up: str, tmp_path: Path) -> None:
    generate = script("docs/generate_accuracy.py")
    found = json.loads(made_up)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in found))
    right = generate.archives(replay, [replay.replay(tmp_path)])
    for metric in ("allocated", "reserved", "device"):
        assert f"| {metric} | holdout | 2 |" in right
        assert f"| {metric} | others | 1 |" in right
    assert "* False fits: 0 of 1 that died. False does-not-fit: 0 of 3 that had a limit.\n" in right
    assert "* Intervals, held out: 2 of 2 hold" in right
    assert "* Boundaries: 1 of 1 exact, 1 within a step.\n" in right
    false_fit(found)
    misplaced(3)(found)
    peak("device", 1.5)(found)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in found))
    wrong = generate.archives(replay, [replay.replay(tmp_path)])
    assert "* False fits: 1 of 1 that died." in wrong
    assert "* Intervals, held out: 1 of 2 hold" in wrong
    assert "* Boundaries: 0 of 1 exact, 0 within a step.\n" in wrong


def peak(counter: str, factor: float, row: int = 0) -> Callable[[list[dict[str, Any]]], None]:
    def change(found: list[dict[str, Any]]) -> None:
        for counters in found[row]["measurement"]["phases"].values():
            if counter in counters:
                counters[counter] = round(counters[counter] * factor)

    return change


def false_fit(found: list[dict[str, Any]]) -> None:
    found[3] = died(1)


def misplaced(away: int) -> Callable[[list[dict[str, Any]]], None]:
    def change(found: list[dict[str, Any]]) -> None:
        found[4]["boundary"]["measured"] += away

    return change


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (peak("allocated", 1.02), "allocated, mean of holdout rows"),
        (peak("allocated", 0.9, row=1), "allocated, worst of other rows"),
        (peak("reserved", 1.15), "reserved, worst of holdout rows"),
        (peak("reserved", 1.06), "reserved, median of holdout rows"),
        (peak("device", 1.08), "device, worst under-estimate of holdout rows"),
        (peak("device", 1.5), "intervals hold 50% of holdout rows"),
        (false_fit, "died but fits"),
        (misplaced(-1), "died but fits"),
        (misplaced(3), "more than a step off"),
        (misplaced(1), "0% of boundaries are exact"),
    ],
)
def test_what_is_wrong_is_told(change: Any, said: str, made_up: str, tmp_path: Path) -> None:
    found = json.loads(made_up)
    change(found)
    assert any(line.startswith(said) for line in judged(tmp_path, found)), judged(tmp_path, found)


def test_a_boundary_may_be_the_models_last_position(made_up: str, tmp_path: Path) -> None:
    row = {"model": "openai-community/gpt2", "training": {}, "cap": 80, "boundary": "seq-len", "holdout": False}
    cluster = {"gpu": "H200", "gpus": 1, "gpu_memory": 80 * GiB}
    found = Boundary(
        option="seq_len", step=64, predicted=1024, measured=1024, tried=(), measurement=None,
        estimate=api.estimate(row["model"], {"seq_len": 1024}, cluster),
    )  # fmt: skip
    (tmp_path / "rows.jsonl").write_text(json.dumps({"row": row, "alongside": 0, "boundary": found.to_dict()}) + "\n")
    (bounded,) = replay.replay(tmp_path).boundaries
    assert bounded.verdicts == {-1: "fits", 0: "fits"}
    assert bounded.is_exact
    assert bounded.is_near
    assert not bounded.died_but_fits


def test_what_was_measured_beside_others_has_no_device_memory(made_up: str, tmp_path: Path) -> None:
    found = json.loads(made_up)
    peak("device", 5)(found)
    found[0]["alongside"] = 2
    assert not [line for line in judged(tmp_path, found) if line.startswith("device")]
    found[0]["measurement"]["device"]["counted"] = "process"
    assert [line for line in judged(tmp_path, found) if line.startswith("device")]


def test_steps_that_were_skipped_are_not_compared(made_up: str, tmp_path: Path) -> None:
    found = json.loads(made_up)
    peak("allocated", 0.5)(found)
    found[0]["measurement"]["ran"]["skipped_steps"] = 2
    assert not [line for line in judged(tmp_path, found) if line.startswith("allocated")]


def test_the_last_line_of_a_row_counts_and_failures_are_set_apart(made_up: str, tmp_path: Path) -> None:
    found = json.loads(made_up)
    wrong = json.loads(json.dumps(found[0]))
    wrong["row"]["alone"] = True
    peak("allocated", 3.0)([wrong])
    failed = json.loads(json.dumps(found[1]))
    failed["measurement"] |= {"status": "failed", "message": "no such kernel"}
    judged(tmp_path, [wrong, *found, failed])
    archive = replay.replay(tmp_path)
    assert len(archive.runs) == 3
    assert [why for _, why in archive.refused] == ["no such kernel"]
    assert all(abs(run.errors.get("allocated", 0)) < 0.01 for run in archive.runs)
