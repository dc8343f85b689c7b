"""A report as one HTML page that stands alone: no network, no script, readable in both themes, printable on A4.

Every number of the answer stands in a ``<data>`` element, whose ``value`` is the JSON's and whose ``data-path`` says
where it is in the JSON.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from memplan.answers import Report
from memplan.errors import SpecError
from memplan.render import svg, words
from memplan.render.colors import VERDICTS
from memplan.results import (
    COMPONENTS,
    Estimate,
    Verdict,
)

__all__ = ["check_path", "report_page", "write"]

_STYLE = """
:root{color-scheme:light dark;--ink:#1a1a1a;--dim:#555;--back:#fff;--line:#d5d5d5;--link:#0059a6;--stripe:#f5f6f8}
@media (prefers-color-scheme:dark){:root{--ink:#ececec;--dim:#b5b5b5;--back:#16181b;--line:#45494f;--link:#7fc1ff;
--stripe:#1f2226}}
@media print{:root{color-scheme:light;--ink:#000;--dim:#333;--back:#fff;--line:#999;--link:#000;--stripe:#fff}}
*{box-sizing:border-box}
body{margin:0 auto;padding:1.5rem;max-width:60rem;background:var(--back);color:var(--ink);
font:16px/1.5 system-ui,"DejaVu Sans",sans-serif}
h1{font-size:1.6rem;margin:0 0 .3rem}h2{font-size:1.25rem;margin:2.2rem 0 .5rem}
a{color:var(--link)}
nav ul,.legend{list-style:none;padding:0;margin:.5rem 0;display:flex;flex-wrap:wrap;gap:.2rem 1rem}
.skip{position:absolute;left:-100vw}.skip:focus{position:static}
:focus-visible{outline:3px solid var(--link);outline-offset:2px}
.verdict{color:#fff;padding:.05em .5em;border-radius:.25em;font-weight:bold}td .verdict{white-space:nowrap}
dl{display:grid;grid-template-columns:max-content 1fr;gap:0 1rem;margin:.5rem 0}dt{color:var(--dim)}dd{margin:0}
figure{margin:.5rem 0}figure>svg{display:block}
.defs{position:absolute}
svg text{fill:var(--ink);font-size:13px;dominant-baseline:central}
svg .halo{paint-order:stroke;stroke:var(--back);stroke-width:4px}
svg .around{stroke:var(--back);stroke-width:5;stroke-opacity:.7}
svg .grid{stroke:var(--line)}svg .span{stroke:var(--ink);stroke-width:1.5}
svg .capacity{stroke:var(--ink);stroke-width:2;stroke-dasharray:5 3}
svg .front{stroke:#56B4E9;stroke-width:2}
.scroll{overflow-x:auto}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;min-width:min(22rem,100%)}
th,td{padding:.15rem .6rem .15rem 0;text-align:left;vertical-align:top;border-bottom:1px solid var(--line)}
.n{text-align:right;white-space:nowrap}thead .n{white-space:normal}
tr.total>*{font-weight:bold}tr.chosen{background:var(--stripe)}tr.chosen>*{font-weight:bold}
caption{text-align:left;color:var(--dim);padding:.3rem 0}
summary{cursor:pointer;color:var(--link)}
@media screen and (max-width:40rem){body{padding:1rem}
.wide,.wide tbody,.wide tr,.wide caption{display:block}.wide thead{display:none}
.wide tr{padding:.4rem 0;border-bottom:1px solid var(--line)}
.wide th,.wide td{display:inline-block;border:0;text-align:left;white-space:normal;padding:0 1rem 0 0}
.wide th{display:block}.wide td:empty{display:none}
.wide td::before{content:attr(data-head) " ";color:var(--dim);font-weight:normal}}
footer{margin-top:3rem;color:var(--dim);font-size:.9rem}
@page{size:A4;margin:15mm}
@media print{body{padding:0;max-width:none;font-size:9.5pt}nav,.skip{display:none}.scroll{overflow:visible}
h2,summary,caption{break-after:avoid}figure,tr{break-inside:avoid}footer{break-before:avoid;break-inside:avoid;
margin-top:1rem;font-size:7.6pt}
tbody tr:nth-child(-n+2){break-after:avoid}tbody :is(tr:first-child,tr:nth-last-child(-n+2)){break-before:avoid}
table{font-size:7.6pt}svg text{font-size:11px}
th,td{padding-right:.35rem}details table{font-size:6.4pt}summary{list-style:none;color:inherit}
details::details-content{display:block;block-size:auto;content-visibility:visible}
.verdict{print-color-adjust:exact;-webkit-print-color-adjust:exact}
figure svg,.legend svg{print-color-adjust:exact;-webkit-print-color-adjust:exact}}
"""
_AT_THE_PEAK = "GiB per GPU at the peak"


def report_page(report: Report) -> str:
    """Return the page."""
    return "".join(_Page(report).parts())


def check_path(path: str | os.PathLike[str], *, force: bool = False) -> Path:
    """Return where a page would be written. Raises SpecError if it cannot be, or is there already, unless ``force``."""
    target, name = Path(path), str(path)
    try:
        is_file = bool(name) and not target.is_dir()
    except (OSError, ValueError) as error:  # ValueError: a path with a null byte
        problem = f"cannot be written ({getattr(error, 'strerror', None) or error})"
        raise SpecError.at("html", name, problem, "Name another file, as in report.html.") from None
    if not is_file or "\0" in name:  # which Python before 3.12 takes for a path that is not there
        raise SpecError.at("html", name, "is no file", "Name the file, as in report.html.")
    if not target.parent.is_dir():
        raise SpecError.at("html", name, "is in a folder that is not there", "Make the folder first.")
    if os.path.lexists(target) and not force:
        raise SpecError.at("html", name, "is there already", "Use another name, or --force to replace it.")
    return target


def write(report: Report, path: str | os.PathLike[str], *, force: bool = False) -> None:
    """Write the page beside its place, and move it there. Raises SpecError as :func:`check_path`."""
    target, text = check_path(path, force=force), report_page(report)
    try:
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as folder:
            beside = Path(folder) / target.name
            beside.write_text(text, encoding="utf-8")
            check_path(path, force=force)  # once more: the page took its time
            beside.replace(target)
    except OSError as error:
        problem = f"cannot be written ({error.strerror or error})"
        raise SpecError.at("html", str(path), problem, "Use another name.") from None


class _Page:
    """The page of one report, which finds its numbers by their path in the JSON."""

    def __init__(self, report: Report) -> None:
        self.report = report
        self.data = report.to_dict()
        self.estimate = report.estimate
        self.start = _start(report)

    def parts(self) -> Iterator[str]:
        estimate, title = self.estimate, escape(self.estimate.model.id)
        sections = [
            ("estimate", "What the run needs", self.components()),
            ("timeline", "Memory over the run", self.timeline()),
            ("ladder", "The ladder of setups", self.ladder()),
        ]
        if self.report.plan is not None and self.report.plan.pareto:
            sections.append(("front", "Time against memory", self.front()))
        sections += [("elsewhere", "Host memory and NVMe", self.elsewhere())] if self.has_elsewhere() else []
        sections.append(("assumptions", "What the numbers rest on", self.assumptions()))
        yield f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}: memory of a run</title>'
        yield '<meta name="viewport" content="width=device-width,initial-scale=1"><link rel="icon" href="data:,">'
        yield f"<style>{_STYLE}</style></head><body>{svg.definitions()}"
        yield f'<a class="skip" href="#estimate">Skip to the numbers</a><header><h1>{title}</h1>'
        yield f"<p>{_verdict(words.verdict(estimate), estimate.verdict)}</p>{self.facts()}</header>"
        links = "".join(f'<li><a href="#{name}">{escape(heading)}</a></li>' for name, heading, _ in sections)
        yield f'<nav aria-label="Sections"><ul>{links}</ul></nav><main>'
        for name, heading, body in sections:
            yield f'<section id="{name}" aria-labelledby="{name}-h"><h2 id="{name}-h">{escape(heading)}</h2>{body}'
            yield "</section>"
        versions = ", ".join(f"{name} {version}" for name, version in estimate.software.items())
        # Within main, so that in print it takes the last section along, where there is no room for both.
        yield f"<footer><p>memplan {escape(self.report.version)}; rules as in {escape(versions)}. "
        yield "The same as JSON is in this file.</p></footer></main>"
        text = json.dumps(self.data, allow_nan=False).replace("<", "\\u003c")
        yield f'<script type="application/json" id="json">{text}</script></body></html>\n'

    # -- sections

    def facts(self) -> str:
        estimate = self.estimate
        step = estimate.step
        facts = [
            ("model", escape(words.model_facts(estimate))),
            ("setup", escape(words.setup_facts(estimate))),
            ("precision", escape(words.precision_facts(estimate))),
            ("hardware", escape(words.hardware(estimate))),
            ("config", escape(f"from {estimate.model.source}")),
        ]
        if step is not None:
            speed = f"{self.number('estimate.step.seconds')} s"
            if not words.is_of_images(estimate):
                speed += f", {self.number('estimate.step.tokens_per_second')} tokens/s"
            facts.append(("step", f"{speed}, bound by {escape(step.bound_by)}"))
        if words.next_steps(estimate):
            facts.append(("next", escape(words.next_steps(estimate))))
        return f"<dl>{''.join(f'<dt>{name}</dt><dd>{fact}</dd>' for name, fact in facts)}</dl>"

    def components(self) -> str:
        gpu = self.estimate.gpu
        there = [name for name in COMPONENTS if getattr(gpu.components, name)]
        label = (
            f"Stacked bar of the GPU's memory at its peak, {words.gib(gpu.peak_device)} GiB; the table has the parts."
        )
        chart = svg.stacks([_bar("", self.estimate)], gpu.capacity, _AT_THE_PEAK, label)
        allocated = [name for name in there if name not in ("fragmentation", "context", "nccl")]
        rows = []
        for name in there:
            rows.append(_row(name, self.number(f"estimate.gpu.components.{name}")))
            if name == allocated[-1]:
                rows.append(_row("allocated", self.number("estimate.gpu.peak_allocated"), kind="total"))
            if name == "fragmentation":
                rows.append(_row("reserved", self.number("estimate.gpu.peak_reserved"), kind="total"))
        rows.append(_row("device", self.number("estimate.gpu.peak_device"), kind="total"))
        rows.append(_row("at least", self.number("estimate.gpu.low")))
        rows.append(_row("at most", self.number("estimate.gpu.high")))
        if gpu.capacity is not None:
            rows.append(_row("capacity", self.number("estimate.gpu.capacity"), kind="total"))
        caption = f"The fullest GPU at its peak, in phase {gpu.peak_phase}"
        return f"<figure>{chart}{svg.legend(there)}</figure>{_table(caption, ('component', '#GiB'), rows)}"

    def timeline(self) -> str:
        gpu = self.estimate.gpu
        sizes = [(phase.name.replace("_", " "), phase.allocated) for phase in gpu.phases]
        bars = [svg.Bar(f"{name}: {words.gib(size)} GiB", ((name, size),), size, size) for name, size in sizes]
        label = "Bars of what is allocated in each phase; the table has the numbers."
        chart = svg.stacks(bars, gpu.capacity, "GiB allocated per GPU, at most", label)
        rows = [
            _row(name, self.number(f"estimate.gpu.phases.{index}.allocated")) for index, (name, _) in enumerate(sizes)
        ]
        caption = "The most that torch allocates within each phase; idle is between steps"
        return f"<figure>{chart}</figure>{_table(caption, ('phase', '#GiB'), rows)}"

    def ladder(self) -> str:
        rungs = list(self.rungs())
        there = [name for name in COMPONENTS if any(getattr(each.gpu.components, name) for _, each, _ in rungs)]
        plan = self.report.plan
        reasons = [rung.reason_passed_over for rung in plan.rungs] if plan is not None else [None] * len(rungs)
        best = None if plan is None or plan.best is None else plan.rungs.index(plan.best)
        bars = [_bar(f"{name} (chosen)" if i == best else name, each) for i, (name, each, _) in enumerate(rungs)]
        label = "Stacked bars of each setup; the tables have the numbers."
        chart = svg.stacks(bars, self.estimate.gpu.capacity, _AT_THE_PEAK, label)
        rows, parts = [], []
        for index, ((name, each, path), reason) in enumerate(zip(rungs, reasons)):
            kind = "chosen" if index == best else ""
            cells = [escape(words.micro_batches(each))]
            cells += [self.number(f"{path}.gpu.{what}") for what in ("peak_device", "low", "high")]
            cells += [self.number(f"{path}.host.peak"), self.number(f"{path}.step.seconds") if each.step else "-"]
            verdict = _verdict(words.verdict_in_a_row(each), each.verdict)
            name = f"{name} (chosen)" if index == best else name
            text = (verdict, escape(reason or "")) if plan is not None else (verdict,)
            rows.append(_row(name, *cells, kind=kind, text=text))
            parts.append(_row(name, *(self.number(f"{path}.gpu.components.{part}") for part in there), kind=kind))
        heads = ["setup", "#batch", "#GPU GiB", "#at least", "#at most", "#host GiB", "#s/step", "verdict"]
        heads += ["why not"] if plan is not None else []
        table = _table("Each setup; a batch is sequences x micro-batches", heads, rows)
        detail = _table("GiB of each component at the peak", ("setup", *(f"#{name}" for name in there)), parts)
        more = f"<details><summary>Components of every setup</summary>{detail}</details>"
        said = "" if plan is None or plan.solved is None else f"<p><b>{escape(words.solved(plan))}.</b></p>"
        if self.start != words.AS_ASKED:
            what = (
                f"A plan of the same run starts with {self.start}, not with {words.strategy(self.estimate)} as above."
            )
            said += f"<p>{escape(what)}</p>"
        return f"{said}<figure>{chart}{svg.legend(there)}</figure>{table}{more}{self.remedies()}"

    def rungs(self) -> Iterator[tuple[str, Estimate, str]]:
        """Name, estimate and path of each setup."""
        if self.report.plan is not None:
            for index, rung in enumerate(self.report.plan.rungs):
                yield self.named(rung.name), rung.estimate, f"plan.rungs.{index}.estimate"
        elif self.report.ladder is not None:
            several = self.report.ladder.estimates
            for index, (name, each) in enumerate(zip(words.rungs(several), several, strict=True)):
                yield name, each, f"ladder.estimates.{index}"

    def named(self, rung: str) -> str:
        """A rung's name, which does not claim to be what was asked for where that is something else."""
        return rung.replace(words.AS_ASKED, self.start, 1)

    def remedies(self) -> str:
        plan = self.report.plan
        if plan is None or not plan.remedies:
            return ""
        rows = [
            _row(
                each.options,
                *(self.number(f"plan.remedies.{index}.{what}") for what in ("high", "host")),
                text=(escape(self.named(each.rung)),),
            )
            for index, each in enumerate(plan.remedies)
        ]
        return _table("What would fit", ("with", "#GPU GiB", "#host GiB", "rung"), rows)

    def front(self) -> str:
        plan = self.report.plan
        assert plan is not None
        dots = [svg.Dot(each.seconds, each.high) for each in plan.pareto]
        label = "Seconds of a step against memory of each setup that no other beats in both; the table has the numbers."
        chart = svg.scatter(dots, self.estimate.gpu.capacity, label)
        rows = []
        for index, each in enumerate(plan.pareto):
            name = f"{index + 1}. {self.named(words.point(each))}"
            numbers = (self.number(f"plan.pareto.{index}.{what}") for what in ("high", "headroom", "seconds"))
            rows.append(_row(name, words.batch_of(each), *numbers))
        heads = ("setup", "#batch", "#GPU GiB", "#to spare", "#s/step")
        caption = "What no other setup beats both in time and in memory"
        return f"<figure>{chart}</figure>{_table(caption, heads, rows)}"

    def has_elsewhere(self) -> bool:
        return bool(self.estimate.host.peak or self.estimate.nvme.bytes)

    def elsewhere(self) -> str:
        tables = []
        for place, total, title in (("host", "peak", "Host memory"), ("nvme", "bytes", "NVMe")):
            memory = getattr(self.estimate, place)
            if getattr(memory, total):
                rows = [
                    _row(name, self.number(f"estimate.{place}.components.{name}"))
                    for name, size in memory.components.items()
                    if size
                ]
                rows.append(_row("total", self.number(f"estimate.{place}.{total}"), kind="total"))
                if memory.capacity is not None:
                    rows.append(_row("capacity", self.number(f"estimate.{place}.capacity"), kind="total"))
                tables.append(_table(f"{title} of a node, all its ranks together", ("component", "#GiB"), rows))
        return "".join(tables)

    def assumptions(self) -> str:
        rows = [
            _row(each.name, text=[escape(text) for text in words.assumed(each)]) for each in self.estimate.assumptions
        ]
        return _table("Numbers that are no rule of a library, with their ranges", ("name", "value", "source"), rows)

    def number(self, path: str) -> str:
        """The number at a path of the JSON: bytes in GiB, others to three digits."""
        value: Any = self.data
        for key in path.split("."):
            value = value[int(key)] if isinstance(value, list) else value[key]
        if path.endswith("tokens_per_second"):
            text = f"{value:,.0f}"
        elif path.endswith("seconds"):
            text = f"{value:.3g}"
        else:
            text = words.gib(value)
        return f'<data value="{value!r}" data-path="{path}">{text}</data>'


def _start(report: Report) -> str:
    """What the first rung is called: a plan starts without a strategy, whatever the report's own estimate has."""
    plan = report.plan
    if plan is None or report.estimate == (plan.best or plan.rungs[0]).estimate:
        return words.AS_ASKED
    asked, first = words.strategy(report.estimate), words.strategy(plan.rungs[0].estimate)
    return words.AS_ASKED if asked == first else words.PLAIN.get(first, first)


class _Row(NamedTuple):
    """A row of a table."""

    name: str
    cells: Sequence[tuple[str, str]]
    """Each with its look, and what it says as HTML."""
    kind: str
    """What the row stands out as."""


def _bar(name: str, estimate: Estimate) -> svg.Bar:
    gpu = estimate.gpu
    said = f"{name}: {words.verdict_in_a_row(estimate)}" if name else words.verdict_in_a_row(estimate)
    return svg.Bar(said, tuple(gpu.components), gpu.low, gpu.high)


def _verdict(text: str, verdict: Verdict) -> str:
    return f'<span class="verdict" style="background:{VERDICTS[verdict]}">{escape(text)}</span>'


def _row(name: str, *numbers: str, kind: str = "", text: Sequence[str] = ()) -> _Row:
    return _Row(name, [*(("n", number) for number in numbers), *(("", each) for each in text)], kind)


def _table(caption: str, heads: Sequence[str], rows: Iterable[_Row]) -> str:
    """A table that is scrolled by itself where it is wide, by keyboard too; a # marks a column of numbers.

    One with more columns than a phone has room for is a list there: each cell says its column.
    """
    titles = "".join(
        f'<th scope="col" class="n">{escape(head[1:])}</th>'
        if head[:1] == "#"
        else f'<th scope="col">{escape(head)}</th>'
        for head in heads
    )
    lines = []
    for row in rows:
        cells = "".join(
            f'<td{_class(look)} data-head="{escape(head.lstrip("#"))}">{cell}</td>'
            for head, (look, cell) in zip(heads[1:], row.cells, strict=True)
        )
        lines.append(f"<tr{_class(row.kind)}><th scope=row>{escape(row.name)}</th>{cells}</tr>")
    head = f"<caption>{escape(caption)}</caption><thead><tr>{titles}</tr></thead>"
    table = f"<table{_class('wide' if len(heads) > 2 else '')}>{head}<tbody>{''.join(lines)}</tbody></table>"
    return f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(caption)}">{table}</div>'


def _class(name: str) -> str:
    return f' class="{name}"' if name else ""
