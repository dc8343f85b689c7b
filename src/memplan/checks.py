"""Checks before a run: of its files, and from within its script."""

from __future__ import annotations

import os
import traceback
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

from memplan.adapters.lora import targets_to_choose
from memplan.advice import cures_of
from memplan.answers import Check, Code, Finding, Preflight
from memplan.case import (
    Case,
    ClusterLike,
    ModelLike,
    SoftwareLike,
    TrainingLike,
    as_asked,
    case_of,
    cluster_spec,
    known_cluster,
    software_spec,
    training_spec,
    within_positions,
)
from memplan.catalog.detect import detect_cluster, free_disk_of, host_memory
from memplan.catalog.gpus import find_gpu
from memplan.errors import MemplanError, PreflightError, ResolutionError, SpecError, UnsupportedError
from memplan.parallel import uncollected
from memplan.results import (
    ENGINE_CONFIG,
    Assumption,
    Estimate,
)
from memplan.space import Setup, changed
from memplan.specs.hardware import ClusterSpec, GPUSpec
from memplan.specs.software import SoftwareSpec
from memplan.specs.training import Dtype, TrainingSpec

if TYPE_CHECKING:
    from memplan.configs.run import Run
    from memplan.integrations.live import Live
    from memplan.lengths import Batches, Lengths


LengthsLike: TypeAlias = Any
"""A path, a list, an array or a column of numbers of tokens."""


def check(
    path: str | os.PathLike[str] | Mapping[str, Any] | Sequence[str],
    model: ModelLike | None = None,
    training: TrainingLike = None,
    cluster: ClusterLike = None,
    *,
    software: SoftwareLike = None,
    lengths: LengthsLike = None,
) -> Check:
    """Say what the files of a run need, and what is wrong with them.

    ``path`` is a DeepSpeed JSON, an accelerate YAML, TrainingArguments as a JSON or a YAML, a LLaMA-Factory YAML, a
    file with the command that starts a run, or a folder that a plan has written; or the values of one of them, or a
    list of arguments. ``model`` is needed where they name none. What the other arguments say wins over the files.
    ``lengths`` are the tokens of the dataset's texts, or a file of them (:mod:`memplan.lengths`): the estimate is then
    of the longest batch, and a finding says how likely one is that does not fit. ``software``: versions; None are those
    that are installed, and of what is not the ones that memplan's rules were read from.

    Raises SpecError for files that cannot be read or whose values the libraries refuse, UnsupportedError for what
    memplan does not model. A mistake beside which the rest can still be read is a finding.
    """
    from memplan.configs.run import read_run  # here, because most estimates have no files
    from memplan.lengths import read_lengths

    if path == "":
        raise SpecError.at("path", path, "names no file", "Give one, or a folder: . is where you are.")
    known = None if lengths is None else read_lengths(lengths)
    versions = installed_software() if software is None else software
    _, _, result = _checked(read_run(path), model, training, cluster, versions, known)
    return result


