"""docs/preflight.md is run, and names every code that preflight has of its own."""

import doctest
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "preflight.md"


@pytest.mark.filterwarnings("ignore:memplan")
def test_the_page_runs() -> None:
    found = doctest.testfile(str(PAGE), module_relative=False)
    assert found.attempted > 5
    assert found.failed == 0


def test_the_page_names_every_code() -> None:
    source = "".join((ROOT / "src" / "memplan" / f"{name}.py").read_text() for name in ("checks", "findings"))
    raised = set(re.findall(r'(?:code=|_excused\()"([a-z-]+)"', source))
    checks = set(re.findall(r"^### `([a-z0-9-]+)`$", (ROOT / "docs" / "checks.md").read_text(), re.MULTILINE))
    named = set(re.findall(r"`([a-z-]+)`", PAGE.read_text()))
    assert {"does-not-fit", "memplan-error", "refused"} <= raised
    assert not raised - checks - named
