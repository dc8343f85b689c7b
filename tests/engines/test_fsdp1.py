"""FSDP1: what its keys do to memory. Bytes are compared with the real one in tests/oracles/test_engines.py."""

from __future__ import annotations

from typing import Any

import pytest
from tests.engines.test_wrapping import run

import memplan
from memplan.engines.fsdp1 import FlatParam
from memplan.engines.wrapping import Row, Unit
from memplan.memory.broadcast import BUCKET
from memplan.specs.strategy import FsdpSpec
from memplan.tape.tensor import bfloat16, float32


def level(phase: str, **keys: Any) -> int:
    return {each.name: each.allocated for each in run(version=1, **keys).gpu.phases}[phase]


@pytest.mark.parametrize("steps", [1, 3])
def test_sharding_less_needs_more(steps: int) -> None:
    training = {"grad_accum_steps": steps}
    levels = [
        level("backward", sharding_strategy=name, training=training)
        for name in ("FULL_SHARD", "SHARD_GRAD_OP", "NO_SHARD")
    ]
    assert levels == sorted(levels)
    assert len(set(levels)) == 3


def test_with_one_rank_nothing_is_sharded() -> None:
    assert run(version=1, gpus=1).gpu == run(version=1, gpus=1, sharding_strategy="NO_SHARD").gpu


def test_original_parameters_keep_the_gradients_until_the_next_forward() -> None:
    """zero_grad clears the weights' gradients, which are views of the flat gradient, and that one stays."""
    weights = run(version=1).gpu.components.weights
    kept = level("idle") - level("idle", use_orig_params=False)
    assert kept == pytest.approx(weights, rel=0.01)


@pytest.mark.parametrize("key", [{"backward_prefetch": "BACKWARD_PRE"}, {"forward_prefetch": True}], ids=str)
def test_prefetching_needs_more(key: dict[str, Any]) -> None:
    assert level("backward", **key) > level("backward")


def test_prefetching_after_a_backward_needs_no_more() -> None:
    assert level("backward", backward_prefetch="BACKWARD_POST") == level("backward")


def test_weights_that_are_broadcast_leave_buckets_in_the_cache() -> None:
    """Beside the weights they need less than the flat copy after them, so nothing that is allocated tells of them."""
    synced, alone = (
        memplan.estimate(
            "meta-llama/Llama-2-7b",
            memplan.TrainingSpec(seq_len=256, gradient_checkpointing=True, lora=memplan.LoraSpec(rank=8)),
            "8xA100-80GB",
            memplan.Strategy(
                kind="fsdp", fsdp=FsdpSpec(version=1, sync_module_states=each, cpu_ram_efficient_loading=each)
            ),
        ).gpu
        for each in (True, False)
    )
    assert synced.phases == alone.phases
    assert BUCKET < synced.peak_reserved - alone.peak_reserved < 2.5 * 2 * BUCKET


def flat(ranks: int, use_orig_params: bool, *elements: int, itemsize: int = 4, trained: bool = True) -> FlatParam:
    gathered = bfloat16.itemsize
    rows = [Row((number, 0), n, 1, itemsize, itemsize, gathered, trained, ranks) for number, n in enumerate(elements)]
    return FlatParam(Unit(rows, (0, 0), (0, 0), True), ranks, ranks > 1, use_orig_params)


def test_original_parameters_begin_at_multiples_of_16_bytes() -> None:
    aligned, packed = flat(3, True, 5, 20, 3), flat(3, False, 5, 20, 3)
    assert [at for _, at in aligned.offsets] == [0, 8, 32]
    assert (aligned.elements, aligned.shard, aligned.padded) == (36, 12, 36)
    assert [at for _, at in packed.offsets] == [0, 5, 25]
    assert (packed.elements, packed.shard, packed.padded) == (28, 10, 30)
    assert [(row.key, n) for row, n in aligned.pieces()] == [((0, 0), 5), ((1, 0), 4)]


def test_frozen_16_bit_weights_are_not_cast() -> None:
    frozen = flat(2, True, 64, itemsize=2, trained=False)
    assert not frozen.is_cast
    assert not list(frozen.pieces())
    assert flat(2, True, 64, itemsize=float32.itemsize).is_cast
