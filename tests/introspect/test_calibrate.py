"""This machine's own constants: fitted from what probes have seen, kept, and used by later estimates."""

from __future__ import annotations

import json
import os
import sys
import traceback
import warnings
from pathlib import Path
from typing import Any

import pytest
from tests.introspect import fake_cuda

from memplan import api
from memplan.catalog import detect
from memplan.catalog.gpus import find_gpu
from memplan.catalog.profile import CONSTANTS, RATES, VARIABLE, calibrated, profile_path
from memplan.cli import main
from memplan.constants import Constant
from memplan.errors import SpecError
from memplan.introspect import calibrate as module
from memplan.introspect import probe
from memplan.introspect.calibrate import Profile, calibrate, fit, read_record
from memplan.introspect.probe import COPIED, PRODUCTS
from memplan.memory.runtime import cublas_workspaces, cuda_context, nccl
from memplan.specs.hardware import ClusterSpec
from memplan.specs.software import SoftwareSpec
from memplan.throughput.rates import DEFAULT_MACHINE, Rates
from memplan.units import GiB, MiB

H200 = find_gpu("H200")


def seen(context: int = 500, step: int = 530, rate: float = 600e12, copied: float = 4.2e12) -> dict[str, Any]:
    """What a probe writes."""
    products = {f"{m},{n},{k}": [3 * 2 * m * n * k / rate, 2 * m * n * k / rate] for m, n, k in PRODUCTS}
    slower = {name: [2 * each for each in times] for name, times in products.items()}
    return {
        "device": {"name": "NVIDIA H200", "total_memory": 140 * GiB, "driver": "580.1"},
        "versions": {"torch": "2.11.0+cu130"},
        "cuda": {"cuda": "13.0"},
        "context": context * MiB,
        "after_step": step * MiB,
        "workspace": 32 * MiB,
        "products": {"bfloat16": products, "float32": slower},
        "copies": {
            "within": [2 * COPIED / copied, 3 * COPIED / copied],
            "pinned_up": [COPIED / 50e9],
            "pinned_down": [COPIED / 45e9, COPIED / 40e9],
            "pageable_up": [COPIED / 9e9],
            "pageable_down": [COPIED / 5e9],
        },
    }


def record(tmp_path: Path, device: int, reserved: int, before: int = 0, group: str = "none") -> Path:
    """A record as the callback writes it."""
    phases = {"run": {"device": device, "reserved": reserved, "allocated": reserved, "host": 1}}
    measurement = {"group": group, "phases": phases, "device": {"name": "NVIDIA H200", "before": before}}
    path = tmp_path / "memplan-memory.json"
    path.write_text(json.dumps({"schema_version": 1, "estimate": None, "measurement": measurement}))
    return path


def test_constants_are_what_was_seen() -> None:
    found = {each.name: each for each in fit(H200, [seen(), seen(502, 536), seen(501, 533)], [], [], "2026-11-21")}
    context = found["cuda_context"]
    assert (context.low, context.value, context.high) == (500 * MiB, 533 * MiB, (536 + 36) * MiB)
    assert found["cublas_workspace"].value == found["cublas_workspace"].high == 32 * MiB
    assert found["matmul_bfloat16"].value == pytest.approx(600e12)
    assert found["matmul_float32"].value == pytest.approx(300e12)
    assert found["copy"].value == pytest.approx(4.2e12)
    assert found["copy"].low == pytest.approx(2.8e12)
    assert found["pcie"].value == pytest.approx(45e9)
    assert found["pcie"].low == pytest.approx(40e9)
    assert found["pcie_pageable"].value == pytest.approx(5e9)
    assert "nccl" not in found
    assert set(found) <= set(CONSTANTS)
    assert all("this machine, 2026-11-21" in each.source for each in found.values())


