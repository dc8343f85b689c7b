"""What other estimators say of a run, beside memplan's answer for the same setup, and what each leaves out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from memplan import estimator, peers
from memplan.answers import Comparison, ComparisonRow, CountedModel, Tool
from memplan.architectures.nn import Build, Module
from memplan.architectures.registry import FAMILIES, attention_implementations, build_model, head_of
from memplan.errors import MemplanError, SpecError, UnsupportedError
from memplan.memory.timeline import COMPONENTS
from memplan.micro_batch import resized, run_of
from memplan.results import (
    Estimate,
)
from memplan.specs.hardware import ClusterSpec, GPUSpec
from memplan.specs.model import ModelSpec
from memplan.specs.software import SoftwareSpec
from memplan.specs.strategy import Strategy
from memplan.specs.training import TrainingSpec
from memplan.tape.dispatch import CPU
from memplan.tape.tape import Tape
from memplan.tape.tensor import dtype_named, float32

DEEPSPEEDS: tuple[Strategy, ...] = (
    Strategy(kind="zero2", offload_optimizer="cpu"),
    Strategy(kind="zero2"),
    Strategy(kind="zero3", offload_optimizer="cpu", offload_param="cpu"),
    Strategy(kind="zero3", offload_optimizer="cpu"),
    Strategy(kind="zero3"),
)
"""The setups that DeepSpeed's estimators print, in their order."""

_ZERO2_LEAVES_OUT = (
    "activations, logits, buckets, copies of the step, CUDA context, NCCL; frozen weights count as trained"
)
_ZERO3_LEAVES_OUT = (
    "activations, logits, buckets, weights gathered beyond the largest layer, copies of the step, CUDA context, NCCL; "
    "frozen weights count as trained"
)
_ACCELERATE_LEAVES_OUT = {
    "largest layer": "all but one layer",
    "total size": "all but weights and buffers",
    "training with Adam": "activations, logits, temporaries, sharding, DDP's buckets, the host, CUDA context, NCCL",
}
_RULE_LEAVES_OUT = (
    "temporaries, sharding, DDP's buckets, the host, NCCL; its activations are memplan's, it has no formula"
)
_MEMPLAN_LEAVES_OUT = "on the host what loading the checkpoint, the data and Python take; blocks that CUDA streams hold"


def compare(
    model: ModelSpec,
    training: TrainingSpec,
    cluster: ClusterSpec,
    strategies: Sequence[Strategy],
    software: SoftwareSpec,
    *,
    replay: bool = True,
) -> Comparison:
    """Compare the estimators on ``strategies``; those that know none answer once, beside the first.

    DeepSpeed's count AutoModel, as in its documentation, unless ``training.head`` names another class; accelerate's
    counts what its command loads. A setup that is not modelled, or that the libraries refuse, gets a row that says so.
    Raises SpecError if they refuse all of them, UnsupportedError for a family that is not written.
    """
    if model.model_type not in FAMILIES:
        remedy = f"Use one of {', '.join(sorted(FAMILIES))}."
        raise UnsupportedError.at("model_type", model.model_type, "is not written, and cannot be counted", remedy)
    answers = [_answer(model, training, cluster, each, software, replay=replay) for each in strategies]
    # A model without a head has no loss: the others can size it, memplan cannot train it.
    headless = (training.head or estimator.declared_head(model)) == "base"
    if not headless and all(isinstance(answer, SpecError) for answer in answers):
        raise next(answer for answer in answers if isinstance(answer, SpecError))
    head = training.head or "base"
    counted = peers.count(_model(resized(model, training), head, software))
    rows: list[ComparisonRow] = []
    for index, (strategy, answer) in enumerate(zip(strategies, answers, strict=True)):
        if index == 0:
            rows += _accelerate(resized(model, training), software)
            rows.append(_rule_of_thumb(model, training, cluster, strategy, software, answer))
        rows += _deepspeed(counted, strategy, cluster)
        rows.append(_memplan(strategy, answer))
    return Comparison(
        model=CountedModel(
            id=model.id, head=head, parameters=counted.parameters, largest_layer_parameters=counted.largest_layer
        ),
        gpus=cluster.gpus,
        nodes=cluster.nodes,
        rows=tuple(rows),
    )


def _model(model: ModelSpec, head: str, software: SoftwareSpec) -> Module:
    """One layer of each kind, in float32."""
    attn = attention_implementations(model.model_type)[0]
    return build_model(Build(Tape(CPU), float32, attn=attn, software=software, full_depth=False), model, head)


def _answer(
    model: ModelSpec,
    training: TrainingSpec,
    cluster: ClusterSpec,
    strategy: Strategy,
    software: SoftwareSpec,
    *,
    replay: bool,
) -> Estimate | MemplanError:
    try:
        return estimator.estimate(model, training, cluster, strategy, software, replay=replay)
    except (SpecError, UnsupportedError) as error:
        return error


# -- rows ------------------------------------------------------------------------------------------------------------


