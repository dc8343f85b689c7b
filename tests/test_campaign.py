"""The measurement campaign: its list, and its runner on a CPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.scripts import script

from memplan import api, case, measuring
from memplan.introspect.measurement import Measurement


@pytest.fixture(scope="module")
def campaign() -> Any:
    return script("benchmarks/campaign.py")


def test_the_list_covers_what_it_should(campaign: Any) -> None:
    listed = campaign.load()
    setups = [row for row in listed if "boundary" not in row]
    boundaries = [row for row in listed if "boundary" in row]
    assert len(setups) >= 200
    assert len(boundaries) >= 40
    assert {row["cap"] for row in boundaries} == {16, 24, 40, 48, 80}
    types = {case.model_spec(model).model_type for model in {row["model"] for row in setups}}
    assert len(types) >= 12
    assert {row.get("gpus", 1) for row in setups} == {1, 2, 8, 64}
    assert {row.get("strategy", {}).get("kind") for row in setups} >= {"zero1", "zero2", "zero3", "fsdp", "ddp"}
    assert 0.3 <= sum(row["holdout"] for row in listed) / len(listed) <= 0.37
    assert len({campaign.key(row) for row in listed}) == len(listed)


def test_every_row_is_a_setup_that_is_modelled(campaign: Any) -> None:
    for row in campaign.load():
        cluster = {"gpu": "H200", "gpus": row.get("gpus", 1)}
        api.estimate(row["model"], row["training"], cluster, row.get("strategy"), replay=False)


def test_marks_stay(campaign: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = campaign.load()
    path = tmp_path / "campaign.json"
    path.write_text(json.dumps(before[5:]))
    monkeypatch.setattr(campaign, "LIST", path)
    campaign.extend()
    after = {campaign.key(row): row["holdout"] for row in campaign.load()}
    assert len(after) == len(before)
    assert all(after[campaign.key(row)] == row["holdout"] for row in before[5:])


def test_a_run_is_archived_once_and_replayed(campaign: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = {
        "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_embd": 64, "n_layer": 2, "n_head": 4,
        "vocab_size": 500, "n_positions": 128,
    }  # fmt: skip
    model = tmp_path / "config.json"
    model.write_text(json.dumps(config))
    rows = [
        {"model": str(model), "training": {"seq_len": 64}, "holdout": False},
        {"model": str(model), "training": {"seq_len": 64, "task": "load"}, "holdout": True},
    ]
    monkeypatch.setattr(campaign, "load", lambda: rows)
    assert campaign.run(tmp_path / "out", 600, 300, "cpu", "") == 2
    assert campaign.run(tmp_path / "out", 600, 300, "cpu", "") == 0
    found, refused = (json.loads(line) for line in (tmp_path / "out" / "rows.jsonl").read_text().splitlines())
    assert "task" in refused["refused"]
    measurement = Measurement.from_dict(found["measurement"])
    assert measurement.status == "ok", measurement.message
    steady = {row.name: row.relative for row in measuring.estimate_again(measurement).differences}["steady_allocated"]
    assert steady is not None
    assert abs(steady) < 0.01