def _checked(
    run: Run,
    model: ModelLike | None,
    training: TrainingLike,
    cluster: ClusterLike,
    software: SoftwareLike,
    lengths: Lengths | None = None,
    *,
    here: bool = False,
) -> tuple[Case, Setup | None, Check]:
    """What is checked, the setup that files come to, and what is found; no setup if none can be estimated.

    ``here`` is whether it will run on this machine, whose disk it offloads to.
    """
    from memplan import findings
    from memplan.configs import run as runs
    from memplan.configs.setup import EngineConfig, with_cluster

    model = run.model if model is None else model
    if model is None:
        raise SpecError(f"{run.source}: does not name the model. Give it, as in --model MODEL.")
    asked, hardware = training_spec(training), cluster_spec(cluster)
    if asked.task != "train":
        problem = "is not a training run, which files are of"
        raise SpecError.at("task", asked.task, problem, "Leave it out, or use memplan estimate.")
    fixed = dict(run.engine.cluster) if run.engine is not None else {}
    refused = run.engine.refused if run.engine is not None else {}
    if "gpus" in run.cluster:
        fixed |= run.cluster
        refused = {name: error for name, error in refused.items() if name not in run.cluster}
    keys = run.engine.keys if run.engine is not None else {}
    fixing = EngineConfig(run.source, {}, cluster=fixed, refused=refused, keys=keys)
    hardware, notes = with_cluster(fixing, hardware)
    counted = "gpus" in hardware.model_fields_set
    if not counted:
        hardware, told = _counted(run, asked, hardware)
        counted = told is not None
        notes += [] if told is None else [_noted(told)]
    if here and hardware.nvme is None and hardware.nvme_path is not None:
        hardware = hardware.replace(nvme=free_disk_of(hardware.nvme_path))
    case = case_of(model, hardware, software)
    found = list(run.findings)
    if not case.software.at_least("transformers", "5"):
        found = [each for each in found if each.code != "removed-argument"]
    if not counted and case.cluster.gpus == hardware.gpus:
        notes.append(_noted("the files do not say on how many GPUs: give --gpus"))
    unadapted = findings.quantized_full(run, asked)
    if unadapted is not None:
        check = Check(estimate=None, verdict="unknown", findings=findings.sorted_by_severity([unadapted, *found]))
        return case, None, check
    merged, spread, said = runs.setup_of(run, asked, {}, case.cluster.gpus, found)
    notes = [*notes, *said, *(_noted(note) for note in run.notes)]
    merged = _as_loaded(case, run, merged)
    batches = None
    if lengths is not None and not ("packed" in merged.model_fields_set and merged.packed):
        from memplan.lengths import collated

        merged = merged.replace(packed=False)
        arguments = run.raw["arguments"].data if "arguments" in run.raw else {}
        batches = collated(lengths, arguments, merged.seq_len if "seq_len" in merged.model_fields_set else None)
        merged = merged.replace(seq_len=max(batches.padded.longest, 1))
    if "seq_len" not in merged.model_fields_set and "vocab_size" in case.model.config:
        merged, _ = within_positions(case, merged)
        merged = merged.replace(seq_len=_at_most(merged.seq_len, case.model.config))
        found.append(_unknown_length((run.arguments or run).source, merged.seq_len))
    setup = Setup(merged, spread, case.cluster.gpus, lora_targets=targets_to_choose(case.model.model_type))
    try:
        estimated = case.with_time(setup, case.estimate(setup))
    except (SpecError, UnsupportedError) as error:
        raise runs.as_written(run, asked, error) from None
    estimated = estimated.model_copy(update={"assumptions": (*estimated.assumptions, *notes)})
    if batches is not None:
        batches = _limited(case, setup, estimated, batches)
    checked = findings.Checked(
        run, merged, spread, case.cluster, case.model, case.software, estimated, batches, counted
    )
    found += findings.find(checked)
    check = Check(estimate=estimated, verdict=estimated.verdict, findings=findings.sorted_by_severity(found))
    return case, setup, check


def _counted(run: Run, training: TrainingSpec, hardware: ClusterSpec) -> tuple[ClusterSpec, str | None]:
    """The cluster of a run that does not say how many GPUs it has, and by what it is told after all; None if it is not.

    A batch that is fixed is that of some number of GPUs. Where that is not told, what each node has is taken.
    """
    from memplan.configs.run import ranks_of_batch, usual_nodes

    ranks = ranks_of_batch(run, training)
    nodes = run.cluster.get("nodes", 1)
    if ranks is not None:
        if ranks % nodes or nodes == 1:
            nodes = usual_nodes(ranks)
        said = f"the files do not say on how many GPUs: {ranks} on {nodes} nodes are taken, as train_batch_size has it"
        return hardware.replace(gpus=ranks, nodes=nodes), f"{said}; give --gpus and --nodes"
    batch = None if run.engine is None else run.engine.batch
    if batch is not None and batch.train is not None:
        return hardware.replace(gpus=1), None  # of which every batch is a multiple
    on_node = run.cluster.get("per_node")
    return (hardware if on_node is None else hardware.replace(gpus=on_node * nodes, nodes=nodes)), None