def test_records_of_runs_and_several_ranks_join(tmp_path: Path) -> None:
    own = read_record(record(tmp_path, 2 * GiB, 2 * GiB - 520 * MiB, before=60 * MiB))
    of_others = read_record(record(tmp_path, 30 * GiB, 2 * GiB))
    several = read_record(record(tmp_path, 2 * GiB, GiB, group="real"))
    ranks = [{"nccl": 700 * MiB}, {"nccl": 690 * MiB}, {"nccl": 710 * MiB}]
    found = {each.name: each for each in fit(H200, [seen()], ranks, [own, of_others, several], "2026-11-21")}
    assert found["cuda_context"].value == (530 + 580) // 2 * MiB
    assert found["cuda_context"].high == (580 + 30) * MiB
    assert "1 records of runs" in found["cuda_context"].source
    assert (found["nccl"].low, found["nccl"].value, found["nccl"].high) == (690 * MiB, 700 * MiB, 710 * MiB)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A machine with one H200, whose user has a configuration folder."""
    monkeypatch.setattr(module, "read_nvml", lambda: (fake_cuda.DEVICE,))
    monkeypatch.setattr(detect, "read_nvml", lambda: (fake_cuda.DEVICE,))
    monkeypatch.setattr(module, "_probe", lambda ranks: [seen()] * ranks)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return tmp_path


def test_a_profile_is_kept_and_later_estimates_use_it(machine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = api.estimate("openai-community/gpt2", {"seq_len": 256})
    assert main(["calibrate"]) == 0
    assert "cuda_context (MiB)" in capsys.readouterr().out
    path = machine / "config" / "memplan" / "profiles" / "H200.json"
    profile = Profile.from_json(path.read_text())
    assert list(path.parent.iterdir()) == [path]  # and nothing half written
    after = api.estimate("openai-community/gpt2", {"seq_len": 256})
    assert after.gpu.components.context == 530 * MiB != before.gpu.components.context
    assert after.gpu.high - after.gpu.low < before.gpu.high - before.gpu.low
    told = {each.name: each for each in after.assumptions}
    assert told["cuda_context"].source.startswith("memplan calibrate on this machine")
    assert told["cuda_context"].high == profile.constants[0].high
    assert told["matmul_bfloat16 (FLOP/s)"].value == pytest.approx(600e12)
    assert after.gpu.peak_allocated == before.gpu.peak_allocated  # cuBLAS takes what the rule says
    named = api.estimate("openai-community/gpt2", {"seq_len": 256}, "1xH200")
    assert named.gpu.components.context == before.gpu.components.context  # of any machine


def test_a_profile_may_be_named_or_refused(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = machine / "own.json"
    assert main(["calibrate", "--out", str(out), "--runs", "1"]) == 0
    assert not (machine / "config").exists()
    monkeypatch.setenv(VARIABLE, str(out))
    found = api.estimate("openai-community/gpt2", {"seq_len": 256}, "1xH200")
    assert found.gpu.components.context == 530 * MiB
    other = api.estimate("openai-community/gpt2", {"seq_len": 256}, "1xA100-80GB")
    assert other.gpu.components.context != 530 * MiB
    monkeypatch.setenv(VARIABLE, "")
    assert profile_path("H200") is None
    assert calibrated(H200) is H200
    with pytest.raises(SpecError, match="MEMPLAN_PROFILE is empty"):
        calibrate()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "is no profile"),
        ("[]", "is no profile"),
        ('{"schema_version": 2, "gpu": "H200", "constants": []}', "schema_version is 2"),
        ('{"schema_version": 1, "constants": []}', "has no 'gpu'"),
        ('{"schema_version": 1, "gpu": "H200", "constants": [{"name": "cuda_context"}]}', "has no 'value'"),
    ],
)
def test_a_profile_that_is_none_is_an_error(
    machine: Path, text: str, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = machine / "bad.json"
    path.write_text(text)
    monkeypatch.setenv(VARIABLE, str(path))
    assert main(["estimate", "openai-community/gpt2", "--strategy", "single"]) == 2
    err = capsys.readouterr().err
    assert said in err
    assert str(path) in err
    assert err.count("\n") == 1


def test_a_profile_that_is_named_must_be_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(VARIABLE, str(tmp_path / "none.json"))
    with pytest.raises(SpecError, match="no such file"):
        calibrated(H200)
    monkeypatch.delenv(VARIABLE)
    assert calibrated(H200, {"XDG_CONFIG_HOME": str(tmp_path)}) is H200


def test_the_probe_runs_whole(tmp_path: Path, machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU that is not there, with smaller products and copies."""
    monkeypatch.setattr(probe, "PRODUCTS", ((64, 32, 16), (32, 32, 32)))
    monkeypatch.setattr(probe, "COPIED", 1 << 16)
    out = tmp_path / "seen.json"
    pid = os.fork()
    if pid == 0:
        try:
            warnings.simplefilter("ignore")  # there is no CUDA to autocast for
            fake_cuda.install(tells_processes=False)
            probe.main(str(out))
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(0)
    os.waitpid(pid, 0)
    found = json.loads(out.read_text())
    assert found["context"] == found["after_step"] == fake_cuda.CONTEXT
    assert found["device"]["driver"] == "580.1"
    assert found["products"].keys() == {"bfloat16", "float16", "float32"}
    assert {len(times) for times in found["products"]["bfloat16"].values()} == {probe.REPEATED}
    assert found["copies"].keys() == {"within", "pinned_up", "pinned_down", "pageable_up", "pageable_down"}
    constants = {each.name for each in fit(H200, [found], [], [], "today")}
    assert constants == {"cuda_context", *RATES, "pcie_pageable"}  # the host has no cuBLAS


def test_where_profiles_are(tmp_path: Path) -> None:
    assert profile_path("H200", {"XDG_CONFIG_HOME": "/x"}) == Path("/x/memplan/profiles/H200.json")
    assert profile_path("H200", {"XDG_CONFIG_HOME": "x", "HOME": "/h"}) == Path("/h/.config/memplan/profiles/H200.json")


def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "read_nvml", lambda: ())
    assert main(["calibrate"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert "no NVIDIA GPU" in err


@pytest.mark.parametrize("arguments", [["--runs", "0"], ["--runs", "x"], ["--record", "nowhere.json"]])
def test_bad_input_is_refused(machine: Path, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["calibrate", *arguments]) == 2
    assert capsys.readouterr().err.startswith(arguments[0])
    assert not (machine / "config").exists()


def test_a_profile_that_cannot_be_written_is_an_error(machine: Path) -> None:
    (machine / "file").write_text("")
    with pytest.raises(SpecError, match="cannot be written"):
        calibrate(machine / "file" / "p.json")


def test_rules_give_way_to_what_was_measured() -> None:
    own = H200.replace(measured=tuple(fit(H200, [seen()], [{"nccl": 700 * MiB}], [], "2026-11-21")))
    software = SoftwareSpec()
    assert cuda_context(own, software).value == 530 * MiB
    assert nccl(own, 8, 8, software).value == 700 * MiB
    assert nccl(own, 16, 8, software) == nccl(H200, 16, 8, software)  # over nodes it was not measured
    assert nccl(own, 1, 1, software).value == 0
    odd = own.replace(measured=(Constant("cublas_workspace", 5 * MiB, 5 * MiB, 5 * MiB, "B", "seen"),))
    assert cublas_workspaces(odd, software, training=True)[0] == 5 * MiB
    rates = Rates(own, ClusterSpec(gpu=own), DEFAULT_MACHINE, "expected")
    assert rates.peak("bfloat16") == pytest.approx(600e12)
    assert rates.pcie == pytest.approx(45e9)
    assert 3.5e12 < rates.bandwidth < 4.2e12
