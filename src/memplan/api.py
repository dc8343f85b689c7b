"""Names, paths and configs in, estimates out."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

from memplan.case import (
    ClusterLike,
    EngineConfigLike,
    ModelLike,
    SoftwareLike,
    StrategyLike,
    TrainingLike,
    asked_setup,
    case_of,
    engine_config_of,
    is_module,
    training_spec,
)
from memplan.errors import SpecError, UnsupportedError
from memplan.parallel import shared_out
from memplan.results import (
    Estimate,
    EstimateList,
)
from memplan.space import Setup, rungs

if TYPE_CHECKING:
    from memplan.answers import Comparison
    from memplan.introspect.extrapolate import Inputs


def estimate(
    model: ModelLike,
    training: TrainingLike = None,
    cluster: ClusterLike = None,
    strategy: StrategyLike = None,
    *,
    engine_config: EngineConfigLike = None,
    software: SoftwareLike = None,
    replay: bool = True,
    explain: bool = False,
    trace: bool = False,
    inputs: Inputs | None = None,
) -> Estimate:
    """Estimate the memory of one setup, in bytes per GPU, and the time of its step where the GPU is known.

    Args:
        model: a hub id, a folder, a ``config.json``, its values as a mapping, a ModelSpec, or an ``nn.Module``.
        training: the run, a TrainingSpec or its fields as a mapping; None is the defaults (full fine-tuning,
            1 x 2048 tokens).
        cluster: ``"2xA100-80GB"``, ``"2x8xH100-80GB"`` (2 nodes of 8), a ClusterSpec or its fields; without a GPU
            this machine's are used, and where there is none the capacity and the verdict are unknown.
        strategy: a Strategy, its fields, or its kind as text; None is plain training on one GPU and DDP on several.
        engine_config: a DeepSpeed JSON or accelerate YAML, as a path or as its values. What the other arguments say
            wins over it, and ``Estimate.assumptions`` name it.
        software: versions, as text (``"transformers=4.46"``), a SoftwareSpec or its fields.
        replay: simulate the caching allocator, and time a step; without it ``peak_reserved`` is an upper bound, and
            ``step`` is None.
        explain: fill ``Estimate.explanation``.
        trace: trace the real model, with the ``train`` extra, instead of running its architecture file. An
            ``nn.Module`` is always traced, and left as it is.
        inputs: for a trace, what forward takes: a function of micro-batch size and sequence length that makes its
            keyword arguments, tensors on the CPU. None is input_ids and labels, or pixel_values and labels, as
            transformers' models take them. The loss must be what forward returns, or the first or the ``loss`` of it.

    Raises:
        ResolutionError: the model or the GPU is not found.
        SpecError: a value or a combination is wrong.
        UnsupportedError: memplan does not model it.
    """
    config = None if engine_config is None else engine_config_of(engine_config)
    case = case_of(model, cluster, software, config, trace=trace, inputs=inputs)
    asked = asked_setup(case, case.decided(training_spec(training)), strategy, config)
    result = case.answer(asked, replay=replay, explain=explain)
    return _with_notes(result, asked)


def ladder(
    model: ModelLike,
    training: TrainingLike = None,
    cluster: ClusterLike = None,
    *,
    software: SoftwareLike = None,
    replay: bool = True,
    explain: bool = False,
    trace: bool = False,
    inputs: Inputs | None = None,
    processes: int = 1,
) -> EstimateList:
    """Estimate every rung of the ladder, from the setup as asked to the one that needs the least memory.

    Arguments and errors are those of :func:`estimate`; :data:`LADDER` lists the rungs. One that the libraries refuse
    for this run, or that is not modelled for it, is left out. ``processes`` share the rungs out: copies of this one,
    which a process with threads or a GPU should not make.
    """
    case = case_of(model, cluster, software, trace=trace, inputs=inputs)
    first, *others = rungs(case.with_nvme(asked_setup(case, case.decided(training_spec(training)), None)))

    def answered(setup: Setup) -> Estimate | None:
        with suppress(SpecError, UnsupportedError):
            return case.answer(setup, replay=replay, explain=explain)
        return None

    if processes > 1 and others and not trace:
        # What is asked for comes last, and so falls to this process or another: its refusal is raised here.
        texts = shared_out(lambda setup: _as_text(answered(setup)), [*others, first], processes)
        found = [None if not text else Estimate.model_validate_json(text) for text in texts]
        asked = found.pop() or case.estimate(first, replay=replay, explain=explain)  # raises
    else:
        asked = case.answer(first, replay=replay, explain=explain)
        found = [answered(setup) for setup in others]
    estimates = (asked, *(each for each in found if each is not None))
    return EstimateList(estimates=tuple(_with_notes(each, first) for each in estimates))


def _with_notes(estimate: Estimate, asked: Setup) -> Estimate:
    if not asked.notes:
        return estimate
    return estimate.model_copy(update={"assumptions": (*estimate.assumptions, *asked.notes)})


def _as_text(estimate: Estimate | None) -> str:
    return "" if estimate is None else estimate.model_dump_json()


def compare(
    model: ModelLike,
    training: TrainingLike = None,
    cluster: ClusterLike = None,
    strategy: StrategyLike = None,
    *,
    engine_config: EngineConfigLike = None,
    software: SoftwareLike = None,
    replay: bool = True,
) -> Comparison:
    """Compare what DeepSpeed's and accelerate's estimators, the rule of thumb and memplan say, in bytes.

    Arguments and errors are those of :func:`estimate`, for a training run of a model that is not a module. Without a
    strategy or an engine's config, plain training (or DDP) and the setups that DeepSpeed's estimators print are
    compared. One that memplan does not model gets a row that says so.
    """
    from memplan import comparison  # here, because estimates do not need it

    if is_module(model):
        remedy = "Give its hub id or its config."
        raise UnsupportedError(f"model: a module is traced, and compare counts by the architecture files. {remedy}")
    config = None if engine_config is None else engine_config_of(engine_config)
    case, run = case_of(model, cluster, software, config), training_spec(training)
    if run.task != "train":
        remedy = "Leave it out: accelerate's total size is what loading takes."
        raise SpecError.at("task", run.task, "is not a training run, which compare is for", remedy)
    asked = asked_setup(case, run, strategy, config)
    others = comparison.DEEPSPEEDS if strategy is None and config is None else ()
    return comparison.compare(
        case.model, asked.training, case.cluster, (asked.strategy, *others), case.software, replay=replay
    )