def _as_loaded(case: Case, run: Run, training: TrainingSpec) -> TrainingSpec:
    """With the dtype of the checkpoint where nothing says one: ``from_pretrained`` takes it since transformers 5.

    The scripts of TRL ask for float32 (ModelConfig). Of a model that is traced the dtype is known.
    """
    from memplan.configs.arguments import is_of_trl

    arguments = run.raw["arguments"].data if "arguments" in run.raw else {}
    of_trls_script = run.source != _OF_OBJECTS and is_of_trl(arguments)
    if training.dtype is not None or case.tracer is not None or of_trls_script:
        return training
    stored = case.model.config.get("dtype") or case.model.config.get("torch_dtype")
    if stored not in get_args(Dtype) or not case.software.at_least("transformers", "5.0"):
        return training
    return training.replace(dtype="auto")


def _limited(case: Case, setup: Setup, estimated: Estimate, batches: Batches) -> Batches:
    """The batches with the length up to which they fit for certain, where it is known how much there is."""
    if estimated.gpu.capacity is None:
        return batches
    if case.fits_where_known(setup):
        return replace(batches, limit=batches.padded.longest)
    tokens = [length for length, _ in batches.padded.counts if length]
    # A mask whose rows are no multiple of 8 is copied, so that 1,545 tokens may need more than 1,600.
    kinds = [[each for each in tokens if each % 8 == 0], [each for each in tokens if each % 8]]
    limits = [_first_that_fails(case, setup, each) for each in kinds if each]
    limit = max((each for each in tokens if all(failing is None or each < failing for failing in limits)), default=0)
    rest = batches.padded.texts % setup.training.micro_batch_size
    last = None
    if setup.gpus == 1 and 0 < batches.padded.beyond(limit) <= rest and not batches.drop_last:
        fits = case.fits_where_known(changed(setup, micro_batch_size=rest))
        last = batches.padded.longest if fits else None
    return replace(batches, limit=limit, limit_of_last=last)


def _first_that_fails(case: Case, setup: Setup, tokens: Sequence[int]) -> int | None:
    """The shortest of these lengths that does not fit for certain; None if all do."""
    place = bisect_left(tokens, True, key=lambda each: not case.fits_where_known(changed(setup, seq_len=each)))
    return tokens[place] if place < len(tokens) else None


def _noted(note: str) -> Assumption:
    return Assumption(name=ENGINE_CONFIG, value=0, low=0, high=0, source=note)


def preflight(
    model: Any,
    args: Any = None,
    *,
    training: TrainingLike = None,
    cluster: ClusterLike = None,
    software: SoftwareLike = None,
    lengths: LengthsLike = None,
    on_failure: OnFailure = "raise",
) -> Preflight:
    """Check a run from within its script, before a weight is loaded; return what is found, the worst first.

    Args:
        model: an ``nn.Module``, a config of transformers, what :func:`estimate` takes, or a Trainer, which has args.
        args: TrainingArguments; a DeepSpeed config as a mapping, a path or an HfDeepSpeedConfig; an Accelerator or one
            of its plugins; or any file of a run that :func:`check` takes, or its values. None is plain training, or
            what the launcher has set.
        training: what the others do not say, ``seq_len`` above all; it wins over them.
        cluster: as for :func:`estimate`; without one, the GPUs that are visible, with the memory that is free on them
            now, the ranks that the launcher has started, and this machine's memory.
        software: versions; None are those that are installed.
        lengths: tokens of the dataset's texts, as for :func:`check`.
        on_failure: what is done about an error: ``raise`` PreflightError, ``warn``, or ``exit`` with 1. On the first
            rank only: the launcher ends the others.

    Raises PreflightError, whose ``findings`` hold all, and SpecError for a wrong argument. What memplan does not model
    is a warning.
    """
    from memplan.integrations import live
    from memplan.lengths import read_lengths

    if on_failure not in get_args(OnFailure):
        raise SpecError.at("on_failure", on_failure, "is not known", f"Use {' or '.join(get_args(OnFailure))}.")
    asked, hardware = training_spec(training), cluster_spec(cluster)
    if isinstance(hardware.gpu, str):
        hardware = known_cluster(hardware)
    versions = None if software is None else software_spec(software)
    known = None if lengths is None else read_lengths(lengths)
    with uncollected():
        try:
            found = _found_before(live.read(model, args), asked, hardware, versions or installed_software(), known)
        except UnsupportedError as error:
            found = Preflight([_excused("not-modelled", "warning", error)])
        except ResolutionError as error:
            found = Preflight([_excused("unknown-model", "warning", error)])
        except SpecError as error:
            found = Preflight([_excused("refused", "error", error)])
        except Exception as error:
            # Whatever is wrong with memplan, a training script must not end of it.
            found = Preflight([_of_memplan(error)])
    if live.rank() == 0:
        _act_on(found, on_failure)
    return found