def _memplan(strategy: Strategy, answer: Estimate | MemplanError) -> ComparisonRow:
    option = _option(strategy)
    if isinstance(answer, MemplanError):
        return _no_answer("memplan", option, str(answer))
    gpu, host = answer.gpu.peak_device, answer.host.peak
    return ComparisonRow(tool="memplan", option=option, gpu=gpu, host=host, leaves_out=_MEMPLAN_LEAVES_OUT)


def _deepspeed(counted: peers.Counted, strategy: Strategy, cluster: ClusterSpec) -> Iterator[ComparisonRow]:
    if not strategy.is_deepspeed:
        return
    option = _option(strategy)
    offloads = (strategy.offload_optimizer, strategy.offload_param)
    if not any((strategy.kind, *offloads) == (s.kind, s.offload_optimizer, s.offload_param) for s in DEEPSPEEDS):
        yield _no_answer("DeepSpeed", option, "its estimators do not know this setup")
        return
    offload_optimizer, offload_param = (place == "cpu" for place in offloads)
    shape = (cluster.gpus_per_node, cluster.nodes)
    if strategy.kind == "zero2":
        states = peers.zero2_states(counted.parameters, *shape, offload_optimizer=offload_optimizer)
        yield _deepspeed_row(option, states, _ZERO2_LEAVES_OUT)
        return
    for zero_init in (True, False):
        states = peers.zero3_states(
            counted, *shape, offload_optimizer=offload_optimizer, offload_param=offload_param, zero_init=zero_init
        )
        yield _deepspeed_row(f"{option}, zero_init={zero_init:d}", states, _ZERO3_LEAVES_OUT)


def _deepspeed_row(option: str, states: peers.States, leaves_out: str) -> ComparisonRow:
    return ComparisonRow(tool="DeepSpeed", option=option, gpu=states.gpu, host=states.host, leaves_out=leaves_out)


def _accelerate(model: ModelSpec, software: SoftwareSpec) -> Iterator[ComparisonRow]:
    try:
        sizes = peers.maximum_sizes(_model(model, _accelerate_head(model), software))
    except (SpecError, UnsupportedError) as error:
        yield _no_answer("accelerate", "all dtypes", str(error))
        return
    for dtype, share in peers.ACCELERATE_DTYPES.items():
        times = peers.ACCELERATE_TRAINING.get(dtype)
        figures = {
            "largest layer": sizes.largest_layer / share,
            "total size": sizes.total / share,
            "training with Adam": None if times is None else sizes.total * times,
        }
        for name, nbytes in figures.items():
            option = f"{dtype}, {name}"
            if nbytes is None:
                yield _no_answer("accelerate", option, "it prints N/A for integers")
            else:
                leaves_out = _ACCELERATE_LEAVES_OUT[name]
                yield ComparisonRow(tool="accelerate", option=option, gpu=int(nbytes), host=None, leaves_out=leaves_out)


def _accelerate_head(model: ModelSpec) -> str:
    """AutoModel, or the class that a config with remote code names first (create_empty_model)."""
    auto_map = model.config.get("auto_map")
    names = auto_map if isinstance(auto_map, dict) else {}
    return next((head_of(name) for name in names if name.startswith("AutoModelFor")), "base")


def _rule_of_thumb(
    model: ModelSpec,
    training: TrainingSpec,
    cluster: ClusterSpec,
    strategy: Strategy,
    software: SoftwareSpec,
    answer: Estimate | MemplanError,
) -> ComparisonRow:
    """With the model and the dtype of memplan's answer."""
    tool: Tool = "rule of thumb"
    if isinstance(answer, MemplanError):
        return _no_answer(tool, "4 x weights + 1.3 GB + activations", str(answer))
    gpu = cluster.gpu if isinstance(cluster.gpu, GPUSpec) else None
    run, _ = run_of(estimator.resolve(model, training, cluster, strategy, software), gpu)
    activations = max(
        sum(size for name, size in zip(COMPONENTS, moment.parts) if name in ("activations", "logits"))
        for moment in run.profile.peaks.values()
    )
    dtype = str(answer.setup["dtype"])
    nbytes = peers.rule_of_thumb(answer.model.parameters, dtype_named(dtype).itemsize, activations)
    option = f"4 x {dtype} + 1.3 GB + activations"
    return ComparisonRow(tool=tool, option=option, gpu=nbytes, host=None, leaves_out=_RULE_LEAVES_OUT)


def _no_answer(tool: Tool, option: str, reason: str) -> ComparisonRow:
    return ComparisonRow(tool=tool, option=option, gpu=None, host=None, leaves_out=f"no answer: {reason}")


def _option(strategy: Strategy) -> str:
    """The strategy and what it offloads, in DeepSpeed's words."""
    offloads = {"offload_param": strategy.offload_param, "offload_optimizer": strategy.offload_optimizer}
    return ", ".join([strategy.kind, *(f"{name}={place}" for name, place in offloads.items() if place != "none")])
