"""Each target, a few hundred times: whatever somebody writes, only errors of memplan's own leave it, and soon.

Hours of the same are ``make fuzz``. What that has found is in ``test_found.py``.
"""

from __future__ import annotations

import os

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.fuzz.strategies import STRATEGIES
from tests.fuzz.targets import TARGETS

ROUNDS = int(os.environ.get("MEMPLAN_FUZZ_ROUNDS", "25"))


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("MEMPLAN_DEBUG", "1")


@pytest.mark.parametrize("name", list(TARGETS))
def test_only_errors_of_memplan_leave(name: str) -> None:
    answered = 0

    @settings(
        max_examples=ROUNDS, deadline=10_000, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
    )
    @given(st.data())
    def each(data: st.DataObject) -> None:
        nonlocal answered
        answered += TARGETS[name](data.draw(STRATEGIES[name]))

    each()
    assert name == "raw_file" or answered > ROUNDS // 20, (
        "nearly everything is refused: what lies behind is not reached"
    )
