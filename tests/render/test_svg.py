"""Charts whose words are read: no text covers another one, and no dashed line runs through one, at any width."""

import random
import re
from collections.abc import Sequence
from html.parser import HTMLParser
from itertools import combinations
from typing import NamedTuple

import pytest
from tests.render.samples import estimate

import memplan
from memplan.answers import Report
from memplan.render import svg
from memplan.render.svg import Bar, Dot
from memplan.units import GiB

WIDTHS = (288, 620, 900)
"""Of a phone's page, of A4 and of a desk's, without their margins."""
FONT, LETTER = 13, 7.2


class Box(NamedTuple):
    """Pixels that something fills."""

    what: str
    left: float
    top: float
    right: float
    bottom: float

    def meets(self, other: "Box") -> bool:
        across = self.left < other.right and other.left < self.right
        return across and self.top < other.bottom and other.top < self.bottom


class Chart(HTMLParser):
    """Where texts, dashed lines and dots of a chart are, as wide as it is shown."""

    def __init__(self, text: str, width: float) -> None:
        super().__init__()
        self.width = width
        self.texts: list[Box] = []
        self.lines: list[Box] = []
        self.dots: list[Box] = []
        self._at: dict[str, str] | None = None
        self.height = float(re.match(r'<svg width="100%" height="(\d+)"', text)[1])
        self.feed(text)

    def across(self, place: str) -> float:
        return float(place[:-1]) / 100 * self.width

    def handle_starttag(self, tag, attrs) -> None:
        given = dict(attrs)
        if tag == "text":
            self._at = given
        if tag == "line" and given["class"] in ("capacity", "front", "span"):
            x1, x2 = (self.across(given[name]) for name in ("x1", "x2"))
            self.lines.append(Box(given["class"], x1 - 1, float(given["y1"]) - 1, x2 + 1, float(given["y2"]) + 1))
        if tag == "circle":
            x, y, r = self.across(given["cx"]), float(given["cy"]), float(given["r"])
            self.dots.append(Box("dot", x - r, y - r, x + r, y + r))

    def handle_data(self, data) -> None:
        if self._at is None:
            return
        x, y = self.across(self._at["x"]) + float(self._at.get("dx") or 0), float(self._at["y"])
        wide = LETTER * len(data)
        left = x - {"start": 0, "middle": wide / 2, "end": wide}[self._at["text-anchor"]]
        self.texts.append(Box(data, left, y - FONT / 2, left + wide, y + FONT / 2))
        self._at = None


def check(text: str) -> None:
    for width in WIDTHS:
        chart = Chart(text, width)
        for one, other in combinations(chart.texts, 2):
            assert not one.meets(other), (width, one, other)
        for one in chart.texts:
            assert one.left >= -1, (width, one)
            assert one.right <= width + 1, (width, one)
            assert 0 <= one.top < one.bottom <= chart.height, (width, one)
            for other in (*chart.lines, *chart.dots):
                assert not one.meets(other), (width, one, other)


def charts(report: Report) -> list[str]:
    return re.findall(r'<svg width="100%".*?</svg>', report.to_html(), re.DOTALL)


def test_what_meets_is_noticed() -> None:
    chart = Chart(
        '<svg width="100%" height="40"><text x="10%" y="10" text-anchor="start">one</text>'
        '<line class="capacity" x1="12%" y1="0" x2="12%" y2="40"/></svg>',
        320,
    )
    assert chart.texts[0].meets(chart.lines[0])


@pytest.mark.parametrize(
    ("model", "training", "cluster"),
    [
        ("gpt2", {"seq_len": 512}, "2xT4"),
        ("google/vit-base-patch16-224", {"micro_batch_size": 16}, "1xT4"),
        ("gpt2", {"seq_len": 1024}, {"gpu": "T4", "gpu_memory": "1GiB", "host_memory": "1GiB"}),
        ("meta-llama/Llama-2-7b", {"seq_len": 512}, {"gpu": "RTX4090", "gpus": 4, "host_memory": "128GiB"}),
        ("gpt2", {"seq_len": 128}, {"gpus": 2}),
    ],
)
def test_the_charts_of_a_report_are_read(model: str, training: dict, cluster: object) -> None:
    for chart in charts(memplan.report(model, training, cluster)):
        check(chart)


@pytest.mark.parametrize("capacity", [None, *(size * GiB for size in (1, 24, 62, 63, 64, 65, 1000))])
def test_the_capacity_runs_through_no_name(capacity: int | None) -> None:
    gpu = estimate().gpu
    names = (
        "fits",
        "ZeRO-3, optimizer offloaded, without checkpointing, liger, 8-bit adam (chosen): does not fit (host)",
    )
    bars = [Bar(name, tuple(gpu.components), gpu.low, gpu.high) for name in names]
    check(svg.stacks(bars, capacity, "GiB per GPU at the peak", "a label"))


def front(number: int, rng: random.Random) -> Sequence[Dot]:
    scale = 10 ** rng.uniform(-2, 3)
    seconds = sorted(scale * (1 + rng.random() * rng.choice((0.01, 1, 20))) for _ in range(number))
    sizes = sorted((int(rng.uniform(0.2, 39) * GiB) for _ in range(number)), reverse=True)
    return [Dot(at, size) for at, size in zip(seconds, sizes, strict=True)]


@pytest.mark.parametrize("seed", range(60))
def test_numbers_of_a_front_are_told_apart(seed: int) -> None:
    rng = random.Random(seed)
    dots = front(rng.choice((1, 2, 3, 5, 9, 14)), rng)
    chart = svg.scatter(dots, rng.choice((None, 40 * GiB, dots[0].size)), "a label")
    check(chart)
    said = [text.what for text in Chart(chart, 288).texts if re.fullmatch(r"\d+(-\d+)?", text.what)]
    said = said[-next(n for n in range(1, len(said) + 1) if said[-n].split("-")[0] == "1") :]
    spans = [tuple(map(int, (text.split("-") * 2)[:2])) for text in said]
    assert [n for first, last in spans for n in range(first, last + 1)] == list(range(1, len(dots) + 1))


def test_an_interval_is_drawn_where_there_is_one() -> None:
    sure = Bar("load", (("load", GiB),), GiB, GiB)
    assert 'class="span"' not in svg.stacks([sure], None, "GiB", "a label")
    assert 'class="span"' in svg.stacks([sure._replace(high=2 * GiB)], None, "GiB", "a label")
