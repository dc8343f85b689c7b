import io
import re

import pytest
from rich.console import Console
from tests.render.samples import PARTS, SETUP, TERM, estimate, several

from memplan.catalog.gpus import all_gpus
from memplan.catalog.models import all_models
from memplan.render import table, words
from memplan.results import EstimateList, HostMemory, NvmeMemory
from memplan.units import GiB

ANSI = re.compile(r"\x1b\[")


def console(width: int = 80, *, terminal: bool = False, encoding: str = "utf-8") -> Console:
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    return Console(file=file, width=width, force_terminal=terminal, color_system="standard" if terminal else None,
                   highlight=False, markup=False, emoji=False)  # fmt: skip


def line_of(page: str, name: str) -> str:
    return next(line for line in page.split("\n") if line.split()[:1] == [name])


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("result", [estimate(), estimate(capacity=GiB), estimate(capacity=None, gpu=None)])
def test_every_number_is_there_once_and_no_line_is_too_long(result, width: int) -> None:
    page = table.estimate_text(result, console=console(width))
    assert max(map(len, page.split("\n"))) <= width
    for name, number in {
        "weights": "25.00", "gradients": "20.00", "optimizer": "10.00", "activations": "5.00", "workspace": "0.00",
        "allocated": "60.00", "fragmentation": "3.00", "reserved": "63.00", "context": "0.50", "device": "63.50",
    }.items():  # fmt: skip
        assert line_of(page, name).split()[1] == number, name
    assert "62.50 .. 64.50" in line_of(page, "device")
    assert "communication" not in page  # nothing is there


def test_numbers_and_bars_are_aligned() -> None:
    page = table.estimate_text(estimate(), console=console())
    rows = [line_of(page, name) for name in ("weights", "gradients", "optimizer", "activations", "allocated", "load")]
    assert len({line.index(".") for line in rows}) == 1
    bars = [line.index("█") for line in rows if "█" in line]
    assert len(bars) == 5
    assert len(set(bars)) == 1


def test_bars_are_to_scale() -> None:
    page = table.estimate_text(estimate(), console=console())
    lengths = {name: line_of(page, name).count("█") for name in ("weights", "optimizer", "load")}
    assert lengths["weights"] == lengths["load"]
    assert lengths["weights"] == pytest.approx(2.5 * lengths["optimizer"], abs=1.5)


def test_phases_stand_beside_the_components_where_there_is_room() -> None:
    assert "Allocated in each phase" in line_of(table.estimate_text(estimate(), console=console(120)), "GPU")
    assert "Allocated in each phase" not in line_of(table.estimate_text(estimate(), console=console(80)), "GPU")


def test_plain_text_in_a_pipe_and_colours_on_a_terminal() -> None:
    assert not ANSI.search(table.estimate_text(estimate(), console=console()))
    assert ANSI.search(table.estimate_text(estimate(), console=console(terminal=True)))


def test_what_is_shown_is_never_markup() -> None:
    model = estimate().model.model_copy(update={"id": "[red]x[/red] :smile:"})
    assert "[red]x[/red] :smile:" in table.estimate_text(estimate(model=model), console=console())


def test_ascii_where_the_encoding_has_no_bars() -> None:
    page = table.estimate_text(estimate(), console=console(encoding="ascii"))
    assert "####" in page
    page.encode("ascii")


def test_a_long_name_is_cut_not_wrapped() -> None:
    model = estimate().model.model_copy(update={"id": "x" * 200})
    page = table.estimate_text(estimate(model=model), console=console())
    assert page.split("\n")[0] == "x" * 79 + "…"


@pytest.mark.parametrize("width", [60, 80, 120])
def test_no_fact_of_a_setup_is_cut(width: int) -> None:
    setup = {
        "strategy": "zero3", "offload_optimizer": "cpu", "offload_param": "cpu", "grad_accum_steps": 16,
        "gradient_checkpointing": True, "lora": {"rank": 16}, "eval_batch_size": 8, "quantization": "nf4",
        "alloc_conf": "expandable_segments:True", "liger": True,
    }  # fmt: skip
    found = estimate(setup=setup, assumptions=())
    for page in (
        table.estimate_text(found, console=console(width)),
        table.estimates_text(EstimateList(estimates=(found, estimate(assumptions=()))), console=console(width)),
    ):
        assert "…" not in page
        assert max(map(len, page.split("\n"))) <= width
    words_of_page = " ".join(table.estimate_text(found, console=console(width)).split())
    for fact in (words.setup_facts(found), words.precision_facts(found), words.hardware(found)):
        assert fact in words_of_page


def test_verdict_and_what_to_do_next() -> None:
    page = table.estimate_text(estimate(capacity=GiB), gpus=["H200"], options=["--liger"], console=console())
    assert "does not fit: even the lower end is 61.50 GiB more than there is" in page
    assert line_of(page, "next").split(maxsplit=1)[1] == "add --liger, or use H200"
    assert "next" not in table.estimate_text(estimate(), gpus=["H200"], console=console())


