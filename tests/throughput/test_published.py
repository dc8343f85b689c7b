"""The step-time model beside what others have published (benchmarks/published/throughput.csv)."""

from dataclasses import replace
from pathlib import Path
from statistics import median

import pytest
from tests.scripts import script

from memplan.estimator import resolve
from memplan.specs.software import SoftwareSpec
from memplan.throughput import step_time
from memplan.throughput.rates import CPU_ADAM

ROOT = Path(__file__).parents[2]


published = script("benchmarks/published/compare.py")
CALIBRATED = "mosaic"
"""The source on which two constants are calibrated: rates.MATMUL and MATMUL_HOPPER."""


@pytest.fixture(scope="module")
def rows():
    return [published.compare(fields) for fields in published.read()]


def within(rows, factor: float) -> float:
    return sum(1 / factor <= row.ratio <= factor for row in rows) / len(rows)


def test_the_table_is_wide_enough(rows) -> None:
    assert len(rows) >= 20
    assert len({row.fields["id"] for row in rows}) == len(rows)
    assert len({row.fields["gpu"] for row in rows}) >= 7
    assert {row.fields["strategy"] for row in rows} >= {"single", "ddp", "zero2", "zero3", "fsdp"}
    assert {row.fields["offload_optimizer"] for row in rows} == {"none", "cpu", "nvme"}
    assert all(row.fields["source"] for row in rows)
    held_out = [row for row in rows if row.family != CALIBRATED]
    assert len(held_out) > len(rows) / 2


def test_ranks_agree(rows) -> None:
    assert published.spearman([row.per_gpu for row in rows]) > 0.98
    held_out = [row for row in rows if row.family != CALIBRATED]
    assert published.spearman([row.per_gpu for row in held_out]) > 0.96


@pytest.mark.parametrize(("source", "least"), [("fms", 0.95), ("mosaic", 0.99), ("qwen1", 0.97), ("a800", 0.85)])
def test_ranks_agree_within_a_source(rows, source: str, least: float) -> None:
    assert published.spearman([row.per_gpu for row in rows if row.family == source]) > least


def test_the_spread_is_what_the_docs_say(rows) -> None:
    held_out = [row for row in rows if row.family != CALIBRATED]
    assert 0.95 < median(row.ratio for row in held_out) < 1.1
    assert within(held_out, 1.25) >= 0.75
    assert round(within(held_out, 1.5), 2) >= 0.94
    assert sum(row.within for row in held_out) / len(held_out) >= 0.85


def test_one_thread_for_each_rank_is_what_offloading_took() -> None:
    """The rows do not state their launcher; torchrun and accelerate leave each rank one thread."""
    rows = {fields["id"]: fields for fields in published.read()}
    longer = []
    for name, plain in (("a800-03", "a800-02"), ("a800-07", "a800-06"), ("a800-08", "a800-09")):
        row, beside = published.compare(rows[name]), published.compare(rows[plain])
        *case, machine = published.specs(rows[name])
        timing = step_time(resolve(*case[:4], SoftwareSpec()), *case[2:4], replace(machine, threads=1))
        longer.append(timing.tokens / row.measured - timing.tokens / beside.measured)
        elements = 6.74e9 / 8
        slowest = timing.seconds.expected + elements * (16.9e-9 - CPU_ADAM.value)
        assert row.ratio > 2.3
        assert 1.4 < timing.tokens_per_second.expected / row.measured < 1.55
        assert timing.tokens / slowest / row.measured == pytest.approx(beside.ratio, abs=0.08)
    assert max(longer) - min(longer) < 4  # s, of 8, 4 and 2 micro-batches


def test_offloading_costs_what_it_costs_at_least(rows) -> None:
    by_id = {row.id: row for row in rows}
    for plain, offloaded in (("a800-02", "a800-03"), ("a800-06", "a800-07")):
        assert by_id[offloaded].measured < by_id[plain].measured
        assert by_id[offloaded].predicted < by_id[plain].predicted
        assert by_id[offloaded].within  # as slow as torchrun's one thread for each rank makes it


def test_spearman_is_that_of_ranks() -> None:
    assert published.spearman([(1, 10), (2, 20), (3, 30)]) == pytest.approx(1)
    assert published.spearman([(1, 30), (2, 20), (3, 10)]) == pytest.approx(-1)
    assert published.spearman([(1, 1), (1, 1), (2, 2), (3, 4), (4, 3)]) == pytest.approx(0.8947368)


def test_the_docs_show_this_table(rows) -> None:
    generate = script("docs/generate_throughput.py")
    page = (ROOT / "docs" / "throughput.md").read_text(encoding="utf-8")
    assert generate.block(page) == generate.tables(rows), "python docs/generate_throughput.py writes it anew"
