"""For the whole run of the tests."""

from __future__ import annotations

import gc

import pytest


@pytest.fixture(scope="module", autouse=True)
def _old_objects_are_not_looked_through() -> None:
    """A trace and a measured step collect garbage, for seconds where they go through all tests, archives and libraries."""
    gc.freeze()
