"""What memplan answers with: pure data, in bytes, that converts to JSON and back without loss.

The models are the JSON contract. Where their parts must sum to a total, a result that breaks the sum
cannot be made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, TypeAlias, TypeVar, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from memplan.constants import Constant
from memplan.errors import SpecError
from memplan.specs._base import freeze, raise_spec_error

if TYPE_CHECKING:
    import pandas as pd
    from typing_extensions import Self

__all__ = [
    "COMPONENTS",
    "ENGINE_CONFIG",
    "PHASES",
    "SCHEMA_VERSION",
    "Assumption",
    "Components",
    "Estimate",
    "EstimateList",
    "GpuMemory",
    "HostMemory",
    "ModelInfo",
    "NvmeMemory",
    "Phase",
    "PhaseName",
    "StepTime",
    "Term",
    "Verdict",
    "best_verdict",
    "verdict_by_place",
    "verdict_for",
    "worst_verdict",
]

SCHEMA_VERSION: Final = 1
"""Version of the JSON contract; it changes when a reader of the last one would go wrong."""

Verdict: TypeAlias = Literal["fits", "tight", "does-not-fit", "unknown"]
PhaseName: TypeAlias = Literal["load", "first_step", "forward", "loss", "backward", "step", "idle", "eval", "save"]
Bytes: TypeAlias = Annotated[int, Field(ge=0, strict=True)]
JsonObject: TypeAlias = Annotated[dict[str, Any], AfterValidator(freeze)]
Parts: TypeAlias = Annotated[dict[str, Bytes], AfterValidator(freeze)]
"""Bytes by name. Frozen, as every mapping here, so that a result can be hashed."""
T = TypeVar("T", bound=BaseModel)

PHASES: tuple[PhaseName, ...] = get_args(PhaseName)
"""The phases of a run, in order; ``idle`` is the level between steps."""
STEADY_PHASES: frozenset[PhaseName] = frozenset({"forward", "loss", "backward", "step", "idle"})
"""The phases that every further step repeats."""

# From the best to the worst. "unknown" does no harm beside a known verdict that is bad, and spoils a good one.
_SEVERITY: Final[tuple[Verdict, ...]] = ("fits", "unknown", "tight", "does-not-fit")


class Result(BaseModel):
    """A frozen piece of an answer."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class Answer(Result):
    """What a command answers: JSON both ways."""

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON contract as plain values."""
        return self.model_dump(mode="json")

    def to_json(self, *, indent: int | None = None) -> str:
        """Return the JSON contract as text."""
        import json

        return json.dumps(self.to_dict(), indent=indent, allow_nan=False)

    @classmethod
    def from_dict(cls: type[T], data: dict[str, Any]) -> T:
        """Build from :meth:`to_dict`. Raises SpecError, naming the field."""
        return _validated(cls, data)

    @classmethod
    def from_json(cls: type[T], text: str | bytes) -> T:
        """Build from :meth:`to_json`. Raises SpecError, naming the field."""
        return _validated(cls, _parsed(text))


class Components(Result):
    """Bytes alive at the peak, by what they are for."""

    weights: Bytes = 0
    """Parameters and buffers; shards of them under FSDP and ZeRO-3."""
    gradients: Bytes = 0
    """Gradients, or their partitions."""
    optimizer: Bytes = 0
    """Optimizer states and float32 master weights."""
    activations: Bytes = 0
    """Tensors saved for the backward, casts of autocast included."""
    logits: Bytes = 0
    """Logits, their copies and gradients, and the loss."""
    temporaries: Bytes = 0
    """Tensors that live within an operation or two."""
    communication: Bytes = 0
    """Buckets and gathered parameters."""
    workspace: Bytes = 0
    """Workspaces of cuBLAS, from the caching allocator."""
    fragmentation: Bytes = 0
    """Reserved by the caching allocator, and not allocated."""
    context: Bytes = 0
    """The CUDA context, with the kernels it has loaded."""
    nccl: Bytes = 0
    """Buffers of NCCL."""

    @property
    def allocated(self) -> int:
        """Weights .. workspace: what ``peak_allocated`` consists of."""
        return (
            self.weights
            + self.gradients
            + self.optimizer
            + self.activations
            + self.logits
            + self.temporaries
            + self.communication
            + self.workspace
        )


COMPONENTS: tuple[str, ...] = tuple(Components.model_fields)
"""The names of the components, in the order in which they sum."""


class Phase(Result):
    """The most that was allocated within one phase."""

    name: PhaseName
    """Its name, from ``load`` to ``save``; ``idle`` is between steps."""
    allocated: Bytes
    """``torch.cuda.max_memory_allocated`` within it; of a host, what is alive there."""


class GpuMemory(Result):
    """Memory of the fullest rank's GPU, in bytes. Raises ValueError unless the components sum to the peaks."""

    capacity: Bytes | None
    """What torch sees; None is unknown."""
    peak_allocated: Bytes
    """``torch.cuda.max_memory_allocated``."""
    peak_reserved: Bytes
    """``torch.cuda.max_memory_reserved``."""
    peak_device: Bytes
    """What nvidia-smi shows for the process."""
    low: Bytes
    """The least that ``peak_device`` may be."""
    high: Bytes
    """The most that ``peak_device`` may be; the verdict uses it."""
    peak_phase: PhaseName
    """The phase that the peak is in."""
    steady_allocated: Bytes
    """The maximum over forward .. idle."""
    components: Components
    """What is alive at the peak."""
    phases: tuple[Phase, ...]
    """The maximum within each phase, in order."""

    @model_validator(mode="after")
    def _sums(self) -> Self:
        parts = self.components
        _equal("components weights .. workspace", parts.allocated, "peak_allocated", self.peak_allocated)
        reserved = self.peak_allocated + parts.fragmentation
        _equal("peak_allocated + fragmentation", reserved, "peak_reserved", self.peak_reserved)
        device = self.peak_reserved + parts.context + parts.nccl
        _equal("peak_reserved + context + nccl", device, "peak_device", self.peak_device)
        if not self.low <= self.peak_device <= self.high:
            raise ValueError(f"peak_device {self.peak_device} is outside low {self.low} .. high {self.high}")
        if self.phases:
            _equal("the largest phase", max(p.allocated for p in self.phases), "peak_allocated", self.peak_allocated)
            steady = [phase.allocated for phase in self.phases if phase.name in STEADY_PHASES]
            if steady:
                _equal("the largest phase of a step", max(steady), "steady_allocated", self.steady_allocated)
        return self