OnFailure: TypeAlias = Literal["raise", "warn", "exit"]


def _excused(code: Code, severity: Literal["error", "warning"], error: MemplanError) -> Finding:
    path, _, rest = str(error).partition(": ")
    problem, stop, remedy = rest.partition(". ")
    if "\n" in rest or not stop:  # several mistakes, or none of the usual form
        return Finding(code=code, severity=severity, path=path, message=rest or str(error), remedy="")
    return Finding(code=code, severity=severity, path=path, message=f"{problem}.", remedy=remedy)


def said_of_memplan(error: Exception) -> str:
    """What is said of an error that is not one of memplan's own."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    text = str(error)[:500]
    return f"The run was not checked: {type(error).__name__}: {text} ({Path(last.filename).name}:{last.lineno})."


def _of_memplan(error: Exception) -> Finding:
    return Finding(
        code="memplan-error",
        severity="warning",
        path="memplan",
        message=said_of_memplan(error),
        remedy="Please report it. The run itself is not touched.",
    )


def _act_on(found: Preflight, on_failure: OnFailure) -> None:
    """Say what is found, and end what cannot work."""
    import warnings

    if found.errors and on_failure == "raise":
        message = "\n".join(("This run is stopped before it starts.", str(found)))
        estimate = None if found.check is None else found.check.estimate
        raise PreflightError(message, report=estimate, findings=found)
    for each in found:
        if each.severity != "info":
            warnings.warn(f"memplan: {each.path}: {each.message} {each.remedy}".strip(), stacklevel=3)
    if found.errors and on_failure == "exit":
        raise SystemExit(1)


_LEGAL = frozenset({"removed-argument", "misspelt-argument"})
"""Findings on names that an object of transformers has, so that they exist."""


@dataclass(frozen=True, slots=True)
class Examined:
    """A run that a script has in its hands, estimated as its files would be."""

    case: Case
    setup: Setup | None
    """None if there can be no estimate."""
    check: Check
    beside: tuple[Finding, ...]
    """What is to be said of the machine and of the objects."""


def examine(
    run: Live,
    training: TrainingSpec,
    cluster: ClusterSpec,
    software: SoftwareSpec,
    lengths: Lengths | None = None,
) -> Examined:
    """Estimate a run that is about to start, on the machine that is there. Raises SpecError and UnsupportedError."""
    from memplan.integrations import live

    hardware, beside = _here(cluster, run)
    here = cluster.gpu is None and cluster.gpu_memory is None
    case, setup, check = _of_objects(run, training, hardware, software, lengths, here=here)
    if run.unread is not None:
        beside.append(_not_read(run.unread))
    if run.module is not None and run.model is not run.module and check.estimate is not None:
        model, (weights, trained) = check.estimate.model, live.counted(run.module)
        if (model.parameters, model.trainable_parameters) != (weights, trained):
            try:
                files = as_files(live.as_module(run), training)
                case, setup, check = _checked(*files, hardware, software, lengths, here=here)
            except MemplanError as error:
                beside.append(_other_model(model.parameters, model.trainable_parameters, weights, trained, error))
    return Examined(case, setup, check, tuple(beside))


def _found_before(
    run: Live,
    training: TrainingSpec,
    cluster: ClusterSpec,
    software: SoftwareSpec,
    lengths: Lengths | None = None,
) -> Preflight:
    from memplan import findings

    examined = examine(run, training, cluster, software, lengths)
    case, setup, check = examined.case, examined.setup, examined.check
    found = [*examined.beside, *(each for each in check.findings if each.code not in _LEGAL or run.as_written)]
    if check.estimate is not None and setup is not None:
        memory = memory_said(examined)
        if memory is not None and not (run.on_cpu and memory.severity == "info"):
            found.insert(0, memory)
    of_model = {"id": case.model.id, "config": case.model.config}
    asked = {} if setup is None else as_asked(case, setup)
    return Preflight(findings.sorted_by_severity(found), check, of_model, asked)


def memory_said(examined: Examined) -> Finding | None:
    """Return what is to be said of a run's memory, with what would fit; nothing if it fits."""
    from memplan import findings

    check, setup = examined.check, examined.setup
    if check.estimate is None or setup is None:
        return None
    cures = cures_of(examined.case, setup) if check.verdict in ("does-not-fit", "tight") else ()
    return findings.memory_finding(check.estimate, cures)


