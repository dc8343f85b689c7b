"""Results as HTML, for notebooks: small tables, readable on light and dark pages.

Text has the page's own colour. A verdict stands in white on a dark colour of its own, so no theme matters to it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from memplan.answers import Check, Comparison, Finding, Plan, Preflight
from memplan.render import words
from memplan.render.colors import BAR, VERDICTS
from memplan.results import (
    Estimate,
    EstimateList,
    Verdict,
)

__all__ = [
    "check_html",
    "comparison_html",
    "estimate_html",
    "estimates_html",
    "findings_html",
    "plan_html",
    "preflight_html",
]

_SEVERITIES: dict[str, Verdict] = {"error": "does-not-fit", "warning": "tight", "info": "unknown"}
"""Severity of a finding -> the verdict whose colour it has."""
_TABLE = "border-collapse:collapse;font-variant-numeric:tabular-nums"
_PADDING = "padding:0.15em 0.6em"
"""Between numbers, on a page without a style for tables too."""
_BAR = f"display:inline-block;height:0.7em;background:{BAR}"
_FULL_EM = 16
"""Length of a bar as long as the GPU's memory, or as the peak if that is more."""


def estimate_html(estimate: Estimate) -> str:
    """Return an estimate as a table of its components, with the verdict below."""
    gpu = estimate.gpu
    full = max(gpu.peak_device, gpu.capacity or 0, 1)
    facts = (words.model_facts(estimate), words.setup_facts(estimate), words.precision_facts(estimate))
    rows = [_row(name, size, full) for name, size in words.components_of(estimate)]
    rows.append(_row("allocated", gpu.peak_allocated, total=True))
    outside = (("fragmentation", gpu.components.fragmentation), ("context", gpu.components.context))
    rows += [_row(name, size, full) for name, size in (*outside, ("nccl", gpu.components.nccl)) if size]
    rows.append(_row("device", gpu.peak_device, total=True, note=words.interval(gpu.low, gpu.high)))
    if gpu.capacity is not None:
        rows.append(_row("capacity", gpu.capacity, total=True))
    places = (("host memory of a node", estimate.host.peak), ("NVMe of a node", estimate.nvme.bytes))
    rows += [_row(name, size, total=True) for name, size in places if size]
    heads = (_head(f"GPU at the peak ({gpu.peak_phase})"), _head("GiB", right=True), _head(""))
    return (
        f"<div><b>{escape(estimate.model.id)}</b>{_lines((*facts, words.hardware(estimate)))}"
        f"{_table(heads, rows)}{_conclusion(estimate)}</div>"
    )


def estimates_html(estimates: EstimateList) -> str:
    """Return a row per estimate, and the table of the best."""
    if not estimates.estimates:
        return "<div>no estimates</div>"
    heads = (_head("setup"), _head("peak GiB", right=True), _head("low .. high", right=True), _head("verdict"))
    rows = (
        f"<tr>{_cell(name)}{_cell(words.gib(estimate.gpu.peak_device), right=True)}"
        f"{_cell(words.interval(estimate.gpu.low, estimate.gpu.high), right=True)}"
        f"{_td(_mark(words.verdict_in_a_row(estimate), estimate.verdict))}</tr>"
        for name, estimate in zip(words.rungs(estimates.estimates), estimates.estimates, strict=True)
    )
    return f"<div>{_table(heads, rows)}</div>{estimate_html(estimates.best)}"


def plan_html(plan: Plan) -> str:
    """Return a row per rung, the chosen one in bold, its table, and what no other setup beats."""
    right = {"batch", "peak GiB", "host GiB", "s/step"}
    names = ("rung", "batch", "peak GiB", "host GiB", "s/step", "verdict")
    heads = (_head(name, right=name in right) for name in names)
    rows = []
    for rung in plan.rungs:
        found = rung.estimate
        numbers = (words.micro_batches(found), words.gib(found.gpu.peak_device), words.gib(found.host.peak))
        cells = [_cell(text, right=True) for text in (*numbers, words.speed_in_a_row(found, by_tokens=False))]
        verdict = _td(_mark(words.verdict_in_a_row(found), found.verdict))
        rows.append(f"<tr{_weight(rung == plan.best)}>{_cell(rung.name)}{''.join(cells)}{verdict}</tr>")
    answer = f"<div><b>{escape(words.solved(plan))}</b></div>" if plan.solved is not None else ""
    if plan.best is None:
        answer += "<div><b>No setup is known to fit.</b></div>"
    chosen = ""
    if plan.best is not None:
        chosen = f"<div><b>{escape(plan.best.name)}</b></div>{estimate_html(plan.best.estimate)}"
    return f"<div>{_table(heads, rows)}{answer}</div>{chosen}{_front(plan)}{_remedies(plan)}"


def check_html(check: Check) -> str:
    """Return what files need, and below it what is wrong with them."""
    estimate = "" if check.estimate is None else estimate_html(check.estimate)
    return f"{estimate}{findings_html(check.findings)}"