class HostMemory(Result):
    """Host memory of one node, in bytes. Raises ValueError unless the components sum to the peak."""

    capacity: Bytes | None
    """RAM of the node; None is unknown."""
    peak: Bytes
    """All ranks of the node together."""
    pinned: Bytes
    """The part of ``peak`` that is page-locked."""
    ranks: int = Field(ge=1)
    """Ranks on the node."""
    components: Parts
    """What is alive at the peak."""
    phases: tuple[Phase, ...] = ()
    """The maximum within each phase, in order."""

    @property
    def steady(self) -> int:
        """The maximum over forward .. idle, or the peak where no phases are told."""
        steps = [phase.allocated for phase in self.phases if phase.name in STEADY_PHASES]
        return max(steps, default=self.peak)

    @model_validator(mode="after")
    def _sums(self) -> Self:
        _equal("host components", sum(self.components.values()), "peak", self.peak)
        if self.pinned > self.peak:
            raise ValueError(f"pinned {self.pinned} exceeds peak {self.peak}")
        return self


class NvmeMemory(Result):
    """NVMe of one node, in bytes. Raises ValueError unless the components sum to the total."""

    capacity: Bytes | None
    """Free bytes of the node's NVMe; None is unknown."""
    bytes: Bytes
    """What the files take, all ranks of the node together."""
    components: Parts
    """What the files hold."""

    @model_validator(mode="after")
    def _sums(self) -> Self:
        _equal("nvme components", sum(self.components.values()), "bytes", self.bytes)
        return self


class StepTime(Result):
    """Time of one optimizer step, all ranks together."""

    seconds: float = Field(gt=0, allow_inf_nan=False)
    """Wall clock."""
    tokens_per_second: float = Field(ge=0, allow_inf_nan=False)
    """Tokens that all ranks train on, per second."""
    flops: float = Field(ge=0, allow_inf_nan=False)
    """Floating-point operations of one rank in the step."""
    bound_by: str
    """What the time goes to: compute, bandwidth, communication, pcie or nvme."""


class ModelInfo(Result):
    """Which model was answered for."""

    id: str
    """Its name on the hub, or what it was given as."""
    architecture: str
    """The class that transformers builds."""
    parameters: int = Field(ge=0)
    """Elements of all parameters, tied ones once, adapters included."""
    trainable_parameters: int = Field(ge=0)
    """Elements of the parameters that get a gradient."""
    source: str
    """Where the config was found."""


ENGINE_CONFIG = "engine config"
"""The name of assumptions that say what became of an engine's config: a statement each, without a number."""


class Assumption(Result):
    """A number the answer rests on that is not a rule of a library."""

    name: str
    """What it is of, with its unit unless that is bytes."""
    value: int | float
    """What the answer has been made with."""
    low: int | float
    """The least that it may be."""
    high: int | float
    """The most that it may be."""
    source: str
    """Where it was measured, or who says so."""

    @classmethod
    def of(cls, constant: Constant) -> Assumption:
        """Return the constant as an assumption; its unit joins the name unless it is bytes."""
        name = constant.name if constant.unit in ("B", "") else f"{constant.name} ({constant.unit})"
        return cls(name=name, value=constant.value, low=constant.low, high=constant.high, source=constant.source)


