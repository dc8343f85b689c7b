from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from tests.oracles import o1

SETUPS = o1.grid("llama", "small", shapes=((1, 16),))[:2]


def test_grid_covers_the_acceptance_table() -> None:
    setups = o1.grid("llama", "small")
    assert len({setup.key for setup in setups}) == len(setups)
    cells = {
        (s.options["dtype"], s.options["mixed_precision"], s.options["gradient_checkpointing"], s.options["attn"])
        for s in setups
    }
    assert len(cells) == 3 * 2 * 2
    assert {s.options["num_layers"] for s in setups} == {2, 4}
    assert sum("lora" in s.options for s in setups) == 24


def test_every_family_has_a_grid_of_distinct_setups() -> None:
    for family in o1.CONFIGS:
        keys = [setup.key for setup in o1.family_grid(family)]
        assert len(set(keys)) == len(keys) >= 60, family


def test_archive_round_trips_and_is_taken_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "llama.json"
    archive = o1.run_grid(SETUPS, path)
    loaded = o1.load_archive(path)
    assert loaded == archive
    assert [row.setup for row in loaded.rows] == SETUPS

    def not_again(setup: o1.Setup) -> None:
        raise AssertionError(f"traced again: {setup}")

    monkeypatch.setattr(o1, "run", not_again)
    assert o1.run_grid(SETUPS, path) == archive


def test_rows_of_a_changed_config_are_not_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "llama.json"
    row = o1.Row(SETUPS[0], {"steady_allocated": 1})
    o1.write_archive(o1.Archive("llama", {}, [row]), path)
    assert o1.load_archive(path).rows == [row]
    changed = {**o1.CONFIGS["llama"], "small": {**o1.CONFIGS["llama"]["small"], "vocab_size": 7}}
    monkeypatch.setitem(o1.CONFIGS, "llama", changed)
    assert o1.load_archive(path).rows == []


def test_unsupported_setups_are_archived_with_the_reason(tmp_path: Path) -> None:
    setup = o1.Setup("bloom", "small", {"attn": "sdpa"})
    (row,) = o1.run_grid([setup], tmp_path / "bloom.json").rows
    assert row.result is None
    assert "scaled_dot_product_attention" in str(row.unsupported)
    assert o1.load_archive(tmp_path / "bloom.json").rows == [row]


def test_a_sample_covers_strata_before_it_repeats_one() -> None:
    rows = [o1.Row(setup, {"phases": {}}) for setup in o1.grid("llama", "small")]
    strata = {row.setup.stratum for row in rows}
    sample = o1.stratified_sample(rows, len(strata), seed=3)
    assert {row.setup.stratum for row in sample} == strata
    assert sample == o1.stratified_sample(rows, len(strata), seed=3)
    assert sample != o1.stratified_sample(rows, len(strata), seed=4)


def test_a_sample_of_a_grid_is_added_to_the_archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(o1, "run", lambda setup: (o1.Row(setup, {"phases": {"step": 1}}), {"torch": "2"}))
    kept: set[str] = set()
    for seed, most in ((0, 5), (0, 5), (1, 10)):
        assert o1.main(["--family", "vit", "--out", str(tmp_path), "--sample", "5", "--seed", str(seed)]) == 0
        found = {row.setup.key for row in o1.load_archive(tmp_path / "vit.json").rows}
        assert kept <= found
        assert 5 <= len(found) <= most
        kept = found
    assert len(kept) > 5


def test_differences_names_what_differs() -> None:
    row, _ = o1.run(SETUPS[0])
    assert row.result is not None
    assert o1.differences(row) == {}
    wrong = dataclasses.replace(row, result={**row.result, "parameters": 1})
    assert o1.differences(wrong) == {"parameters": (1, row.result["parameters"])}


@pytest.mark.oracle
def test_a_sample_of_the_archive_is_traced_again_to_the_byte() -> None:
    archives = o1.load_archives()
    _, here = o1.run(SETUPS[0])
    stale = [name for name, archive in archives.items() if not o1.same_versions(archive.versions, here)]
    if stale:
        pytest.skip(f"{', '.join(stale)} were traced with other versions than {here}")
    rows = [row for archive in archives.values() for row in archive.rows]
    assert rows
    for row in o1.stratified_sample(rows, 24, seed=20):
        assert o1.differences(row) == {}, row.setup.key
