"""What plans, checks and comparisons answer with: results of :mod:`memplan.results`, put together.

They stand apart, because a process that answers one estimate need not make their models.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from pydantic import Field, PrivateAttr, model_validator

from memplan.errors import SpecError
from memplan.results import (
    SCHEMA_VERSION,
    Answer,
    Bytes,
    Estimate,
    EstimateList,
    JsonObject,
    Result,
    Verdict,
    best_verdict,
    drawn,
)

if TYPE_CHECKING:
    import pandas as pd
    from typing_extensions import Self

__all__ = [
    "Check",
    "Comparison",
    "ComparisonRow",
    "CountedModel",
    "Finding",
    "Plan",
    "Point",
    "Preflight",
    "Question",
    "Remedy",
    "Report",
    "Rung",
    "Searched",
    "Solved",
    "Tool",
]

Tool: TypeAlias = Literal["DeepSpeed", "accelerate", "rule of thumb", "memplan"]


Code: TypeAlias = Literal[
    # of files
    "batch-product",
    "bf16-emulated",
    "bf16-in-fp16",
    "default-buckets",
    "device-map",
    "fsdp-wraps-nothing",
    "frozen-weights-held",
    "fsdp1-sharding-ignored",
    "geforce-p2p",
    "host-memory",
    "longest-batch",
    "misplaced-key",
    "misspelt-argument",
    "misspelt-key",
    "no-weights-saved",
    "nvme-below-stage-3",
    "offload-param-ignored",
    "optimizer-replaced",
    "padding",
    "quantized-full",
    "removed-argument",
    "removed-key",
    "save-needs-more",
    "scheduler-total-steps",
    "scheduler-warmup-steps",
    "seq-len-unknown",
    "trainer-mismatch",
    "unknown-key",
    # of a running script
    "data-parallel",
    "does-not-fit",
    "made-whole",
    "memory-unknown",
    "memplan-error",
    "not-modelled",
    "not-read",
    "other-model",
    "refused",
    "tight",
    "unknown-model",
]
"""What a finding may be. Each has a heading in ``docs/checks.md``, and a row in ``tests/test_every_finding.py``."""


class Finding(Result):
    """What is wrong with a run's files, beside memory."""

    code: Code
    """Its name, which stays."""
    severity: Literal["error", "warning", "info"]
    """An error does not start, or does something else than is asked for; a warning costs something; info is to be
    known."""
    path: str
    """The file, and the key in it."""
    message: str
    """What is there, and what the libraries make of it."""
    remedy: str
    """What to do."""


