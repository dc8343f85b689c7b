"""Estimates as plots: components stacked against the capacity. Needs the ``notebook`` extra, for matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from memplan.errors import UnsupportedError
from memplan.render import words
from memplan.results import COMPONENTS, Estimate, EstimateList
from memplan.units import GiB

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["plot_estimate", "plot_estimates"]

# One colour per component, the same in every plot: matplotlib's tab10 has one too few.
_COLORS = (
    "#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#e377c2", "#7f7f7f", "#bcbd22", "#17becf",
    "#393b79",
)  # fmt: skip


def plot_estimate(estimate: Estimate, *, ax: Axes | None = None) -> Axes:
    """Draw one bar of the components in GiB, with low, high and the capacity. Returns the axes.

    ``ax`` is where to draw; by default a new figure. Raises UnsupportedError without matplotlib.
    """
    return _plot([estimate], [words.gpu_name(estimate) or "GPU"], estimate.model.id, ax)


def plot_estimates(estimates: EstimateList, *, ax: Axes | None = None) -> Axes:
    """Draw a bar per estimate, the first on top; as :func:`plot_estimate`."""
    several = estimates.estimates
    return _plot(several, words.rungs(several), several[0].model.id if several else "", ax)


def _plot(estimates: Sequence[Estimate], labels: Sequence[str], title: str, ax: Axes | None) -> Axes:
    axes: Any = _new_axes(len(estimates)) if ax is None else ax
    places = range(len(estimates))
    starts = [0.0] * len(estimates)
    for name, color in zip(COMPONENTS, _COLORS, strict=True):
        sizes = [getattr(estimate.gpu.components, name) / GiB for estimate in estimates]
        if any(sizes):
            axes.barh(places, sizes, left=starts, label=name, color=color, height=0.6)
            starts = [start + size for start, size in zip(starts, sizes, strict=True)]
    lows = [(estimate.gpu.peak_device - estimate.gpu.low) / GiB for estimate in estimates]
    highs = [(estimate.gpu.high - estimate.gpu.peak_device) / GiB for estimate in estimates]
    axes.errorbar(starts, places, xerr=[lows, highs], fmt="none", ecolor="black", capsize=4)
    for capacity in sorted({e.gpu.capacity for e in estimates if e.gpu.capacity is not None}):
        axes.axvline(capacity / GiB, color="black", linestyle="--", label=f"capacity {words.gib(capacity)} GiB")
    axes.set_yticks(places, labels)
    axes.invert_yaxis()
    axes.set_xlabel("GiB per GPU")
    axes.set_title(title)
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return axes


def _new_axes(bars: int) -> Any:
    try:
        from matplotlib import pyplot
    except ImportError:
        raise UnsupportedError("plot: matplotlib is not installed. Run pip install 'memplan[notebook]'.") from None
    _, axes = pyplot.subplots(figsize=(9, max(3.6, 1.2 + 0.8 * bars)), layout="constrained")
    return axes
