"""The rows of memplan compare, beside what the other tools print for the same model."""

from __future__ import annotations

import os
import re
from typing import Any

import pytest

os.environ.setdefault("DS_ACCELERATOR", "cpu")  # read when DeepSpeed is imported
from deepspeed.runtime.zero import stage3, stage_1_and_2

import memplan
from memplan.answers import Comparison, ComparisonRow
from memplan.units import GiB

T0 = "bigscience/T0_3B"
CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 512,
}
DOCUMENTED = {
    "zero3, offload_param=cpu, offload_optimizer=cpu, zero_init=1": ("70.00", "0.25"),
    "zero3, offload_param=cpu, offload_optimizer=cpu, zero_init=0": ("70.00", "0.25"),
    "zero3, offload_optimizer=cpu, zero_init=1": ("62.23", "2.84"),
    "zero3, offload_optimizer=cpu, zero_init=0": ("62.23", "2.84"),
    "zero3, zero_init=1": ("0.74", "23.58"),
    "zero3, zero_init=0": ("31.11", "23.58"),
}
"""DeepSpeed 0.19.8, docs/code-docs/source/memory.rst: T0_3B on one node of two GPUs, per CPU and per GPU."""


def compared(model: Any = CONFIG, *arguments: Any, **options: Any) -> Comparison:
    return memplan.compare(model, *arguments, replay=False, **options)


def of(comparison: Comparison, tool: str) -> dict[str, ComparisonRow]:
    return {row.option: row for row in comparison.rows if row.tool == tool}


def in_its_gb(row: ComparisonRow) -> tuple[str, str]:
    assert row.host is not None
    assert row.gpu is not None
    return f"{row.host / 2**30:.2f}", f"{row.gpu / 2**30:.2f}"


