"""Estimates beside Liger's own Python, of every family that memplan and Liger share."""

from __future__ import annotations

import dataclasses

import pytest
from tests.oracles import compare, liger, o1

ROWS = [row for archive in o1.load_archives(liger.ARCHIVE).values() for row in archive.rows]


def with_liger(row: o1.Row) -> o1.Row:
    return dataclasses.replace(row, setup=dataclasses.replace(row.setup, options={**row.setup.options, "liger": True}))


@pytest.mark.parametrize("family", liger.FAMILIES)
def test_estimates_agree_with_the_librarys_own_allocations(family: str) -> None:
    rows = [row for row in ROWS if row.setup.family == family]
    assert len(rows) == len(liger.grid(family))
    for row in rows:
        compared = compare.compare(with_liger(row))
        traced, estimated = compared.phases["backward"]
        assert compared.error == pytest.approx(0, abs=1e-3), row.setup.key
        assert estimated / traced == pytest.approx(1, abs=1e-3), row.setup.key


def test_liger_is_no_detail() -> None:
    """The same rows without Liger are far off, so the test above can fail."""
    row = next(row for row in ROWS if row.setup.family == "llama")
    assert abs(compare.compare(row).error) > 0.01
