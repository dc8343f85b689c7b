"""What others have measured of memory beside the estimates (benchmarks/published/memory.csv): O5."""

from pathlib import Path

import pytest
from tests.scripts import script

ROOT = Path(__file__).parents[1]


published = script("benchmarks/published/memory.py")


@pytest.fixture(scope="module")
def rows():
    return [published.compare(fields) for fields in published.read()]


def of(rows, family: str, metric: str = "allocated"):
    return [row for row in rows if row.family == family and row.metric == metric and row.found]


def test_every_row_names_its_source_once(rows) -> None:
    assert len(rows) == 173
    assert len({row.id for row in rows}) == len(rows)
    assert all(row.fields["source"] for row in rows)
    assert sum(row.found is None for row in rows) == 24


def test_full_and_lora_fine_tuning_of_one_source_agree(rows) -> None:
    """What fms-acceleration measured on one GPU and under FSDP1, but for the family whose loss was another then."""
    found = [row for row in of(rows, "fms") if "santacoder" not in row.fields["model"]]
    assert len(found) == 11
    plain = [row for row in found if row.fields["quantization"] == "none"]
    packed = [row for row in found if "prepare_for_kbit_training" in row.fields["options"]]
    assert (len(plain), len(packed)) == (6, 3)
    assert all(abs(row.ratio - 1) < 0.001 for row in plain)
    assert all(abs(row.ratio - 1) < 0.005 for row in packed)
    assert all(0 < row.ratio - 1 < 0.05 for row in found if row not in plain + packed)  # TRL casts embeddings back


def test_santacoder_had_one_more_copy_of_its_logits_than_its_source_says(rows) -> None:
    """4.48.1 took the logits as they are: three copies in bfloat16 by its source, and four by the figures."""
    found = {row.id: row for row in of(rows, "fms") if row.id in ("fms-a-001", "fms-a-003", "fms-a-004")}
    assert len(found) == 3
    assert found["fms-a-001"].ratio == pytest.approx(1, abs=0.001)  # its peak is in the step
    for name, batch in (("fms-a-003", 8), ("fms-a-004", 4)):
        copy = batch * 2048 * 49280 * 2 / 2**30
        assert found[name].measured - found[name].predicted == pytest.approx(copy, rel=0.15)


def test_generation_agrees_while_it_decodes(rows) -> None:
    ratios = [row.decoding / row.measured for row in of(rows, "qwen3")]
    assert len(ratios) == 24
    assert sorted(ratios)[-2] < 1.015
    assert min(ratios) >= 0.999
    assert max(ratios) < 1.04  # qwen3-sp-013, which stopped early


def test_reserved_memory_agrees(rows) -> None:
    found = of(rows, "peft", "reserved")
    assert len(found) == 6
    assert all(abs(row.ratio - 1) < 0.06 for row in found)


def test_runs_that_died_do_not_fit(rows) -> None:
    died = [row for row in rows if row.metric == "oom" and row.found]
    assert len(died) == 10
    assert all(row.agrees for row in died)
    assert all(row.found.verdict == "does-not-fit" for row in died)


def test_the_docs_show_this_table(rows) -> None:
    generate = script("docs/generate_accuracy.py")
    page = (ROOT / "docs" / "accuracy.md").read_text(encoding="utf-8")
    assert generate.block(page) == generate.tables(rows), "python docs/generate_accuracy.py writes it anew"
