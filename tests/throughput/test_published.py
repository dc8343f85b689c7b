"""The step-time model beside what others have published (benchmarks/published/throughput.csv)."""

from pathlib import Path
from statistics import median

import pytest
from tests.scripts import script

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
    assert within(held_out, 1.5) >= 0.94
    assert sum(row.within for row in held_out) / len(held_out) >= 0.85


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
