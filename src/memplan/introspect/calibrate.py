"""This machine's own constants, from a few short runs: ``memplan calibrate``. See :mod:`.probe` for the runs."""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime, timezone
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import AfterValidator, Field

import memplan
from memplan.catalog.detect import Device, read_nvml, visible_devices
from memplan.catalog.gpus import match_device
from memplan.catalog.profile import profile_path
from memplan.constants import Constant
from memplan.errors import SpecError, UnsupportedError
from memplan.introspect.probe import COPIED
from memplan.memory.runtime import cuda_context
from memplan.results import SCHEMA_VERSION, Answer, Result
from memplan.specs._base import freeze
from memplan.specs.hardware import GPUSpec
from memplan.specs.software import SoftwareSpec

__all__ = ["MeasuredConstant", "Profile", "calibrate", "fit", "read_record"]

RUNS = 3
TIMEOUT = 300
"""Seconds that one run may take."""
Seen: TypeAlias = Mapping[str, Any]
"""What a probe wrote."""


class MeasuredConstant(Result):
    """A number of this machine, as :class:`~memplan.constants.Constant` has it."""

    name: str
    value: float | int
    low: float | int
    high: float | int
    unit: str
    """``B``, ``B/s`` or ``FLOP/s``."""
    source: str


class Profile(Answer):
    """What was found; :func:`memplan.catalog.profile.calibrated` reads it."""

    schema_version: Literal[1] = SCHEMA_VERSION
    gpu: str
    """As in the catalog."""
    memplan: str
    taken: str
    """When: ISO 8601, in UTC."""
    device: Annotated[dict[str, Any], AfterValidator(freeze)] = Field(default_factory=dict)
    versions: Annotated[dict[str, Any], AfterValidator(freeze)] = Field(default_factory=dict)
    constants: tuple[MeasuredConstant, ...]
    """``cuda_context``, ``cublas_workspace``, ``nccl`` (B); ``matmul_<dtype>`` (FLOP/s); ``copy`` within the GPU,
    ``pcie`` to pinned and ``pcie_pageable`` to other host memory, the slower direction (B/s).
    """


def calibrate(
    out: Path | None = None,
    records: Sequence[Path] = (),
    runs: int = RUNS,
    probe: Callable[[int], list[Seen]] | None = None,
) -> tuple[Profile, Path]:
    """Measure this machine's constants, and write them to ``out``, by default where estimates look for them.

    ``records`` are files of :class:`memplan.MemoryCallback`, from runs on this machine; ``runs`` is how many processes
    look at the GPU. ``probe`` takes the number of ranks, and returns what each has seen. Returns the profile and where
    it is.

    Raises SpecError without a GPU, for one that is not in the catalog, and for a record that cannot be read.
    """
    devices = visible_devices(read_nvml())
    if not devices:
        remedy = "Run it where nvidia-smi shows one."
        raise SpecError(f"gpu: there is no NVIDIA GPU here, and one is needed. {remedy}")
    gpu = match_device(devices[0].name, devices[0].memory)
    if gpu is None:
        remedy = "Name the nearest GPU of the catalog in estimates; constants of this one cannot be kept."
        raise SpecError.at("gpu", devices[0].name, "is not in the catalog", remedy)
    read = [read_record(path) for path in records]
    path = out or profile_path(gpu.name)
    if path is None:
        raise SpecError.at("out", None, "is not known: MEMPLAN_PROFILE is empty", "Name a file with --out.")
    if probe is None and find_spec("torch") is None:
        raise UnsupportedError("calibrate: torch is not installed. Install it, as in pip install 'memplan[train]'.")
    run = probe or _probe
    seen = [each for _ in range(runs) for each in run(1)]
    alike = _alike(devices)
    together = run(alike) if alike > 1 else []
    today = datetime.now(timezone.utc)
    constants = fit(gpu, seen, together, read, f"{today:%Y-%m-%d}")
    profile = Profile(
        gpu=gpu.name,
        memplan=memplan.__version__,
        taken=today.isoformat(timespec="seconds"),
        device=dict(seen[0]["device"]),
        versions={**seen[0]["versions"], **seen[0]["cuda"]},
        constants=tuple(
            MeasuredConstant(
                name=each.name, value=each.value, low=each.low, high=each.high, unit=each.unit, source=each.source
            )
            for each in constants
        ),
    )
    write(profile, path)
    return profile, path


def _alike(devices: Sequence[Device]) -> int:
    return sum((each.name, each.memory) == (devices[0].name, devices[0].memory) for each in devices)


# -- from what was seen to constants -----------------------------------------------------------------------------------


