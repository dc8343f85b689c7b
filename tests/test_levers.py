"""What changing one key of an engine does to the peaks."""

from __future__ import annotations

import pytest
from rich.console import Console

import memplan
from memplan.render.explain import levers as rendered
from memplan.results import Estimate, Lever

SMALL = memplan.TrainingSpec(seq_len=64)
CPU = memplan.ClusterSpec(gpu="cpu", gpus=4)
MODEL = "HuggingFaceTB/SmolLM2-135M"
STRATEGIES = {
    "zero1": {"kind": "zero1", "offload_optimizer": "cpu"},
    "zero2": {"kind": "zero2"},
    "zero3": {"kind": "zero3", "zero": {"reduce_bucket_size": "auto", "stage3_prefetch_bucket_size": "auto"}},
    "fsdp": {"kind": "fsdp"},
    "fsdp1": {"kind": "fsdp", "fsdp": {"version": 1}},
}


def explained(strategy: memplan.Strategy) -> Estimate:
    return memplan.estimate(MODEL, SMALL, CPU, strategy, explain=True)


def with_lever(strategy: memplan.Strategy, lever: Lever) -> memplan.Strategy:
    if lever.key.startswith("offload_"):
        return strategy.replace(**{lever.key: lever.instead})
    if strategy.kind == "fsdp":
        return strategy.replace(fsdp=strategy.fsdp.replace(**{lever.key: lever.instead}))
    return strategy.replace(zero=strategy.zero.replace(**{lever.key: lever.instead}))


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_lever_is_what_an_estimate_with_the_key_changed_says(name: str) -> None:
    strategy = memplan.Strategy(**STRATEGIES[name])
    before = explained(strategy)
    assert before.levers
    for lever in before.levers:
        after = memplan.estimate(MODEL, SMALL, CPU, with_lever(strategy, lever))
        assert lever.gpu == after.gpu.peak_allocated - before.gpu.peak_allocated
        assert lever.host == after.host.peak - before.host.peak


def test_the_key_that_saves_most_comes_first_and_shows_its_value() -> None:
    found = {lever.key: lever for lever in explained(memplan.Strategy(kind="zero2")).levers}
    assert min(found.values(), key=lambda lever: lever.gpu).key == next(iter(found))
    bucket = found["reduce_bucket_size"]
    assert (bucket.value, bucket.instead) == (500_000_000, 50_000_000)
    assert bucket.gpu <= -450_000_000 * 2  # the bucket, in bfloat16, and weights that no longer fit into it


def test_nothing_to_move_without_an_engine_or_unasked() -> None:
    assert not memplan.estimate(MODEL, SMALL, CPU, memplan.Strategy(kind="ddp"), explain=True).levers
    assert not memplan.estimate(MODEL, SMALL, CPU, memplan.Strategy(kind="zero2")).levers


@pytest.mark.parametrize("width", [80, 120])
def test_every_value_can_be_read(width: int) -> None:
    console = Console(width=width)
    with console.capture() as capture:
        console.print(rendered(explained(memplan.Strategy(kind="zero3")).levers))
    assert "…" not in capture.get()
    assert "5e8" in capture.get()
