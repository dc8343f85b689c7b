"""The measurement campaign: its list, and its runner on a CPU."""

from __future__ import annotations

import errno
import json
import os
import random
import re
import signal
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.introspect import fake_cuda
from tests.scripts import script
from torch.utils.file_baton import FileBaton

from memplan import api, case, estimator, measuring
from memplan.catalog import detect
from memplan.errors import MemplanError
from memplan.introspect import measure
from memplan.introspect.measurement import Measurement
from memplan.introspect.nvml import Driver
from memplan.units import GiB


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
    assert {row.get("strategy", {}).get("kind") for row in setups} >= {
        "zero0",
        "zero1",
        "zero2",
        "zero3",
        "fsdp",
        "ddp",
    }
    assert {row["training"].get("attn") for row in setups} >= {None, "eager", "flash_attention_2"}
    assert {row["strategy"].get("offload_param") for row in setups if "strategy" in row} >= {"cpu", "nvme"}
    assert 0.3 <= sum(row["holdout"] for row in listed) / len(listed) <= 0.37
    assert len({campaign.key(row) for row in listed}) == len(listed)


def test_every_row_is_a_setup_that_is_modelled(campaign: Any) -> None:
    for row in campaign.load():
        api.estimate(*campaign.specs(row, "H200"), replay=False)


