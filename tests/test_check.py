"""What the files of a run need."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import memplan
from memplan import api
from memplan.errors import SpecError

CLUSTER = memplan.ClusterSpec(gpu="A100-80GB", gpus=2, host_memory="1TiB")
AUTO = {
    "zero_optimization": {"stage": 3},
    "bf16": {"enabled": "auto"},
    "train_micro_batch_size_per_gpu": "auto",
    "train_batch_size": "auto",
    "gradient_accumulation_steps": "auto",
}


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(AUTO))
    return path


def test_a_config_of_an_engine_is_what_estimate_says_of_it(config: Path) -> None:
    found = api.check(config, "gpt2", {"seq_len": 128}, CLUSTER)
    assert found.estimate == api.estimate("gpt2", {"seq_len": 128}, CLUSTER, engine_config=config)
    assert (found.verdict, found.findings) == ("fits", ())
    assert memplan.Check.from_json(found.to_json()) == found
    assert set(found.to_dict()) >= {"estimate", "verdict", "findings"}


def test_a_folder_of_a_plan_needs_what_was_planned(tmp_path: Path) -> None:
    plan = api.plan("gpt2", {"seq_len": 128}, CLUSTER, global_batch_size=4)
    plan.write(tmp_path / "run")
    assert plan.best is not None
    found = api.check(tmp_path / "run", cluster={"gpu": "A100-80GB", "host_memory": "1TiB"})
    assert found.estimate.gpu == plan.best.estimate.gpu
    longer = api.check(tmp_path / "run", None, {"seq_len": 512}, {"gpu": "A100-80GB", "gpus": 4})
    assert (longer.estimate.setup["seq_len"], longer.estimate.cluster["gpus"]) == (512, 4)


@pytest.mark.parametrize(
    ("path", "model", "message"),
    [
        ("ds.json", None, "model: None is not in the files. Name it, as in --model MODEL."),
        ("nothing.json", "gpt2", "path: "),
        (".", None, "training_args.json: missing"),
    ],
)
def test_bad_input(config: Path, path: str, model: Any, message: str) -> None:
    with pytest.raises(SpecError) as error:
        api.check(config.parent / path, model, cluster=CLUSTER)
    assert message in str(error.value)