def _of_objects(
    run: Live,
    training: TrainingSpec,
    cluster: ClusterSpec,
    software: SoftwareSpec,
    lengths: Lengths | None = None,
    *,
    here: bool,
) -> tuple[Case, Setup | None, Check]:
    """What is checked. A model that is there is legal: if memplan has no words for it, it is traced.

    Raises SpecError for what is wrong whatever the model is, UnsupportedError for the rest.
    """
    from memplan.integrations import live

    try:
        return _checked(*as_files(run, training), cluster, software, lengths, here=here)
    except MemplanError as error:
        if run.module is None or run.model is run.module:
            raise
        try:
            return _checked(*as_files(live.as_module(run), training), cluster, software, lengths, here=here)
        except MemplanError as other:
            if str(other) == str(error):
                raise error from None
            raise UnsupportedError(str(error)) from None


def _not_read(optimizer: str) -> Finding:
    return Finding(
        code="not-read",
        severity="warning",
        path="optimizer",
        message=f"The Trainer was given a {optimizer}, of whose states memplan knows nothing: optim was estimated.",
        remedy="Take the estimate with care.",
    )


_OF_OBJECTS = "TrainingArguments"
"""What messages call the arguments of a script that runs."""


def as_files(run: Live, training: TrainingSpec) -> tuple[Run, Any, TrainingSpec]:
    """What the files of a run would say, its model, and what is known beside: what is asked for wins."""
    from memplan.configs.arguments import parse_arguments
    from memplan.configs.run import Run, read_run

    known: dict[str, Any] = {}
    if run.of_a_trainer:
        files = read_run(run.said, _OF_OBJECTS)
    else:
        files = Run("the script")
        of_a_trainer = parse_arguments({}, "model").training
        said = parse_arguments(run.said, "model").training
        known = {name: value for name, value in said.items() if name not in of_a_trainer}
    if run.engine is not None:
        engine = read_run(run.engine, "config")
        if engine.arguments is not None:  # a file with TrainingArguments, or a folder
            known = {name: value for name, value in known.items() if name not in engine.arguments.training}
            files = replace(files, arguments=engine.arguments, cluster=engine.cluster, alloc_conf=engine.alloc_conf)
        raw = {**engine.raw, **files.raw}
        files = replace(files, engine=engine.engine, raw=raw, launcher=files.launcher or engine.launcher)
        files = replace(files, findings=(*files.findings, *engine.findings))
    if run.module is not None:
        files = _without_init(files, run.module)
    known |= run.training
    known = {name: value for name, value in known.items() if name not in training.model_fields_set}
    return files, run.model, training.replace(**known)


def _without_init(files: Run, module: Any) -> Run:
    """A run under ZeRO-3 whose model is there already, and whole: its engine partitions it as it is set up."""
    from memplan.integrations import live

    engine = files.engine
    if engine is None or engine.strategy.get("kind") != "zero3" or not live.made_whole(module):
        return files
    if getattr(getattr(module, "config", None), "quantization_config", None) is not None:
        return files  # which no zero.Init partitions (PreTrainedModel.get_init_context)
    strategy = {**engine.strategy, "zero": {**engine.strategy.get("zero", {}), "zero3_init_flag": False}}
    found = Finding(
        code="made-whole",
        severity="warning",
        path="model",
        message="Every rank has made the whole model in its host memory: ZeRO-3 partitions weights as they are made "
        "only where TrainingArguments, or an HfDeepSpeedConfig, are there before.",
        remedy="Make TrainingArguments first, and the model by from_pretrained or from_config.",
    )
    return replace(files, engine=replace(engine, strategy=strategy), findings=(*files.findings, found))