def test_assumptions_stand_below_with_as_much_of_the_source_as_fits() -> None:
    page = table.estimate_text(estimate(), console=console())
    assert "0.50 GiB (0.25 .. 1.00)  nvidia-smi" in line_of(page, "cuda_context")
    assert line_of(page, "cuda_context").endswith("…")
    assert "a paper" in page


def test_host_and_nvme_are_shown_where_they_are_used() -> None:
    host = HostMemory(capacity=64 * GiB, peak=12 * GiB, pinned=0, ranks=2, components={"masters": 12 * GiB})
    nvme = NvmeMemory(capacity=None, bytes=3 * GiB, components={"moments": 3 * GiB})
    page = table.estimate_text(estimate(host=host, nvme=nvme), console=console())
    assert "Host memory of a node (2 ranks), GiB" in page
    assert line_of(page, "masters").split()[1] == "12.00"
    assert line_of(page, "moments").split()[1] == "3.00"
    assert "Host memory" not in table.estimate_text(estimate(), console=console())


@pytest.mark.parametrize("width", [80, 120])
def test_a_ladder_has_a_row_per_rung_and_the_page_of_the_best(width: int) -> None:
    page = table.estimates_text(several(), console=console(width))
    assert max(map(len, page.split("\n"))) <= width
    rows = [line for line in page.split("\n") if ".." in line and line.startswith("ddp")]
    assert [line.split("  ")[0] for line in rows] == [
        "ddp, batch 4", "ddp, batch 1 x 4", "ddp, batch 4, checkpointing",
    ]  # fmt: skip
    assert [line.split("  ")[-1].strip() for line in rows] == ["does not fit", "fits", "fits"]
    assert line_of(page, "activations").split()[1] == "1.00"


def test_a_ladder_says_where_it_is_not_the_gpu_that_decides() -> None:
    host = HostMemory(capacity=8 * GiB, peak=9 * GiB, pinned=0, ranks=2, components={"weights": 9 * GiB})
    nvme = NvmeMemory(capacity=None, bytes=GiB, components={"weights": GiB})
    fits = {"capacity": 90 * GiB}
    ladder = EstimateList(
        estimates=(estimate(capacity=8 * GiB, host=host), estimate(**fits, host=host), estimate(**fits, nvme=nvme))
    )
    rows = [line for line in table.estimates_text(ladder, console=console()).split("\n") if line.startswith("ddp  ")]
    assert [row.split("  ")[-1].strip() for row in rows] == ["does not fit", "does not fit (host)", "unknown (NVMe)"]


def test_a_ladder_of_a_huge_model_breaks_names_and_never_numbers() -> None:
    parts = {**PARTS, "weights": 12_000 * GiB}
    setup = {**SETUP, "strategy": "zero2", "offload_optimizer": "cpu", "gradient_checkpointing": True}
    ladder = EstimateList(estimates=(estimate(parts=parts), estimate(parts=parts, setup=setup)))
    page = table.estimates_text(ladder, console=console(80))
    assert max(map(len, page.split("\n"))) <= 80
    rows = [line for line in page.split("\n") if line.endswith("does not fit")]
    assert [row.split()[-7:-3] for row in rows] == [["12,038.50", "12,037.50", "..", "12,039.50"]] * 2
    assert rows[1].startswith("zero2, optim on cpu, ")
    assert page.split("\n")[page.split("\n").index(rows[1]) + 1] == "checkpointing"


def test_a_ladder_without_a_gpu_names_the_smallest_one_per_rung() -> None:
    ladder = EstimateList(estimates=(estimate(capacity=None, gpu=None), estimate(capacity=None, gpu=None)))
    page = table.estimates_text(ladder, gpus=[["H200", "B200"], []], console=console())
    rows = [line for line in page.split("\n") if "unknown" in line and ".." in line]
    assert rows[0].endswith("unknown  H200")
    assert rows[1].endswith("unknown  no GPU")
    assert "it fits on H200 or B200" in page


def test_a_ladder_of_one_rung_is_an_estimate() -> None:
    one = EstimateList(estimates=(estimate(),))
    assert table.estimates_text(one, console=console()) == table.estimate_text(estimate(), console=console())


def test_explanation() -> None:
    page = table.estimate_text(estimate(explanation=(TERM,)), console=console())
    assert "weights: 25.10 GiB, 26,953,662,464 bytes" in page
    for line in ("formula  4 x parameters", "numbers  4 x 6,738,415,616", "source   torch.float32"):
        assert f"    {line}" in page


def test_catalogs_fit_80_columns_with_their_names_whole() -> None:
    gpus, models = table.gpus_text(all_gpus(), console()), table.models_text(all_models(), console())
    for page, names in ((gpus, [gpu.name for gpu in all_gpus()]), (models, [model.id for model in all_models()])):
        assert max(map(len, page.split("\n"))) <= 80
        assert "…" not in page
        assert [line.split()[0] for line in page.split("\n")[1 : 1 + len(names)]] == names
