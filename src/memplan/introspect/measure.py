"""Real steps of a setup on this machine's GPU, each run in a process of its own; see :mod:`.worker`."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import memplan
from memplan.catalog.detect import Device, read_nvml, visible_devices
from memplan.errors import MemplanError, SpecError, UnsupportedError
from memplan.introspect.measurement import Measurement
from memplan.results import Estimate

__all__ = ["Job", "LibraryError", "MachineError", "NoGpuError", "boundary", "measure", "needs", "visible"]


class MachineError(MemplanError):
    """The run is one for another machine: this one lacks what it needs."""


class NoGpuError(MachineError, SpecError):
    """There is no NVIDIA GPU."""


class LibraryError(MachineError, UnsupportedError):
    """A library is not installed."""


class Process(Protocol):
    """What is needed of a process, as in :class:`subprocess.Popen`."""

    pid: int

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end, and return its exit code; raises subprocess.TimeoutExpired."""

    def poll(self) -> int | None:
        """Return its exit code, or None while it runs."""


Start: TypeAlias = Callable[[Path, Path], Process]
"""Starts the worker on a folder, with a file for its output."""

LIBRARIES = ("torch", "transformers", "accelerate")
TIMEOUT = 3600
"""Seconds that a run may take, unless it is said."""


@dataclass(frozen=True, slots=True)
class Job:
    """How a run is made and watched; what is trained is in its files."""

    device: str
    """``cuda``, or ``cpu`` to count tensors."""
    engine: str
    """The strategy's kind."""
    ranks: int
    nodes: int
    dtype: str
    """Of the weights, where the files leave it to the checkpoint."""
    config: Mapping[str, Any]
    """Values of config.json."""
    steps: int = 3
    cap: int | None = None
    """Bytes of a smaller GPU to be."""
    outside: int | None = None
    """Bytes of it that the process has outside of torch's allocator; None is what it sees, if nobody else is there."""
    alloc_conf: str | None = None
    """Settings of torch's allocator, as PYTORCH_ALLOC_CONF has them; None is the defaults."""
    pretrained: bool = False
    """Whether weights come from a checkpoint by from_pretrained."""
    evaluates: bool = False
    save: bool = False
    snapshot: bool = False
    """Whether the blocks at the peak are kept, which takes time."""
    libraries: tuple[str, ...] = ()
    """Modules that the run imports beside those of every run."""


def visible(device: str) -> tuple[Device, ...]:
    """Return this machine's GPUs; none are needed of a ``cpu``. Raises NoGpuError."""
    if device == "cpu":
        return ()
    devices = visible_devices(read_nvml())
    if not devices:
        remedy = "Run it where nvidia-smi shows one, or use --gpu cpu to count a small model's tensors."
        raise NoGpuError(f"gpu: there is no NVIDIA GPU here, and one is needed. {remedy}")
    return devices


def needs(job: Job) -> None:
    """Raise if this machine cannot run the job: NoGpuError, LibraryError, or SpecError for what it never can."""
    devices = visible(job.device)
    if devices and job.cap is not None and job.cap > devices[0].memory:
        problem = f"bytes are more than this GPU has ({devices[0].memory})"
        raise SpecError.at("cap", job.cap, problem, "Name a smaller one.")
    if job.device == "cpu" and job.engine != "single":
        remedy = "Use --strategy single."
        raise SpecError.at("strategy", job.engine, "allocates what cannot be counted on a CPU", remedy)
    lacking = [name for name in (*LIBRARIES, *_of_engine(job.engine), *job.libraries) if find_spec(name) is None]
    if lacking:
        are, them = ("is", "it") if len(lacking) == 1 else ("are", "them")
        remedy = f"Install {them}, as in pip install 'memplan[train]'."
        raise LibraryError(f"measure: {', '.join(lacking)} {are} not installed. {remedy}")


def _of_engine(engine: str) -> tuple[str, ...]:
    return ("deepspeed",) if engine.startswith("zero") else ()


