import sys
from types import SimpleNamespace
from typing import Any

import pytest
from tests.render.samples import PARTS, SETUP, estimate, several

import memplan
from memplan.answers import Plan, Point, Rung
from memplan.errors import SpecError, UnsupportedError
from memplan.render import plots
from memplan.results import (
    Estimate,
    StepTime,
)
from memplan.units import GiB

BATCH = {"micro_batch_size": 1, "grad_accum_steps": 2}
FAST = Point(name="ddp", setup=BATCH, seconds=1, tokens_per_second=2, high=30 * GiB, headroom=0)
SMALL = Point(name="zero3", setup=BATCH, seconds=2, tokens_per_second=1, high=10 * GiB, headroom=0)


def plan() -> Plan:
    rungs = [
        Rung(name=f"rung {n}", estimate=each, reason_passed_over="slow") for n, each in enumerate(several().estimates)
    ]
    return Plan(best=rungs[1], rungs=tuple(rungs), pareto=(FAST, SMALL))


class Axes(SimpleNamespace):
    """Stands for matplotlib's, and notes what is drawn."""

    def __init__(self) -> None:
        super().__init__(calls=[])

    def __getattr__(self, name: str) -> Any:
        if name.endswith("axis"):
            return Axes()
        return lambda *args, **options: self.calls.append((name, args, options))

    def get_yticklabels(self) -> list[Any]:
        return []

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
    names = ["ddp, batch 4\ndoes not fit", "ddp, batch 1 x 4\nfits", "ddp, batch 4, checkpointing\nfits"]
    assert axes.named("set_yticks")[0][0][1] == names
    assert [args for args, _ in axes.named("axvline")] == [(40.0,), (64.0,)]
    assert all(len(args[1]) == 3 for args, _ in axes.named("barh"))


def test_phases_are_bars_beside_the_capacity() -> None:
    axes = Axes()
    estimate().plot("phases", ax=axes)
    (places, sizes), _ = axes.named("bar")[0]
    assert list(zip(places, sizes)) == [(0, 25.0), (1, pytest.approx(60, abs=0.01)), (2, 0.0)]
    assert axes.named("set_xticks")[0][0][1] == ["25.00\nload", "60.00\nbackward", "0.00\nidle"]
    assert axes.named("axhline")[0][0] == (80.0,)


