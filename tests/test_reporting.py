"""The page of a report says what its JSON says; in a real browser too, where there is one."""

import json
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from tests.browser import CHROMIUM, CONTRAST, Browser, text_of_pages

import memplan
from memplan import cli
from memplan.answers import Report
from memplan.errors import SpecError
from memplan.units import gib

RUN = ("gpt2", "--seq-len", "64")
in_a_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: apt-get install chromium")


class Numbers(HTMLParser):
    """What the <data> elements and the areas of the charts say."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.found: list[list[str]] = []
        self.areas: list[dict[str, str]] = []
        self.external: list[str] = []
        self._within = False
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        if tag == "data":
            self.found.append([given["data-path"], given["value"], ""])
            self._within = True
        if tag == "rect" and "data-bytes" in given:
            self.areas.append(given)
        self.external += [given[name] for name in ("src", "href") if name in given and given[name][:1] != "#"]

    def handle_endtag(self, tag: str) -> None:
        self._within = self._within and tag != "data"

    def handle_data(self, data: str) -> None:
        if self._within:
            self.found[-1][2] += data


def at(data: Any, path: str) -> Any:
    for key in path.split("."):
        data = data[int(key)] if isinstance(data, list) else data[key]
    return data


def check_numbers(found: list[list[str]], data: dict[str, Any]) -> None:
    """Each number is the JSON's at its path, and reads as it."""
    for path, value, text in found:
        expected = at(data, path)
        assert json.loads(value) == expected, path
        if isinstance(expected, int):
            assert text == gib(expected), path
        else:
            assert text in (f"{expected:.3g}", f"{expected:,.0f}"), path


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    path = tmp_path_factory.mktemp("report") / "report.html"
    result = memplan.report("gpt2", {"seq_len": 512}, "2xT4", global_batch_size=32)
    result.write(path)
    return path, json.loads(result.to_json())


def test_the_page_has_the_numbers_of_the_json(written: tuple[Path, dict[str, Any]]) -> None:
    path, data = written
    page = path.read_text(encoding="utf-8")
    found = Numbers(page).found
    check_numbers(found, data)
    shown = {name for name, _, _ in found}
    gpu = data["estimate"]["gpu"]
    wanted = {f"estimate.gpu.{name}" for name in ("peak_allocated", "peak_reserved", "peak_device", "low", "high")}
    wanted |= {f"estimate.gpu.components.{name}" for name, size in gpu["components"].items() if size}
    wanted |= {f"estimate.gpu.phases.{index}.allocated" for index in range(len(gpu["phases"]))}
    wanted |= {f"plan.rungs.{n}.estimate.gpu.high" for n in range(len(data["plan"]["rungs"]))}
    wanted |= {f"plan.pareto.{n}.seconds" for n in range(len(data["plan"]["pareto"]))}
    assert wanted <= shown
    embedded = re.search(r'<script type="application/json" id="json">(.*?)</script>', page)
    assert embedded is not None
    assert json.loads(embedded[1]) == data


def test_areas_are_as_large_as_what_they_stand_for(written: tuple[Path, dict[str, Any]]) -> None:
    path, data = written
    areas = Numbers(path.read_text(encoding="utf-8")).areas
    first = [size for size in data["estimate"]["gpu"]["components"].values() if size]
    phases = [phase["allocated"] for phase in data["estimate"]["gpu"]["phases"] if phase["allocated"]]
    for sizes in (first, phases):
        own, areas = areas[: len(sizes)], areas[len(sizes) :]
        assert [int(area["data-bytes"]) for area in own] == sizes
        widths = [float(area["width"].removesuffix("%")) for area in own]
        scale = max(widths) / max(sizes)
        assert widths == pytest.approx([scale * size for size in sizes], abs=0.0011)


def test_the_page_stands_alone(written: tuple[Path, dict[str, Any]]) -> None:
    page = written[0].read_text(encoding="utf-8")
    assert set(Numbers(page).external) == {"data:,"}
    assert "@import" not in page
    assert not re.search(r"url\((?!#)", page)


def test_a_report_comes_back_from_its_json(written: tuple[Path, dict[str, Any]]) -> None:
    path, data = written
    assert Report.from_dict(data).to_html() == path.read_text(encoding="utf-8")


