from html.parser import HTMLParser

import pytest
from tests.render.samples import estimate, several

from memplan.results import EstimateList
from memplan.units import GiB


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
        if self.open and self.open[-1] in ("td", "th"):
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
