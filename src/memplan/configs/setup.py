"""What an engine's config fixes, and how that meets the options: an option wins over the file, with a note."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from memplan.answers import Finding
from memplan.errors import MemplanError, SpecError
from memplan.results import (
    ENGINE_CONFIG,
    Assumption,
)
from memplan.specs.hardware import ClusterSpec
from memplan.specs.strategy import Strategy
from memplan.specs.training import TrainingSpec

__all__ = ["Batch", "EngineConfig", "batch_finding", "in_keys", "merged", "of_file", "with_cluster", "with_training"]


@dataclass(frozen=True, slots=True)
class Batch:
    """DeepSpeed's three numbers; None is left open, or ``auto``."""

    train: int | None = None
    micro: int | None = None
    steps: int | None = None
    automatic: frozenset[str] = frozenset()
    """Those that are ``auto``, by the fields' names."""


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """A config in memplan's terms."""

    source: str
    """The file's name."""
    strategy: Mapping[str, Any]
    """Fields of Strategy, the nested ones as mappings."""
    training: Mapping[str, Any] = field(default_factory=dict)
    """Fields of TrainingSpec that it fixes."""
    assumed: Mapping[str, Any] = field(default_factory=dict)
    """Fields of TrainingSpec that hold if no option says otherwise."""
    cluster: Mapping[str, Any] = field(default_factory=dict)
    """Fields of ClusterSpec that it fixes."""
    batch: Batch | None = None
    refused: Mapping[str, MemplanError] = field(default_factory=dict)
    """What is wrong with a field, unless an option takes its place."""
    keys: Mapping[str, str] = field(default_factory=dict)
    """A field's path -> the key of the file that sets it; one that ends with a dot is the beginning of several."""
    notes: tuple[str, ...] = ()
    """What the engine does with the config that its text does not say."""

    @property
    def assumptions(self) -> tuple[Assumption, ...]:
        """The notes, as results carry them."""
        return tuple(_said(note) for note in self.notes)


def _said(note: str) -> Assumption:
    return Assumption(name=ENGINE_CONFIG, value=0, low=0, high=0, source=note)


def with_cluster(config: EngineConfig, cluster: ClusterSpec) -> tuple[ClusterSpec, list[Assumption]]:
    """Return the cluster with what the config fixes, and the notes. Raises SpecError."""
    _check_refused(config, cluster)
    changes, notes = merged(config, config.cluster, cluster)
    return of_file(config, lambda: cluster.replace(**changes)) if changes else cluster, notes


def with_training(
    config: EngineConfig, training: TrainingSpec, strategy: Mapping[str, Any], gpus: int
) -> tuple[TrainingSpec, Strategy, list[Assumption]]:
    """Return training and strategy with what the config fixes, and the notes; ``strategy`` is what options say.

    Raises SpecError for what the config or its combination with the options has wrong.
    """
    given = training.model_fields_set
    _check_refused(config, training)
    changes, notes = merged(config, config.training, training)
    changes = {name: value for name, value in config.assumed.items() if name not in given} | changes
    if config.batch is not None:
        found, said = _batch(config, config.batch, training, gpus)
        changes |= found
        notes += [_said(note) for note in said]
    training = of_file(config, lambda: training.replace(**changes))
    options = {name: value for name, value in strategy.items() if value is not None}
    for name, value in options.items():
        known = config.strategy.get(name)
        if known is not None and known != value and not isinstance(value, Mapping):
            notes.append(_wins(config, "strategy" if name == "kind" else name, value, known))
    fields = {**config.strategy, **options}
    if set(options) & {"kind", "offload_optimizer", "offload_param"}:
        return training, Strategy(**fields), notes
    return training, of_file(config, lambda: Strategy(**fields)), notes


def merged(
    config: EngineConfig, fixed: Mapping[str, Any], spec: ClusterSpec | TrainingSpec
) -> tuple[dict[str, Any], list[Assumption]]:
    """What the config adds to a spec, and a note for each field that an option has given another value."""
    changes: dict[str, Any] = {}
    notes: list[Assumption] = []
    for name, value in fixed.items():
        if name not in spec.model_fields_set:
            changes[name] = value
        elif getattr(spec, name) != value:
            notes.append(_wins(config, name, getattr(spec, name), value))
    return changes, notes


