"""What a running script takes, beside what was predicted: read at the end of each step, judged after the second one.

torch's counters are read, never reset: they are the script's. On the CPU nothing counts tensors, and the process's
resident memory is all there is.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import memplan
from memplan.errors import SpecError
from memplan.integrations.live import rank
from memplan.introspect.measurement import Difference, Measured, Measurement
from memplan.results import Estimate
from memplan.units import MiB, gib

__all__ = ["RECORD", "Watch", "watch"]

RECORD = "memplan-memory.json"
"""The file in the output folder."""
JUDGED_AFTER = 2
"""Steps: the first one makes the optimizer's states."""
WINDOW = 16
"""Steps, of which the lowest idle level counts: batches differ."""
RISES = 5
"""Windows in a row, each above the one before: by chance once in 6! times."""
LEAST_GROWTH = MiB
"""Bytes over these windows that are worth a word: a CUDA allocator's small segments are 2 MiB."""
_PHASES_OF_TRAINING = ("load", "first_step", "forward", "loss", "backward", "step", "idle")


@contextmanager
def harmless(stop: Callable[[], None]) -> Iterator[None]:
    """A mistake of memplan's ends the watching, never the training; a warning that is an error is the script's."""
    try:
        yield
    except Warning:
        raise
    except Exception as error:
        stop()
        warnings.warn(f"memplan: memory is not watched: {type(error).__name__}: {error}.", stacklevel=4)


def of_estimate(estimate: Any) -> Estimate | None:
    """What is watched beside. Raises SpecError for what is no estimate."""
    if estimate is not None and not isinstance(estimate, Estimate):
        raise SpecError.at("estimate", estimate, "is none", "Give what memplan.estimate returns, or leave it out.")
    return estimate


def _folder(folder: Any) -> Path | None:
    """Where the record is written. Raises SpecError for what can be no path."""
    if folder is None:
        return None
    try:
        path = Path(folder)
        if b"\0" in os.fsencode(path):
            raise ValueError("a null byte")
    except (TypeError, ValueError):  # text that no file system has, among it
        remedy = "Give the path of one, or leave it out."
        raise SpecError.at("folder", folder, "is no path of a folder", remedy) from None
    return path


