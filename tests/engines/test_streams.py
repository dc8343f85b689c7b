"""Which stream has what in its pool, and when what is deferred can be reused."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
from tests.laws.test_plays import GPUS, resolved
from tests.laws.test_sharded import ENGINES, name

from memplan import sharded
from memplan.engines import fsdp, fsdp1, zero, zero3
from memplan.engines.streams import Streams
from memplan.memory.course import DEFAULT_STREAM
from memplan.memory.play import Play, PlayLedger
from memplan.micro_batch import run_of
from memplan.specs.strategy import FsdpSpec, Strategy, ZeroSpec

RUNS: list[dict[str, Any]] = [
    {},
    {"gradient_checkpointing": True, "grad_accum_steps": 3},
    {"lora": 8, "eval_batch_size": 3},
    {"dtype": "float32", "mixed_precision": "no", "optim": "adamw_torch"},
]
FSDP1 = Strategy(kind="fsdp", fsdp=FsdpSpec(version=1))
OVERLAPPING = [
    *(Strategy(kind=kind, zero=ZeroSpec(overlap_comm=True, reduce_bucket_size=10**6)) for kind in ("zero1", "zero2")),
    *(each for each in ENGINES if each.kind in ("zero3", "fsdp")),
    Strategy(kind="fsdp", fsdp=FsdpSpec(version=1, sharding_strategy="HYBRID_SHARD")),
    Strategy(kind="fsdp", fsdp=FsdpSpec(dp_replicate_size=2)),
]
IN_ORDER = [
    *(each for each in ENGINES if each.kind in ("zero0", "zero1", "zero2")),
    Strategy(kind="zero3", zero=ZeroSpec(overlap_comm=False)),
]


def played(strategy: Strategy, **training: Any) -> Play:
    setup = resolved(strategy, 2, 64, training)
    run, _ = run_of(setup, None)
    return sharded._played(setup, run, strategy, GPUS, 2, 0, sharded._closed(setup, run, strategy))


def reserved(strategy: Strategy, training: dict[str, Any]) -> int:
    return sharded.replay(resolved(strategy, 2, 64, training), None, strategy, GPUS, 2, 0, None).peak_reserved


# -- what is deferred --------------------------------------------------------------------------------------------------


class Recording(PlayLedger):
    """What was deferred, and what can be reused, by number."""

    @property
    def reused(self) -> list[int]:
        return [number for each in self.passes for act in each.acts for number in act.blocks]


def test_a_block_waits_for_an_event_on_the_stream_that_uses_it() -> None:
    ledger = Recording()
    streams = Streams(ledger)
    with ledger.on(1):
        block, own = ledger.allocate("weights", 512), ledger.allocate("weights", 512)
    streams.free(own, used_on=1)
    assert not ledger.deferred  # record_stream says nothing of the stream that has allocated it
    streams.free(block, None, used_on=2)
    assert ledger.deferred == {block.address}
    streams.synchronize(streams.record(1))
    assert ledger.reused == []
    streams.synchronize(streams.record(2))
    assert ledger.reused == [block.address]
    streams.synchronize_all()
    assert ledger.reused == [block.address]


def test_an_event_says_nothing_of_what_comes_after_it() -> None:
    ledger = Recording()
    streams = Streams(ledger)
    event = streams.record(1)
    streams.free(ledger.allocate("weights", 512), used_on=1)
    streams.synchronize(event)
    assert ledger.reused == []


def test_a_stream_that_has_waited_for_another_answers_for_it() -> None:
    ledger = Recording()
    streams = Streams(ledger)
    first, second = ledger.allocate("weights", 512), ledger.allocate("weights", 512)
    streams.free(first, used_on=2)
    streams.wait(3, 2)
    streams.free(second, used_on=2)
    streams.synchronize(streams.record(3))
    assert ledger.reused == [first.address]
    streams.synchronize_all()
    assert ledger.reused == [first.address, second.address]


def test_blocks_remember_the_current_stream() -> None:
    ledger = PlayLedger()
    with ledger.on(2):
        with ledger.on(1):
            inner = ledger.allocate("weights", 512)
        outer = ledger.allocate("weights", 512)
    last = ledger.allocate("weights", 512)
    assert (inner.stream, outer.stream, last.stream) == (1, 2, DEFAULT_STREAM)
    assert ledger.streams == {inner.address: 1, outer.address: 2}


# -- what engines place ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", OVERLAPPING, ids=name)
def test_a_replay_without_the_marks_is_another(strategy: Strategy) -> None:
    marked = reserved(strategy, {})
    play = played(strategy)
    assert play.ledger.streams
    with _one_stream():
        assert reserved(strategy, {}) != marked


@contextmanager
def _one_stream() -> Iterator[None]:
    """Everything is allocated on the default stream."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PlayLedger, "on", lambda ledger, stream: nullcontext())
        _forget()
        yield
    _forget()


def _forget() -> None:
    for kept in (sharded._play, sharded._play_alike, sharded.replay):
        kept.cache_clear()


