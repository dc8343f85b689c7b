"""The allocator's replay beside the phases, where evaluation decides."""

from __future__ import annotations

from typing import Any

import pytest

import memplan
from memplan.memory.depth import as_it_ran
from memplan.memory.evaluation import Kept
from memplan.memory.timeline import unroll
from memplan.memory.trace import Batch, EvaluationLoop, _evaluate, _Replay
from memplan.specs.strategy import ZeroSpec
from memplan.specs.training import AllocatorSpec
from memplan.tape.tape import Tape
from memplan.tape.tensor import float32
from memplan.units import MiB

CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 128,
    "intermediate_size": 344,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 32000,
}


def estimated(gpus: int = 1, replay: bool = True, gpu_memory: int | None = None, **training: Any) -> memplan.Estimate:
    cluster = memplan.ClusterSpec(gpu="A100-80GB", gpus=gpus, gpu_memory=gpu_memory)
    strategy = memplan.Strategy(kind="single" if gpus == 1 else "ddp")
    spec = memplan.TrainingSpec(seq_len=128, **training)
    return memplan.estimate(CONFIG, spec, cluster, strategy, replay=replay)


@pytest.mark.parametrize("gpus", [1, 2])
@pytest.mark.parametrize("steps", [None, 1, 2, 3, 7])
def test_evaluation_is_replayed_and_bounded(gpus: int, steps: int | None) -> None:
    training: dict[str, Any] = {"eval_batch_size": 24, "eval_accumulation_steps": steps}
    replayed, bound = (estimated(gpus, flag, **training).gpu for flag in (True, False))
    levels = [{phase.name: phase.allocated for phase in gpu.phases} for gpu in (replayed, bound)]
    assert replayed.peak_phase == "eval"
    assert levels[0]["eval"] == pytest.approx(levels[1]["eval"], rel=0.01)
    # What is cached from training does not fit the logits of a larger batch.
    assert replayed.peak_allocated < replayed.peak_reserved <= bound.peak_reserved
    assert replayed.peak_reserved > estimated(gpus).gpu.peak_reserved


@pytest.mark.parametrize("kind", ["zero0", "zero1", "zero2", "zero3", "fsdp"])
@pytest.mark.parametrize("steps", [None, 1, 3])
def test_evaluation_under_an_engine_is_replayed_and_bounded(kind: str, steps: int | None) -> None:
    training = memplan.TrainingSpec(seq_len=128, eval_batch_size=24, eval_accumulation_steps=steps)
    cluster, strategy = memplan.ClusterSpec(gpu="A100-80GB", gpus=4), memplan.Strategy(kind=kind)
    if kind.startswith("zero") and kind != "zero0":
        strategy = strategy.replace(zero=ZeroSpec(reduce_bucket_size=100_000))
    replayed, bound = (memplan.estimate(CONFIG, training, cluster, strategy, replay=flag) for flag in (True, False))
    levels = [{phase.name: phase.allocated for phase in each.gpu.phases} for each in (replayed, bound)]
    assert replayed.gpu.peak_phase == "eval"
    assert levels[0]["eval"] == pytest.approx(levels[1]["eval"], rel=0.02)
    assert replayed.gpu.peak_allocated <= replayed.gpu.peak_reserved <= bound.gpu.peak_reserved
    host = {phase.name: phase.allocated for phase in replayed.host.phases}
    # Each of the four has all four's logits, in 16 bit and, for NumPy, in float32.
    assert host["eval"] - host["idle"] == 4 * 4 * (steps or 0) * 24 * 128 * 32000 * (2 + 4)


def test_an_engine_is_confined_as_training_itself_is_not() -> None:
    training = memplan.TrainingSpec(seq_len=128, micro_batch_size=8, eval_batch_size=40)
    strategy = memplan.Strategy(kind="fsdp")

    def high(gpu_memory: int | None) -> memplan.Estimate:
        cluster = memplan.ClusterSpec(gpu="A100-80GB", gpus=4, gpu_memory=gpu_memory)
        return memplan.estimate(CONFIG, training, cluster, strategy)

    free = high(None).gpu
    small = high(free.high - 256 * MiB)
    assert small.gpu.peak_allocated == free.peak_allocated
    assert small.gpu.high <= free.high - 256 * MiB
    assert small.verdict == "fits"


def test_what_training_cached_goes_before_evaluation_dies() -> None:
    training: dict[str, Any] = {"micro_batch_size": 8, "eval_batch_size": 40}
    free = estimated(**training).gpu
    small = estimated(gpu_memory=free.high - 256 * MiB, **training)
    assert small.gpu.peak_allocated == free.peak_allocated
    assert small.gpu.high <= free.high - 256 * MiB
    assert small.verdict == "fits"


def test_training_itself_keeps_what_it_has_cached() -> None:
    training: dict[str, Any] = {"micro_batch_size": 24, "eval_batch_size": 1}
    free = estimated(**training).gpu
    assert estimated(gpu_memory=free.high - 1, **training).gpu.peak_reserved == free.peak_reserved


@pytest.mark.parametrize("rows", [10, 100])
def test_an_evaluation_that_dies_reserves_more_than_there_is(rows: int) -> None:
    tape = Tape()
    x = tape.new((rows, MiB), float32, "logits")
    del x
    tape.close()
    limit = rows * 4 * MiB - MiB
    replay = _Replay(AllocatorSpec())
    replay.free(replay.allocate("step", [8 * MiB]))
    batch = Batch(as_it_ran(unroll(tape, {})), tape.sizes, input_count=0)
    _evaluate(replay, EvaluationLoop(batch, Kept((), 1), 1, limit))
    assert replay.peak_reserved == rows * 4 * MiB > limit
