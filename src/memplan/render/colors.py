"""Colours that people who see fewer of them tell apart too, the same in plots and on pages.

From Okabe and Ito, "Color Universal Design" (2008), https://jfly.uni-koeln.de/color/, and greys for what is not
torch's. There are more components than such colours, so some have a pattern beside.
"""

from __future__ import annotations

from typing import NamedTuple

from memplan.results import Verdict

__all__ = ["BAR", "BLUE", "COMPONENTS", "SERIES", "VERDICTS", "Fill", "Look", "series"]


class Fill(NamedTuple):
    """How an area looks."""

    color: str
    hatch: str = ""
    """A pattern as matplotlib names it; empty is none."""


class Look(NamedTuple):
    """How a line or a group of points looks."""

    color: str
    marker: str
    line: str
    """As matplotlib names them."""


BLUE, SKY, GREEN, ORANGE, YELLOW, VERMILION, PURPLE = (
    "#0072B2", "#56B4E9", "#009E73", "#E69F00", "#F0E442", "#D55E00", "#CC79A7",
)  # fmt: skip

COMPONENTS: dict[str, Fill] = {
    "weights": Fill(BLUE),
    "gradients": Fill(SKY),
    "optimizer": Fill(GREEN),
    "activations": Fill(ORANGE),
    "logits": Fill(YELLOW),
    "temporaries": Fill(VERMILION),
    "communication": Fill(PURPLE),
    "workspace": Fill(YELLOW, "xx"),
    "fragmentation": Fill("#D9D9D9", "//"),
    "context": Fill("#8C8C8C", ".."),
    "nccl": Fill("#4D4D4D"),
}
"""By component, in the order in which they sum: neighbours differ in lightness too."""

SERIES: tuple[str, ...] = (BLUE, VERMILION, GREEN, PURPLE, ORANGE)
"""Colours of lines and groups of points."""
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_DASHES = ("-", "--", ":", "-.")

VERDICTS: dict[Verdict, str] = {
    "fits": "#1B6E3C",
    "tight": "#8A5A00",
    "does-not-fit": "#B3261E",
    "unknown": "#5C5C5C",
}
"""Behind a verdict in white letters: it reads on light and dark pages alike."""

BAR = "#4C8BBF"
"""A bar beside a number, on light and dark pages."""


def series(number: int) -> list[Look]:
    """Looks of ``number`` lines: colours and markers come again, but not together before the 36th.

    >>> len(set(series(35))), len({look[:2] for look in series(35)})
    (35, 35)
    """
    return [
        Look(SERIES[n % len(SERIES)], _MARKERS[n % len(_MARKERS)], _DASHES[n // len(SERIES) % len(_DASHES)])
        for n in range(number)
    ]