def measure(
    job: Job,
    files: Mapping[str, str],
    estimate: Estimate,
    asked: Mapping[str, Any],
    timeout: float = TIMEOUT,
    start: Start | None = None,
) -> Measurement:
    """Run a job; ``files`` are those that train it, by name, and ``estimate`` is expected of what was ``asked``.

    A run that dies is a measurement too. ``start`` begins :func:`memplan.introspect.worker.main` in a process of its
    own, by default a new one. Raises what :func:`needs` raises.
    """
    needs(job)
    with tempfile.TemporaryDirectory(prefix="memplan-") as folder:
        for name, text in {**files, "job.json": json.dumps(_plain(asdict(job)))}.items():
            (Path(folder) / name).write_text(text, encoding="utf-8")
        seen = _seen(Path(folder), timeout, start or _started)
    device = seen.pop("device", {"name": job.device})
    machine = seen.pop("machine", {})
    where = seen.pop("where", None)
    if where:
        seen["message"] += f" ({' < '.join(reversed(where))})"
    return Measurement(
        memplan=_version(),
        taken=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        model={"id": estimate.model.id, "config": _plain(job.config)},
        asked=asked,
        setup=estimate.setup,
        cluster=estimate.cluster,
        device={**device, **machine},
        group="fake" if job.ranks > 1 or job.engine != "single" else "none",
        weights="from_pretrained" if job.pretrained else "random",
        **{"phases": {}, **seen},
    )


def _started(folder: Path, log: Path) -> subprocess.Popen[bytes]:
    """A new process, whose output goes to a file."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    source = str(Path(memplan.__file__).parents[1])
    environment["PYTHONPATH"] = os.pathsep.join([source, environment.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    command = [sys.executable, "-m", "memplan.introspect.worker", str(folder)]
    with log.open("wb") as output:
        return subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=environment,
            start_new_session=True,
        )  # fmt: skip


def _seen(folder: Path, timeout: float, start: Start = _started) -> dict[str, Any]:
    """What the worker has written, or why it has not."""
    log = folder / "log"
    process = start(folder, log)
    try:
        code = process.wait(timeout)
        ended = f"the process ended with {code}"
    except subprocess.TimeoutExpired:
        code, ended = None, f"not done after {timeout:.0f} s"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    record = folder / "record.json"
    if record.exists():
        found: dict[str, Any] = json.loads(record.read_text(encoding="utf-8"))
        return found
    last = "\n".join(log.read_text(encoding="utf-8", errors="replace").strip().split("\n")[-5:])
    killed = code == -signal.SIGKILL
    # Nothing but the kernel, short of memory, kills a process of ours.
    return {
        "status": "out-of-memory" if killed else "failed",
        "message": f"{ended}: {last}" if not killed else "the host's memory ran out",
        "versions": {},
    }


def _plain(values: Any) -> Any:
    """JSON values of frozen ones."""
    if isinstance(values, Mapping):
        return {name: _plain(value) for name, value in values.items()}
    if isinstance(values, (list, tuple)):
        return [_plain(value) for value in values]
    return values


def _version() -> str:
    """memplan's, and the commit if it runs from a checkout."""
    folder = Path(memplan.__file__).parents[2]
    if not (folder / ".git").exists():
        return memplan.__version__
    try:
        command = ["git", "-C", str(folder), "rev-parse", "--short=12", "HEAD"]
        commit = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return memplan.__version__
    return f"{memplan.__version__}+{commit}"


def boundary(values: Sequence[int], guess: int, lives: Callable[[int], bool]) -> int:
    """Return the place of the largest of ascending ``values`` with which a run lives; -1 if none does.

    ``guess`` is the place to begin at, from which it looks further and further away. What is smaller than one that
    lives is taken to live too, and what is larger than one that dies, to die.
    """
    living, dying, width = -1, len(values), 1
    place = min(max(guess, 0), len(values) - 1)
    while dying - living > 1:
        if lives(values[place]):
            living = place
        else:
            dying = place
        if dying == len(values):
            place = min(living + width, dying - 1)
        elif living == -1:
            place = max(dying - width, 0)
        else:
            place = (living + dying) // 2
        width *= 2
    return living
