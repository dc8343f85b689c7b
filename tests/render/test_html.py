from html.parser import HTMLParser
from pathlib import Path

import pytest
from tests.browser import CHROMIUM, CONTRAST, Browser
from tests.render.samples import estimate, several

import memplan
from memplan.answers import Check, Finding, Preflight
from memplan.results import (
    EstimateList,
)
from memplan.units import GiB

WRONG = Finding(code="unknown-key", severity="error", path="ds.json: a.b", message="is <wrong>.", remedy="Mend it.")


class Page(HTMLParser):
    """The cells of a page; refuses tags that are not closed in order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.rows: list[list[str]] = []
        self.text = ""
        self.widths: list[float] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs) -> None:
        if tag == "br":
            return
        self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        style = dict(attrs).get("style") or ""
        if tag == "span":
            self.widths.append(float(style.rpartition("width:")[2].removesuffix("em")))

    def handle_endtag(self, tag) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data) -> None:
        self.text += data
        if "td" in self.open or "th" in self.open:
            self.rows[-1][-1] += data


def test_an_estimate_in_a_notebook() -> None:
    page = Page(estimate()._repr_html_())
    rows = {row[0]: row[1] for row in page.rows}
    assert rows["weights"] == "25.00"
    assert rows["allocated"] == "60.00"
    assert rows["device"] == "63.50"
    assert rows["capacity"] == "80.00"
    assert "nccl" not in rows
    assert "fits: 15.50 GiB to spare" in page.text
    assert page.widths[0] == pytest.approx(16 * 25 / 80)


def test_names_are_escaped() -> None:
    model = estimate().model.model_copy(update={"id": "<script>a & b</script>"})
    html = estimate(model=model)._repr_html_()
    assert "<script>" not in html
    assert "<script>a & b</script>" in Page(html).text


def test_a_list_has_a_row_per_estimate() -> None:
    page = Page(several()._repr_html_())
    assert [row[0] for row in page.rows[1:4]] == ["ddp, batch 4", "ddp, batch 1 x 4", "ddp, batch 4, checkpointing"]
    assert [row[3] for row in page.rows[1:4]] == ["does not fit", "fits", "fits"]
    assert "no estimates" in Page(EstimateList(estimates=())._repr_html_()).text


def test_what_does_not_fit_says_what_it_needs() -> None:
    assert "it needs a GPU of 64.50 GiB" in Page(estimate(capacity=GiB)._repr_html_()).text


def test_a_plan_has_a_row_per_rung_and_the_front() -> None:
    plan = memplan.plan("gpt2", {"seq_len": 512}, "2xT4", global_batch_size=32)
    page = Page(plan._repr_html_())
    rows = {row[0]: row for row in page.rows[: len(plan.rungs) + 1]}
    assert list(rows) == ["rung", *(rung.name for rung in plan.rungs)]
    for rung in plan.rungs:
        gpu, host = rung.estimate.gpu.peak_device, rung.estimate.host.peak
        assert rows[rung.name][2:4] == [f"{gpu / GiB:.2f}", f"{host / GiB:.2f}"]
    assert page.text.count(plan.best.name) > 1
    front = page.rows[-len(plan.pareto) - 1 :]
    assert front[0] == ["setup", "batch", "GPU GiB", "to spare", "s/step"]
    assert [row[2] for row in front[1:]] == [f"{point.high / GiB:.2f}" for point in plan.pareto]
    assert len({(row[0], row[1]) for row in front[1:]}) == len(plan.pareto)  # told apart


def test_a_plan_of_which_nothing_fits_says_what_would() -> None:
    plan = memplan.plan("gpt2", {"seq_len": 1024}, {"gpu": "T4", "gpu_memory": "1GiB", "host_memory": "1GiB"})
    page = Page(plan._repr_html_())
    assert "No setup is known to fit." in page.text
    assert plan.remedies
    assert all(remedy.options in page.text for remedy in plan.remedies)


def test_findings_are_below_the_estimate() -> None:
    found = estimate()
    check = Check(estimate=found, verdict=found.verdict, findings=(WRONG,))
    page = Page(check._repr_html_())
    assert "fits: 15.50 GiB to spare" in page.text
    assert page.rows[-1] == ["error", "unknown-key", "ds.json: a.b", "is <wrong>.Mend it."]
    assert "1 error in the files" in page.text
    preflight = Page(Preflight([WRONG], check)._repr_html_())
    assert preflight.rows == page.rows
    assert "1 error" in preflight.text
    assert "files" not in preflight.text  # a script has none
    assert "no findings" in Preflight()._repr_html_()


def test_a_comparison_has_a_row_per_figure() -> None:
    comparison = memplan.compare("gpt2", {"seq_len": 128}, "2xT4")
    page = Page(comparison._repr_html_())
    assert [row[:2] for row in page.rows[1:]] == [[row.tool, row.option] for row in comparison.rows]


GAPS = """
[...document.querySelectorAll("tr")].flatMap(row => {
  const words = [...row.cells].filter(e => e.textContent).map(e => {
    const range = document.createRange();
    range.selectNodeContents(e);
    return range.getBoundingClientRect();
  });
  return words.slice(1).map((box, i) => box.left - words[i].right);
})
"""
"""Pixels between what neighbours in a row say."""
THEMES = {"light": ("#ffffff", "#000000"), "dark": ("#111111", "#e0e0e0")}
"""Behind and in front, as JupyterLab's two themes have it."""


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: apt-get install chromium")
def test_tables_are_read_on_light_and_dark_pages(tmp_path: Path) -> None:
    plan = memplan.plan("gpt2", {"seq_len": 512}, "2xT4", global_batch_size=32)
    check = Check(estimate=estimate(), verdict="fits", findings=(WRONG,))
    comparison = memplan.compare("gpt2", {"seq_len": 128}, "2xT4")
    parts = "".join(each._repr_html_() for each in (estimate(), several(), plan, check, comparison))
    with Browser() as browser:
        for name, (back, ink) in THEMES.items():
            path = tmp_path / f"{name}.html"
            path.write_text(
                f'<meta charset="utf-8"><body style="background:{back};color:{ink}">{parts}', encoding="utf-8"
            )
            browser.open(path)
            assert browser.run(CONTRAST) == []
            assert browser.said() == []
            assert min(browser.run(GAPS)) > 8  # without a style for tables, as Jupyter has one