class Watch:
    """Compares a run with an estimate. Call :meth:`step` after every optimizer step, gradients being gone."""

    def __init__(
        self,
        estimate: Estimate | None = None,
        folder: str | os.PathLike[str] | None = None,
        *,
        say: Callable[[str], object] = print,
    ) -> None:
        """``folder`` is where the record is written; the first rank gives ``say`` the report. Raises SpecError."""
        if not callable(say):
            raise SpecError.at("say", say, "cannot be called", "Give a function of a text, such as print.")
        self.estimate = of_estimate(estimate)
        self.folder = _folder(folder)
        self.model: dict[str, Any] = {}
        self.asked: dict[str, Any] = {}
        """A Measurement's, where they are known."""
        self._say = say
        self.steps = 0
        self.report = ""
        """What was measured beside what was predicted, in words; empty until the second step is done."""
        self.status = "ok"
        self._message = ""
        self._ended = False
        self._cuda: Any = None
        self._in_use_before = 0
        with harmless(self._end):
            self._cuda = _cuda()
            self._in_use_before = _in_use(self._cuda)
        self._idle: int | None = None
        self._lowest: int | None = None
        self._level: int | None = None
        self._rises, self._risen_from = 0, 0
        self._started = time.monotonic()
        self._warned: set[str] = set()

    def step(self) -> None:
        """An optimizer step is done. Warns where there is reason to."""
        self.steps += 1
        if self._ended:
            return
        with harmless(self._end):
            self._step()

    def _end(self) -> None:
        self._ended = True

    def _step(self) -> None:
        if self._cuda is not None and self.steps >= JUDGED_AFTER:
            self._idle = _now(self._cuda, "allocated_bytes", "current")
            self._lowest = self._idle if self._lowest is None else min(self._lowest, self._idle)
        if self.steps == JUDGED_AFTER:
            self.judge()
        elif self._lowest is not None and (self.steps - JUDGED_AFTER) % WINDOW == 0:
            self._end_window(self._lowest)

    def judge(self) -> None:
        """Put what is measured now beside the estimate, say it, and write the record."""
        measured = self.measured()
        self.report = _in_words(measured, self.estimate)
        if rank() == 0:
            self._say(self.report)
        self._warn_of_drift(measured)
        self.write(measured)

    def finish(self, error: BaseException | None = None) -> None:
        """The run has ended, or died of ``error``: the record is written again."""
        if error is not None:
            self.status = "out-of-memory" if "OutOfMemory" in type(error).__name__ else "failed"
        if self._ended or (self.steps < JUDGED_AFTER and error is None):
            return
        with harmless(self._end):
            if error is not None:
                self._message = f"{type(error).__name__}: {error}".split("\n")[0][:500]
            measured = self.measured()
            self._warn_of_drift(measured)
            self.write(measured)

    def measured(self) -> Measurement:
        """What the counters say now; peaks are of the whole run until here, in a phase of that name."""
        found: dict[str, dict[str, int]] = {"run": {}}
        host = _resident()
        if host is not None:
            found["run"]["host"] = host
        if self._cuda is not None:
            found["run"]["allocated"] = _now(self._cuda, "allocated_bytes", "peak")
            found["run"]["reserved"] = _now(self._cuda, "reserved_bytes", "peak")
            outside = max(0, _in_use(self._cuda) - self._of_others())
            found["run"]["device"] = self._cuda.memory_reserved() + outside
            if self._idle is not None:
                found["idle"] = {"allocated": self._idle}
        estimate = self.estimate
        return Measurement(
            status=self.status,
            message=self._message,
            memplan=memplan.__version__,
            taken=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            model=self.model or ({} if estimate is None else {"id": estimate.model.id}),
            asked=self.asked,
            setup={} if estimate is None else estimate.setup,
            cluster={} if estimate is None else estimate.cluster,
            device=_device(self._cuda) | {"before": self._of_others()},
            versions=_versions(),
            group="none" if estimate is None or estimate.cluster.get("gpus", 1) == 1 else "real",
            weights="from_pretrained",
            phases=found,
            ran={"steps": self.steps},
            seconds=time.monotonic() - self._started,
        )

    def _of_others(self) -> int:
        """What other processes had of the GPU as it began; this one's context is taken to be what the estimate says."""
        context = 0 if self.estimate is None else self.estimate.gpu.components.context
        return max(0, self._in_use_before - context)

    def record(self, measured: Measurement) -> dict[str, Any]:
        """What the file holds: a :class:`~memplan.introspect.measurement.Measured`, whose estimate may be null."""
        if self.estimate is None:
            return {"schema_version": 1, "estimate": None, "measurement": measured.to_dict(), "differences": []}
        found = tuple(_differences(measured, self.estimate))
        return Measured(estimate=self.estimate, measurement=measured, differences=found).to_dict()

    def write(self, measured: Measurement) -> None:
        """Write the record, whole or not at all; a folder that cannot be written is a warning."""
        if self.folder is None or rank() != 0:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            _replace(self.folder / RECORD, json.dumps(self.record(measured), indent=2, allow_nan=False) + "\n")
        except OSError as error:
            self._warn("record", f"{self.folder / RECORD} cannot be written ({error.strerror or error})")

    def _warn_of_drift(self, measured: Measurement) -> None:
        """What is above the estimate's interval will not fit where the estimate says it does."""
        estimate, used = self.estimate, _used(measured, self.estimate)
        if estimate is None or used is None or used <= estimate.gpu.high:
            return
        self._warn(
            "drift",
            f"after step {self.steps} the process has {gib(used)} GiB of the GPU; at most {gib(estimate.gpu.high)} GiB "
            "were predicted. The run is not the one that was estimated, or memplan is wrong: please report the record",
        )

    def _end_window(self, lowest: int) -> None:
        if self._level is not None and lowest > self._level:
            if self._rises == 0:
                self._risen_from = self._level
            self._rises += 1
        else:
            self._rises = 0
        self._level, self._lowest = lowest, None
        grown = lowest - self._risen_from
        if self._rises >= RISES and grown >= LEAST_GROWTH:
            each = grown // (self._rises * WINDOW)
            self._warn(
                "growth",
                f"what is allocated between steps has grown by {gib(grown)} GiB over {self._rises * WINDOW} steps, "
                f"{each} bytes a step: something keeps tensors, such as a loss that is summed with its graph",
            )

    def _warn(self, kind: str, message: str) -> None:
        if kind not in self._warned and rank() == 0:
            self._warned.add(kind)
            warnings.warn(f"memplan: {message}.", stacklevel=4)


