"""Real steps on this machine beside their estimate."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from memplan import estimator, micro_batch
from memplan.api import estimate
from memplan.case import (
    Case,
    ClusterLike,
    EngineConfigLike,
    ModelLike,
    SoftwareLike,
    StrategyLike,
    TrainingLike,
    as_asked,
    asked_setup,
    case_of,
    cluster_spec,
    engine_config_of,
    training_spec,
)
from memplan.catalog.detect import detect_cluster
from memplan.catalog.gpus import find_gpu
from memplan.errors import MemplanError, PositionsError, SpecError, UnsupportedError
from memplan.results import Estimate
from memplan.space import Setup
from memplan.specs.hardware import GPUSpec
from memplan.specs.software import SoftwareSpec
from memplan.specs.strategy import Strategy
from memplan.specs.training import TrainingSpec

if TYPE_CHECKING:
    from memplan.introspect.measure import Start
    from memplan.introspect.measurement import Boundary, Measured, Measurement


def measure(
    model: ModelLike,
    training: TrainingLike = None,
    cluster: ClusterLike = None,
    strategy: StrategyLike = None,
    *,
    engine_config: EngineConfigLike = None,
    software: SoftwareLike = None,
    cap: int | None = None,
    steps: int = 3,
    save: bool = False,
    pretrained: bool = False,
    snapshot: bool = False,
    timeout: float = 3600,
    start: Start | None = None,
) -> Measured:
    """Run real steps of a setup on this machine's GPU, in a process of its own, and compare them with the estimate.

    The first arguments are those of :func:`estimate`; the GPU is this machine's, or ``cpu``, where tensors are counted.
    Of several ranks the first one runs, and a process group stands in for the others. ``cap`` are the bytes of a
    smaller GPU to be; ``steps`` are the optimizer steps; ``save`` writes a checkpoint at their end; ``pretrained``
    loads weights that are random too by ``from_pretrained``; ``snapshot`` keeps the blocks at the peak. A run that
    dies is a measurement, and so is one that takes longer than ``timeout`` seconds. ``start`` begins the process.

    Raises SpecError without a GPU and for what :func:`estimate` refuses, UnsupportedError for what is not installed.
    """
    from memplan.configs import launch
    from memplan.introspect import measure as instrument
    from memplan.introspect.extrapolate import installed
    from memplan.introspect.measurement import beside

    for option, value, smallest in (("steps", steps, 2), ("cap", cap, 1)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < smallest):
            raise SpecError.at(option, value, "is not a number that can be", f"Use a whole number from {smallest} on.")
    config = None if engine_config is None else engine_config_of(engine_config)
    given = cluster_spec(cluster)
    case = case_of(model, given if cap is None else given.replace(gpu_memory=cap), software, config)
    asked = asked_setup(case, training_spec(training), strategy, config)
    gpu = case.cluster.gpu
    on_cpu = isinstance(gpu, GPUSpec) and gpu.is_cpu
    if asked.training.task != "train":
        raise SpecError.at("task", asked.training.task, "has no steps to measure", "Leave it out.")
    name = gpu.name if isinstance(gpu, GPUSpec) else gpu
    here = None if given.gpu is None or on_cpu else detect_cluster().gpu
    if isinstance(here, GPUSpec) and here.name != name:
        raise SpecError.at("gpu", name, "is not the GPU of this machine", "Leave it out, or use cpu.")
    if on_cpu and cap is not None:
        raise SpecError.at("cap", cap, "is kept by no allocator on a CPU, where tensors are counted", "Leave it out.")
    written = replace(asked, strategy=launch.as_written(asked.strategy))
    resolved = estimator.resolve(case.model, written.training, case.cluster, written.strategy, case.software)
    if on_cpu and resolved.precision.mixed_precision == "fp16":
        # accelerator.py, prepare_model: float16 autocast is for GPUs; a CPU would run float32 under its name.
        raise SpecError.at("mixed_precision", "fp16", "is not run by accelerate on a CPU", "Use bf16 or no.")
    quantized = asked.training.quantization is not None
    job = instrument.Job(
        device="cpu" if on_cpu else "cuda",
        engine=asked.strategy.kind,
        ranks=case.cluster.gpus,
        nodes=case.cluster.nodes,
        dtype=resolved.precision.dtype,
        config=case.model.config,
        steps=steps,
        cap=cap,
        alloc_conf=estimator.alloc_conf(asked.training),
        pretrained=pretrained or quantized,  # quantizing is a part of loading
        evaluates=asked.training.eval_batch_size is not None,
        save=save,
        snapshot=snapshot,
        libraries=_libraries(asked.training),
    )
    instrument.needs(job)
    case = replace(case, software=installed(case.software))
    # Files are for GPUs, and of a checkpoint: here there may be neither, and nothing of them is used.
    cluster = case.cluster.replace(gpu=find_gpu("A100-80GB")) if on_cpu else case.cluster
    files = launch.files(
        case.model.replace(source="random"), written.training, cluster, written.strategy, case.software
    )
    estimated = case.estimate(written)
    fields = as_asked(case, written)
    return _with_blocks(
        case, written, beside(estimated, instrument.measure(job, files, estimated, fields, timeout, start))
    )


def _libraries(training: TrainingSpec) -> tuple[str, ...]:
    """What a run imports beside what every run does."""
    wanted = {
        "peft": training.lora is not None,
        "bitsandbytes": training.quantization is not None or "bit" in training.optim or "paged" in training.optim,
        "flash_attn": training.attn == "flash_attention_2",
        "liger_kernel": training.liger,
    }
    return tuple(name for name, is_wanted in wanted.items() if is_wanted)


def _with_blocks(case: Case, setup: Setup, found: Measured) -> Measured:
    """With the blocks that only one side has, if the run's were kept."""
    from memplan.introspect.measurement import align, fullest_phase

    taken = found.measurement.blocks
    if taken is None:
        return found
    named = {phase.name for phase in found.estimate.gpu.phases}
    fullest = fullest_phase(found.measurement)
    phase = fullest if fullest in named - {"first_step"} else found.estimate.gpu.peak_phase
    specs = (case.model, setup.training, case.cluster, setup.strategy, case.software)
    return found.model_copy(update={"blocks": align(estimator.alive_blocks(*specs, phase), taken)})


