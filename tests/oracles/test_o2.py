from __future__ import annotations

import dataclasses
import importlib.util
import itertools
from pathlib import Path
from typing import Any

import pytest
from tests.oracles import o2

ARCHIVES = o2.load_archives()
MEASURED = [row for archive in ARCHIVES.values() for row in archive.rows if row.result is not None]
BRIEF = [row for group in o2.BRIEF for row in ARCHIVES[group].rows]
"""Without their blocks."""

needs_engines = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed; the archive is replayed only"
)


def blocks(*spans: tuple[int, int, int | None, str]) -> list[o2.Block]:
    return [o2.Block(nbytes, f"site {nbytes}", born, 0, died, side) for nbytes, born, died, side in spans]


def test_phases_are_a_replay_of_blocks_between_marks() -> None:
    spans = blocks((600, 1, None, "device"), (100, 5, 12, "device"), (512, 6, 7, "device"), (9000, 6, None, "host"))
    first, second = o2.phases_of(spans, [(0, "load"), (10, "init"), (20, "end")], "device")
    assert (first.name, first.start.to_list(), first.peak.to_list()) == ("load", [0, 0], [1024 + 512 + 512, 1212])
    assert first.end == second.start == o2.Level(1024 + 512, 700)
    assert second.end == o2.Level(1024, 600)
    assert first.blocks == [(600, 1, "site 600"), (512, 1, "site 512"), (100, 1, "site 100")]
    (host,) = o2.phases_of(spans, [(0, "load"), (10, "end")], "host")
    assert host.peak == o2.Level(9216, 9000)


def test_groups_hold_distinct_setups() -> None:
    for name, setups in o2.groups().items():
        keys = [setup.key for setup in setups]
        assert len(keys) == len(set(keys)) >= 10, name


def test_engine_config_is_what_a_user_writes() -> None:
    options = {"strategy": "zero3", "offload_param": "cpu", "zero": {"offload_param": {"pin_memory": False}}}
    zero = o2.engine_config(options)["zero_optimization"]
    assert zero["stage3_prefetch_bucket_size"] == zero["reduce_bucket_size"] == "auto"
    assert zero["offload_param"] == {"device": "cpu", "pin_memory": False}


def test_archive_round_trips(tmp_path: Path) -> None:
    phase = {"start": [0, 0], "peak": [512, 8], "end": [512, 8], "blocks": [[8, 1, "aten::empty | f | "]]}
    result = {"engine": "E", "idle_scan": {}, "phases": {"device": {"load": phase, "init": phase}}}
    rows = [o2.Row(o2.groups()["zero2"][0], result), o2.Row(o2.groups()["zero2"][1], None, "refused")]
    archive = o2.Archive("zero2", {"torch": "2"}, rows)
    o2.write_archive(archive, tmp_path / "zero2.json")
    assert o2.load_archive(tmp_path / "zero2.json") == archive


def test_the_archive_has_every_engine() -> None:
    assert set(ARCHIVES) == set(o2.groups())
    assert {row.result["engine"] for row in MEASURED} >= {
        "DeepSpeedZeroOptimizer",
        "DeepSpeedZeroOptimizer_Stage3",
        "FP16_UnfusedOptimizer",
        "FSDPLlamaForCausalLM",
        "FullyShardedDataParallel",
    }


@pytest.mark.parametrize("row", MEASURED, ids=lambda row: row.setup.key)
def test_ledgers_are_consistent(row: o2.Row) -> None:
    for phases in row.result["phases"].values():
        for before, after in itertools.pairwise(phases.values()):
            assert before["end"] == after["start"]
        for phase in phases.values():
            assert phase["peak"][0] >= max(phase["start"][0], phase["end"][0])
            listed = sum(o2.Block(size, "", 0, 0).rounded * count for size, count, _ in phase["blocks"])
            assert listed <= phase["peak"][0]
            if len(phase["blocks"]) < o2.LARGEST and row not in BRIEF:
                assert listed == phase["peak"][0]


@pytest.mark.parametrize("row", MEASURED, ids=lambda row: row.setup.key)
def test_idle_levels_equal_a_scan_of_storages(row: o2.Row) -> None:
    """What the allocator says is alive between steps is what Python can reach, but for a few scalars."""
    sides = row.result["phases"].values()
    for name, scanned in row.result["idle_scan"].items():
        level = sum(phases[name]["start"][0] for phases in sides)
        assert abs(level - scanned) <= max(0.005 * level, 40 * o2.BLOCK), name


def steady(**options: Any) -> dict[str, Any]:
    (row,) = [row for row in MEASURED if row.setup.config == "small" and row.setup.options == {**o2.BASE, **options}]
    return row.result


def test_two_sides_change_nothing_where_nothing_is_offloaded() -> None:
    for stage in ("zero2", "zero3"):
        plain, sided = steady(strategy=stage), steady(strategy=stage, two_sides=True)
        for name, phase in plain["phases"]["device"].items():
            total = phase["end"][1]
            both = sum(phases[name]["end"][1] for phases in sided["phases"].values())
            assert abs(both - total) <= 0.01 * total, (stage, name)


@needs_engines
@pytest.mark.oracle
def test_rows_measured_again_are_the_archive_to_the_byte() -> None:
    if any(not o2.same_versions(archive.versions, o2.versions()) for archive in ARCHIVES.values()):
        pytest.skip(f"archived with other versions than {o2.versions()}")
    for strategy in ("zero2", "zero3", "fsdp"):
        row = next(row for row in MEASURED if row.setup.options["strategy"] == strategy)
        assert o2.differences(row) == {}, row.setup.key
    wrong = dataclasses.replace(row, result={**row.result, "phases": {"device": {}}})
    assert o2.differences(wrong)
