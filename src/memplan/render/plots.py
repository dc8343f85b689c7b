"""Results as plots, in GiB beside the capacity. Needs the ``notebook`` extra, for matplotlib.

Each function draws into ``ax``, by default a new figure as wide as a notebook, and returns the axes. Raises
UnsupportedError without matplotlib. Colours are those of :mod:`memplan.render.colors`; what they say, a marker, a
pattern or the order says too.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from memplan.answers import Plan
from memplan.errors import SpecError, UnsupportedError
from memplan.render import words
from memplan.render.colors import BLUE, COMPONENTS, VERDICTS, series
from memplan.results import (
    Estimate,
    EstimateList,
)
from memplan.units import GiB

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = [
    "plot_errors",
    "plot_estimate",
    "plot_estimates",
    "plot_ladder",
    "plot_pareto",
    "plot_peaks",
    "plot_phases",
]

_OPTIONS = {
    "micro_batch_size": "micro-batch, sequences per GPU",
    "seq_len": "length of a sequence, tokens",
    "gpus": "GPUs",
    "lora_rank": "rank of the LoRA adapters",
}
"""What the axis says of an option that estimates differ in."""
_NAME = 36
"""Characters of a line of a name: bars and points keep most of a plot's width."""


def plot_estimate(estimate: Estimate, *, ax: Axes | None = None) -> Axes:
    """Draw one bar of the components, with low, high and the capacity."""
    return _bars([estimate], [words.gpu_name(estimate) or "GPU"], estimate.model.id, ax)


def plot_estimates(estimates: EstimateList, *, ax: Axes | None = None) -> Axes:
    """Draw a bar per estimate, the first on top; as :func:`plot_estimate`."""
    several = estimates.estimates
    return _bars(several, words.rungs(several), several[0].model.id if several else "", ax)


def plot_ladder(plan: Plan, *, ax: Axes | None = None) -> Axes:
    """Draw a bar per rung, the first on top; the chosen one is marked."""
    names = [f"{rung.name} (chosen)" if rung == plan.best else rung.name for rung in plan.rungs]
    return _bars([rung.estimate for rung in plan.rungs], names, plan.rungs[0].estimate.model.id, ax)


def plot_phases(estimate: Estimate, *, ax: Axes | None = None) -> Axes:
    """Draw the most that is allocated within each phase of a run, with the capacity."""
    axes: Any = _new_axes(4.2) if ax is None else ax
    names = [phase.name for phase in estimate.gpu.phases]
    sizes = [phase.allocated / GiB for phase in estimate.gpu.phases]
    places = range(len(names))
    axes.bar(places, sizes, color=BLUE, width=0.7, label="allocated")
    # Numbers stand with the names: on the bars the capacity's line would run through some.
    numbers = [words.gib(phase.allocated) for phase in estimate.gpu.phases]
    axes.set_xticks(places, [f"{number}\n{name}".replace("_", "\n") for number, name in zip(numbers, names)])
    axes.set_xlabel("phase of the run")
    axes.set_ylabel("GiB allocated per GPU, at most")
    _mark_capacities(axes.axhline, [estimate])
    # From the axes' left to the picture's right, over the legend, and on to a next line there.
    axes.set_title(f"{estimate.model.id}: {words.setup_facts(estimate)}", loc="left", fontsize="medium", wrap=True)
    top = max([*sizes, (estimate.gpu.capacity or 0) / GiB])
    axes.set_ylim(0, 1.1 * top or 1)
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return axes