class Check(Answer):
    """What the files of a run need, and what is wrong with them."""

    schema_version: Literal[1] = SCHEMA_VERSION
    """Version of the JSON contract."""
    estimate: Estimate | None
    """None where a finding leaves nothing to estimate."""
    verdict: Verdict
    """The estimate's; ``unknown`` without one."""
    findings: tuple[Finding, ...] = ()
    """What is wrong, the errors first."""

    @model_validator(mode="after")
    def _of_the_estimate(self) -> Check:
        expected = "unknown" if self.estimate is None else self.estimate.verdict
        if self.verdict != expected:
            raise ValueError(f"verdict is {self.verdict}, but the estimate's is {expected}")
        return self

    @property
    def has_errors(self) -> bool:
        """Whether a finding is an error: the run does not do what its files say, or does not start."""
        return any(finding.severity == "error" for finding in self.findings)

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON contract as plain values."""
        return super().to_dict() | {"estimate": None if self.estimate is None else self.estimate.to_dict()}

    def to_dataframe(self) -> pd.DataFrame:
        """Return the findings as a pandas DataFrame. Raises UnsupportedError without pandas."""
        from memplan.render import frames

        return frames.findings_frame(self.findings)

    def _repr_html_(self) -> str:
        from memplan.render import html

        page: str = html.check_html(self)
        return page


class Preflight(tuple[Finding, ...]):
    """Findings, the worst first, of a run that was let pass."""

    check: Check | None
    """The estimate that they were made from; None for a run that could not be estimated."""
    model: Mapping[str, Any]
    """``id`` and the values of its ``config``; empty without an estimate."""
    asked: Mapping[str, Any]
    """Fields of ``training``, ``cluster`` and ``strategy``, with which it can be estimated again."""

    def __new__(
        cls,
        findings: Iterable[Finding] = (),
        check: Check | None = None,
        model: Mapping[str, Any] | None = None,
        asked: Mapping[str, Any] | None = None,
    ) -> Self:
        self = super().__new__(cls, findings)
        self.check, self.model, self.asked = check, model or {}, asked or {}
        return self

    @property
    def errors(self) -> tuple[Finding, ...]:
        """Those that end the run."""
        return tuple(found for found in self if found.severity == "error")

    def __str__(self) -> str:
        return "\n".join(f"{found.path}: {found.message} {found.remedy}".strip() for found in self)

    def to_dataframe(self) -> pd.DataFrame:
        """Return the findings as a pandas DataFrame. Raises UnsupportedError without pandas."""
        from memplan.render import frames

        return frames.findings_frame(self)

    def _repr_html_(self) -> str:
        from memplan.render import html

        page: str = html.preflight_html(self)
        return page


class Rung(Result):
    """A setup that a plan has looked at."""

    name: str
    """What the ladder calls it."""
    estimate: Estimate
    """With the largest micro-batch that fits, if any does."""
    reason_passed_over: str | None = None
    """Why another one was chosen; None for the chosen one."""


class Point(Result):
    """A setup that fits, and that none beats both in time and in the memory it leaves."""

    name: str
    """What the ladder calls it."""
    setup: JsonObject
    """Every option, resolved."""
    seconds: float = Field(gt=0, allow_inf_nan=False)
    """Of a step."""
    tokens_per_second: float = Field(ge=0, allow_inf_nan=False)
    """Tokens that all ranks train on, per second."""
    high: Bytes
    """The most that it may take of each GPU."""
    headroom: Bytes
    """What it leaves of each GPU, at the least."""


Question: TypeAlias = Literal["micro-batch", "seq-len", "gpus", "gpu"]
"""What a plan may be asked for beside the fastest setup."""


class Solved(Result):
    """The answer to a question that has one value for an answer."""

    question: Question
    """What was asked for."""
    value: int | str | None
    """Sequences, tokens, GPUs or a GPU's name, with which the best fits; None if it fits with none."""
    next: int | str | None
    """The next value, with which nothing fits: one more, or in GPUs one less. None if there is none."""
    limit: str
    """What ends the search before something does not fit, in words; else empty."""


class Remedy(Result):
    """A change with which a setup fits, where none does without: estimated, as everything is."""

    options: str
    """On the command line."""
    rung: str
    """Of the ladder, the first that fits then."""
    high: Bytes
    """The most that it may take of each GPU."""
    host: Bytes
    """What it takes of a node's host memory."""
    seconds: float | None = None
    """Of a step."""


class Searched(Result):
    """How much of the space of setups was looked at, and how closely."""

    setups: int = Field(ge=0)
    """That there are: engines x checkpointing x micro-batches x sizes of buffers."""
    estimated: int = Field(ge=0)
    """For the others memory that grows with the batch, or time, told that they cannot be chosen."""
    replayed: int = Field(ge=0)
    """Estimates with the caching allocator's replay: what is chosen, and what only it could rule out."""


class Recipe:
    """Makes the files of a plan's best, as text by name. No part of what the plan says: all are equal."""

    __slots__ = ("files",)

    def __init__(self, files: Callable[[], dict[str, str]] | None = None) -> None:
        self.files = files

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Recipe)

    def __hash__(self) -> int:
        return 0


