"""What a recording says of a batch of another size is what a run on it says, for every family."""

from __future__ import annotations

from itertools import cycle
from typing import Any

import pytest
from tests.laws.test_depth import RELEASES, models, release_id, trainings

from memplan.catalog.gpus import find_gpu
from memplan.errors import MemplanError
from memplan.estimator import resolve
from memplan.micro_batch import MicroBatch, Recording, Setup, _run
from memplan.specs.hardware import ClusterSpec
from memplan.specs.software import SoftwareSpec
from memplan.specs.strategy import Strategy
from memplan.specs.training import TrainingSpec

SIZES = [(1, 1), (2, 24), (3, 31), (4, 128), (5, 512)]
"""(batch, length): short and long, lengths that are also widths of the models, and multiples of nothing."""
STRATEGIES = ("single", "zero2", "zero3", "fsdp")


def all_of(micro: MicroBatch) -> list[Any]:
    """Everything that an estimate takes from a micro-batch."""
    tape, unrolled = micro.tape, micro.unrolled
    return [
        (tape.log, tape.sizes, tape.components, tape.flops, tape.input_count),
        (tape.flowing, tape.held, tape.kept, tape.passed, tape.passed_gradients),
        [(mark.name, mark.layer, mark.position, mark.flops, mark.events) for mark in tape.marks],
        [(event.position, event.kind, event.storage) for event in tape.events],
        (micro.predictions, micro.assumptions),
        (unrolled.profile(), unrolled.size_counts(), unrolled.changes),
        [(segment, count) for segment, count in unrolled.runs],
    ]


def runner(setup: Setup, accumulated: bool, evaluation: bool) -> Any:
    def run(batch: Any, length: Any) -> MicroBatch:
        return _run(setup, batch, length, False, accumulated, evaluation)

    return run


@pytest.mark.parametrize("gpu", ["cpu", "A100-80GB"])
@pytest.mark.parametrize(("family", "software"), RELEASES, ids=release_id)
def test_recording_says_what_a_run_says(family: str, software: SoftwareSpec, gpu: str) -> None:
    strategies = cycle(STRATEGIES)
    told = 0
    for training in trainings(family, len(gpu)):
        spec = TrainingSpec(seq_len=24, **training)
        strategy = Strategy() if gpu == "cpu" else Strategy(kind=next(strategies))
        try:
            setup = resolve(models(family, 4)[0], spec, ClusterSpec(gpu=find_gpu(gpu)), strategy, software)
            run = runner(setup, spec.grad_accum_steps > 1, evaluation=training["liger"])
            recording = Recording.of(run, 2, 416, run(2, 416)) or Recording.of(run, 2, 48, run(2, 48))
        except MemplanError:  # what Liger, the engine or the GPU refuses
            continue
        for batch, length in SIZES:
            found = None if recording is None else recording.micro_batch(batch, length)
            if found is not None:
                assert all_of(found) == all_of(run(batch, length)), (training, batch, length)
                told += 1
    assert told