def _other_model(weights: int, trained: int, real: int, really_trained: int, error: MemplanError) -> Finding:
    return Finding(
        code="other-model",
        severity="warning",
        path="model",
        message=f"It has {real:,} weights, {really_trained:,} of them trained; what was estimated has {weights:,} and "
        f"{trained:,}, and the model itself could not be traced ({error})",
        remedy="Take the estimate with care.",
    )


def _at_most(tokens: int, config: Mapping[str, Any]) -> int:
    """As many tokens, or fewer if the model was made for fewer, as far as its config says so."""
    longest = config.get("max_position_embeddings") or config.get("n_positions")
    return min(tokens, longest) if isinstance(longest, int) and longest > 0 else tokens


def _unknown_length(path: str, taken: int) -> Finding:
    return Finding(
        code="seq-len-unknown",
        severity="info",
        path=path,
        message=f"Nothing says how many tokens a sequence has: {taken} are taken.",
        remedy='Say it, by --seq-len or --lengths, or training={"seq_len": ...} or lengths=.',
    )


def _here(spec: ClusterSpec, run: Live) -> tuple[ClusterSpec, list[Finding]]:
    """The cluster that is given, or this machine with what is free now, and the launcher's ranks; and what is to be
    said of it.
    """
    from memplan import findings
    from memplan.integrations import live

    fields: dict[str, Any] = {}
    found: list[Finding] = []
    launched = live.world()
    if launched is not None and "gpus" not in spec.model_fields_set:
        fields |= {"gpus": launched[0], "nodes": _nodes(*launched)}
    if spec.gpu is None and spec.gpu_memory is None:
        fields |= {"gpu": find_gpu("cpu")} if run.on_cpu else _free_gpus()
        if spec.host_memory is None and "gpu" in fields:
            fields["host_memory"] = host_memory()
    count = fields.pop("devices", 1)
    if launched is None and "gpus" not in spec.model_fields_set:
        fields["gpus"] = 1
        if count > 1 and run.of_a_trainer:
            found.append(findings.data_parallel_of(count))
    return spec.replace(**fields), found


def _nodes(ranks: int, on_node: int) -> int:
    """The nodes of ranks of which one has ``on_node``: as few as that takes, of those that share them evenly."""
    least = -(-ranks // on_node)
    return next(nodes for nodes in range(least, ranks + 1) if ranks % nodes == 0)


def _free_gpus() -> dict[str, Any]:
    """Fields of ClusterSpec, and how many ``devices`` there are: the fullest of those that are visible decides."""
    from memplan.catalog.detect import read_nvml, visible_devices
    from memplan.catalog.gpus import match_device
    from memplan.integrations import live
    from memplan.memory.runtime import cuda_context

    devices = read_nvml()
    sliced = any(device.mig for device in devices) or "MIG-" in os.environ.get("CUDA_VISIBLE_DEVICES", "")
    if not devices:
        return {}
    gpu = match_device(devices[0].name, devices[0].memory) if sliced else detect_cluster().gpu
    if not isinstance(gpu, GPUSpec):
        if not sliced:
            return {}
        remedy = "Say which one is near to it, by cluster=memplan.ClusterSpec(gpu=..., gpu_memory=...)."
        raise UnsupportedError.at("gpu", devices[0].name, "is not in the catalog", remedy)
    context = int(cuda_context(gpu, SoftwareSpec()).value)
    if sliced:
        return {"gpu": gpu, "gpu_memory": live.slice_memory(context), "devices": 1}
    visible = visible_devices(devices)
    free = min(live.free_memory(device, context) for device in visible)
    return {"gpu": gpu, "gpu_memory": free, "devices": len(visible)}


def installed_software() -> SoftwareSpec:
    """The versions of the libraries that are here."""
    from importlib import metadata

    found: dict[str, str] = {}
    for library in SoftwareSpec.model_fields:
        with suppress(metadata.PackageNotFoundError):
            found[library] = metadata.version(library).partition("+")[0]
    return SoftwareSpec(**found)
