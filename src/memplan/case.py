"""What every setup of one call shares: the model, the cluster and the versions, from what a user writes."""

from __future__ import annotations

import os
import sys
from collections.abc import Container, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeAlias, TypeGuard, TypeVar, Union

from memplan import estimator, micro_batch
from memplan.adapters.lora import targets_to_choose
from memplan.architectures.registry import FAMILIES
from memplan.catalog import hub
from memplan.catalog.detect import detect_cluster, free_disk
from memplan.catalog.gpus import find_gpu, parse_cluster
from memplan.errors import MemplanError, PositionsError, SpecError, UnsupportedError
from memplan.results import Assumption, Estimate, StepTime, verdict_by_place
from memplan.space import Setup
from memplan.specs._base import Spec
from memplan.specs.hardware import ClusterSpec, GPUSpec
from memplan.specs.model import ModelSpec
from memplan.specs.software import SoftwareSpec
from memplan.specs.strategy import Strategy
from memplan.specs.training import TrainingSpec

if TYPE_CHECKING:
    from torch import nn

    from memplan.configs.setup import EngineConfig
    from memplan.introspect.extrapolate import Inputs
    from memplan.planner import Bounder, Timer

ModelLike: TypeAlias = Union[str, os.PathLike[str], ModelSpec, Mapping[str, Any], "nn.Module"]
"""A hub id, a path, a ModelSpec, the values of a config.json, or a module of torch."""

TrainingLike: TypeAlias = TrainingSpec | Mapping[str, Any] | None

ClusterLike: TypeAlias = str | ClusterSpec | Mapping[str, Any] | None

StrategyLike: TypeAlias = str | Strategy | Mapping[str, Any] | None

SoftwareLike: TypeAlias = str | SoftwareSpec | Mapping[str, Any] | None
"""A spec, its fields as a mapping, or the text that is short for it; None is its defaults."""


EngineConfigLike: TypeAlias = str | os.PathLike[str] | Mapping[str, Any] | None
"""A path, or the values of the file."""


def case_of(
    model: ModelLike,
    cluster: ClusterLike,
    software: SoftwareLike,
    config: EngineConfig | None = None,
    *,
    trace: bool = False,
    inputs: Inputs | None = None,
) -> Case:
    """What is asked about, resolved: names looked up, a config's cluster taken over, a module traced.

    Raises ResolutionError for what is not found, SpecError for a wrong value.
    """
    versions = software_spec(software)
    notes: list[Assumption] = []
    if config is not None:
        from memplan.configs.setup import with_cluster

        cluster, notes = with_cluster(config, cluster_spec(cluster))
    if not trace and not is_module(model):
        if inputs is not None:
            raise SpecError.at("inputs", inputs, "are for a trace", "Use trace=True, or leave them out.")
        return Case(model_spec(model), known_cluster(cluster), versions, notes=tuple(notes))
    from memplan.introspect import extrapolate

    known = extrapolate.known_model_types()
    module = model if is_module(model) else None
    spec = model_spec(model, known) if module is None else extrapolate.module_spec(module)
    return Case(
        spec, known_cluster(cluster), extrapolate.installed(versions), Tracer(module, inputs), notes=tuple(notes)
    )