def test_peaks_are_lines_by_what_else_differs() -> None:
    def of(batch: int, length: int) -> Estimate:
        parts = PARTS | {"activations": batch * length * GiB // 1024}
        return estimate(parts=parts, setup={"micro_batch_size": batch, "seq_len": length})

    axes = Axes()
    plots.plot_peaks([of(batch, length) for length in (1024, 2048) for batch in (4, 1)], by="micro_batch_size", ax=axes)
    lines = {options["label"]: args for args, options in axes.named("plot")}
    assert list(lines) == ["ddp, 1,024 tokens", "ddp, 2,048 tokens"]
    at, peaks = lines["ddp, 2,048 tokens"]
    assert at == [1, 4]
    assert peaks == [of(batch, 2048).gpu.peak_device / GiB for batch in (1, 4)]
    assert [args for args, _ in axes.named("axhline")] == [(80.0,)]
    with pytest.raises(SpecError, match="by: 'optim' is no number of every estimate"):
        plots.plot_peaks([of(1, 1024)], by="optim", ax=axes)


def test_the_ladder_marks_what_was_chosen() -> None:
    axes = Axes()
    plan().plot(ax=axes)
    assert axes.named("set_yticks")[0][0][1] == ["rung 0\ndoes not fit", "rung 1 (chosen)\nfits", "rung 2\nfits"]


def test_the_front_is_a_staircase() -> None:
    axes = Axes()
    plan().plot("pareto", ax=axes)
    assert axes.named("plot")[0][0] == ([1.0, 2.0], [30.0, 10.0])
    assert [options["label"] for _, options in axes.named("plot")[1:]] == ["ddp, 1 x 2", "zero3, 1 x 2"]
    assert axes.named("set_title")[0][0] == ("org/model",)


def test_where_nothing_fits_the_front_says_so() -> None:
    seconds = StepTime(seconds=2, tokens_per_second=1, flops=1, bound_by="compute")
    rung = Rung(name="ddp", estimate=estimate(capacity=GiB, step=seconds), reason_passed_over="large")
    axes = Axes()
    Plan(best=None, rungs=(rung,)).plot("pareto", ax=axes)
    assert axes.named("plot") == []
    assert [(args, options["label"]) for args, options in axes.named("scatter")] == [
        (((2.0,), (rung.estimate.gpu.high / GiB,)), "rung that does not fit")
    ]
    assert axes.named("set_title")[0][0] == ("org/model: no setup is known to fit",)


def test_a_rung_on_the_front_is_drawn_once() -> None:
    seconds = StepTime(seconds=1, tokens_per_second=1, flops=1, bound_by="compute")
    rung = Rung(name="ddp", estimate=estimate(step=seconds))
    point = FAST.model_copy(update={"high": rung.estimate.gpu.high})
    axes = Axes()
    Plan(best=rung, rungs=(rung,), pareto=(point,)).plot("pareto", ax=axes)
    assert axes.named("scatter") == []


def test_errors_are_points_by_group() -> None:
    axes = Axes()
    plots.plot_errors([("a", 1.0, 1.1), ("b", 2.0, 0.9), ("a", 4.0, 1.0)], ax=axes)
    assert [(args, options["label"]) for args, options in axes.named("scatter")] == [
        (((1.0, 4.0), (1.1, 1.0)), "a (2)"),
        (((2.0,), (0.9,)), "b (1)"),
    ]


def test_another_plot_is_refused() -> None:
    with pytest.raises(SpecError, match="Use ladder or pareto"):
        plan().plot("front")
    with pytest.raises(SpecError, match="Use components or phases"):
        estimate().plot("phase")


def test_matplotlib_draws_them_all() -> None:
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    found = estimate()
    drawn = [found.plot(), found.plot("phases"), several().plot(), plan().plot(), plan().plot("pareto")]
    drawn += [plots.plot_peaks(several(), by="micro_batch_size"), plots.plot_errors([("a", 1.0, 1.1)])]
    for axes in drawn:
        axes.figure.canvas.draw()
        assert "GiB" in axes.get_xlabel() + axes.get_ylabel()
        # What tells its size and its colours is within the picture.
        inner, outer = axes.get_legend().get_window_extent(), axes.figure.bbox
        assert outer.x0 <= inner.x0 < inner.x1 <= outer.x1
        assert outer.y0 <= inner.y0 < inner.y1 <= outer.y1
        matplotlib.pyplot.close(axes.figure)


LONG = {
    "strategy": "zero3", "offload_optimizer": "cpu", "offload_param": "cpu", "grad_accum_steps": 16,
    "gradient_checkpointing": True, "lora": {"rank": 16}, "eval_batch_size": 8,
    "alloc_conf": "expandable_segments:True",
}  # fmt: skip


def test_every_word_of_a_plot_is_in_the_picture_and_off_the_capacity() -> None:
    """Whatever the capacity is: also where bars end."""
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    setup = {**SETUP, **LONG}
    for capacity in (24, 25, 26, 58, 60, 62, 64, 66, 200):
        found = estimate(capacity=capacity * GiB, setup=setup)
        rungs = [Rung(name="ZeRO-3, optimizer offloaded, without checkpointing", estimate=found) for _ in range(9)]
        ladder = Plan(best=None, rungs=tuple(rungs))
        for axes in (found.plot("phases"), found.plot(), ladder.plot()):
            axes.figure.canvas.draw()
            texts = [axes.title, axes._left_title]
            for axis, (one, other) in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim())):
                ticks = zip(axis.get_majorticklocs(), axis.get_majorticklabels())
                texts += [label for at, label in ticks if min(one, other) <= at <= max(one, other)]
            texts += [axes.xaxis.label, axes.yaxis.label, *axes.texts]
            boxes = [text.get_window_extent() for text in texts if text.get_text()]
            (line,) = (each for each in axes.lines if each.get_linestyle() == "--")
            picture, dashes = axes.figure.bbox, line.get_window_extent()
            for box in boxes:
                assert picture.x0 <= box.x0 < box.x1 <= picture.x1
                assert picture.y0 <= box.y0 < box.y1 <= picture.y1
                inside = box.x0 < dashes.x1 and dashes.x0 < box.x1 and box.y0 < dashes.y1 and dashes.y0 < box.y1
                assert not inside
            matplotlib.pyplot.close(axes.figure)


def test_twenty_lines_look_different() -> None:
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    several = [estimate(setup={"micro_batch_size": b, "seq_len": s}) for s in range(100, 2100, 100) for b in (1, 2)]
    axes = plots.plot_peaks(several, by="micro_batch_size")
    drawn = [line for line in axes.lines if line.get_marker() != "None"]
    assert len({(line.get_color(), line.get_marker(), line.get_linestyle()) for line in drawn}) == len(drawn) == 20
    matplotlib.pyplot.close(axes.figure)


def test_results_as_data_frames() -> None:
    pytest.importorskip("pandas")
    frame = plan().to_dataframe()
    assert list(frame.rung) == ["rung 0", "rung 1", "rung 2"]
    assert list(frame.chosen) == [False, True, False]
    assert list(frame.high) == [each.gpu.high for each in several().estimates]
    assert estimate().to_dataframe().query("component == 'weights'").bytes.item() == 25 * GiB
    finding = memplan.Finding(code="padding", severity="info", path="p", message="m", remedy="r")
    assert memplan.Check(estimate=None, verdict="unknown", findings=(finding,)).to_dataframe().code.item() == "padding"


def test_without_pandas_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(UnsupportedError, match=r"pip install 'memplan\[notebook\]'"):
        plan().to_dataframe()


def test_without_matplotlib_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UnsupportedError, match=r"pip install 'memplan\[notebook\]'"):
        estimate().plot()