def estimate_again(measurement: Measurement, *, blocks: bool = False) -> Measured:
    """Estimate what was measured, with the versions that were, and put both beside each other.

    With ``blocks`` those of a snapshot are aligned again too.
    """
    from memplan.introspect.measurement import beside

    asked, versions = measurement.asked, measurement.versions
    software = SoftwareSpec(
        **{name: versions[name].partition("+")[0] for name in SoftwareSpec.model_fields if name in versions}
    )
    model = {**measurement.model["config"], "_name_or_path": measurement.model["id"]}
    training, cluster, strategy = (dict(asked[name]) for name in ("training", "cluster", "strategy"))
    found = beside(estimate(model, training, cluster, strategy, software=software), measurement)
    if not blocks:
        return found
    case = case_of(model, cluster, software, None)
    return _with_blocks(case, asked_setup(case, training_spec(training), strategy, None), found)


def _positions(case: Case, training: TrainingSpec, longest: int) -> int:
    """How many tokens the model has positions for, where that is fewer than ``longest``."""
    try:
        asked = training.replace(seq_len=longest)
        micro_batch.run_in_full(estimator.resolve(case.model, asked, case.cluster, Strategy(), case.software))
    except PositionsError as error:
        return error.most
    except MemplanError:  # is raised again where the setup is estimated
        pass
    return longest


BOUNDARIES = {"micro-batch": ("micro_batch_size", 1, 1024), "seq-len": ("seq_len", 64, 131_072)}
"""What :func:`measure_boundary` searches -> the option, the step of its values, and the largest."""


def measure_boundary(
    model: ModelLike,
    training: TrainingLike = None,
    cluster: ClusterLike = None,
    strategy: StrategyLike = None,
    *,
    boundary: str = "micro-batch",
    **options: Any,
) -> Boundary:
    """Search the largest ``micro-batch`` (or ``seq-len``, in steps of 64 tokens) that runs, beside the predicted one.

    Arguments are those of :func:`measure`. Raises SpecError for a boundary that is not known, and as that does.
    """
    from memplan.introspect.measure import boundary as search
    from memplan.introspect.measurement import Boundary, Measured, Tried

    if boundary not in BOUNDARIES:
        raise SpecError.at("boundary", boundary, "is not known", f"Use {' or '.join(BOUNDARIES)}.")
    option, step, largest = BOUNDARIES[boundary]
    run, found = training_spec(training), dict[int, Measured]()
    hardware = cluster_spec(cluster)
    config = options.get("engine_config")
    case = case_of(model, hardware, options.get("software"), None if config is None else engine_config_of(config))
    if isinstance(case.cluster.gpu, GPUSpec) and case.cluster.gpu.is_cpu:
        raise SpecError.at("boundary", boundary, "has no end on a CPU, where tensors are counted", "Leave it out.")
    capped = hardware if options.get("cap") is None else hardware.replace(gpu_memory=options["cap"])
    shared = {name: options[name] for name in ("engine_config", "software") if name in options}

    def estimated(value: int) -> Estimate:
        return estimate(model, run.replace(**{option: value}), capped, strategy, **shared)

    if option == "seq_len":
        largest = _positions(case, run, largest)
    values = range(step, largest + 1, step) or range(largest, largest + 1)

    def fits(value: int) -> bool:
        return estimated(value).verdict == "fits"

    def lives(value: int) -> bool:
        found[value] = measure(model, run.replace(**{option: value}), cluster, strategy, **options)
        status = found[value].measurement.status
        if status == "failed":
            raise UnsupportedError(f"measure: {option}={value} failed: {found[value].measurement.message}")
        return status == "ok"

    predicted = search(values, 0, fits)
    measured = search(values, predicted, lives)
    return Boundary(
        option=option,
        step=step,
        predicted=None if predicted < 0 else values[predicted],
        measured=None if measured < 0 else values[measured],
        tried=tuple(
            Tried(value=value, status=each.measurement.status, peak_reserved=each.measurement.peak("reserved"))
            for value, each in found.items()
        ),
        estimate=estimated(values[max(predicted, 0)]),
        measurement=None if measured < 0 else found[values[measured]].measurement,
    )