def plot_peaks(estimates: EstimateList | Iterable[Estimate], *, by: str, ax: Axes | None = None) -> Axes:
    """Draw the peak of each GPU against an option, ``low`` to ``high`` shaded, and a line per setup otherwise equal.

    ``by`` is the option's name in ``setup``, such as ``micro_batch_size`` or ``seq_len``, or ``gpus``. Raises SpecError
    if an estimate has no number there.
    """
    lines: dict[str, list[tuple[float, Estimate]]] = {}
    several = tuple(estimates.estimates if isinstance(estimates, EstimateList) else estimates)
    for estimate in several:
        value = estimate.cluster.get("gpus") if by == "gpus" else words.option(estimate, by)
        if not isinstance(value, int | float):
            raise SpecError.at("by", by, "is no number of every estimate", f"Use {' or '.join(_OPTIONS)}.")
        lines.setdefault(_line_name(estimate, by), []).append((value, estimate))
    axes: Any = _new_axes(4.8) if ax is None else ax
    for (name, points), (color, marker, style) in zip(lines.items(), series(len(lines))):
        points.sort(key=lambda point: point[0])
        at = [value for value, _ in points]
        gpus = [estimate.gpu for _, estimate in points]
        axes.fill_between(at, [gpu.low / GiB for gpu in gpus], [gpu.high / GiB for gpu in gpus], color=color, alpha=0.2)
        look = {"color": color, "marker": marker, "linestyle": style}
        axes.plot(at, [gpu.peak_device / GiB for gpu in gpus], label=name, **look)
    _mark_capacities(axes.axhline, several)
    axes.set_xlabel(_OPTIONS.get(by, by))
    axes.set_ylabel("GiB per GPU at the peak (shaded: low to high)")
    axes.set_title(several[0].model.id if several else "")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return axes


def plot_pareto(plan: Plan, *, ax: Axes | None = None) -> Axes:
    """Draw the setups that no other beats in time and memory, with the other rungs that fit, or may.

    Where nothing is known to fit, the title says so, and rungs that do not fit are drawn too.
    """
    axes: Any = _new_axes(4.8) if ax is None else ax
    rungs = [rung.estimate for rung in plan.rungs]
    front = [(each.seconds, each.high / GiB) for each in plan.pareto]
    groups = [("other rung that fits", ("fits",), "o"), ("rung that may fit", ("tight", "unknown"), "x")]
    if not front:
        groups.append(("rung that does not fit", ("does-not-fit",), "+"))
    for name, verdicts, marker in groups:
        found = [(each.step.seconds, each.gpu.high / GiB) for each in rungs if each.step and each.verdict in verdicts]
        found = [place for place in found if place not in front]
        if found:
            seconds, highs = zip(*found)
            axes.scatter(seconds, highs, color="#767676", marker=marker, label=name)
    if front:
        look: dict[str, Any] = {"color": "#767676", "linewidth": 1, "drawstyle": "steps-post"}
        axes.plot([x for x, _ in front], [y for _, y in front], label="not beaten by any:", **look)
    for each, place, (color, marker, _) in zip(plan.pareto, front, series(len(front))):
        name = textwrap.fill(f"{words.point(each)}, {words.batch_of(each)}", _NAME)
        axes.plot(*place, color=color, marker=marker, markersize=8, linestyle="none", label=name)
    _mark_capacities(axes.axhline, rungs)
    axes.set_xlabel("seconds per step")
    axes.set_ylabel("GiB per GPU, at most")
    title = rungs[0].model.id if rungs else ""
    axes.set_title(title if front else f"{title}: no setup is known to fit")
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return axes


def plot_errors(rows: Iterable[tuple[str, float, float]], *, unit: str = "GiB", ax: Axes | None = None) -> Axes:
    """Draw what was predicted over what was measured against what was measured.

    ``rows`` are a group, the measured value in ``unit`` and the ratio of predicted to measured: 1 is right, above it
    memplan said too much. The band is 10 % to each side.
    """
    groups: dict[str, list[tuple[float, float]]] = {}
    for group, measured, ratio in rows:
        groups.setdefault(group, []).append((measured, ratio))
    axes: Any = _new_axes(4.8) if ax is None else ax
    axes.axhspan(0.9, 1.1, color="#E5E5E5", label="within 10 %")
    axes.axhline(1, color="black", linewidth=1)
    for (name, points), (color, marker, _) in zip(groups.items(), series(len(groups))):
        at, ratios = zip(*points)
        axes.scatter(at, ratios, color=color, marker=marker, s=22, alpha=0.8, label=f"{name} ({len(points)})")
    axes.set_xscale("log")
    _mark_decades(axes.xaxis)
    axes.set_xlabel(f"measured, {unit}")
    axes.set_ylabel("predicted / measured")
    axes.grid(alpha=0.3)
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return axes


