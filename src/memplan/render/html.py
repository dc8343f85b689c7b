"""Estimates as HTML, for notebooks: one small table, readable on light and dark pages."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

from memplan.render import words
from memplan.results import Comparison, Estimate, EstimateList, Verdict

__all__ = ["comparison_html", "estimate_html", "estimates_html"]

_COLORS: dict[Verdict, str] = {"fits": "#2e7d32", "tight": "#b26a00", "does-not-fit": "#c62828", "unknown": "inherit"}
_TABLE = "border-collapse:collapse;font-variant-numeric:tabular-nums"
_BAR = "display:inline-block;height:0.7em;background:#4c8bbf"
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
    return (
        f"<div><b>{escape(estimate.model.id)}</b>{_lines((*facts, words.hardware(estimate)))}"
        f'<table style="{_TABLE}"><thead><tr>{_head(f"at the peak ({gpu.peak_phase})")}{_head("GiB", right=True)}'
        f"{_head('')}</tr></thead><tbody>{''.join(rows)}</tbody></table>{_verdict(estimate)}</div>"
    )


def estimates_html(estimates: EstimateList) -> str:
    """Return a row per estimate, and the table of the best."""
    if not estimates.estimates:
        return "<div>no estimates</div>"
    heads = (_head("setup"), _head("peak GiB", right=True), _head("low .. high", right=True), _head("verdict"))
    rows = (
        f"<tr>{_cell(name)}{_cell(words.gib(estimate.gpu.peak_device), right=True)}"
        f"{_cell(words.interval(estimate.gpu.low, estimate.gpu.high), right=True)}"
        f"{_cell(words.verdict_in_a_row(estimate), color=_COLORS[estimate.verdict])}</tr>"
        for name, estimate in zip(words.rungs(estimates.estimates), estimates.estimates, strict=True)
    )
    table = f'<table style="{_TABLE}"><thead><tr>{"".join(heads)}</tr></thead><tbody>{"".join(rows)}</tbody></table>'
    return f"<div>{table}</div>{estimate_html(estimates.best)}"


def comparison_html(comparison: Comparison) -> str:
    """Return a row per figure, with what its tool leaves out."""
    right = {"GPU GiB", "host GiB"}
    heads = (_head(name, right=name in right) for name in ("tool", "option", "GPU GiB", "host GiB", "leaves out"))
    rows = (
        f"<tr>{_cell(row.tool)}{_cell(row.option)}"
        f"{''.join(_cell('-' if size is None else words.gib(size), right=True) for size in (row.gpu, row.host))}"
        f"{_cell(row.leaves_out)}</tr>"
        for row in comparison.rows
    )
    facts = (words.compared_hardware(comparison), f"DeepSpeed {words.counted(comparison.model)}")
    table = f'<table style="{_TABLE}"><thead><tr>{"".join(heads)}</tr></thead><tbody>{"".join(rows)}</tbody></table>'
    return f"<div><b>{escape(comparison.model.id)}</b>{_lines(facts)}{table}</div>"


def _lines(facts: Iterable[str]) -> str:
    return "".join(f"<div>{escape(fact)}</div>" for fact in facts)


def _row(name: str, size: int, full: int = 0, *, total: bool = False, note: str = "") -> str:
    length = _FULL_EM * size / full if full else 0
    last = f'<span style="{_BAR};width:{length:.2f}em"></span>' if length else escape(note)
    weight = ' style="font-weight:bold"' if total else ""
    return f"<tr{weight}>{_cell(name)}{_cell(words.gib(size), right=True)}{_td(last)}</tr>"


def _head(text: str, *, right: bool = False) -> str:
    return f'<th style="text-align:{"right" if right else "left"}">{escape(text)}</th>'


def _cell(text: str, *, right: bool = False, color: str = "inherit") -> str:
    return _td(escape(text), right=right, color=color)


def _td(html: str, *, right: bool = False, color: str = "inherit") -> str:
    return f'<td style="text-align:{"right" if right else "left"};color:{color}">{html}</td>'


def _verdict(estimate: Estimate) -> str:
    next_steps = words.next_steps(estimate)
    verdict = f'<b style="color:{_COLORS[estimate.verdict]}">{escape(words.verdict(estimate))}</b>'
    return f"<div>{verdict}{escape(f' ({next_steps})') if next_steps else ''}</div>"
