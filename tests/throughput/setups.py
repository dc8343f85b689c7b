"""Setups that the tests of the step-time model share."""

from typing import Any

from memplan.case import model_spec
from memplan.catalog.gpus import find_gpu
from memplan.catalog.models import lookup
from memplan.estimator import resolve
from memplan.micro_batch import Setup
from memplan.specs.hardware import ClusterSpec
from memplan.specs.software import SoftwareSpec
from memplan.specs.strategy import Strategy
from memplan.specs.training import TrainingSpec
from memplan.throughput import Machine, StepTiming, step_time


def resolved(
    model: str = "TinyLlama/TinyLlama-1.1B-Chat-v1.0",
    gpu: str = "A100-80GB",
    gpus: int = 1,
    nodes: int = 1,
    strategy: Strategy | None = None,
    **training: Any,
) -> tuple[Setup, ClusterSpec, Strategy]:
    found = lookup(model)
    assert found is not None
    cluster = ClusterSpec(gpu=find_gpu(gpu), gpus=gpus, nodes=nodes, nvme_path="/nvme")
    strategy = strategy or Strategy()
    training = {"seq_len": 1024, **training}
    return (
        resolve(model_spec(found.config), TrainingSpec(**training), cluster, strategy, SoftwareSpec()),
        cluster,
        strategy,
    )


def timed(machine: Machine | None = None, **options: Any) -> StepTiming:
    return step_time(*resolved(**options), machine or Machine())


def seconds(timing: StepTiming, part: str) -> float:
    """Of a part, 0 where there is none."""
    return sum(each.seconds.expected for each in timing.parts if each.name == part)
