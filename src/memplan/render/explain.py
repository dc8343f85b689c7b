"""``--explain``: every term of an estimate with its formula, its numbers and its source."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from memplan.render import words
from memplan.results import Term

__all__ = ["explanation"]


def explanation(terms: Iterable[Term]) -> RenderableType:
    """Return a paragraph per term. Long formulas and sources go on in the next line, under their start."""
    paragraphs: list[RenderableType] = [Text("Terms", style="bold")]
    for term in terms:
        paragraphs += [_title(term), Padding(_lines(term), (0, 0, 0, 4))]
    return Group(*paragraphs)


def _title(term: Term) -> Text:
    return Text(f"  {term.name}: {words.gib(term.bytes)} GiB, {term.bytes:,} bytes", no_wrap=True, overflow="ellipsis")


def _lines(term: Term) -> Table:
    table = Table.grid(padding=(0, 2, 0, 0))
    for name, text in (("formula", term.formula), ("numbers", term.filled), ("source", term.source)):
        table.add_row(Text(name, style="dim"), Text(text))
    return table