def test_names_are_escaped() -> None:
    config = {"_name_or_path": "</script><b>", "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}
    found = memplan.report(config, {"seq_len": 64})
    named = found.estimate.model.model_copy(update={"id": "</script><b>&"})
    page = found.model_copy(update={"estimate": found.estimate.model_copy(update={"model": named})}).to_html()
    assert "</script><b>" not in page
    assert "<h1>&lt;/script&gt;&lt;b&gt;&amp;</h1>" in page


def test_without_a_gpu_the_ladder_takes_the_plans_place() -> None:
    found = memplan.report("gpt2", {"seq_len": 128}, {"gpus": 2})
    assert found.plan is None
    assert found.ladder == memplan.ladder("gpt2", {"seq_len": 128}, {"gpus": 2})
    numbers = Numbers(found.to_html()).found
    check_numbers(numbers, found.to_dict())
    assert any(path.startswith("ladder.estimates.2.") for path, _, _ in numbers)


def test_where_nothing_fits_the_page_says_what_would() -> None:
    small = {"gpu": "T4", "gpu_memory": "1GiB", "host_memory": "1GiB"}
    found = memplan.report("gpt2", {"seq_len": 1024}, small)
    assert found.plan is not None
    assert found.plan.best is None
    assert found.estimate == found.plan.rungs[0].estimate
    page = found.to_html()
    assert all(remedy.options in page for remedy in found.plan.remedies)
    check_numbers(Numbers(page).found, found.to_dict())


def test_a_strategy_is_what_the_estimate_is_of() -> None:
    found = memplan.report("gpt2", {"seq_len": 128}, "2xT4", "zero3")
    assert found.estimate == memplan.estimate("gpt2", {"seq_len": 128}, "2xT4", "zero3")
    assert found.plan is not None
    # What the plan starts with is not what was asked for, and no word of the page says so.
    page = found.to_html().partition("<script")[0]
    assert "as asked" not in page
    assert "<th scope=row>DDP" in page
    assert "starts with DDP" in page


@pytest.mark.parametrize(("strategy", "cluster"), [(None, "2xT4"), ("ddp", "2xT4"), (None, "1xT4")])
def test_what_was_asked_for_is_called_so(strategy: str | None, cluster: str) -> None:
    page = memplan.report("gpt2", {"seq_len": 128}, cluster, strategy).to_html().partition("<script")[0]
    assert "<th scope=row>as asked" in page
    assert "starts with" not in page


# -- the command


def test_the_command_writes_the_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "r.html"
    assert cli.main(["report", *RUN, "--gpu", "T4", "--html", str(path), "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    check_numbers(Numbers(path.read_text(encoding="utf-8")).found, data)
    assert [entry.name for entry in tmp_path.iterdir()] == ["r.html"]
    assert path.stat().st_mode & 0o777 == 0o666 & ~_umask()


def _umask() -> int:
    import os

    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_what_is_there_stays_but_with_force(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "r.html"
    path.write_text("mine", encoding="utf-8")
    assert cli.main(["report", *RUN, "--html", str(path)]) == 2
    assert "--html" in (message := capsys.readouterr().err)
    assert "--force" in message
    assert path.read_text(encoding="utf-8") == "mine"
    assert cli.main(["report", *RUN, "--html", str(path), "--force"]) == 0
    assert path.read_text(encoding="utf-8").startswith("<!doctype html>")


@pytest.mark.parametrize("name", ["", ".", "no/such/folder.html", "a\0b"])
def test_where_no_page_can_be_is_said_first(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["report", *RUN, "--html", name]) == 2
    assert capsys.readouterr().err.startswith("--html: ")


@pytest.mark.parametrize("arguments", [[], ["--task", "load", "--html", "r.html"], ["--explain", "--html", "r.html"]])
def test_what_a_report_is_not_for(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["report", *RUN, *arguments]) == 2
    assert capsys.readouterr().err.startswith(("--html", "--task", "--explain"))
    assert not list(tmp_path.iterdir())


def test_images_have_no_tokens() -> None:
    found = memplan.report("google/vit-base-patch16-224", None, "1xT4")
    assert found.estimate.step is not None
    page = found.to_html()
    assert "tokens/s" not in page
    assert "estimate.step.seconds" in page


def test_a_page_that_fails_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "r.html"
    path.write_text("mine", encoding="utf-8")
    found = memplan.report("gpt2", {"seq_len": 64})

    def full(*_: object, **__: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(SpecError, match="No space left"):
        found.write(path, force=True)
    assert path.read_text(encoding="utf-8") == "mine"
    assert [entry.name for entry in tmp_path.iterdir()] == ["r.html"]


# -- in a browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with Browser() as opened:
        yield opened


NUMBERS = """[...document.querySelectorAll("data")].map(e => [e.dataset.path, e.value, e.textContent])"""
WIDER = """[...document.querySelectorAll("table, figure")].filter(e => e.scrollWidth > e.parentElement.clientWidth + 1)
.map(e => e.outerHTML.slice(0, 80))"""
LETTERS = """[...document.querySelectorAll("figure text")].map(e =>
e.getScreenCTM().a * parseFloat(getComputedStyle(e).fontSize))"""
HEADS = """[...document.querySelectorAll(".wide td")].map(e =>
getComputedStyle(e, "::before").content.split('"')[1].trim())"""
COVERED = """
[...document.querySelectorAll("figure > svg")].flatMap(chart => {
  const boxes = query => [...chart.querySelectorAll(query)].map(e => [e.textContent, e.getBoundingClientRect()]);
  const meet = ([, a], [, b]) => a.left < b.right && b.left < a.right && a.top + 2 < b.bottom && b.top + 2 < a.bottom;
  const texts = boxes("text"), own = chart.getBoundingClientRect();
  const out = texts.filter(([, box]) => box.left < own.left || box.right > own.right || box.bottom > own.bottom);
  const under = texts.flatMap((one, i) => [...texts.slice(i + 1), ...boxes(".capacity, .front, circle")]
    .filter(other => meet(one, other)).map(other => [one[0], other[0]]));
  return [...out.map(([text]) => [text]), ...under];
})
"""
"""What of the charts is out of them, and which texts are under each other, a dashed line or a dot."""


@in_a_browser
def test_the_browser_notices_what_a_page_does(browser: Browser, tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    path.write_text(
        '<body style="background:#fff"><p style="color:#999">pale</p><img src="http://127.0.0.1:9/x.png">'
        "<script>console.log(1); nothing()</script>",
        encoding="utf-8",
    )
    browser.open(path)
    assert [text for text, _ in browser.run(CONTRAST)] == ['<p style="color:#999">pale</p>']
    assert browser.requests() == [path.as_uri(), "http://127.0.0.1:9/x.png"]
    kinds = [event["method"] for event in browser.said()]
    assert {"Runtime.consoleAPICalled", "Runtime.exceptionThrown"} <= set(kinds)


@in_a_browser
def test_the_page_in_chromium(written: tuple[Path, dict[str, Any]], browser: Browser) -> None:
    path, data = written
    for scheme in ("light", "dark"):
        browser.scheme(scheme)
        browser.open(path)
        assert browser.run("matchMedia('(prefers-color-scheme: dark)').matches") is (scheme == "dark")
        check_numbers(browser.run(NUMBERS), data)
        assert browser.run(CONTRAST) == []
        assert browser.said() == []
        assert browser.requests() == [path.as_uri()]
    assert browser.run("getComputedStyle(document.body).backgroundColor") == "rgb(22, 24, 27)"


@in_a_browser
def test_every_chart_has_words_and_a_table(written: tuple[Path, dict[str, Any]], browser: Browser) -> None:
    browser.open(written[0])
    charts = "[...document.querySelectorAll('figure')]"
    labels = browser.run(f"{charts}.map(f => f.querySelector('svg').getAttribute('aria-label'))")
    assert len(labels) == 4
    assert all("table" in label for label in labels)
    assert all(browser.run(f"{charts}.map(f => !!f.nextElementSibling.querySelector('table caption'))"))
    nodes = browser.ask("Accessibility.getFullAXTree")["nodes"]
    images = [node["name"]["value"] for node in nodes if node["role"]["value"] == "image" and not node["ignored"]]
    assert images == labels


@in_a_browser
@pytest.mark.parametrize("width", [320, 380, 680, 1200])
def test_nothing_covers_words_of_a_chart(written: tuple[Path, dict[str, Any]], browser: Browser, width: int) -> None:
    browser.ask("Emulation.setDeviceMetricsOverride", width=width, height=800, deviceScaleFactor=1, mobile=width < 600)
    browser.open(written[0])
    assert browser.run(COVERED) == []
    browser.ask("Emulation.clearDeviceMetricsOverride")


@in_a_browser
def test_the_page_by_keyboard(written: tuple[Path, dict[str, Any]], browser: Browser) -> None:
    browser.open(written[0])
    wanted = browser.run("document.querySelectorAll('a, summary, [tabindex=\"0\"]').length")
    seen = []
    for _ in range(wanted):
        browser.press("Tab")
        seen.append(browser.run("document.activeElement.outerHTML.slice(0, 60)"))
        assert browser.run("getComputedStyle(document.activeElement).outlineStyle") == "solid"
        if browser.run("document.activeElement.tagName") == "SUMMARY":
            browser.press("Enter")
            assert browser.run("document.activeElement.parentElement.open") is True
            wanted_within = browser.run("document.activeElement.parentElement.querySelectorAll('table').length")
            assert wanted_within == 1
    assert len(set(seen)) > 8
    assert seen[0].startswith('<a class="skip"')
    browser.open(written[0])
    browser.press("Tab")
    browser.press("Enter")
    assert browser.run("location.hash") == "#estimate"


@in_a_browser
def test_the_page_prints_on_a4(written: tuple[Path, dict[str, Any]], browser: Browser) -> None:
    browser.scheme("dark")
    browser.open(written[0])
    pdf = browser.printed()
    boxes = {tuple(map(float, box.split())) for box in re.findall(rb"/MediaBox\s*\[([^\]]*)\]", pdf)}
    assert len(boxes) == 1
    assert boxes.pop() == pytest.approx((0, 0, 595, 842), abs=1)  # 210 x 297 mm in points
    # As the printer lays it out: nothing is wider than the page between its margins, and nothing is folded away.
    browser.ask("Emulation.setEmulatedMedia", media="print")
    browser.ask("Emulation.setDeviceMetricsOverride", width=680, height=1010, deviceScaleFactor=1, mobile=False)
    assert browser.run(WIDER) == []
    assert browser.run("document.querySelector('details td').getBoundingClientRect().height") > 0
    assert browser.run("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    browser.ask("Emulation.clearDeviceMetricsOverride")
    browser.ask("Emulation.setEmulatedMedia", media="")


@in_a_browser
def test_pages_break_where_they_read(written: tuple[Path, dict[str, Any]], browser: Browser) -> None:
    """However long what comes before is: no page has a footer alone, and no table's head a row or none below it."""
    browser.open(written[0])
    browser.run("document.querySelector('#timeline').before(document.createElement('hr'))")
    for height in range(0, 1000, 40):
        browser.run(f"document.querySelector('hr').style.height = '{height}px'")
        pages = [re.sub(r"\s", "", page) for page in text_of_pages(browser.printed())]
        assert "rulesasin" in pages[-1]
        assert not pages[-1].startswith("memplan"), height
        for page in pages:
            if "verdictwhynot" in page:
                table = page.partition("verdictwhynot")[2].partition("Componentsofeverysetup")[0]
                assert len(re.findall(r"\d+x\d+", table)) >= 2, (height, table)


@in_a_browser
def test_the_page_on_a_phone(written: tuple[Path, dict[str, Any]], browser: Browser) -> None:
    browser.ask("Emulation.setDeviceMetricsOverride", width=380, height=800, deviceScaleFactor=1, mobile=True)
    browser.open(written[0])
    browser.run("document.querySelectorAll('details').forEach(e => { e.open = true })")
    wide = "[...document.querySelectorAll('body *')].filter(e => e.getBoundingClientRect().right > 380)"
    assert browser.run(f"{wide}.map(e => e.outerHTML.slice(0, 80))") == []
    assert browser.run("document.documentElement.scrollWidth") <= 380
    # Nothing has to be scrolled to be read whole, no sentence is a word wide, and letters are as large as elsewhere.
    assert browser.run(WIDER) == []
    sentences = "[...document.querySelectorAll('td')].filter(e => e.textContent.length > 30)"
    assert min(browser.run(f"{sentences}.map(e => e.getBoundingClientRect().width)")) > 200
    assert min(browser.run(LETTERS)) >= 13
    # Each cell says which column it is of.
    assert set(browser.run(HEADS)) >= {"batch", "GPU GiB", "verdict"}
    browser.ask("Emulation.clearDeviceMetricsOverride")
