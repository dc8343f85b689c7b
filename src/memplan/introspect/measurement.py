"""What was measured, as it is archived, and beside what was estimated."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Final, Literal, TypeAlias

from pydantic import AfterValidator, Field

from memplan.results import PHASES, SCHEMA_VERSION, STEADY_PHASES, Answer, Estimate, Result
from memplan.specs._base import freeze

__all__ = [
    "BlockDifference",
    "Boundary",
    "Difference",
    "Measured",
    "Measurement",
    "Tried",
    "align",
    "beside",
    "fullest_phase",
]

Status: TypeAlias = Literal["ok", "out-of-memory", "failed"]
Values: TypeAlias = Annotated[dict[str, Any], AfterValidator(freeze)]

COUNTERS: Final = ("allocated", "requested", "reserved", "active", "inactive_split", "device", "pinned", "host")
"""Of a phase, in bytes: torch's ``max_memory_allocated`` and its like, requested without rounding, what the device has
in use beside what it had before, page-locked memory and the process's resident memory on the host."""


class Measurement(Answer):
    """One run, as it was seen. Bytes; peaks are within the phase."""

    schema_version: Literal[1] = SCHEMA_VERSION
    status: Status
    """``out-of-memory`` and ``failed`` runs have the phases until then."""
    message: str
    """Why it ended, if not by itself."""
    memplan: str
    """Version, and the commit of the code that measured, if it is known."""
    taken: str
    """When: ISO 8601, in UTC."""
    model: Values
    """``id`` and the values of its config."""
    asked: Values
    """What was asked for: fields of ``training``, ``cluster`` and ``strategy`` that were given."""
    setup: Values
    """The estimate's ``setup``."""
    cluster: Values
    """The estimate's: of how many ranks this was the first."""
    device: Values
    """Name, total_memory, capability and the like; ``{"name": "cpu"}`` where tensors were counted."""
    versions: Values
    group: str
    """How the other ranks were stood in for: ``none`` for one process, or ``fake``, where NCCL is never used: what its
    first use takes needs a second process, and :func:`memplan.introspect.calibrate.calibrate` measures it."""
    weights: str
    """Where they came from: ``random``, or ``from_pretrained`` of random ones, whose loading is measured too."""
    cap: int | None = None
    """Bytes of the smaller GPU that was played."""
    outside: Values = Field(default_factory=dict)
    """What the process has of the device beside torch's allocator, piece after piece; NCCL is in none of them."""
    phases: Values
    """Phase -> counter -> bytes."""
    step_seconds: tuple[float, ...] = ()
    ran: Values = Field(default_factory=dict)
    """Classes of engine and optimizer, elements of the weights."""
    losses: tuple[float | None, ...] = ()
    """Of each step; None of one that is no number."""
    blocks: tuple[tuple[int, int, str], ...] | None = None
    """What was alive at the peak: bytes of a block, how many, the line that allocated them."""
    seconds: float = 0
    """All of it."""

    def peak(self, counter: str = "allocated", *, steady: bool = False) -> int | None:
        """The largest of a counter in any phase, or in those that every step repeats; None if it was not read."""
        found = [
            counters[counter]
            for phase, counters in self.phases.items()
            if counter in counters and (not steady or phase in STEADY_PHASES)
        ]
        return max(found, default=None)


class Difference(Result):
    """One figure, estimated and measured."""

    name: str
    """A phase's name for what it has allocated, or a field of the estimate's ``gpu``."""
    estimated: int
    measured: int
    difference: int
    """Estimated less measured, in bytes."""
    relative: float | None
    """Of the measured one; None if that is 0."""


class BlockDifference(Result):
    """Blocks of one size, of which one side has more."""

    bytes: int
    """Of one block, a multiple of 512."""
    estimated: int
    """How many there are."""
    measured: int
    names: tuple[str, ...]
    """What the estimated ones are: ``3 x optimizer: state of AdamW``."""
    sites: tuple[str, ...]
    """Which lines allocated the measured ones."""

    @property
    def difference(self) -> int:
        """Estimated less measured, in bytes."""
        return self.bytes * (self.estimated - self.measured)


