"""Paths that a config names: followed to its neighbours, and nowhere else, whatever they are."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest

import memplan
from memplan.errors import MemplanError, SpecError

RUN = {"output_dir": "out", "per_device_train_batch_size": 1, "model_name_or_path": "gpt2", "max_length": 64}
ZERO = {"zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": "auto"}
ELSEWHERE = "leads elsewhere, where memplan does not follow a config"


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with a config deep inside, what lies beside the repository, and another folder to be started in."""
    for name in ("repository/.git", "repository/examples/train", "repository/configs", "beside", "started"):
        (tmp_path / name).mkdir(parents=True)
    for name in (
        "repository/configs/ds.json",
        "repository/examples/train/ds.json",
        "beside/ds.json",
        "started/ds.json",
    ):
        (tmp_path / name).write_text(json.dumps(ZERO))
    monkeypatch.chdir(tmp_path / "started")
    return tmp_path


def checked(tree: Path, named: str, values: dict[str, Any] | None = None) -> memplan.Check:
    path = tree / "repository/examples/train/run.json"
    path.write_text(json.dumps(values or {**RUN, "deepspeed": named}))
    return memplan.check(path, cluster="2xA100-80GB")


@pytest.mark.parametrize("named", ["ds.json", "../../configs/ds.json", "configs/ds.json", "./ds.json"])
def test_neighbours_are_read(named: str, tree: Path) -> None:
    assert checked(tree, named).estimate.setup["strategy"] == "zero3"


def test_absolute_paths_to_neighbours_are_read(tree: Path) -> None:
    for name in ("started/ds.json", "repository/configs/ds.json"):
        assert checked(tree, str(tree / name)).estimate.setup["strategy"] == "zero3"


@pytest.mark.parametrize(
    "named", ["{tree}/beside/ds.json", "../../../beside/ds.json", "/etc/passwd", "/proc/self/environ"]
)
def test_others_are_not(named: str, tree: Path) -> None:
    with pytest.raises(SpecError, match=ELSEWHERE) as raised:
        checked(tree, named.format(tree=tree))
    assert "root:" not in str(raised.value)


def test_neither_are_links_that_lead_out(tree: Path) -> None:
    (tree / "repository/examples/train/link.json").symlink_to(tree / "beside/ds.json")
    (tree / "repository/examples/train/loop.json").symlink_to("loop.json")
    with pytest.raises(SpecError, match=ELSEWHERE):
        checked(tree, "link.json")
    with pytest.raises(SpecError):
        checked(tree, "loop.json")


def test_nor_what_an_accelerate_config_a_command_or_a_folder_names(tree: Path) -> None:
    outside = str(tree / "beside/ds.json")
    launched = {
        "distributed_type": "DEEPSPEED",
        "num_processes": 2,
        "deepspeed_config": {"deepspeed_config_file": outside},
    }
    with pytest.raises(SpecError, match=ELSEWHERE):
        checked(tree, "", launched)
    script = tree / "repository/run.sh"
    script.write_text(f"torchrun --nproc_per_node 2 a.py --per_device_train_batch_size 1 --deepspeed {outside}")
    with pytest.raises(SpecError, match=ELSEWHERE):
        memplan.check(script, "gpt2", cluster="2xA100-80GB")
    (tree / "repository/training_args.json").write_text(json.dumps({**RUN, "deepspeed": outside}))
    (tree / "repository/launch.sh").write_text("GPUS_PER_NODE=2\nNODES=1\n")
    with pytest.raises(SpecError, match=ELSEWHERE):
        memplan.check(tree / "repository", cluster="2xA100-80GB")


def test_what_a_script_says_itself_is_trusted(tree: Path) -> None:
    found = memplan.check({**RUN, "deepspeed": str(tree / "beside/ds.json")}, cluster="2xA100-80GB")
    assert found.estimate.setup["strategy"] == "zero3"


@pytest.mark.parametrize("kind", ["fifo", "zero", "folder", "missing", "socket"])
def test_what_is_no_file_is_refused_and_not_waited_for(kind: str, tree: Path) -> None:
    path = tree / "repository/examples/train" / kind
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "zero":
        path.symlink_to("/dev/zero")
    elif kind == "folder":
        path.mkdir()
    elif kind == "socket":
        os.mknod(path, 0o600 | stat.S_IFSOCK)
    with pytest.raises(MemplanError):
        checked(tree, kind)
    if kind not in ("folder", "missing"):
        for read in (
            lambda: memplan.check(path, "gpt2"),
            lambda: memplan.estimate(path, cluster="1xT4", strategy="ddp"),
        ):
            with pytest.raises(MemplanError):
                read()
