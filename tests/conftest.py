"""For the whole run of the tests."""

from __future__ import annotations

import gc

import pytest


@pytest.fixture(scope="module", autouse=True)
def _old_objects_are_not_looked_through() -> None:
    """A trace collects garbage, which takes seconds among all tests, archives and libraries."""
    gc.freeze()