class Term(Result):
    """One line of ``--explain``: a formula, with its numbers filled in."""

    name: str
    """What it is a part of: a component, or a part of one."""
    formula: str
    """In names: ``2 x parameters``."""
    filled: str
    """In numbers: ``2 x 6738415616``."""
    bytes: int
    """What it comes to."""
    source: str
    """What of which library the formula is the rule of."""


class Lever(Result):
    """What changing one key of the engine, and it alone, does to the peaks of a rank and of its node's host."""

    key: str
    """As the library names it."""
    value: int | bool | str
    """What it is in this setup."""
    instead: int | bool | str
    """What it is changed to."""
    gpu: int
    """Bytes more allocated at the GPU's peak; negative are saved."""
    host: int
    """Bytes more at the host's peak."""


class Estimate(Result):
    """The answer for one setup. Renders in a notebook; converts to JSON and back."""

    schema_version: Literal[1] = SCHEMA_VERSION
    """Version of the JSON contract."""
    model: ModelInfo
    """Which model, and how large."""
    setup: JsonObject
    """Every option, resolved; JSON values under the options' names."""
    cluster: JsonObject
    """The hardware, resolved; JSON values."""
    software: Annotated[dict[str, str], AfterValidator(freeze)]
    """Versions of the libraries."""
    gpu: GpuMemory
    """Of the fullest rank's GPU."""
    host: HostMemory
    """Of a node's RAM, all its ranks together."""
    nvme: NvmeMemory
    """Of a node's NVMe, all its ranks together."""
    step: StepTime | None = None
    """None where the time is not known: no GPU, a task without steps, or an estimate without replay."""
    verdict: Verdict
    """The worst of GPU, host and NVMe."""
    assumptions: tuple[Assumption, ...] = ()
    """Numbers that are no rule of a library, and what became of an engine's config."""
    footprint: Bytes | None = None
    """Task load: what ``model.get_memory_footprint()`` returns."""
    device_map: Annotated[dict[str, int | str] | None, AfterValidator(freeze)] = None
    """Task load: module name -> GPU index, ``cpu`` or ``disk``."""
    kv_cache: Bytes | None = None
    """Task generate: keys and values that the cache holds at the end: of all tokens but the last."""
    explanation: tuple[Term, ...] = Field(default=(), repr=False)
    """Every term; left out of JSON unless asked for."""
    levers: tuple[Lever, ...] = Field(default=(), repr=False)
    """With an engine that shards, its keys that move a peak; left out of JSON unless asked for."""

    def to_dict(self, *, explain: bool = False) -> dict[str, Any]:
        """Return the JSON contract as plain values; fields of other tasks are left out."""
        data = self.model_dump(mode="json", exclude=None if explain else {"explanation", "levers"})
        for name in ("footprint", "device_map", "kv_cache"):
            if data[name] is None:
                del data[name]
        return data

    def to_json(self, *, indent: int | None = None, explain: bool = False) -> str:
        """Return the JSON contract as text."""
        import json

        return json.dumps(self.to_dict(explain=explain), indent=indent, allow_nan=False)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Estimate:
        """Build from :meth:`to_dict`. Raises SpecError, naming the field."""
        return _validated(cls, data)

    @classmethod
    def from_json(cls, text: str | bytes) -> Estimate:
        """Build from :meth:`to_json`. Raises SpecError, naming the field."""
        return _validated(cls, _parsed(text))

    def to_dataframe(self) -> pd.DataFrame:
        """Return the components as a pandas DataFrame: place, component, bytes. Raises UnsupportedError without it."""
        return EstimateList(estimates=(self,)).to_dataframe()

    def plot(self, kind: Literal["components", "phases"] = "components", **options: Any) -> Any:
        """Draw the components, or the phases, against the capacity; see :mod:`memplan.render.plots`."""
        from memplan.render import plots

        return drawn({"components": plots.plot_estimate, "phases": plots.plot_phases}, kind)(self, **options)

    def _repr_html_(self) -> str:
        from memplan.render import html

        page: str = html.estimate_html(self)
        return page