def test_every_row_has_files_to_run(campaign: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """All that happens before a run, with a run that ends at once."""
    monkeypatch.setattr(measure, "read_nvml", lambda: (fake_cuda.DEVICE,))
    monkeypatch.setattr(detect, "read_nvml", lambda: (fake_cuda.DEVICE,))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    estimate = estimator.estimate
    monkeypatch.setattr(estimator, "estimate", lambda *specs, **_: estimate(*specs, replay=False))
    monkeypatch.setattr(measure, "find_spec", lambda name: name)  # flash-attn is not everywhere
    jobs: list[dict[str, Any]] = []

    class Ended:
        pid = 0

        def __init__(self, folder: Path, log: Path) -> None:
            jobs.append(json.loads((folder / "job.json").read_text()))
            assert (folder / "train.py").exists()
            assert json.loads((folder / "training_args.json").read_text())["dataset"] is None
            record = {"status": "ok", "message": "", "versions": {}, "phases": {}}
            (folder / "record.json").write_text(json.dumps(record))

        def wait(self, timeout: float | None = None) -> int:
            return 0

        poll = wait

    how = campaign.How(start=Ended)
    for row in campaign.load():
        row.pop("boundary", None)
        assert "measurement" in campaign.measured(row, how), row
    assert {job["ranks"] for job in jobs} == {1, 2, 8, 64}
    assert {job["alloc_conf"] for job in jobs} == {None, "expandable_segments:True", "roundup_power2_divisions:4"}
    assert {job["cap"] for job in jobs} == {None, *(cap * GiB for cap in (16, 24, 40, 48, 80))}


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
    how = campaign.How(timeout=300, gpu="cpu")
    assert campaign.run(tmp_path / "out", 600, how) == 2
    assert campaign.run(tmp_path / "out", 600, how) == 0
    found, refused = (json.loads(line) for line in (tmp_path / "out" / "rows.jsonl").read_text().splitlines())
    assert "task" in refused["refused"]
    measurement = Measurement.from_dict(found["measurement"])
    assert measurement.status == "ok", measurement.message
    steady = {row.name: row.relative for row in measuring.estimate_again(measurement).differences}["steady_allocated"]
    assert steady is not None
    assert abs(steady) < 0.01


def test_alone_rows_come_first_and_marks_do_not_change_a_row(campaign: Any, tmp_path: Path) -> None:
    rows = campaign.pending(tmp_path / "rows.jsonl", "", again=False)
    alone = [row.get("alone", False) for row in rows]
    assert alone == sorted(alone, reverse=True)
    assert 20 <= sum(alone) <= 40
    assert {campaign.key(row) for row in rows} == {campaign.key(row | {"alone": True}) for row in rows}


def test_a_campaign_that_is_killed_again_and_again_ends_with_every_row_once(
    campaign: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Runs are stood in for by what takes as long as it likes, and starts a process of its own as they do."""
    rows = [{"model": "gpt2", "training": {"seq_len": n}, "holdout": False} for n in range(1, 25)]

    def measured(row: dict[str, Any], how: Any) -> dict[str, Any]:
        def work(folder: str) -> None:
            (tmp_path / f"pid-{os.getpid()}").touch()
            time.sleep(0.1 * (row["training"]["seq_len"] % 4))
            os._exit(0)

        monkeypatch.setattr(campaign.worker, "main", work)
        assert campaign.Forked(tmp_path, tmp_path / "log").wait(10) == 0
        return {"measurement": {"status": "ok", "n": row["training"]["seq_len"]}, "said": "measured " * 20}

    monkeypatch.setattr(campaign, "load", lambda: rows)
    monkeypatch.setattr(campaign, "measured", measured)
    monkeypatch.setattr(campaign, "needs", lambda row, gpu: (1, 1))
    chance, out = random.Random(5), tmp_path / "out"
    out.mkdir()
    kills = 0
    while True:
        pid = os.fork()
        if pid == 0:
            campaign.run(out, 60, campaign.How(gpu="cpu", workers=3))
            os._exit(0)
        time.sleep(chance.uniform(0.1, 0.9))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        kills += 1
        with (out / "rows.jsonl").open("a") as file:  # as if the cut had come within a line
            file.write('{"row": {"mo')
        if not campaign.pending(out / "rows.jsonl", "", again=False):
            break
        assert kills < 300  # on a busy machine little is done between two
    assert kills > 2
    lines = campaign.archived.read(out / "rows.jsonl")
    assert sorted(line["measurement"]["n"] for line in lines) == list(range(1, 25))
    assert max(line["alongside"] for line in lines) == 2
    until = time.monotonic() + 5
    while any(Path("/proc", path.name[4:]).exists() for path in tmp_path.glob("pid-*")):
        assert time.monotonic() < until


def test_a_row_that_dies_beside_others_is_run_again_alone(
    campaign: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"model": "gpt2", "training": {"seq_len": n}, "holdout": False} for n in (1, 2)]

    def measured(row: dict[str, Any], how: Any) -> dict[str, Any]:
        time.sleep(0.5)
        died = row["training"]["seq_len"] == 2
        return {"measurement": {"status": "out-of-memory" if died else "ok"}, "said": ""}

    monkeypatch.setattr(campaign, "load", lambda: rows)
    monkeypatch.setattr(campaign, "measured", measured)
    monkeypatch.setattr(campaign, "needs", lambda row, gpu: (1, 1))
    campaign.run(tmp_path, 60, campaign.How(gpu="cpu", workers=2))
    first, second = campaign.archived.read(tmp_path / "rows.jsonl")
    assert (first["alongside"], second["alongside"]) == (1, 0)
    assert second["row"]["alone"]


def test_rows_wait_for_room(campaign: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(row: dict[str, Any], how: Any) -> dict[str, Any]:
        time.sleep(0.2)
        return {"refused": "no", "said": "no"}

    rows = [{"model": "gpt2", "training": {"seq_len": n}, "holdout": False} for n in (1, 2, 3)]
    monkeypatch.setattr(campaign, "load", lambda: rows)
    monkeypatch.setattr(campaign, "measured", refused)
    monkeypatch.setattr(campaign, "needs", lambda row, gpu: (1 << 60, 1))
    campaign.run(tmp_path, 60, campaign.How(gpu="cpu", workers=3))
    assert [line["alongside"] for line in campaign.archived.read(tmp_path / "rows.jsonl")] == [0, 0, 0]
    assert campaign.run(tmp_path, 60, campaign.How(gpu="cpu", workers=3)) == 0
    assert campaign.run(tmp_path, 60, campaign.How(gpu="cpu", workers=3), again=True) == 3


def test_a_cap_goes_by_what_processes_alone_had_outside(
    campaign: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the driver does not tell processes apart, neighbours would hide it."""
    plain = {"model": "gpt2", "training": {"seq_len": 1}, "holdout": False, "alone": True}
    capped = [{"model": "gpt2", "training": {"seq_len": n}, "cap": 24, "holdout": False} for n in (1, 2)]
    counted = "difference"
    monkeypatch.setattr(measure, "read_nvml", lambda: (fake_cuda.DEVICE,))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def measured(row: dict[str, Any], how: Any) -> dict[str, Any]:
        time.sleep(0.3)
        outside = {"context": 500, "small_step": 30}
        device = {"counted": counted}
        told = how.start.keywords["outside"] if isinstance(how.start, partial) else None
        return {"measurement": {"status": "ok", "outside": outside, "device": device, "told": told}, "said": ""}

    def run(rows: list[dict[str, Any]], out: Path) -> list[tuple[Any, int]]:
        monkeypatch.setattr(campaign, "load", lambda: json.loads(json.dumps(rows)))
        campaign.run(out, 60, campaign.How(workers=3))
        found = campaign.archived.read(out / "rows.jsonl")
        return [(line["measurement"]["told"], line["alongside"]) for line in found if "cap" in line["row"]]

    monkeypatch.setattr(campaign, "measured", measured)
    monkeypatch.setattr(campaign, "needs", lambda row, gpu: (0, 1))
    assert run([plain, *capped], tmp_path / "known") == [(530, 1), (530, 1)]
    assert run(capped, tmp_path / "unknown") == [(None, 0), (530, 0)]  # the first one is alone, and tells
    counted = "process"
    assert run([plain, *capped], tmp_path / "told") == [(None, 1), (None, 1)]
    (tmp_path / "job.json").write_text("{}")
    monkeypatch.setattr(campaign.worker, "main", lambda folder: os._exit(0))
    assert campaign.Forked(tmp_path, tmp_path / "log", outside=7).wait(10) == 0
    assert json.loads((tmp_path / "job.json").read_text()) == {"outside": 7}


def command(campaign: Any, monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr("sys.argv", ["campaign.py", *map(str, arguments)])
    monkeypatch.setattr(campaign, "LIST", campaign.LIST)  # which the command sets
    code: int = campaign.main()
    return code


def test_without_a_gpu_it_says_so_and_writes_nothing(
    campaign: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "read_nvml", lambda: ())
    for arguments in (["--out", tmp_path / "out", "--limit", 3], ["--limit", 3]):
        assert command(campaign, monkeypatch, *arguments) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err.count("\n") == 1
        assert "no NVIDIA GPU" in err
    assert list(tmp_path.iterdir()) == []


def test_what_this_machine_lacks_is_not_archived(
    campaign: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"model": "gpt2", "training": {"seq_len": 64}, "holdout": False}]
    monkeypatch.setattr(campaign, "load", lambda: rows)
    monkeypatch.setattr(measure, "find_spec", lambda name: None)
    how = campaign.How(gpu="cpu")
    assert campaign.run(tmp_path, 60, how) == 0
    assert "not on this machine, 1 rows: measure: torch" in capsys.readouterr().out
    assert campaign.archived.read(tmp_path / "rows.jsonl") == []
    assert campaign.pending(tmp_path / "rows.jsonl", "", again=False) == rows


def test_what_is_imported_ahead_makes_no_context(
    campaign: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """bitsandbytes asks what the GPU can do as it is imported, and a context is of no use to copies."""

    def contexts(device: Any = None) -> tuple[int, int]:
        raise AssertionError("a context was made")

    (tmp_path / "asks_as_it_is_imported.py").write_text(
        "import torch\nfound = torch.cuda.get_device_capability(torch.cuda.device(0))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    monkeypatch.setattr(campaign, "PRELOADED", ("torch", "asks_as_it_is_imported"))
    monkeypatch.setattr(campaign, "Driver", lambda: Driver(fake_cuda.Nvml(None)))
    monkeypatch.setattr("torch.cuda.get_device_capability", contexts)
    campaign.preload()
    assert sys.modules.pop("asks_as_it_is_imported").found == (9, 0)
    assert torch.cuda.get_device_capability is contexts


def test_an_op_is_compiled_ahead_and_a_lock_that_nobody_holds_is_gone(
    campaign: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Builder:
        def load(self, verbose: bool) -> None:
            (tmp_path / "compiled").touch()

    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr("deepspeed.ops.op_builder.CPUAdamBuilder", Builder)
    lock = tmp_path / campaign.COMPILED / "lock"
    lock.parent.mkdir()
    baton = FileBaton(str(lock))
    assert baton.try_acquire()
    campaign.compile_ahead()
    assert os.wait()[1] == 0
    assert lock.exists()  # somebody is at it
    os.close(baton.fd)  # as the kernel does when a process is killed
    campaign.compile_ahead()
    assert os.wait()[1] == 0
    assert not lock.exists()
    assert (tmp_path / "compiled").exists()


def test_rows_go_by_the_host_memory_that_is_said(
    campaign: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A virtual machine may be given its memory as it uses it, and tells little at its start."""
    rows = [{"model": "gpt2", "training": {"seq_len": n}, "holdout": False} for n in (1, 2)]

    def measured(row: dict[str, Any], how: Any) -> dict[str, Any]:
        time.sleep(0.3)
        return {"refused": "no", "said": ""}

    monkeypatch.setattr(campaign, "load", lambda: [dict(row) for row in rows])
    monkeypatch.setattr(campaign, "measured", measured)
    monkeypatch.setattr(campaign, "needs", lambda row, gpu: (0, 20 * GiB))
    monkeypatch.setattr(campaign, "host_memory", lambda: 16 * GiB)
    for said, alongside in ((None, [0, 0]), (128 * GiB, [1, 1])):
        out = tmp_path / str(said)
        campaign.run(out, 60, campaign.How(gpu="cpu", workers=2, host_memory=said))
        assert [line["alongside"] for line in campaign.archived.read(out / "rows.jsonl")] == alongside


def test_a_full_disk_is_told_of(
    campaign: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(campaign, "campaign", full)
    assert command(campaign, monkeypatch, "--out", tmp_path) == 2
    assert capsys.readouterr().err == f"{tmp_path}: No space left on device. Name another with --out or --list.\n"


@pytest.mark.parametrize("text", ["{}", "[3]", '[{"model": "gpt2"}]', "no"])
def test_a_list_that_is_none_is_told_of(
    campaign: Any, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "list.json"
    path.write_text(text)
    assert command(campaign, monkeypatch, "--plan", "--out", tmp_path, "--list", path) == 2
    assert capsys.readouterr().err.startswith(f"{path}: is no")


@pytest.mark.parametrize("option", ["--workers", "--limit"])
def test_of_nothing_at_once_nothing_is_begun(campaign: Any, option: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit) as ended:
        command(campaign, monkeypatch, "--plan", option, 0)
    assert ended.value.code == 2


GOOD = json.dumps({"row": {"model": "gpt2", "training": {"seq_len": 64}}, "refused": "no"}).encode()


@pytest.mark.parametrize(
    "bad", [b'{"row": {"mo', b"\xff\xfe", b"[1]", b'{"row": 3}', GOOD.replace(b"refused", b"other"), b"[" * 9999]
)
def test_a_line_that_is_none_is_named(
    campaign: Any, bad: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x" / "rows.jsonl"
    path.parent.mkdir()
    path.write_bytes(GOOD + b"\n" + bad + b"\n" + GOOD + b"\n")
    replay = script("benchmarks/replay.py")
    monkeypatch.setattr(replay, "MEASUREMENTS", tmp_path)
    assert command(campaign, monkeypatch, "--plan", "--out", path.parent) == 2
    monkeypatch.setattr("sys.argv", ["replay.py"])
    assert replay.main() == 2
    first, second = capsys.readouterr().err.splitlines()
    assert first == second
    assert first.startswith(f"{path}, line 2: ")
    assert first.endswith("run its row again.")


def test_a_measurement_that_is_none_is_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(GOOD.replace(b'"refused": "no"', b'"measurement": {"status": "odd"}') + b"\n")
    with pytest.raises(MemplanError) as told:
        script("benchmarks/replay.py").lines(tmp_path)
    assert str(told.value).startswith(f"{path}, line 1: measurement: status: 'odd' is not a choice.")
    assert "\n" not in str(told.value)


def test_what_a_cut_has_left_is_no_line(campaign: Any, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(GOOD + b"\n" + GOOD[:-9])
    replay = script("benchmarks/replay.py")
    assert len(replay.lines(tmp_path)) == len(campaign.archived.read(path)) == 1
    assert path.read_bytes() != GOOD + b"\n"  # who only reads leaves it there
    assert len(campaign.archived.mended(path)) == 1
    assert path.read_bytes() == GOOD + b"\n"


def test_the_archive_is_that_of_the_gpu(campaign: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [json.loads(GOOD)["row"] | {"holdout": False}]
    monkeypatch.setattr(campaign, "load", lambda: rows)
    monkeypatch.setattr(measure, "read_nvml", lambda: (fake_cuda.DEVICE,))
    monkeypatch.setattr(detect, "read_nvml", lambda: (fake_cuda.DEVICE,))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    today = campaign.folder_of(None, tmp_path)
    assert re.fullmatch(r"h200-\d{4}-\d\d-\d\d", today.name)
    begun, full = tmp_path / "h200-2020-01-01", tmp_path / "h200-2020-01-02"
    for folder in (begun, full, tmp_path / "h200-notes"):
        folder.mkdir()
    (full / "rows.jsonl").write_bytes(GOOD + b"\n")
    assert campaign.folder_of(None, tmp_path) == begun  # it is taken up
    assert campaign.folder_of("cpu", tmp_path).name.startswith("cpu-")