class Measured(Answer):
    """A run beside its estimate."""

    estimate: Estimate
    measurement: Measurement
    differences: tuple[Difference, ...]
    blocks: tuple[BlockDifference, ...] | None = None
    """At the fullest moment, what only one side has; None if no snapshot was taken."""

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON contract as plain values."""
        return super().to_dict() | {"estimate": self.estimate.to_dict()}


class Tried(Result):
    """One value that was run in search of a boundary."""

    value: int
    status: Status
    peak_reserved: int | None


class Boundary(Answer):
    """The largest value of an option with which a run lives, as predicted and as it is."""

    schema_version: Literal[1] = SCHEMA_VERSION
    option: str
    """``micro_batch_size`` or ``seq_len``."""
    step: int
    """By how much values differ."""
    predicted: int | None
    """The largest of which the estimate says that it fits; None if there is none."""
    measured: int | None
    tried: tuple[Tried, ...]
    """In the order in which they ran."""
    estimate: Estimate
    """Of the predicted one, or of the smallest if none fits."""
    measurement: Measurement | None
    """Of the measured one; None if none lives."""

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON contract as plain values."""
        return super().to_dict() | {"estimate": self.estimate.to_dict()}


def beside(estimate: Estimate, measurement: Measurement) -> Measured:
    """Compare what both have: phases, and the peaks over them."""
    gpu = estimate.gpu
    rows: list[tuple[str, int, int | None]] = []
    measured: Mapping[str, Mapping[str, int]] = measurement.phases
    estimated = {phase.name: phase.allocated for phase in gpu.phases}
    if "loss" in estimated and "loss" not in measured:  # the model computes it within its forward
        estimated["forward"] = max(estimated["forward"], estimated["loss"])
    on_host = measurement.weights == "from_pretrained" or measurement.asked.get("training", {}).get("vocab_size")
    if measurement.device.get("name") == "cpu" and on_host:
        # What passes through the host as it is loaded is counted with the model; so are both embeddings, the mean and
        # the covariance, which resize_token_embeddings has on the host before the model is moved to a GPU.
        estimated.pop("load", None)
    rows += [
        (name, estimated[name], measured[name].get("allocated"))
        for name in PHASES
        if name in estimated and name in measured
    ]
    if measurement.status == "ok":
        rows.append(("steady_allocated", gpu.steady_allocated, measurement.peak(steady=True)))
        for counter in ("allocated", "reserved", "device"):
            ours = getattr(gpu, f"peak_{counter}")
            if counter == "device" and measurement.group == "fake":
                ours -= gpu.components.nccl  # nobody is there to talk to
            rows.append((f"peak_{counter}", ours, measurement.peak(counter)))
    found = [_difference(name, ours, theirs) for name, ours, theirs in rows if theirs is not None]
    return Measured(estimate=estimate, measurement=measurement, differences=tuple(found))


def fullest_phase(measurement: Measurement) -> str:
    """The phase in which most was allocated; of equal ones that which every step repeats."""
    found = {phase: counters.get("allocated", 0) for phase, counters in measurement.phases.items()}
    return max(found, key=lambda phase: (found[phase], phase in STEADY_PHASES))


def align(ours: Iterable[tuple[int, int, str]], theirs: Iterable[tuple[int, int, str]]) -> tuple[BlockDifference, ...]:
    """Compare blocks alive at one moment, estimated and measured: (bytes of one, how many, what it is).

    A block of one side is that of the other if both have as many bytes, for names tell nothing across the sides. What
    is returned are the sizes of which one side has more, the largest sums first: their differences add up to that of
    the totals.
    """
    sides: list[dict[int, Counter[str]]] = []
    for blocks in (ours, theirs):
        by_size: dict[int, Counter[str]] = {}
        for nbytes, count, label in blocks:
            by_size.setdefault(nbytes, Counter())[label] += count
        sides.append(by_size)
    estimated, measured = sides
    rows = (
        BlockDifference(
            bytes=nbytes,
            estimated=sum(estimated.get(nbytes, {}).values()),
            measured=sum(measured.get(nbytes, {}).values()),
            names=_counted(estimated.get(nbytes)),
            sites=_counted(measured.get(nbytes)),
        )
        for nbytes in estimated.keys() | measured.keys()
    )
    return tuple(sorted((row for row in rows if row.difference), key=lambda row: (-abs(row.difference), row.bytes)))


def _counted(labels: Counter[str] | None) -> tuple[str, ...]:
    return tuple(f"{count} x {label}" for label, count in (labels or Counter()).most_common())


def _difference(name: str, estimated: int, measured: int) -> Difference:
    return Difference(
        name=name,
        estimated=estimated,
        measured=measured,
        difference=estimated - measured,
        relative=(estimated - measured) / measured if measured else None,
    )