def fit(
    gpu: GPUSpec, seen: Sequence[Seen], together: Sequence[Seen], records: Iterable[Seen], day: str
) -> list[Constant]:
    """Return the constants that probes have seen, alone and together, and the records of runs on this machine.

    The context is what a process has outside of torch's allocator once a small step has run. At least it is what it
    was before that; other kernels may take as much as the step's did, or what a run's record has.
    """
    where = f"memplan calibrate on this machine, {day}: {len(seen)} processes"
    contexts = [int(each["after_step"]) for each in seen]
    outside = [each for each in map(_outside, records) if each is not None]
    # Somebody else's memory would be taken for this run's.
    most = 2 * int(cuda_context(gpu, SoftwareSpec()).high)
    kept = [each for each in outside if each <= most]
    value = round(statistics.median([*contexts, *kept]))
    bare = min(int(each["context"]) for each in seen)
    kernels = max(0, max(contexts) - bare)
    text = f"{where} after a small step" + (f", and {len(kept)} records of runs" if kept else "")
    most_seen = max([*contexts, *kept])
    found = [Constant("cuda_context", value, min(bare, value), most_seen + kernels, "B", text)]
    workspaces = [int(each["workspace"]) for each in seen]
    if min(workspaces) > 0:
        found.append(_spread("cublas_workspace", workspaces, "B", f"{where}, the first product of matrices"))
    if together:
        each_rank = [int(each["nccl"]) for each in together]
        if min(each_rank) > 0:
            text = f"memplan calibrate on this machine, {day}: {len(together)} ranks, three kinds of collectives"
            found.append(_spread("nccl", each_rank, "B", text))
    for dtype in seen[0]["products"]:
        rates = [rate for each in seen for rate in _flops(each["products"][dtype])]
        found.append(_spread(f"matmul_{dtype}", rates, "FLOP/s", f"{where}, products as in a transformer's layers"))
    for name, parts, factor in (
        ("copy", ("within",), 2),  # bytes are read and written
        ("pcie", ("pinned_up", "pinned_down"), 1),
        ("pcie_pageable", ("pageable_up", "pageable_down"), 1),
    ):
        rates = [min(factor * COPIED / min(each["copies"][part]) for part in parts) for each in seen]
        slowest = min(factor * COPIED / max(each["copies"][part]) for each in seen for part in parts)
        found.append(_spread(name, [*rates, slowest], "B/s", f"{where}, copies of {COPIED >> 30} GiB", rates))
    return found


def _spread(
    name: str, values: Sequence[float], unit: str, source: str, typical: Sequence[float] | None = None
) -> Constant:
    """The median of what is typical, between the least and the most of all."""
    middle = statistics.median(typical or values)
    return Constant(name, round(middle), round(min(values)), round(max(values)), unit, source)


def _flops(seconds: Mapping[str, Sequence[float]]) -> list[float]:
    """FLOP/s of each shape, at its fastest."""
    found = []
    for shape, times in seconds.items():
        m, n, k = map(int, shape.split(","))
        found.append(2 * m * n * k / min(times))
    return found


def read_record(path: Path) -> Seen:
    """Return the measurement of a file that :class:`memplan.MemoryCallback` wrote. Raises SpecError."""
    remedy = "Name a memplan-memory.json."
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        measurement: Seen = found["measurement"]
        if not isinstance(measurement["phases"], dict):
            raise TypeError("phases")
        return measurement
    except OSError as error:
        problem = f"cannot be read ({(error.strerror or str(error)).lower()})"
        raise SpecError.at("record", str(path), problem, remedy) from None
    except (ValueError, KeyError, TypeError):
        raise SpecError.at("record", str(path), "is no record of a run", remedy) from None


def _outside(record: Seen) -> int | None:
    """What a run on one GPU had of it beside torch's allocator, if nobody else used the GPU; None if it is not told."""
    run = record["phases"].get("run", {})
    if record.get("group") != "none" or "device" not in run or "reserved" not in run:
        return None
    # The record takes the context to be the estimate's, and what is more of it for somebody else's.
    return int(run["device"] - run["reserved"] + record.get("device", {}).get("before", 0))


# -- the runs ----------------------------------------------------------------------------------------------------------


def _probe(ranks: int) -> list[Seen]:
    """Start a probe, or one per rank, and return what each has seen. Raises UnsupportedError if one dies."""
    with tempfile.TemporaryDirectory(prefix="memplan-") as folder:
        files = [Path(folder) / f"{rank}.json" for rank in range(ranks)]
        processes = [_started(rank, ranks, file) for rank, file in enumerate(files)]
        try:
            for process in processes:
                process.wait(TIMEOUT)
        except subprocess.TimeoutExpired:
            raise UnsupportedError(f"calibrate: not done after {TIMEOUT} s. Look at nvidia-smi.") from None
        finally:
            for process in processes:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
        for file in files:
            if not file.exists():
                text = file.with_suffix(".log").read_text(encoding="utf-8", errors="replace").strip()
                raise UnsupportedError(f"calibrate: a run died: {(text.splitlines() or ['it said nothing'])[-1]}")
        return [json.loads(file.read_text(encoding="utf-8")) for file in files]


def _started(rank: int, ranks: int, file: Path) -> subprocess.Popen[bytes]:
    source = str(Path(memplan.__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([source, os.environ.get("PYTHONPATH", "")])}
    if ranks > 1:
        environment |= {"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank)}
        environment |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "29513"}
    with file.with_suffix(".log").open("wb") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "memplan.introspect.probe", str(file)],
            stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=environment, start_new_session=True,
        )  # fmt: skip


def write(profile: Profile, path: Path) -> None:
    """Write a profile, whole or not at all. Raises SpecError if it cannot be."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            partial.write_text(profile.to_json(indent=2) + "\n", encoding="utf-8")
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise SpecError.at("out", str(path), f"cannot be written ({reason})", "Name another file.") from None