def _bars(estimates: Sequence[Estimate], labels: Sequence[str], title: str, ax: Axes | None) -> Axes:
    axes: Any = _new_axes(max(3.4, 1.2 + 0.6 * len(estimates))) if ax is None else ax
    places = range(len(estimates))
    starts = [0.0] * len(estimates)
    for name, (color, hatch) in COMPONENTS.items():
        sizes = [getattr(estimate.gpu.components, name) / GiB for estimate in estimates]
        if any(sizes):
            look: dict[str, Any] = {"color": color, "hatch": hatch, "edgecolor": "white", "linewidth": 0.5}
            axes.barh(places, sizes, left=starts, label=name, height=0.6, **look)
            starts = [start + size for start, size in zip(starts, sizes, strict=True)]
    lows = [(estimate.gpu.peak_device - estimate.gpu.low) / GiB for estimate in estimates]
    highs = [(estimate.gpu.high - estimate.gpu.peak_device) / GiB for estimate in estimates]
    axes.errorbar(starts, places, xerr=[lows, highs], fmt="none", ecolor="black", capsize=4, label="low to high")
    _mark_capacities(axes.axvline, estimates)
    # Verdicts stand below the names: beside the bars the capacity's line would run through some.
    names = [textwrap.fill(label, _NAME) for label in labels]
    verdicts = [words.verdict_in_a_row(estimate) for estimate in estimates]
    axes.set_yticks(places, [f"{name}\n{verdict}" for name, verdict in zip(names, verdicts)])
    for label, estimate in zip(axes.get_yticklabels(), estimates):
        label.set_color(VERDICTS[estimate.verdict])
    edge = 0.8 if len(estimates) == 1 else 0.5
    axes.set_ylim(len(estimates) - 1 + edge, -edge)
    ends = [max(each.gpu.high, each.gpu.capacity or 0) / GiB for each in estimates]
    axes.set_xlim(0, 1.05 * max(ends, default=0) or 1)
    axes.set_xlabel("GiB per GPU at the peak")
    axes.set_title(title)
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return axes


def _mark_capacities(line: Any, estimates: Sequence[Estimate]) -> None:
    """A dashed line per size of GPU that is known."""
    for capacity in sorted({each.gpu.capacity for each in estimates if each.gpu.capacity is not None}):
        line(capacity / GiB, color="black", linestyle="--", label=f"capacity {words.gib(capacity)} GiB")


def _mark_decades(axis: Any) -> None:
    """1, 2, 5, 10 and so on, as they are read."""
    from matplotlib import ticker

    axis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_locator(ticker.NullLocator())


def _line_name(estimate: Estimate, by: str) -> str:
    """What tells the lines apart: the strategy, and the batch or the length that is not on the axis."""
    parts = [words.strategy(estimate)]
    if by != "micro_batch_size":
        parts.append(f"micro-batch {words.option(estimate, 'micro_batch_size')}")
    if by != "seq_len":
        parts.append(f"{words.tokens(estimate)} tokens")
    if words.option(estimate, "gradient_checkpointing"):
        parts.append("checkpointing")
    return ", ".join(parts)


def _new_axes(height: float) -> Any:
    try:
        from matplotlib import pyplot
    except ImportError:
        raise UnsupportedError("plot: matplotlib is not installed. Run pip install 'memplan[notebook]'.") from None
    _, axes = pyplot.subplots(figsize=(9, height), layout="constrained")
    return axes
