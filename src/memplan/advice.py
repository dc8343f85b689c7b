"""What to do about a setup that does not fit: GPUs, options and rungs with which it does, each of them estimated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from memplan.case import (
    Case,
    ClusterLike,
    EngineConfigLike,
    ModelLike,
    SoftwareLike,
    StrategyLike,
    TrainingLike,
    asked_setup,
    case_of,
    default_strategy,
    engine_config_of,
    training_spec,
)
from memplan.catalog.gpus import all_gpus
from memplan.errors import MemplanError
from memplan.estimator import least
from memplan.results import Estimate, EstimateList, verdict_by_place
from memplan.space import (
    Change,
    Setup,
    changed,
    checkpointed,
    eval_batch_1,
    in_nf4,
    micro_batch_1,
    rungs,
    with_8bit_adam,
    with_liger,
    with_lora,
)
from memplan.specs.hardware import GPUSpec
from memplan.specs.training import LoraSpec, QuantizationSpec, TrainingSpec
from memplan.units import gib


@dataclass(frozen=True, slots=True)
class Advice:
    """What to do about answers that do not fit, or whose GPU is not known."""

    gpus: tuple[tuple[str, ...], ...] = ()
    """The smallest GPUs of the catalog that the setup as asked fits on; where the GPU is not known, the smallest one
    for each further estimate too."""
    options: tuple[str, ...] = ()
    """Command line options, each of which makes the run fit."""


def advise(
    result: Estimate | EstimateList,
    model: ModelLike,
    training: TrainingLike = None,
    cluster: ClusterLike = None,
    strategy: StrategyLike = None,
    *,
    engine_config: EngineConfigLike = None,
    software: SoftwareLike = None,
) -> Advice:
    """Return what to do next about ``result``, which the other arguments gave; nothing if it fits.

    GPUs are estimated by their own rules, and options by estimating the setup with them: what is named fits.
    """
    if result.verdict == "fits":
        return Advice()
    config = None if engine_config is None else engine_config_of(engine_config)
    case = case_of(model, cluster, software, config)
    asked = asked_setup(case, training_spec(training), strategy, config)
    estimates = result.estimates if isinstance(result, EstimateList) else (result,)
    if result.verdict != "unknown":
        options = _remedies(case, asked)
        if isinstance(result, EstimateList):
            options = options or _remedies(case, asked, rungs(asked)[-1])
        elif config is None:
            options += _fitting_rung(case, asked)
        return Advice(gpus=(_fitting_gpus(case, asked, estimates[0]),), options=options)
    if case.cluster.gpu is not None:
        return Advice()  # a device without a size of its own
    gpus = [_fitting_gpus(case, asked, estimates[0])]
    # Rungs that were left out come last.
    for setup, estimated in zip(rungs(case.with_nvme(asked))[1:], estimates[1:], strict=False):
        # An engine that shards takes too long to be tried on every GPU.
        gpus.append(("-",) if setup.strategy.shards else _fitting_gpus(case, setup, estimated, limit=1))
    return Advice(gpus=tuple(gpus))


def _in_bfloat16(setup: Setup) -> Setup | None:
    """Frozen weights in 16 bit; to train them so is another matter."""
    if setup.training.quantization is not None or (setup.training.task == "train" and setup.training.lora is None):
        return None
    return changed(setup, dtype="bfloat16")


REMEDIES: tuple[tuple[Change, ...], ...] = (
    (eval_batch_1,),
    (micro_batch_1,),
    (checkpointed,),
    (micro_batch_1, eval_batch_1),
    (checkpointed, eval_batch_1),
    (micro_batch_1, checkpointed),
    (micro_batch_1, checkpointed, eval_batch_1),
    (checkpointed, with_liger),
    (checkpointed, with_liger, with_8bit_adam),
    (with_lora,),
    (with_lora, checkpointed),
    (with_lora, _in_bfloat16),
    (with_lora, _in_bfloat16, checkpointed),
    (with_lora, in_nf4),
    (with_lora, in_nf4, checkpointed),
    (_in_bfloat16,),
    (in_nf4,),
)
"""What may make a setup fit; of several changes all are made. The later change what is trained, so they are offered,
never taken."""


def _remedies(case: Case, asked: Setup, setup: Setup | None = None, limit: int = 2) -> tuple[str, ...]:
    """Options that make ``setup`` fit, which is the one asked for if None."""
    setup = setup or asked
    enough: list[Sequence[Change]] = []
    found: list[str] = []
    for changes in REMEDIES:
        less = all_changed(setup, changes)
        if less is None or any(set(fewer) <= set(changes) for fewer in enough) or not case.computes_in(less):
            continue
        if len(found) < limit and case.fits(less):
            enough.append(changes)
            found.append(options_between(asked, less))
    return tuple(found)


def _fitting_rung(case: Case, asked: Setup) -> tuple[str, ...]:
    """Options for the first rung of the ladder that fits, where a run was asked for that does not."""
    ladder = rungs(replace(asked, strategy=default_strategy(asked.training, case.cluster)))
    found = next((setup for setup in ladder if setup.strategy.shards and case.fits(setup)), None)
    return () if found is None else (options_between(asked, found),)


def _fitting_gpus(case: Case, setup: Setup, estimated: Estimate, limit: int = 3) -> tuple[str, ...]:
    """The smallest GPUs that a setup fits on, which ``estimated`` is an estimate of on any GPU."""
    idle = [phase.allocated for phase in estimated.gpu.phases if phase.name == "idle"]
    # Weights and optimizer states are the same on every GPU: one too small for them need not be tried.
    held = max(idle, default=0) - estimated.gpu.components.workspace
    floors: dict[object, int] = {}
    found: list[str] = []
    for gpu in sorted(all_gpus(), key=lambda gpu: gpu.memory_bytes):
        on, kind = case.on(gpu), case.kind_of(gpu, setup)
        if len(found) == limit or gpu.memory_bytes < floors.get(kind, held):
            continue
        if on.fits(setup):
            found.append(gpu.name)
        else:
            floors[kind] = max(held, on.floor(setup))
    return tuple(found)


def cures_of(case: Case, asked: Setup) -> tuple[str, ...]:
    """Setups that fit, in words: what they change, need, and cost. First two that train the same, then one that does
    not.
    """
    if not isinstance(case.cluster.gpu, GPUSpec):
        return ()
    less_of = {changes: all_changed(asked, changes) for changes in REMEDIES}
    others = [(changes, less) for changes, less in less_of.items() if less is not None and case.computes_in(less)]
    alike = [(changes, less) for changes, less in others if _trains_alike(asked, less)]
    others = [each for each in others if each not in alike]
    known = [less for _, less in alike]
    ladder = [less for less in rungs(case.with_nvme(asked))[1:] if less not in known and not _is_back(asked, less)]
    before: list[float] = []

    def fitting(ways: Sequence[tuple[Sequence[Change], Setup]], limit: int) -> list[str]:
        found: list[tuple[float, str]] = []
        enough: list[set[Change]] = []
        for changes, less in ways:
            if len(found) == limit or any(fewer <= set(changes) for fewer in enough):
                continue
            if (needs := _needs(case, less)) is None:
                continue
            if changes:
                enough.append(set(changes))
            # Of what was estimated, whose play is there.
            before[:] = before or [case.seconds(asked, as_written=False)]
            seconds = case.seconds(less, as_written=False)
            cost = _cost(seconds / before[0])
            found.append((seconds, f"{_in_arguments(asked, less)}: {gib(needs)} GiB, fits, {cost}"))
        return [said for _, said in sorted(found)]

    return (*fitting([*alike, *(((), less) for less in ladder)], 2), *fitting(others, 1))


def _cost(ratio: float) -> str:
    """How long a step takes, beside another's.

    >>> _cost(1.3), _cost(0.9), _cost(1.001), _cost(1200)
    ('about 30% slower', 'about 10% faster', 'as fast', 'takes about 1,200 times as long')
    """
    if abs(ratio - 1) < 0.005:
        return "as fast"
    if ratio >= 3:
        return f"takes about {ratio:,.0f} times as long"
    return f"about {abs(ratio - 1):.0%} {'slower' if ratio > 1 else 'faster'}"


def _needs(case: Case, setup: Setup) -> int | None:
    """Bytes of each GPU if the setup fits for certain; None if it does not, or is refused."""
    try:
        # What an engine holds as it is set up is soon told, and most of what does not fit fails there.
        if case.tracer is None:
            specs = (case.model, setup.training, case.cluster, setup.strategy, case.software)
            if least(*specs, played=False).verdict == "does-not-fit":
                return None
        roughly = case.estimate(setup, replay=False)
        places = verdict_by_place(roughly.gpu, roughly.host, roughly.nvme)
        # The replay can only tell what is between the two ends on the GPU.
        if places["gpu"] == "does-not-fit" or any(places[name] != "fits" for name in places if name != "gpu"):
            return None
        found = case.estimate(setup)
    except MemplanError:
        return None
    return found.gpu.high if found.verdict == "fits" else None


def _is_back(asked: Setup, less: Setup) -> bool:
    """Whether a rung is one that the run has left behind: it shards less, and offloads no more."""
    kinds = [strategy.kind for strategy in (asked.strategy, less.strategy)]
    if not all(kind in _SHARDING for kind in kinds):
        return False
    now, then = (_SHARDING.index(kind) for kind in kinds)
    offloads = [getattr(less.strategy, name) for name in _OFFLOADS]
    return then < now and all(
        each in ("none", getattr(asked.strategy, name)) for name, each in zip(_OFFLOADS, offloads)
    )


_SHARDING = ("ddp", "zero0", "zero1", "zero2", "zero3")


def _trains_alike(asked: Setup, less: Setup) -> bool:
    """Whether the same weights are trained, in the same types."""
    before, after = asked.training, less.training
    return all(getattr(before, name) == getattr(after, name) for name in ("lora", "quantization", "dtype"))


_ARGUMENTS = {
    "micro_batch_size": "per_device_train_batch_size",
    "eval_batch_size": "per_device_eval_batch_size",
    "grad_accum_steps": "gradient_accumulation_steps",
    "liger": "use_liger_kernel",
    "seq_len": "max_length",
}
"""Options whose name in TrainingArguments is another."""


def _in_arguments(asked: Setup, less: Setup) -> str:
    """What makes one setup of the other, as a training script would have it."""
    before, after = _named(asked), _named(less)
    said: list[str] = []
    for name, value in after.items():
        if before[name] == value:
            continue
        if isinstance(value, LoraSpec):
            targets = f" on {', '.join(value.targets)}" if value.targets else ""
            said.append(f"LoRA of rank {value.rank}{targets}")
        elif isinstance(value, QuantizationSpec):
            said.append(f"{value.kind} weights")
        else:
            said.append(f"{_ARGUMENTS.get(name, name)}={value}")
    return ", ".join(said)


def all_changed(setup: Setup, changes: Sequence[Change]) -> Setup | None:
    """The setup with all changes made; None if one of them changes nothing."""
    for change in changes:
        less = change(setup)
        if less is None or less == setup:
            return None
        setup = less
    return setup


def options_between(asked: Setup, less: Setup) -> str:
    """The command line options that turn one run into the other."""
    before, after = _named(asked), _named(less)
    return " ".join(_option(name, value) for name, value in after.items() if before[name] != value)


def _named(setup: Setup) -> dict[str, object]:
    """What options say, by their names."""
    training, strategy = setup.training, setup.strategy
    spread = {"strategy": strategy.kind, **{name: getattr(strategy, name) for name in _OFFLOADS}}
    return spread | {name: getattr(training, name) for name in TrainingSpec.model_fields}


_OFFLOADS = ("offload_optimizer", "offload_param")


def _option(name: str, value: object) -> str:
    if isinstance(value, LoraSpec):
        targets = f" --lora-targets {','.join(value.targets)}" if value.targets else ""
        return f"--lora-rank {value.rank}{targets}"
    option = f"--{name.replace('_', '-')}"
    if value is True:
        return option
    return f"{option} {value.kind if isinstance(value, QuantizationSpec) else value}"