class Plan(Answer):
    """The setups of the ladder, and the one to take."""

    _recipe: Recipe = PrivateAttr(default_factory=Recipe)

    schema_version: Literal[1] = SCHEMA_VERSION
    """Version of the JSON contract."""
    best: Rung | None
    """The chosen one; None if nothing fits."""
    rungs: tuple[Rung, ...]
    """All of them, in the order in which they give more up."""
    files: tuple[str, ...] = ()
    """Names of the files that run the best, as they were written."""
    pareto: tuple[Point, ...] = ()
    """The fastest setup, and then each that is the fastest of those that leave more of each GPU."""
    searched: Searched | None = None
    """How much of the space of setups was looked at."""
    solved: Solved | None = None
    """The answer to ``solve``, and to ``objective="gpus"``."""
    remedies: tuple[Remedy, ...] = ()
    """Where nothing fits for certain: changes with which something does, each by itself, the smaller ones first."""

    @property
    def verdict(self) -> Verdict:
        """Of the best; of all if there is none."""
        if self.best is not None:
            return self.best.estimate.verdict
        return best_verdict(rung.estimate.verdict for rung in self.rungs)

    def write(self, folder: str | os.PathLike[str], *, force: bool = False) -> Plan:
        """Write the files that run the best into a folder, all or none, and return the plan that names them.

        ``plan.json`` is among them. Raises SpecError if nothing fits, if one of them is there already, unless ``force``
        replaces it, and for a plan that was read from JSON, which has no model.
        """
        if self.best is None:
            raise SpecError.at("out", str(folder), "has nothing to be written: nothing fits", "Change the setup.")
        if self._recipe.files is None:
            problem = "cannot be written from a plan that was read: it has no model"
            raise SpecError.at("out", str(folder), problem, "Make the plan again, with memplan.plan.")
        from memplan.configs import launch

        files = self._recipe.files()
        written = self.model_copy(update={"files": (*files, "plan.json")})
        launch.write({**files, "plan.json": written.to_json(indent=2) + "\n"}, folder, force=force)
        return written

    def to_dataframe(self) -> pd.DataFrame:
        """Return a pandas DataFrame with a row per rung. Raises UnsupportedError without pandas."""
        from memplan.render import frames

        return frames.plan_frame(self)

    def plot(self, kind: Literal["ladder", "pareto"] = "ladder", **options: Any) -> Any:
        """Draw the rungs, or the setups that no other beats in time and memory; see :mod:`memplan.render.plots`."""
        from memplan.render import plots

        return drawn({"ladder": plots.plot_ladder, "pareto": plots.plot_pareto}, kind)(self, **options)

    def _repr_html_(self) -> str:
        from memplan.render import html

        page: str = html.plan_html(self)
        return page


class Report(Answer):
    """An estimate, and what stands beside it on a page: a plan, or where no GPU is known the ladder."""

    schema_version: Literal[1] = SCHEMA_VERSION
    """Version of the JSON contract."""
    version: str
    """memplan's."""
    estimate: Estimate
    """Of the setup that was asked for; without a strategy, of the plan's best."""
    plan: Plan | None = None
    """What a plan finds for the same run; None where no GPU is known."""
    ladder: EstimateList | None = None
    """Takes the plan's place where no GPU is known."""

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON contract as plain values."""
        parts = {name: getattr(self, name) for name in ("estimate", "plan", "ladder")}
        found = {name: None if part is None else part.to_dict() for name, part in parts.items()}
        return {"schema_version": self.schema_version, "version": self.version, **found}

    def to_html(self) -> str:
        """Return one page that needs nothing but itself."""
        from memplan.render import page

        text: str = page.report_page(self)
        return text

    def write(self, path: str | os.PathLike[str], *, force: bool = False) -> None:
        """Write the page into a file, whole or not at all. Raises SpecError if it is there, unless ``force``."""
        from memplan.render import page

        page.write(self, path, force=force)


class CountedModel(Result):
    """The model as DeepSpeed's estimators count it."""

    id: str
    """Its name on the hub, or what it was given as."""
    head: str
    """``base`` is AutoModel, which their documentation loads."""
    parameters: int = Field(ge=0)
    """Elements of all parameters, tied ones once, adapters not among them."""
    largest_layer_parameters: int = Field(ge=0)
    """The most elements that one module holds itself."""


class ComparisonRow(Result):
    """What one tool says of one setup, in bytes."""

    tool: Tool
    """Who says so."""
    option: str
    """The setup, or what is counted, in the tool's words."""
    gpu: Bytes | None
    """On each GPU; memplan's is ``peak_device``. None is no answer."""
    host: Bytes | None
    """On each node; None where the tool does not know the host."""
    leaves_out: str
    """In words; without an answer the reason."""


class Comparison(Answer):
    """What other estimators say, beside memplan. A tool's rows for a setup stand above memplan's for the same."""

    schema_version: Literal[1] = SCHEMA_VERSION
    """Version of the JSON contract."""
    model: CountedModel
    """As DeepSpeed's estimators count it."""
    gpus: int = Field(ge=1)
    """Ranks in total."""
    nodes: int = Field(ge=1)
    """Nodes that the ranks are on."""
    rows: tuple[ComparisonRow, ...]
    """A row per figure."""

    def to_dataframe(self) -> pd.DataFrame:
        """Return the rows as a pandas DataFrame. Raises UnsupportedError without pandas."""
        from memplan.render import frames

        return frames.comparison_frame(self)

    def _repr_html_(self) -> str:
        from memplan.render import html

        page: str = html.comparison_html(self)
        return page