def preflight_html(preflight: Preflight) -> str:
    """Return what the run needs, where that could be estimated, and the findings."""
    estimate = None if preflight.check is None else preflight.check.estimate
    needed = "" if estimate is None else estimate_html(estimate)
    return f"{needed}{findings_html(preflight, where='')}"


def findings_html(findings: Sequence[Finding], where: str = " in the files") -> str:
    """Return a row per finding, with its remedy, below how many there are ``where``."""
    if not findings:
        return "<div>no findings</div>"
    rows = (
        f"<tr>{_td(_mark(each.severity, _SEVERITIES[each.severity]))}{_cell(each.code)}{_cell(each.path)}"
        f"{_td(f'{escape(each.message)}<br><i>{escape(each.remedy)}</i>')}</tr>"
        for each in findings
    )
    title = f"<div><b>{escape(words.findings_title(findings, where))}</b></div>"
    return f"<div>{title}{_table(map(_head, ('', 'finding', 'where', 'what, and what to do')), rows)}</div>"


def comparison_html(comparison: Comparison) -> str:
    """Return a row per figure, with what its tool leaves out."""
    right = {"GPU GiB", "host GiB"}
    heads = (_head(name, right=name in right) for name in ("tool", "option", "GPU GiB", "host GiB", "leaves out"))
    rows = (
        f"<tr{_weight(row.tool == 'memplan')}>{_cell(row.tool)}{_cell(row.option)}"
        f"{''.join(_cell('-' if size is None else words.gib(size), right=True) for size in (row.gpu, row.host))}"
        f"{_cell(row.leaves_out)}</tr>"
        for row in comparison.rows
    )
    facts = (words.compared_hardware(comparison), f"DeepSpeed {words.counted(comparison.model)}")
    return f"<div><b>{escape(comparison.model.id)}</b>{_lines(facts)}{_table(heads, rows)}</div>"


def _front(plan: Plan) -> str:
    """The setups that no other beats both in time and in memory."""
    if len(plan.pareto) < 2:
        return ""
    names = ("setup", "batch", "GPU GiB", "to spare", "s/step")
    heads = (_head(name, right=name != "setup") for name in names)
    rows = []
    for each in plan.pareto:
        numbers = (words.batch_of(each), words.gib(each.high), words.gib(each.headroom), f"{each.seconds:.3g}")
        cells = "".join(_cell(text, right=True) for text in numbers)
        rows.append(f"<tr>{_cell(words.point(each))}{cells}</tr>")
    return f"<div><b>What no other setup beats both in time and in memory</b>{_table(heads, rows)}</div>"


def _remedies(plan: Plan) -> str:
    """What would fit, where nothing does."""
    if not plan.remedies:
        return ""
    right = {"GPU GiB", "host GiB"}
    heads = (_head(name, right=name in right) for name in ("with", "rung", "GPU GiB", "host GiB"))
    rows = (
        f"<tr>{_cell(each.options)}{_cell(each.rung)}"
        f"{''.join(_cell(words.gib(size), right=True) for size in (each.high, each.host))}</tr>"
        for each in plan.remedies
    )
    return f"<div><b>What would fit</b>{_table(heads, rows)}</div>"


def _table(heads: Iterable[str], rows: Iterable[str]) -> str:
    head = f"<thead><tr>{''.join(heads)}</tr></thead>"
    return f'<table style="{_TABLE}">{head}<tbody>{"".join(rows)}</tbody></table>'


def _lines(facts: Iterable[str]) -> str:
    return "".join(f"<div>{escape(fact)}</div>" for fact in facts)


def _row(name: str, size: int, full: int = 0, *, total: bool = False, note: str = "") -> str:
    length = _FULL_EM * size / full if full else 0
    last = f'<span style="{_BAR};width:{length:.2f}em"></span>' if length else escape(note)
    return f"<tr{_weight(total)}>{_cell(name)}{_cell(words.gib(size), right=True)}{_td(last)}</tr>"


def _weight(bold: bool) -> str:
    return ' style="font-weight:bold"' if bold else ""


def _head(text: str, *, right: bool = False) -> str:
    return f'<th scope="col" style="{_PADDING};text-align:{"right" if right else "left"}">{escape(text)}</th>'


def _cell(text: str, *, right: bool = False) -> str:
    return _td(escape(text), right=right)


def _td(html: str, *, right: bool = False) -> str:
    return f'<td style="{_PADDING};text-align:{"right" if right else "left"}">{html}</td>'


def _mark(text: str, verdict: Verdict) -> str:
    style = f"background:{VERDICTS[verdict]};color:#fff;padding:0 0.4em;border-radius:0.2em;font-weight:bold"
    return f'<b style="{style}">{escape(text)}</b>'


def _conclusion(estimate: Estimate) -> str:
    said = [*words.extras(estimate), ("", words.next_steps(estimate))]
    others = "".join(f"<div>{escape(f'{name} {text}'.strip())}</div>" for name, text in said if text)
    return f"<div>{_mark(words.verdict(estimate), estimate.verdict)}</div>{others}"
