"""``--explain``: every term of an estimate with its formula, its numbers and its source."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from memplan.render import words
from memplan.results import Lever, Term

__all__ = ["explanation", "levers"]


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


def levers(found: Iterable[Lever]) -> RenderableType:
    """Return a table of keys: what the other value of each, alone, does to the peaks of a rank and of its host."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for title in ("key", "now", "instead"):
        table.add_column(title, no_wrap=title == "key")
    for title in ("GPU GiB", "host GiB"):
        table.add_column(title, justify="right", no_wrap=True)
    for lever in found:
        values = (words.key_value(value) for value in (lever.value, lever.instead))
        table.add_row(lever.key, *values, words.gib_more(lever.gpu), words.gib_more(lever.host))
    return Group(Text("Keys, each changed alone", style="bold"), Padding(table, (0, 0, 0, 2)))