@pytest.mark.parametrize("strategy", IN_ORDER, ids=name)
def test_what_does_not_overlap_has_one_stream(strategy: Strategy) -> None:
    ledger = played(strategy).ledger
    assert not ledger.streams
    assert not ledger.deferred


def of(play: Play, stream: int) -> Counter[str]:
    """How many blocks of each component a stream has."""
    ledger = play.ledger
    return Counter(ledger.components[number] for number, each in ledger.streams.items() if each == stream)


def test_zero_reduces_on_a_stream_of_its_own() -> None:
    play = played(Strategy(kind="zero2", zero=ZeroSpec(overlap_comm=True)))
    assert set(play.ledger.streams.values()) == {zero.REDUCTION}
    assert of(play, zero.REDUCTION)["gradients"] > 0  # grads_in_partition is made by copy_grads_in_partition
    assert not play.ledger.deferred


def test_zero3_gathers_and_reduces_on_two_streams() -> None:
    play = played(Strategy(kind="zero3"))
    assert set(play.ledger.streams.values()) == {zero3.ALL_GATHER, zero3.REDUCE_AND_PARTITION}
    assert set(of(play, zero3.ALL_GATHER)) == {"communication"}
    assert of(play, zero3.REDUCE_AND_PARTITION)
    taken = {block for each in play.ledger.passes for _, block in each.taken}
    assert play.ledger.deferred
    assert play.ledger.deferred <= taken  # of gradients; how many gathered weights wait only memory bounds


def test_fsdp2_holds_what_streams_use_by_references() -> None:
    play = played(Strategy(kind="fsdp"))
    assert set(play.ledger.streams.values()) == {fsdp.COPY_IN, fsdp.REDUCE_SCATTER}
    assert set(of(play, fsdp.REDUCE_SCATTER)) == {"gradients"}
    assert not play.ledger.deferred
    hybrid = played(Strategy(kind="fsdp", fsdp=FsdpSpec(dp_replicate_size=2)))
    assert of(hybrid, fsdp.ALL_REDUCE)["gradients"]  # post_reduce_stream casts


def test_fsdp1_gathers_where_it_splits_the_gradients() -> None:
    play = played(FSDP1)
    assert set(play.ledger.streams.values()) == {fsdp1.UNSHARD, fsdp1.PRE_UNSHARD, fsdp1.POST_BACKWARD}
    flats = of(play, fsdp1.UNSHARD)
    assert flats["communication"] > flats["gradients"] > 0
    assert set(of(play, fsdp1.PRE_UNSHARD)) == {"communication"}
    assert set(of(play, fsdp1.POST_BACKWARD)) >= {"gradients"}
    hybrid = played(Strategy(kind="fsdp", fsdp=FsdpSpec(version=1, sharding_strategy="HYBRID_SHARD")))
    assert of(hybrid, fsdp1.ALL_REDUCE)["gradients"]


def test_the_rate_limiter_lets_two_units_be_freed_ahead_of_the_gpu() -> None:
    """In a forward each unit is gathered beside the one before it, which the CPU does not wait for."""
    ledger = played(FSDP1.replace(fsdp=FsdpSpec(version=1, sharding_strategy="FULL_SHARD"))).ledger
    alive: dict[int, int] = {}
    most: Counter[int] = Counter()
    units = [n for n, each in ledger.streams.items() if each == fsdp1.UNSHARD and ledger.components[n] != "gradients"]
    sizes = Counter(ledger.requested[number] for number in units)
    block = max(sizes, key=lambda size: sizes[size])
    for entry in ledger.returned:
        size = ledger.requested[max(entry, ~entry)]
        if max(entry, ~entry) in set(units) and size == block:
            alive[size] = alive.get(size, 0) + (1 if entry >= 0 else -1)
            most[size] = max(most[size], alive[size])
    assert most[block] == fsdp1.IN_FLIGHT


@pytest.mark.parametrize("training", RUNS, ids=str)
@pytest.mark.parametrize("strategy", OVERLAPPING, ids=name)
def test_what_is_deferred_is_reused_once_and_reserved(strategy: Strategy, training: dict[str, Any]) -> None:
    play = played(strategy, **training)
    ledger = play.ledger
    reused = [number for each in ledger.passes for act in each.acts for number in act.blocks]
    assert len(reused) == len(set(reused))
    left = ledger.deferred.difference(reused)
    assert not left or "eval_batch_size" in training  # of its last batch
    assert ledger.deferred.issuperset(reused)
    setup = resolved(strategy, 2, 64, training)
    found = sharded.replay(setup, None, strategy, GPUS, 2, 0, None)
    assert found.peak_reserved >= max(found.peak_allocated.values())
    assert sharded.bound(setup, None, strategy, GPUS, 2) >= found.peak_reserved


def test_a_stream_of_its_own_can_need_less() -> None:
    """What is gathered for a moment leaves no segments in which adapters then lie, one to each."""
    strategy, training = Strategy(kind="fsdp"), {"lora": 8, "eval_batch_size": 3}
    marked = reserved(strategy, training)
    with _one_stream():
        assert reserved(strategy, training) > marked