def test_deepspeeds_documented_table() -> None:
    comparison = compared(T0, None, {"gpus": 2})
    rows = of(comparison, "DeepSpeed")
    assert {option: in_its_gb(row) for option, row in rows.items() if "zero3" in option} == DOCUMENTED
    model = comparison.model
    assert (model.head, model.parameters // 10**6, model.largest_layer_parameters // 10**6) == ("base", 2783, 65)


@pytest.mark.parametrize(("gpus", "nodes"), [(1, 1), (2, 1), (16, 2), (12, 3)])
def test_what_deepspeed_prints_is_printed(capsys: pytest.CaptureFixture[str], gpus: int, nodes: int) -> None:
    comparison = compared(CONFIG, None, {"gpus": gpus, "nodes": nodes})
    total, largest = comparison.model.parameters, comparison.model.largest_layer_parameters
    stage_1_and_2.estimate_zero2_model_states_mem_needs_all_cold(total, gpus // nodes, nodes)
    stage3.estimate_zero3_model_states_mem_needs_all_cold(total, largest, gpus // nodes, nodes)
    printed = re.findall(r"^ +([\d.]+)GB \| +([\d.]+)GB \| (.*)$", capsys.readouterr().out, re.MULTILINE)
    assert [(host, gpu) for host, gpu, _ in printed] == [in_its_gb(row) for row in of(comparison, "DeepSpeed").values()]
    # Some Pythons print the enumeration's name, and ours leave out what is not offloaded.
    options = [re.findall(r"(\w+)=(?:OffloadDeviceEnum\.)?(cpu|0|1)", option) for _, _, option in printed]
    ours = [re.findall(r"(\w+)=(\w+)", option) for option in of(comparison, "DeepSpeed")]
    assert options == ours


def test_memplans_rows_are_its_estimates() -> None:
    comparison = compared(CONFIG, {"seq_len": 512}, "2xA100-80GB")
    rows = of(comparison, "memplan")
    strategies = {
        "ddp": memplan.Strategy(kind="ddp"),
        "zero2, offload_optimizer=cpu": memplan.Strategy(kind="zero2", offload_optimizer="cpu"),
        "zero2": memplan.Strategy(kind="zero2"),
        "zero3, offload_param=cpu, offload_optimizer=cpu": memplan.Strategy(
            kind="zero3", offload_optimizer="cpu", offload_param="cpu"
        ),
        "zero3, offload_optimizer=cpu": memplan.Strategy(kind="zero3", offload_optimizer="cpu"),
        "zero3": memplan.Strategy(kind="zero3"),
    }
    assert list(rows) == list(strategies)
    for option, strategy in strategies.items():
        estimate = memplan.estimate(CONFIG, {"seq_len": 512}, "2xA100-80GB", strategy, replay=False)
        assert (rows[option].gpu, rows[option].host) == (estimate.gpu.peak_device, estimate.host.peak)


def test_every_figure_stands_above_memplans_for_the_same_setup() -> None:
    setup = ""
    for row in reversed(compared(CONFIG, None, {"gpus": 2}).rows):
        if row.tool == "memplan":
            setup = row.option
        elif row.tool == "DeepSpeed":
            assert row.option.partition(", zero_init")[0] == setup
        else:
            assert setup == "ddp"


def test_accelerates_rows_are_its_table() -> None:
    rows = of(compared(CONFIG), "accelerate")
    weights = 2 * (4 * 64 * 64 + 3 * 64 * 128 + 2 * 64) + 512 * 64 + 64
    total = 4 * (weights + 2 * 8)  # inv_freq and original_inv_freq of the rotary embedding are buffers
    assert rows["float32, total size"].gpu == total
    assert rows["float32, training with Adam"].gpu == 4 * total
    assert rows["float16, training with Adam"].gpu == 2 * total
    assert rows["int4, total size"].gpu == total // 8
    assert rows["int8, largest layer"].gpu == (4 * 64 * 64 + 3 * 64 * 128 + 2 * 64)
    assert rows["int8, training with Adam"].gpu is None
    assert len(rows) == 12
    assert all(row.host is None for row in rows.values())


def test_accelerate_loads_the_class_that_a_config_with_remote_code_names() -> None:
    auto_map = {"AutoConfig": "c.C", "AutoModel": "m.M", "AutoModelForCausalLM": "m.L", "AutoModelForX": "m.X"}
    with_head = of(compared(CONFIG | {"auto_map": auto_map}), "accelerate")["float32, total size"].gpu
    without = of(compared(CONFIG), "accelerate")["float32, total size"].gpu
    assert with_head is not None
    assert without is not None
    assert with_head - without == 4 * 64 * 512
    (row,) = of(compared(CONFIG | {"auto_map": {"AutoModelForNonsense": "m.N"}}), "accelerate").values()
    assert row.gpu is None
    assert "AutoModelForNonsense" in row.leaves_out


@pytest.mark.parametrize(("strategy", "itemsize"), [(None, 4), ("zero3", 2)])
def test_the_rule_takes_the_dtype_of_the_setup_and_activations_of_memplan(strategy: str | None, itemsize: int) -> None:
    figures = {}
    for length in (512, 1024):
        (row,) = of(compared(CONFIG, {"seq_len": length}, None, strategy), "rule of thumb").values()
        assert row.gpu is not None
        figures[length] = row.gpu
    parameters = memplan.estimate(CONFIG).model.parameters
    activations = figures[512] - 4 * itemsize * parameters - 1_300_000_000
    assert activations > 0
    assert 1.9 < (figures[1024] - figures[512] + activations) / activations < 2.1


def test_deepspeed_counts_the_class_that_is_asked_for() -> None:
    asked = compared(CONFIG, {"head": "causal-lm"})
    assert asked.model.head == "causal-lm"
    assert asked.model.parameters - compared(CONFIG).model.parameters == 64 * 512
    assert compared(CONFIG, {"vocab_size": 1024}).model.largest_layer_parameters == 64 * 1024
    assert of(asked, "accelerate") == of(compared(CONFIG), "accelerate")


@pytest.mark.parametrize(
    ("strategy", "expected"),
    [
        ("ddp", []),
        ("fsdp", []),
        ("zero2", ["zero2"]),
        ({"kind": "zero3", "offload_optimizer": "cpu"}, ["zero3, offload_optimizer=cpu, zero_init=" + i for i in "10"]),
    ],
)
def test_a_strategy_is_compared_alone(strategy: Any, expected: list[str]) -> None:
    comparison = compared(CONFIG, None, {"gpus": 2}, strategy)
    assert list(of(comparison, "DeepSpeed")) == expected
    assert len(of(comparison, "memplan")) == 1
    assert len(of(comparison, "rule of thumb")) == 1


@pytest.mark.parametrize("strategy", ["zero1", {"kind": "zero3", "offload_param": "cpu"}])
def test_deepspeed_has_no_answer_to_a_setup_that_its_estimators_do_not_know(strategy: Any) -> None:
    comparison = compared(CONFIG, None, {"gpus": 2}, strategy)
    (row,) = of(comparison, "DeepSpeed").values()
    assert (row.gpu, row.host) == (None, None)
    assert row.leaves_out.startswith("no answer: ")
    assert all(row.gpu is not None for row in of(comparison, "memplan").values())


def test_a_setup_that_is_not_modelled_says_so_in_its_row() -> None:
    comparison = compared(CONFIG, {"optim": "muon"}, {"gpus": 2})
    rows = of(comparison, "memplan")
    assert rows["ddp"].gpu is not None
    assert rows["zero3"].gpu is None
    assert "muon" in rows["zero3"].leaves_out
    assert all(row.gpu is not None for row in of(comparison, "DeepSpeed").values())


def test_a_setup_that_the_libraries_refuse_says_so_in_its_row() -> None:
    comparison = compared(CONFIG, {"dtype": "float16", "mixed_precision": "fp16"}, {"gpus": 2})
    rows = of(comparison, "memplan")
    assert rows["ddp"].leaves_out.startswith("no answer: ")
    assert rows["zero2"].gpu is not None
    (rule,) = of(comparison, "rule of thumb").values()
    assert rule.gpu is None


@pytest.mark.parametrize("how", [{"head": "base"}, {}])
def test_a_model_without_a_head_is_sized_by_the_others(how: dict[str, str]) -> None:
    config = CONFIG if how else CONFIG | {"architectures": ["LlamaModel"]}
    comparison = compared(config, how, {"gpus": 2})
    for tool in ("DeepSpeed", "accelerate"):
        assert of(comparison, tool) == of(compared(CONFIG, None, {"gpus": 2}), tool)
    assert all("has no loss to train" in row.leaves_out for row in of(comparison, "memplan").values())


def test_what_no_setup_can_run_is_an_error() -> None:
    with pytest.raises(memplan.SpecError, match="head"):
        compared(CONFIG, {"head": "image-classification"})
    with pytest.raises(memplan.SpecError, match="task"):
        compared(CONFIG, {"task": "load"})
    with pytest.raises(memplan.UnsupportedError, match="model_type: 'nonesuch' is not written"):
        compared(CONFIG | {"model_type": "nonesuch"})


def test_a_module_is_refused() -> None:
    import torch

    with pytest.raises(memplan.UnsupportedError, match="model: a module"):
        compared(torch.nn.Linear(2, 2))


def test_round_trip() -> None:
    comparison = compared(CONFIG)
    assert Comparison.from_json(comparison.to_json()) == comparison
    data = comparison.to_dict()
    assert data["schema_version"] == 1
    assert list(data["rows"][0]) == ["tool", "option", "gpu", "host", "leaves_out"]
    assert all(type(row[place]) in (int, type(None)) for row in data["rows"] for place in ("gpu", "host"))
    frame = comparison.to_dataframe()
    assert list(frame.columns) == list(data["rows"][0])
    assert len(frame) == len(comparison.rows)


def test_html_has_every_row_and_no_markup_of_the_users() -> None:
    comparison = compared(CONFIG | {"_name_or_path": "<b>x"})
    page = comparison._repr_html_()
    assert page.count("<tr") == len(comparison.rows) + 1
    assert "<b>x" not in page
    assert f"{comparison.rows[0].gpu / GiB:,.2f}" in page  # type: ignore[operator]
