import sys
from types import SimpleNamespace
from typing import Any

import pytest
from tests.render.samples import PARTS, estimate, several

from memplan.errors import UnsupportedError
from memplan.units import GiB


class Axes(SimpleNamespace):
    """Stands for matplotlib's, and notes what is drawn."""

    def __init__(self) -> None:
        super().__init__(calls=[])

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **options: self.calls.append((name, args, options))

    def named(self, name: str) -> list[tuple[Any, Any]]:
        return [(args, options) for called, args, options in self.calls if called == name]


def test_components_are_stacked_up_to_the_peak() -> None:
    axes = Axes()
    assert estimate().plot(ax=axes) is axes
    bars = {options["label"]: (args[1][0], options["left"][0]) for args, options in axes.named("barh")}
    assert bars == {
        name: (size / GiB, sum(list(PARTS.values())[:index]) / GiB) for index, (name, size) in enumerate(PARTS.items())
    }
    (at, places), options = axes.named("errorbar")[0]
    assert list(places) == [0]
    assert at[0] == pytest.approx(63.5, abs=0.01)
    assert options["xerr"] == [[1.0], [1.0]]
    assert axes.named("axvline")[0][0] == (80.0,)


def test_a_bar_per_estimate_and_a_line_per_capacity() -> None:
    axes = Axes()
    several().plot(ax=axes)
    assert axes.named("set_yticks")[0][0][1] == ["ddp, batch 4", "ddp, batch 1 x 4", "ddp, batch 4, checkpointing"]
    assert [args for args, _ in axes.named("axvline")] == [(40.0,), (64.0,)]
    assert all(len(args[1]) == 3 for args, _ in axes.named("barh"))


def test_without_matplotlib_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UnsupportedError, match=r"pip install 'memplan\[notebook\]'"):
        estimate().plot()