def _wins(config: EngineConfig, name: str, value: object, known: object) -> Assumption:
    return _said(f"{name} {value}, as asked, in place of {known} in {config.source}")


def _check_refused(config: EngineConfig, spec: ClusterSpec | TrainingSpec) -> None:
    for name, error in config.refused.items():
        if name in type(spec).model_fields and name not in spec.model_fields_set:
            raise error


def of_file(config: EngineConfig, make: Callable[[], Any]) -> Any:
    """What ``make`` returns; its errors name the file, and its keys."""
    try:
        return make()
    except SpecError as error:
        raise SpecError("\n".join(in_keys(config, line) for line in str(error).split("\n"))) from None


def in_keys(config: EngineConfig, line: str) -> str:
    """A line of a message as the file has it: its name, and the key in place of the field."""
    path, colon, rest = line.partition(":")
    prefixes = [prefix for prefix in config.keys if prefix.endswith(".") and path.startswith(prefix)]
    for prefix in prefixes:
        path = config.keys[prefix] + path.removeprefix(prefix)
    return f"{config.source}: {config.keys.get(path, path)}{colon}{rest}"


def batch_finding(config: EngineConfig, training: TrainingSpec, gpus: int) -> Finding | None:
    """Return the finding that DeepSpeed's three numbers do not go together on ``gpus`` ranks, or None."""
    batch = config.batch
    if batch is None or batch.train is None:
        return None
    try:
        _batch(config, batch, training, gpus)
    except SpecError as error:
        path, _, rest = str(error).partition("train_batch_size: ")
        problem, _, remedy = rest.partition(". ")
        message = f"{problem}: DeepSpeed asserts that it is."
        where = f"{path}train_batch_size"
        return Finding(code="batch-product", severity="error", path=where, message=message, remedy=remedy)
    return None


def _batch(config: EngineConfig, batch: Batch, training: TrainingSpec, gpus: int) -> tuple[dict[str, Any], list[str]]:
    """DeepSpeedConfig._set_batch_related_parameters, with options in place of the file's numbers."""
    fields = {"micro_batch_size": batch.micro, "grad_accum_steps": batch.steps}
    notes: list[str] = []
    found: dict[str, int | None] = {}
    overridden = False
    for name, number in fields.items():
        value: int = getattr(training, name)
        if name in training.model_fields_set:
            if number is not None and number != value:
                notes.append(f"{name} {value}, as asked, in place of {number} in {config.source}")
                overridden = True
            found[name] = value
        else:
            found[name] = value if name in batch.automatic else number
    micro, steps = found["micro_batch_size"], found["grad_accum_steps"]
    if batch.train is None:
        if micro is None:
            remedy = 'Add it, or "auto" for the Trainer, or give --micro-batch-size.'
            raise SpecError(
                f"{config.source}: train_micro_batch_size_per_gpu: missing, and train_batch_size too. {remedy}"
            )
        return {"micro_batch_size": micro, "grad_accum_steps": steps or 1}, notes
    steps = steps if steps is not None else batch.train // micro // gpus if micro is not None else 1
    micro = micro if micro is not None else batch.train // gpus // steps
    steps = max(steps, 1) if overridden else steps
    product = micro * steps * gpus
    if product == batch.train:
        return {"micro_batch_size": micro, "grad_accum_steps": steps}, notes
    made = f"{micro} sequences x {steps} accumulation steps x {gpus} GPUs"
    if not overridden and steps == 0:
        made = f"{micro} sequences x {gpus} GPUs, nor a multiple of it"
    if not overridden:
        remedy = 'Change one of them, or --gpus; for the Trainer write "auto".'
        raise SpecError.at(f"{config.source}: train_batch_size", batch.train, f"is not {made}", remedy)
    return {"micro_batch_size": micro, "grad_accum_steps": steps}, [
        *notes,
        f"train_batch_size {product} ({made}), in place of {batch.train} in {config.source}",
    ]