@dataclass(frozen=True, slots=True)
class Case:
    """What every setup of one call shares, resolved."""

    model: ModelSpec
    cluster: ClusterSpec
    software: SoftwareSpec
    tracer: Tracer | None = None
    notes: tuple[Assumption, ...] = ()

    def estimate(self, setup: Setup, *, replay: bool = True, explain: bool = False) -> Estimate:
        specs = (self.model, setup.training, self.cluster, setup.strategy, self.software)
        if self.tracer is None:
            return estimator.estimate(*specs, replay=replay, explain=explain)
        if setup.training.task != "train":
            remedy = "Leave --trace out and name the model or give its config, or use --task train."
            raise UnsupportedError(f"trace: a training step can be traced, task {setup.training.task} cannot. {remedy}")
        traced = self.tracer.trace(estimator.resolve(*specs))
        result = estimator.estimate(*specs, replay=replay, explain=explain, traced=traced)
        return self.tracer.beside_the_written(result, *specs) if replay else result

    def answer(self, setup: Setup, *, replay: bool, explain: bool) -> Estimate:
        """The estimate, with its step's time; but not where haste is asked for: the time takes longer than the rest."""
        found = self.estimate(setup, replay=replay, explain=explain)
        return self.with_time(setup, found) if replay else found

    def with_time(self, setup: Setup, found: Estimate) -> Estimate:
        """The estimate with its step's time, of a training run on a GPU that is known, and the time's interval."""
        gpu = self.cluster.gpu
        if setup.training.task != "train" or not isinstance(gpu, GPUSpec) or gpu.is_cpu:
            return found
        from memplan import throughput  # here, because an estimate without a GPU does not need it

        resolved = estimator.resolve(self.model, setup.training, self.cluster, setup.strategy, self.software)
        if self.tracer is not None:
            resolved = replace(resolved, traced=self.tracer.trace(resolved))
        timing = throughput.step_time(resolved, self.cluster, setup.strategy)
        assumptions = (*found.assumptions, Assumption.of(timing.interval), *_measured_rates(gpu))
        return found.model_copy(update={"step": timing.result(), "assumptions": assumptions})

    def timed(self, setup: Setup, exact: bool) -> Estimate:
        """The estimate as the files that are written have it; with the time of a step, if it is ``exact``."""
        from memplan.configs import launch

        setup = replace(setup, strategy=launch.as_written(setup.strategy))
        found = self.estimate(setup, replay=exact)
        return found.model_copy(update={"step": self._step(setup)}) if exact else found

    @property
    def bound(self) -> Bounder | None:
        """What a setup of :meth:`timed` cannot do without; of a trace only the estimate tells."""
        if self.tracer is not None:
            return None
        from memplan.configs import launch

        def least(setup: Setup, played: bool) -> estimator.Least:
            strategy = launch.as_written(setup.strategy)
            return estimator.least(self.model, setup.training, self.cluster, strategy, self.software, played=played)

        return least

    def seconds(self, setup: Setup, *, as_written: bool = True) -> float:
        """The time of a step, as in :meth:`timed`; or of the setup as it stands, as in :meth:`estimate`."""
        from memplan import throughput
        from memplan.configs import launch

        strategy = launch.as_written(setup.strategy) if as_written else setup.strategy
        resolved = estimator.resolve(self.model, setup.training, self.cluster, strategy, self.software)
        return throughput.expected_seconds(resolved, self.cluster, strategy)

    @property
    def least_seconds(self) -> Timer | None:
        """At the most :meth:`seconds`, but sooner told; of a trace only the time itself is."""
        if self.tracer is not None:
            return None
        from memplan import throughput
        from memplan.configs import launch

        def least(setup: Setup) -> float:
            strategy = launch.as_written(setup.strategy)
            resolved = estimator.resolve(self.model, setup.training, self.cluster, strategy, self.software)
            return throughput.least_seconds(resolved, self.cluster, strategy)

        return least

    def _step(self, setup: Setup) -> StepTime:
        from memplan import throughput  # here, because one estimate does not need it

        resolved = estimator.resolve(self.model, setup.training, self.cluster, setup.strategy, self.software)
        return throughput.step_time(resolved, self.cluster, setup.strategy).result()

    def decided(self, training: TrainingSpec) -> TrainingSpec:
        """The training with what the model itself decides, if it is a module."""
        return training if self.tracer is None else self.tracer.decided(training)

    def with_nvme(self, setup: Setup) -> Setup:
        """The setup with what offloading to NVMe asks for, where there is one."""
        if self.cluster.nvme is None or setup.training.task != "train" or self.tracer is not None:
            return setup
        strategy = Strategy(kind="zero3")
        resolved = estimator.resolve(self.model, setup.training, self.cluster, strategy, self.software)
        run, _ = micro_batch.run_of(resolved, self.cluster.gpu if isinstance(self.cluster.gpu, GPUSpec) else None)
        largest = max(p.numel for p, _ in run.parameters)
        return replace(setup, nvme_buffer_size=-(-largest // self.cluster.gpus))

    def on(self, gpu: GPUSpec) -> Case:
        """The same on another GPU."""
        return replace(self, cluster=self.cluster.replace(gpu=gpu, gpu_memory=None))

    def kind_of(self, gpu: GPUSpec, setup: Setup) -> object:
        """What a setup's tensors on a GPU depend on, but for the partial sums of kernels; None if it is refused."""
        try:
            spec = self.on(gpu)
            resolved = estimator.resolve(spec.model, setup.training, spec.cluster, setup.strategy, spec.software)
        except MemplanError:
            return None
        return resolved.precision, replace(resolved.rules, multiprocessors=1)

    def floor(self, setup: Setup) -> int:
        """What every GPU of this one's kind has allocated at the peak; nothing if the setup is refused."""
        try:
            memory = self.estimate(setup, replay=False).gpu
        except MemplanError:
            return 0
        return memory.peak_allocated - memory.components.workspace - memory.components.temporaries

    def computes_in(self, setup: Setup) -> bool:
        """Whether the GPU has units for the setup's dtype."""
        gpu = self.cluster.gpu
        return not (isinstance(gpu, GPUSpec) and setup.training.dtype == "bfloat16" and not gpu.supports_bf16)

    def fits_where_known(self, setup: Setup) -> bool:
        """Whether the setup fits for certain on the GPU, and wherever else it is known how much there is.

        Raises what :meth:`estimate` raises.
        """
        found = self._looked_at(setup)
        return not {"does-not-fit", "tight"} & set(verdict_by_place(found.gpu, found.host, found.nvme).values())

    def fits(self, setup: Setup) -> bool:
        """Whether the setup fits for certain; what the estimator refuses does not."""
        try:
            return self._looked_at(setup).verdict == "fits"
        except MemplanError:
            return False

    def _looked_at(self, setup: Setup) -> Estimate:
        """The estimate, replayed where only that can tell: without it the GPU's high end is an upper bound."""
        found = self.estimate(setup, replay=False)
        places = verdict_by_place(found.gpu, found.host, found.nvme)
        if places["gpu"] == "tight" and "does-not-fit" not in places.values():
            found = self.estimate(setup)
        return found


@dataclass(frozen=True, slots=True)
class Tracer:
    """Traces the setups of one call, each once."""

    module: nn.Module | None
    inputs: Inputs | None
    traced: dict[tuple[object, ...], micro_batch.Traced] = field(default_factory=dict)

    def trace(self, setup: micro_batch.Setup) -> micro_batch.Traced:
        from memplan.introspect.extrapolate import trace_model

        key = (setup.training.replace(optim="sgd"), setup.precision, setup.rules, setup.engine, setup.copies_gradients)
        if key not in self.traced:
            self.traced[key] = trace_model(setup, self.module, self.inputs)
        return self.traced[key]

    def is_written(self, model: ModelSpec) -> bool:
        """Whether an architecture file says of what is traced what it should be."""
        return self.module is None and model.model_type in FAMILIES

    def decided(self, training: TrainingSpec) -> TrainingSpec:
        from memplan.introspect.extrapolate import decided_by

        return training if self.module is None else decided_by(self.module, training)

    def beside_the_written(
        self,
        result: Estimate,
        model: ModelSpec,
        training: TrainingSpec,
        cluster: ClusterSpec,
        strategy: Strategy,
        software: SoftwareSpec,
    ) -> Estimate:
        """Name what the architecture file says, where there is one that disagrees with the trace."""
        if not self.is_written(model):
            return result
        try:
            written = estimator.estimate(model, training, cluster, strategy, software, replay=False)
        except SpecError as error:
            if str(error).startswith("seq_len:"):  # positions end with their table: without data no trace sees it
                raise
            return result
        except MemplanError:
            return result
        own, other = result.gpu.steady_allocated, written.gpu.steady_allocated
        if abs(other / own - 1) <= DISAGREEMENT:
            return result
        assumption = Assumption(
            name="written family",
            value=other,
            low=min(own, other),
            high=max(own, other),
            source=f"steady_allocated by the architecture file {FAMILIES[model.model_type]}.py, "
            f"{other / own - 1:+.1%} beside the trace, which is shown",
        )
        return result.model_copy(update={"assumptions": (*result.assumptions, assumption)})


DISAGREEMENT = 0.03
"""How far trace and architecture file may be apart before the answer says so: ten times what they should be."""


def asked_setup(
    case: Case, training: TrainingSpec, strategy: StrategyLike, config: EngineConfig | None = None
) -> Setup:
    """The setup that is asked for: an engine's config with what the other arguments say over it."""
    targets = targets_to_choose(case.model.model_type)
    if config is not None:
        from memplan.configs.setup import with_training

        if training.task != "train":
            problem = f"has no use in task {training.task}: it is of a training run"
            raise SpecError.at("engine_config", config.source, problem, "Leave it out, or use --task train.")
        training, spread, notes = with_training(config, training, strategy_fields(strategy), case.cluster.gpus)
        training, fewer = within_positions(case, training)
        said = (*case.notes, *notes, *config.assumptions, *fewer)
        return Setup(training, spread, case.cluster.gpus, lora_targets=targets, notes=said)
    spread = default_strategy(training, case.cluster) if strategy is None else _strategy_spec(strategy)
    training, fewer = within_positions(case, training)
    is_gpu_known = case.cluster.gpu is not None
    return Setup(training, spread, case.cluster.gpus, is_gpu_known=is_gpu_known, lora_targets=targets, notes=fewer)


def within_positions(case: Case, training: TrainingSpec) -> tuple[TrainingSpec, tuple[Assumption, ...]]:
    """The training with as many tokens as the model has positions for, where that is fewer than the default and nobody
    says how many; and a note of it.
    """
    config = case.model.config
    longest = config.get("max_position_embeddings") or config.get("n_positions")
    is_long = not isinstance(longest, int) or longest >= training.seq_len  # then nothing need be run
    is_written = case.tracer is None or case.tracer.is_written(case.model)
    if "seq_len" in training.model_fields_set or is_long or not is_written or training.task == "load":
        return training, ()
    try:
        resolved = estimator.resolve(case.model, training, case.cluster, Strategy(), case.software)
        micro_batch.run_in_full(resolved)
    except PositionsError as error:
        most = error.most
        if training.task == "generate":
            from memplan.memory.generation import DEFAULT_NEW_TOKENS  # here, because training needs none of it

            most -= (training.max_new_tokens or DEFAULT_NEW_TOKENS) - 1  # the last is not fed back
        if most < 1:
            return training, ()
        source = f"the default is {training.seq_len}, and the model has positions for {error.most}"
        note = Assumption(name="seq_len (tokens)", value=most, low=most, high=most, source=source)
        return training.replace(seq_len=most), (note,)
    except MemplanError:  # is raised again where the setup is estimated
        pass
    return training, ()


def default_strategy(training: TrainingSpec, cluster: ClusterSpec) -> Strategy:
    """Return plain training on one GPU and DDP on several; loading and generation have one copy of the model."""
    return Strategy(kind="ddp" if cluster.gpus > 1 and training.task == "train" else "single")


def as_asked(case: Case, setup: Setup) -> dict[str, Any]:
    """Fields of a setup, with which :func:`estimate_again` makes it again."""
    gpu = case.cluster.gpu
    specs = {"training": setup.training, "cluster": case.cluster, "strategy": setup.strategy}
    fields = {name: spec.model_dump(mode="json", exclude_unset=True) for name, spec in specs.items()}
    fields["cluster"]["gpu"] = gpu.name if isinstance(gpu, GPUSpec) else None
    return fields


def is_module(model: object) -> TypeGuard[nn.Module]:
    """Whether it is a module of torch, which is not imported for it."""
    # Whoever holds a module has imported torch.
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(model, torch.nn.Module)


def model_spec(model: ModelLike, known_model_types: Container[str] = FAMILIES) -> ModelSpec:
    """The model that a name, a path, a mapping or a spec stands for."""
    if isinstance(model, ModelSpec):
        return model
    if isinstance(model, Mapping):
        name = str(model.get("_name_or_path") or "config")
        return hub._spec(name, dict(model), "mapping", known_model_types)
    if isinstance(model, (str, os.PathLike)):
        return hub.resolve_config(model, known_model_types=known_model_types)
    remedy = "Give a hub id, a path, a config as a mapping, a ModelSpec or an nn.Module."
    raise SpecError.at("model", model, "is not a model", remedy)


def training_spec(training: TrainingLike) -> TrainingSpec:
    """The run that a mapping or a spec stands for; None is the defaults."""
    remedy = "Give a TrainingSpec, or its fields as a mapping."
    return _spec(TrainingSpec, training, "training", remedy)


def _strategy_spec(strategy: StrategyLike) -> Strategy:
    """The strategy that a kind, a mapping or a spec stands for."""
    if isinstance(strategy, str):
        strategy = {"kind": strategy}
    return _spec(Strategy, strategy, "strategy", "Give a kind, as in ddp, a Strategy, or its fields as a mapping.")


def strategy_fields(strategy: StrategyLike) -> Mapping[str, Any]:
    """What a strategy says beside a config, which may be what makes it whole."""
    if isinstance(strategy, Strategy):
        return {name: getattr(strategy, name) for name in strategy.model_fields_set}
    if isinstance(strategy, Mapping):
        return strategy
    return {} if strategy is None else {"kind": strategy}


def engine_config_of(config: EngineConfigLike) -> EngineConfig:
    """A DeepSpeed JSON or accelerate YAML, read."""
    from memplan.configs.read import read_engine_config  # here, because most runs have none

    return read_engine_config(config)


def software_spec(software: SoftwareLike) -> SoftwareSpec:
    """The versions that a text, a mapping or a spec stands for; None is the defaults."""
    if isinstance(software, str):
        return SoftwareSpec.parse(software)
    remedy = "Write it as torch=2.13, or give a SoftwareSpec, or its fields as a mapping."
    return _spec(SoftwareSpec, software, "software", remedy)


S = TypeVar("S", bound=Spec)


def _spec(cls: type[S], value: object, field: str, remedy: str) -> S:
    if isinstance(value, cls):
        return value
    if value is not None and not isinstance(value, Mapping):
        raise SpecError.at(field, value, "is not a spec", remedy)
    return cls.from_dict(value or {})


def cluster_spec(cluster: ClusterLike) -> ClusterSpec:
    """The cluster that a text, a mapping or a spec stands for, as it is written."""
    if isinstance(cluster, str):
        return parse_cluster(cluster)
    remedy = "Write it as 2xA100-80GB, or give a ClusterSpec, or its fields as a mapping."
    return _spec(ClusterSpec, cluster, "cluster", remedy)


def known_cluster(cluster: ClusterLike) -> ClusterSpec:
    """The cluster with its GPU looked up, or this machine's where none is named."""
    spec = cluster_spec(cluster)
    if spec.gpu is None:
        return _on_this_machine(spec)
    gpu = find_gpu(spec.gpu) if isinstance(spec.gpu, str) else spec.gpu
    if "MEMPLAN_PROFILE" in os.environ and not gpu.measured:  # a profile that is named
        from memplan.catalog.profile import calibrated

        gpu = calibrated(gpu)
    return spec if gpu is spec.gpu else spec.replace(gpu=gpu)


def _measured_rates(gpu: GPUSpec) -> tuple[Assumption, ...]:
    """What decides a step's time of a profile."""
    if not gpu.measured:
        return ()
    from memplan.catalog.profile import RATES

    return tuple(Assumption.of(rate) for rate in gpu.measured if rate.name in RATES)


def _on_this_machine(spec: ClusterSpec) -> ClusterSpec:
    """Fill in this machine's GPU, and its host memory and disk if the run is on it alone."""
    here = detect_cluster()
    if here.gpu is None:
        return spec
    gpus = spec.gpus if "gpus" in spec.model_fields_set else here.gpus
    from memplan.catalog.profile import calibrated  # here, because without a GPU there is none

    gpu = calibrated(here.gpu) if isinstance(here.gpu, GPUSpec) else here.gpu
    found: dict[str, Any] = {"gpu": gpu, "gpus": gpus, "gpu_memory": spec.gpu_memory or here.gpu_memory}
    if spec.nodes == 1 and gpus <= here.gpus:
        found["host_memory"] = spec.host_memory or here.host_memory
        if spec.nvme is None and spec.nvme_path is not None:
            found["nvme"] = free_disk(spec.nvme_path)
    return spec.replace(**found)
