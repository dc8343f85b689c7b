"""The worker's CUDA branch, run whole in a process that takes its host for a GPU."""

from __future__ import annotations

import os
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.introspect import fake_cuda
from tests.introspect.test_measure import T5, TINY

from memplan import measuring
from memplan.catalog import detect
from memplan.errors import SpecError
from memplan.introspect import measure, worker
from memplan.introspect.nvml import Driver
from memplan.units import GiB, MiB


class Forked:
    """A copy of this process that sees a GPU, and runs the worker."""

    def __init__(self, tells_processes: bool, folder: Path, log: Path) -> None:
        self.pid = os.fork()
        if self.pid == 0:
            try:
                output = os.open(log, os.O_WRONLY | os.O_CREAT)
                os.dup2(output, 1)
                os.dup2(output, 2)
                os.setsid()
                fake_cuda.install(tells_processes)
                worker.main(str(folder))
            except BaseException as error:
                sys.stderr.write(repr(error))
            finally:
                sys.stderr.flush()
                os._exit(1)
        self._code: int | None = None

    def poll(self) -> int | None:
        if self._code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self._code = os.waitstatus_to_exitcode(status) if pid else None
        return self._code

    def wait(self, timeout: float | None = None) -> int:
        while self.poll() is None:
            time.sleep(0.05)
        assert self._code is not None
        return self._code


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers.trainer  # noqa: F401  # for all copies at once

    monkeypatch.setattr(measure, "read_nvml", lambda: (fake_cuda.DEVICE,))
    monkeypatch.setattr(detect, "read_nvml", lambda: (fake_cuda.DEVICE,))
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")  # of the user's, not of the estimate
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")


COUNTERS = {"allocated", "requested", "reserved", "active", "inactive_split", "pinned", "retries", "host"}


@pytest.mark.parametrize(
    ("training", "options", "tells"),
    [
        ({"seq_len": 64, "eval_batch_size": 2}, {"save": True}, True),
        ({"seq_len": 64, "lora": {"rank": 4}}, {"pretrained": True}, False),
        ({"seq_len": 64, "lora": {"rank": 4}, "alloc_conf": "expandable_segments:True"}, {"snapshot": True}, True),
    ],
    ids=["evaluated and saved", "from a checkpoint", "snapshot"],
)
def test_a_run_is_recorded_whole(training: Any, options: Any, tells: bool) -> None:
    """``tells`` is whether the driver says what each process has."""
    found = measuring.measure(TINY, training, start=partial(Forked, tells), **options).measurement
    assert found.status == "ok", found.message
    assert {"load", "first_step", "forward", "loss", "backward", "step", "idle"} <= found.phases.keys()
    assert all(counters.keys() >= COUNTERS for counters in found.phases.values())
    assert found.peak("device") == pytest.approx(found.phases["idle"]["allocated"] + fake_cuda.CONTEXT, rel=0.1)
    assert found.outside == {"context": fake_cuda.CONTEXT, "first_kernel": 0, "first_matmul": 0, "small_step": 0}
    told = {"name": "NVIDIA H200", "total_memory": fake_cuda.TOTAL, "capability": "9.0", "driver": "580.1"}
    assert told.items() <= dict(found.device).items()
    assert found.device["counted"] == ("process" if tells else "difference")
    assert found.device["other_processes"] == (1 if tells else None)
    assert found.device["environment"]["CUDA_VISIBLE_DEVICES"] == "0"
    assert "PYTORCH_CUDA_ALLOC_CONF" not in found.device["environment"]  # as it is before the run
    assert found.versions.get("cuda") == torch.version.cuda
    assert found.ran["skipped_steps"] == 0
    assert len(found.step_seconds) == len(found.losses) == 3
    assert (found.blocks is not None) == ("snapshot" in options)


@pytest.mark.parametrize("config", [{**TINY, "tie_word_embeddings": True}, T5], ids=["llama", "t5"])
def test_weights_that_are_not_initialized_are_tied(config: Any) -> None:
    """Tying is a part of transformers' ``init_weights``, which is left out on a GPU."""
    found = measuring.measure(config, {"seq_len": 32}, steps=2, start=partial(Forked, True))
    assert found.measurement.status == "ok", found.measurement.message
    assert found.measurement.ran["parameters"] == found.estimate.model.parameters


def test_a_run_dies_of_a_smaller_gpu() -> None:
    found = measuring.measure(TINY, {"seq_len": 64}, cap=fake_cuda.CONTEXT + 12 * MiB, start=partial(Forked, False))
    assert found.measurement.status == "out-of-memory", found.measurement.message
    assert found.measurement.cap == fake_cuda.CONTEXT + 12 * MiB
    assert "load" in found.measurement.phases
    assert not [row for row in found.differences if row.name.startswith("peak")]


def test_a_larger_gpu_cannot_be_played() -> None:
    with pytest.raises(SpecError, match=r"cap: .* more than this GPU has"):
        measuring.measure(TINY, {"seq_len": 64}, cap=200 * GiB)


def test_a_boundary_is_searched_under_a_cap() -> None:
    options: dict[str, Any] = {"cap": fake_cuda.CONTEXT + 60 * MiB, "start": partial(Forked, True), "steps": 2}
    found = measuring.measure_boundary(TINY, {"seq_len": 64}, boundary="micro-batch", **options)
    assert found.measured is not None
    statuses = {tried.value: tried.status for tried in found.tried}
    assert statuses[found.measured] == "ok"
    assert statuses[found.measured + 1] == "out-of-memory"


def test_the_driver_is_asked() -> None:
    driver = Driver(fake_cuda.Nvml({7: 5 * GiB}))
    assert driver.used() == fake_cuda.OTHERS
    assert driver.processes() == {7: 5 * GiB}
    assert driver.version() == "580.1"
    assert driver.capability() == (9, 0)
    assert Driver(fake_cuda.Nvml(None)).processes() is None
    assert Driver(fake_cuda.Nvml({7: 2**64 - 1})).processes() is None


def test_without_a_gpu_there_is_no_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("memplan.introspect.nvml.read_nvml", lambda: ())
    with pytest.raises(SpecError, match="no NVIDIA GPU"):
        Driver()