class EstimateList(Result):
    """Answers for several setups, such as the rungs of the ladder."""

    schema_version: Literal[1] = SCHEMA_VERSION
    """Version of the JSON contract."""
    estimates: tuple[Estimate, ...]
    """In the order in which they were asked for; of a ladder, the setup that gives the least up first."""

    @property
    def verdict(self) -> Verdict:
        """The best of the estimates' verdicts: one setup that fits is enough."""
        return best_verdict(estimate.verdict for estimate in self.estimates)

    @property
    def best(self) -> Estimate:
        """The first with the best verdict; where none fits, the one that lacks least of what it lacks most."""
        verdict = self.verdict
        found = (estimate for estimate in self.estimates if estimate.verdict == verdict)
        return min(found, key=_lacks) if verdict == "does-not-fit" else next(found)

    def to_dict(self, *, explain: bool = False) -> dict[str, Any]:
        """Return the JSON contract as plain values."""
        return {
            "schema_version": self.schema_version,
            "estimates": [estimate.to_dict(explain=explain) for estimate in self.estimates],
        }

    def to_json(self, *, indent: int | None = None, explain: bool = False) -> str:
        """Return the JSON contract as text."""
        import json

        return json.dumps(self.to_dict(explain=explain), indent=indent, allow_nan=False)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> EstimateList:
        """Build from :meth:`to_dict`. Raises SpecError, naming the field."""
        return _validated(cls, data)

    @classmethod
    def from_json(cls, text: str | bytes) -> EstimateList:
        """Build from :meth:`to_json`. Raises SpecError, naming the field."""
        return _validated(cls, _parsed(text))

    def to_dataframe(self) -> pd.DataFrame:
        """Return a pandas DataFrame, a row per estimate, place and component. Raises UnsupportedError without it."""
        from memplan.render import frames

        return frames.estimates_frame(self)

    def plot(self, **options: Any) -> Any:
        """Draw the estimates beside each other; see :mod:`memplan.render.plots`."""
        from memplan.render import plots

        return plots.plot_estimates(self, **options)

    def _repr_html_(self) -> str:
        from memplan.render import html

        page: str = html.estimates_html(self)
        return page


def verdict_for(low: int, high: int, capacity: int | None) -> Verdict:
    """Judge an interval of bytes against a capacity; the pessimistic end decides.

    >>> verdict_for(10, 20, 20), verdict_for(10, 20, 15), verdict_for(10, 20, 9), verdict_for(10, 20, None)
    ('fits', 'tight', 'does-not-fit', 'unknown')
    """
    if low > high:
        raise ValueError(f"low {low} exceeds high {high}")
    if capacity is None:
        return "unknown"
    if high <= capacity:
        return "fits"
    return "tight" if low <= capacity else "does-not-fit"


def verdict_by_place(gpu: GpuMemory, host: HostMemory, nvme: NvmeMemory) -> dict[str, Verdict]:
    """Judge every place that holds something: ``gpu`` always, ``host`` and ``nvme`` where they are used.

    Every run passes through the host as it loads and saves. Where its size is not known, that alone is not judged.
    """
    verdicts = {"gpu": verdict_for(gpu.low, gpu.high, gpu.capacity)}
    used_on_host = host.steady if host.capacity is None else host.peak
    for name, used, capacity in (("host", used_on_host, host.capacity), ("nvme", nvme.bytes, nvme.capacity)):
        if used:
            verdicts[name] = verdict_for(used, used, capacity)
    return verdicts


def _lacks(estimate: Estimate) -> float:
    """How many times over a setup needs the place that it is least fit for."""
    gpu, host, nvme = estimate.gpu, estimate.host, estimate.nvme
    places = ((gpu.low, gpu.capacity), (host.peak, host.capacity), (nvme.bytes, nvme.capacity))
    return max((needed / capacity for needed, capacity in places if capacity), default=0.0)


def worst_verdict(verdicts: Iterable[Verdict]) -> Verdict:
    """Return the worst: for the places of one setup, all of which must fit.

    >>> worst_verdict(["fits", "tight", "unknown"])
    'tight'
    """
    return max(verdicts, key=_SEVERITY.index)


def best_verdict(verdicts: Iterable[Verdict]) -> Verdict:
    """Return the best: for a list of setups, one of which will do.

    >>> best_verdict(["does-not-fit", "fits"])
    'fits'
    """
    return min(verdicts, key=_SEVERITY.index)


def drawn(kinds: Mapping[str, Callable[..., Any]], kind: str) -> Callable[..., Any]:
    """The function that draws one of the kinds of plot."""
    if kind not in kinds:
        raise SpecError.at("kind", kind, "is no plot of this", f"Use {' or '.join(kinds)}.")
    return kinds[kind]


def _equal(what: str, total: int, name: str, expected: int) -> None:
    if total != expected:
        raise ValueError(f"{what} sum to {total}, but {name} is {expected}")


def _parsed(text: str | bytes) -> object:
    import json

    try:
        parsed: object = json.loads(text)
    except ValueError as error:
        raise SpecError.at("estimate", text, f"is not JSON ({error})", "Give what to_json returned.") from None
    return parsed


def _validated(cls: type[T], data: object) -> T:
    try:
        return cls.model_validate(data)
    except ValidationError as error:
        raise_spec_error(cls, error)