@contextmanager
def watch(
    estimate: Estimate | None = None, folder: str | os.PathLike[str] | None = None, say: Callable[[str], object] = print
) -> Iterator[Watch]:
    """Watch a training loop of one's own, whose body calls ``step()`` after each optimizer step.

    After the second one ``say`` is given the report, on the first rank; ``folder`` is where the record is written, if
    it is given. A run that dies within is recorded as that. Raises SpecError for a wrong argument.
    """
    watched = Watch(estimate, folder, say=say)
    try:
        yield watched
    except BaseException as error:
        watched.finish(error)
        raise
    watched.finish()


# -- counters ----------------------------------------------------------------------------------------------------------


def _cuda() -> Any:
    """``torch.cuda``, if it is there to be read."""
    torch = sys.modules.get("torch")
    return torch.cuda if torch is not None and torch.cuda.is_available() else None


def _now(cuda: Any, counter: str, which: str) -> int:
    """A counter of torch's allocator, without the flat dict of all that ``memory_stats`` makes."""
    found = cuda.memory_stats_as_nested_dict()
    return int(found[counter]["all"][which]) if found else 0  # before its first allocation there are none


def _in_use(cuda: Any) -> int:
    """Bytes of the GPU that are in use, but by torch's allocator in this process."""
    if cuda is None:
        return 0
    free, total = cuda.mem_get_info()
    return int(total - free - cuda.memory_reserved())


def _device(cuda: Any) -> dict[str, Any]:
    if cuda is None:
        return {"name": "cpu"}
    _, total = cuda.mem_get_info()
    return {"name": cuda.get_device_name(), "total_memory": total}


def _resident() -> int | None:
    """The process's resident memory, in bytes; None where /proc has none."""
    with suppress(OSError, ValueError, IndexError):
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")
    return None


def _versions() -> dict[str, str]:
    names = ("torch", "transformers", "accelerate", "deepspeed", "peft")
    loaded = ((name, sys.modules.get(name)) for name in names)
    return {name: str(getattr(module, "__version__", "")) for name, module in loaded if module is not None}


# -- both beside each other --------------------------------------------------------------------------------------------


def _predicted(estimate: Estimate) -> int:
    """The peak of what has run by the end of a step: neither an evaluation nor a checkpoint."""
    return max(phase.allocated for phase in estimate.gpu.phases if phase.name in _PHASES_OF_TRAINING)


def _differences(measured: Measurement, estimate: Estimate) -> Iterator[Difference]:
    gpu, run = estimate.gpu, measured.phases["run"]
    idle = next((phase.allocated for phase in gpu.phases if phase.name == "idle"), None)
    rows = [
        ("idle", idle, measured.phases.get("idle", {}).get("allocated")),
        ("peak_allocated", _predicted(estimate), run.get("allocated")),
        ("peak_reserved", gpu.peak_reserved, run.get("reserved")),
        ("peak_device", gpu.peak_device, run.get("device")),
    ]
    for name, ours, theirs in rows:
        if ours is not None and theirs is not None:
            relative = (ours - theirs) / theirs if theirs else None
            yield Difference(name=name, estimated=ours, measured=theirs, difference=ours - theirs, relative=relative)


def _used(measured: Measurement, estimate: Estimate | None) -> int | None:
    """What the process has of the GPU: as the driver says, or at least what torch has and the least beside it."""
    run = measured.phases["run"]
    if estimate is None or "reserved" not in run:
        return None
    beside: int = estimate.gpu.low - estimate.gpu.peak_allocated
    return max(int(run["device"]), int(run["reserved"]) + beside)


def _in_words(measured: Measurement, estimate: Estimate | None) -> str:
    run = measured.phases["run"]
    head = f"memplan, after step {measured.ran['steps']}:"
    if "allocated" not in run:
        host = f" {gib(run['host'])} GiB of resident memory" if "host" in run else " nothing"
        return f"{head} no GPU is in use, so that{host} can be read, and nothing that was predicted beside it."
    if estimate is None:
        seen = ", ".join(f"{name} {gib(run[name])}" for name in ("allocated", "reserved", "device"))
        return f"{head} {seen} GiB (nothing was predicted)."
    rows = (
        f"  {row.name.replace('_', ' '):<15}{gib(row.measured):>9}{gib(row.estimated):>11}"
        for row in _differences(measured, estimate)
    )
    return "\n".join((f"{head:<26}", f"  {'GiB':<15}{'measured':>9}{'predicted':>11}", *rows))


def _replace(path: Path, text: str) -> None:
    """Write a file beside its place, and move it there."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
