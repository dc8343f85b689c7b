"""A kept play tells of every batch what one on the batch tells, and of the allocator what all layers do."""

from __future__ import annotations

from typing import Any

import pytest
from tests.laws.test_sharded import CONFIG, ENGINES, name

from memplan import sharded
from memplan.catalog.gpus import find_gpu
from memplan.engines import plain
from memplan.estimator import estimate, least, resolve
from memplan.memory.allocator import CachingAllocator
from memplan.memory.course import Ledger
from memplan.memory.depth import as_it_ran
from memplan.micro_batch import Setup, run_of
from memplan.specs.hardware import ClusterSpec
from memplan.specs.model import ModelSpec
from memplan.specs.software import SoftwareSpec
from memplan.specs.strategy import Strategy
from memplan.specs.training import TrainingSpec

GPUS = 4
RUNS: list[dict[str, Any]] = [
    {},
    {"gradient_checkpointing": True, "grad_accum_steps": 4, "attn": "eager"},
    {"lora": 8, "grad_accum_steps": 2, "eval_batch_size": 3, "eval_accumulation_steps": 2},
]
SIZES = [(1, 64), (3, 48), (2, 200), (1, 8), (4, 64), (5, 72)]
"""The last ones are told by a recording, and by a play of others."""


MODEL = ModelSpec(id="llama", model_type="llama", architecture="LlamaForCausalLM", config=CONFIG, source="test")


def resolved(strategy: Strategy, batch: int, length: int, training: dict[str, Any]) -> Setup:
    spec = TrainingSpec(micro_batch_size=batch, seq_len=length, **training)
    cluster = ClusterSpec(gpu=find_gpu("A100-80GB"), gpus=GPUS, nvme="1TB")
    return resolve(MODEL, spec, cluster, strategy, SoftwareSpec())


@pytest.mark.parametrize("training", RUNS, ids=str)
@pytest.mark.parametrize("strategy", ENGINES, ids=name)
def test_a_kept_play_says_what_one_on_the_batch_says(strategy: Strategy, training: dict[str, Any]) -> None:
    for batch, length in SIZES:
        setup = resolved(strategy, batch, length, training)
        found = sharded.play_ranks(setup, None, strategy, GPUS, GPUS)
        ledger = Ledger(ranks=GPUS)
        sharded.play_engine(setup, None, strategy, GPUS, GPUS, found.rank, ledger, full_depth=False)
        for phase, parts in found.gpu.items():
            assert parts == {part: size for part, size in ledger.fullest(phase).items() if size}, (batch, length, phase)
            assert found.host[phase] == ledger.fullest(phase, "host")
            assert found.pinned[phase] == plain.total(ledger.fullest(phase, "pinned"))
        assert found.nvme == ledger.fullest("idle", "nvme")
        assert found.moves == tuple(ledger.moves_of_step)


KERNELS: list[dict[str, Any]] = [
    {},
    {"attn": "flash_attention_2"},
    {"liger": True},
    {"gradient_checkpointing": True},
    {"liger": True, "gradient_checkpointing": True},
]


@pytest.mark.parametrize("others", [{}, {"grad_accum_steps": 3}, {"lora": 8}], ids=str)
@pytest.mark.parametrize("strategy", ENGINES, ids=name)
def test_a_play_of_other_kernels_says_what_its_own_says(strategy: Strategy, others: dict[str, Any]) -> None:
    """An engine is played once for all in which it finds the same."""
    setups = [resolved(strategy, 2, 96, {**kernels, **others}) for kernels in KERNELS]
    replays = []
    for setup in setups:
        found = sharded.play_ranks(setup, None, strategy, GPUS, GPUS)
        ledger = Ledger(ranks=GPUS)
        sharded.play_engine(setup, None, strategy, GPUS, GPUS, found.rank, ledger, full_depth=False)
        for phase, parts in found.gpu.items():
            assert parts == {part: size for part, size in ledger.fullest(phase).items() if size}, phase
            assert found.host[phase] == ledger.fullest(phase, "host")
        assert found.moves == tuple(ledger.moves_of_step)
        replays.append((found.rank, sharded.replay(setup, None, strategy, GPUS, GPUS, found.rank, None)))
    plays = {id(sharded._fullest(setup, None, strategy, GPUS, GPUS).ledger.log) for setup in setups}
    assert len(plays) < len(KERNELS) or strategy.kind == "fsdp"
    for setup, (rank, replayed) in zip(setups, replays, strict=True):
        for remembered in (sharded.replay, sharded._play, sharded._play_alike):
            remembered.cache_clear()
        assert sharded.replay(setup, None, strategy, GPUS, GPUS, rank, None) == replayed


@pytest.mark.parametrize("training", RUNS[:2], ids=str)
@pytest.mark.parametrize("strategy", ENGINES, ids=name)
def test_a_replay_is_that_of_a_play_over_every_layer(strategy: Strategy, training: dict[str, Any]) -> None:
    for batch, length in SIZES[-2:]:
        setup = resolved(strategy, batch, length, training)
        run, _ = run_of(setup, None)
        batches = sharded._every_layer(setup, run, strategy)
        played = sharded._played(setup, run, strategy, GPUS, GPUS, 0, batches)
        every = [as_it_ran(each.unrolled) for each in batches.each]
        exact = played.replay(CachingAllocator(), every, batches.unrolled, batches.waiting(run), None)
        found = sharded.replay(setup, None, strategy, GPUS, GPUS, 0, None)
        assert (found.peak_allocated, found.peak_reserved) == exact


_VERDICTS = {("fits", "fits"), ("fits", "tight"), ("unknown", "unknown"), ("unknown", "tight")}


@pytest.mark.parametrize("training", [*RUNS, {"dtype": "float32", "mixed_precision": "no"}], ids=str)
@pytest.mark.parametrize("strategy", [Strategy(), Strategy(kind="ddp"), *ENGINES], ids=name)
def test_the_least_is_what_an_estimate_says(strategy: Strategy, training: dict[str, Any]) -> None:
    gpus = 1 if strategy.kind == "single" else GPUS
    cluster = ClusterSpec(gpu=find_gpu("A100-80GB"), gpus=gpus, nvme="1TB")
    for batch, length in SIZES:
        spec = TrainingSpec(micro_batch_size=batch, seq_len=length, **training)
        found = least(MODEL, spec, cluster, strategy, SoftwareSpec())
        said = estimate(MODEL, spec, cluster, strategy, SoftwareSpec(), replay=False)
        assert found[:3] == (said.gpu.low, said.host.peak, said.nvme.bytes), (batch, length)
        assert (found.verdict, said.verdict) in _VERDICTS, (batch, length)
        unplayed = least(MODEL, spec, cluster, strategy, SoftwareSpec(), played=False)
        assert all(a <= b for a, b in zip(unplayed[:3], found[:3], strict=True)), (batch, length)
        assert unplayed.gpu > found.gpu // 4
