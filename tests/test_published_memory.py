"""What others have measured of memory beside the estimates (benchmarks/published): O5."""

from __future__ import annotations

import csv
import doctest
import json
import random
from pathlib import Path

import pytest
from tests.scripts import script

ROOT = Path(__file__).parents[1]

score = script("benchmarks/published/score.py")
adapter, reading, releases = score.adapter, score.reading, script("benchmarks/published/releases.py")


@pytest.fixture(scope="module")
def rows():
    return [score.compare(fields) for fields in score.read()]


def of(rows, source: str, metric: str = "allocated"):
    return [row for row in rows if row.source.endswith(source) and row.metric == metric and row.ratio is not None]


@pytest.mark.parametrize("module", [reading, releases, score], ids=lambda module: module.__name__)
def test_examples(module) -> None:
    failed, tried = doctest.testmod(module)
    assert tried
    assert not failed


def test_every_row_becomes_a_setup_or_says_why_not(rows) -> None:
    assert len(rows) == len({row.id for row in rows}) == 603
    assert all(row.fields["source"] for row in rows)
    assert score.counts(rows) == {
        "rows": 603,
        "setups": 172,
        "out_of_scope": 348,
        "not_stated": 51,
        "refused_by_memplan": 32,
        "errors": 0,
    }
    assert all(bool(row.refused) != (row.found is not None) for row in rows)


@pytest.mark.parametrize(
    ("metric", "most"),
    [("allocated", 0.04), ("allocated, probably", 0.1), ("reserved", 0.08), ("device", 0.08), ("not stated", 0.08)],
)
def test_the_median_error_of_each_metric(rows, metric: str, most: float) -> None:
    assert score.grouped(metric, "", rows).median <= most


def test_rows_that_are_far_off_have_their_cause(rows) -> None:
    far = [row for row in rows if row.ratio is not None and abs(row.ratio - 1) > score.FAR]
    wrong = [row for row in rows if row.found is not None and not row.agrees]
    assert 0 < len(far) + len(wrong) < 20
    assert [row.id for row in far + wrong if not row.fields["note"]] == []


def test_full_and_lora_fine_tuning_of_one_source_agree(rows) -> None:
    """What fms-acceleration measured on one GPU and under FSDP1."""
    found = of(rows, "fms-acceleration")
    assert len(found) == 25
    on_one_gpu = [row for row in found if row.fields["n_gpus"] == "1" and row.setup.training.quantization]
    prepared = [row for row in on_one_gpu if "baseline" in row.fields["framework"]]
    assert len(prepared) == 2
    assert all(abs(row.ratio - 1) < 0.005 for row in found if row not in prepared)
    plain = [row for row in found if not row.setup.training.quantization and "santacoder" not in row.fields["model"]]
    assert len(plain) == 6
    assert all(abs(row.ratio - 1) < 0.001 for row in plain)
    assert all(0 < row.ratio - 1 < 0.05 for row in prepared)  # TRL casts embeddings back
    # Found by these rows: frozen blocks under reentrant checkpointing. Before, Mistral's were 7 % low and Llama's 21 %.
    sharded = [row for row in found if row.setup.training.quantization and row.fields["n_gpus"] == "2"]
    assert len(sharded) == 8
    assert all(abs(row.ratio - 1) < 0.0001 for row in sharded if "santacoder" not in row.fields["model"])


def test_generation_agrees_while_it_decodes(rows) -> None:
    found = of(rows, "Qwen2.5")
    assert len(found) == 24
    decoding = [
        next(phase.allocated for phase in row.found.gpu.phases if phase.name == "step") / 2**30 / row.measured
        for row in found
    ]
    assert sorted(decoding)[-2] < 1.015
    assert min(decoding) >= 0.999
    assert max(decoding) < 1.04  # qwen3-sp-013, which stopped early


def test_runs_that_died_do_not_fit(rows) -> None:
    found = score.boundaries(rows)
    assert found["died"] == 12
    assert found["died_verdicts"] == {"does-not-fit": 10, "tight": 2}  # tight: fms-a-068 and -096, of 68 of 79 GiB
    assert found["false_fits"] == []
    assert found["false_does_not_fit"] == ["hfz-1", "hfz-4", "hfz-5"]


# -- other files ------------------------------------------------------------------------------------------------------

GOOD = {
    "id": "x-1",
    "source": "https://example.org/page",
    "model": "Mistral-7B-v0.1",
    "task": "finetune",
    "gpu": "NVIDIA A100 (80 GB)",
    "n_gpus": "2",
    "framework": "HF Trainer",
    "framework_version_if_known": "transformers==4.48.1, torch==2.4.1",
    "weight_dtype": "BF16",
    "mixed_precision": "No",
    "optimizer": "AdamW",
    "method": "full fine-tuning",
    "zero_stage_or_fsdp": "FSDP1 FULL_SHARD BACKWARD_PRE",
    "offload": "",
    "gradient_checkpointing": "True",
    "attention": "FlashAttention-2",
    "compile": "",
    "fused_loss": "",
    "micro_batch": "2",
    "seq_len": "4k",
    "packed_or_padded": "packed",
    "grad_accum": "1",
    "measured_GiB": "33.74",
    "metric": "torch.cuda.max_memory_allocated",
}


def written(path: Path, *rows: dict[str, str], columns=adapter.COLUMNS, delimiter: str = ",") -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore", restval="", delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)
    return path


def one(**values: str):
    return score.compare(dict.fromkeys(adapter.COLUMNS, "") | GOOD | values)


def test_other_spellings_are_the_same_setup() -> None:
    row = one()
    assert row.ratio == pytest.approx(1, abs=0.001)
    for values in (
        {"model": "mistralai/mistral-7b-V0.1", "gpu": "A100-SXM4-80GB", "seq_len": "4,096", "n_gpus": "2 (one node)"},
        {"weight_dtype": "bfloat16", "mixed_precision": "none (pure bf16)", "optimizer": "adamw_torch (default)"},
        {"gradient_checkpointing": "full", "attention": "fa2", "method": "SFT", "measured_GiB": "33.74GiB"},
    ):
        other = one(**values)
        assert other.found is not None, other.refused
        assert other.ratio == pytest.approx(row.ratio)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("NVIDIA GeForce RTX 4090", "RTX4090"), ("rtx3090", "RTX3090"), ("2x A100-80GB", "A100-80GB"),
        ("A100 40GB PCIe", "A100-PCIe-40GB"), ("Tesla V100-SXM2-32GB", "V100-32GB"), ("L4 (24GB)", "L4"),
        ("H100 SXM5 80GB x 8", "H100-80GB"), ("RTX A6000 48GB", "A6000"), ("H100-96GB (HBM2e, 95.04 GiB)", "H100-80GB"),
    ],
)  # fmt: skip
def test_names_of_gpus(text: str, name: str) -> None:
    found, memory, certain = adapter.gpu_named(text, [])
    assert found.name == name
    assert certain
    assert (memory is None) == ("95.04" not in text)


def test_other_words() -> None:
    assert [reading.count("micro_batch", text, []) for text in ("8 per GPU", "bs=4", "batch size 2")] == [8, 4, 2]
    words = {"AdamW (8-bit, bitsandbytes)": "adamw_bnb_8bit", "adamw_torch (fused)": "adamw_torch_fused"}
    assert {text: reading.optimizer(text, []) for text in words} == words
    engines = {"zero_stage=2": "zero2", "FULL_SHARD": "fsdp", "Distributed Data Parallel": "ddp"}
    assert {text: reading.engine(text, 8, "", []).kind for text in engines} == engines
    with pytest.raises(reading.RefusedError, match="unsloth"):
        reading.checkpointing("full (unsloth)", [])


@pytest.mark.parametrize(
    ("text", "targets", "saved"),
    [
        (
            "lora r16 modules_to_save=embed_tokens,lm_head targets=all-linear",
            ("all-linear",),
            ("embed_tokens", "lm_head"),
        ),
        ("lora r64 targets=c_attn+w1 + modules_to_save wte,lm_head", ("c_attn", "w1"), ("wte", "lm_head")),
        ("LoRA rank=16, alpha=16 (target_modules=[q_proj, v_proj])", ("q_proj", "v_proj"), ()),
        ("rslora r32", (), ()),
    ],
)
def test_adapters_in_other_words(text: str, targets: tuple[str, ...], saved: tuple[str, ...]) -> None:
    found = reading.method(text, "train", "", [])
    assert found.kind == "lora"
    assert (found.targets, found.saved) == (targets, saved)


@pytest.mark.parametrize(
    ("values", "kind", "words"),
    [
        ({"seq_len": ""}, "not stated", "seq_len"),
        ({"optimizer": "?"}, "not stated", "optimizer"),
        ({"gpu": "24GB class"}, "not stated", "names no one GPU"),
        ({"gpu": "RTX 3080"}, "not stated", "may be RTX3080-10GB, RTX3080-12GB"),
        ({"gpu": "Voodoo 2"}, "not stated", "not in the catalog"),
        ({"model": "acme/unheard-of-7b"}, "not stated", "not in the catalog"),
        ({"n_gpus": "two"}, "not stated", "n_gpus"),
        ({"zero_stage_or_fsdp": "none"}, "not stated", "how 2 GPUs share"),
        ({"micro_batch": "1-4"}, "not stated", "micro_batch"),
        ({"micro_batch": "0"}, "not stated", "micro_batch"),
        ({"weight_dtype": "bf16 or fp16"}, "not stated", "weight_dtype"),
        ({"zero_stage_or_fsdp": "FSDP2 x TP2"}, "scope", "not modelled"),
        ({"compile": "y"}, "scope", "compile"),
        ({"weight_dtype": "gptq-int4"}, "scope", "gptq"),
        ({"framework": "torchtitan"}, "scope", "its own"),
        ({"method": "dora r16"}, "scope", "dora"),
        ({"gradient_checkpointing": "selective"}, "scope", "gradient_checkpointing"),
        ({"optimizer": "galore_adamw"}, "scope", "optimizer"),
        ({"fused_loss": "y (cut cross-entropy)"}, "scope", "fused_loss"),
        ({"framework_version_if_known": "transformers 4.48", "model": "Mixtral-8x7B-v0.1"}, "memplan", "experts"),
    ],
)
def test_what_a_row_lacks_or_memplan_does_not_model_is_said(values: dict[str, str], kind: str, words: str) -> None:
    row = one(**values)
    assert row.found is None
    assert row.kind == kind
    assert words in row.refused


def test_inequalities() -> None:
    died, ran = (one(metric=metric, measured_GiB="") for metric in ("CUDA out of memory", "fits (max batch)"))
    assert (died.metric, ran.metric) == ("OOM", "fits")
    assert died.verdict == ran.verdict == "fits"
    assert ran.agrees
    assert not died.agrees
    assert score.boundaries([died, ran])["false_fits"] == ["x-1"]


def test_a_file_from_elsewhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(tmp_path / "rows.csv", GOOD, GOOD | {"id": "x-2", "seq_len": "varies"})
    assert score.main([str(path), "--json", str(tmp_path / "out.json")]) == 0
    assert "seq_len: 'varies'" in capsys.readouterr().out
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["counts"]["setups"] == 1
    assert found["rows"][0]["setup"]["training"]["seq_len"] == 4096
    assert found["rows"][1]["refused"]
    (group,) = (group for group in found["summary"] if group["source"] is None)
    assert (group["metric"], group["n"]) == ("allocated", 1)


def test_json_alone_is_printed_and_never_written_over_the_file(tmp_path: Path, capsys) -> None:
    path = written(tmp_path / "rows.csv", GOOD)
    before = path.read_bytes()
    for arguments in ([str(path), "--json"], ["--json", str(path)]):
        assert score.main(arguments) == 0
        assert json.loads(capsys.readouterr().out)["counts"]["setups"] == 1
        assert path.read_bytes() == before


def test_columns_may_lack_stand_elsewhere_and_be_parted_by_semicolons(tmp_path: Path, capsys) -> None:
    columns = [name for name in reversed(adapter.COLUMNS) if name not in ("note", "grad_accum")]
    path = written(tmp_path / "rows.csv", GOOD, columns=columns, delimiter=";")
    assert score.main([str(path)]) == 0
    captured = capsys.readouterr()
    assert "has no grad_accum, note" in captured.err
    assert "1 setups" in captured.out


@pytest.mark.parametrize("content", [b"", b"a,b\n1,2\n", b"\xff\xfe\0\0nonsense", b'model,metric\n"unclosed'])
def test_a_file_that_is_no_table(tmp_path: Path, capsys, content: bytes) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes(content)
    code = score.main([str(path)])
    assert code in (0, 2)
    assert (code == 2) == bool(capsys.readouterr().err.startswith(str(path)) and b"model" not in content)
    assert score.main([str(tmp_path / "nowhere.csv")]) == 2
    assert score.main([str(tmp_path)]) == 2


def test_no_text_breaks_it() -> None:
    """Cells of all rows mixed with each other and with rubbish: a setup or a reason, and never an error."""
    pick = random.Random(1)
    fields = score.read()
    cells = {name: sorted({row[name] for row in fields}) for name in adapter.COLUMNS}
    rubbish = [
        "",
        "?",
        "-1",
        "1e9",
        "999999999999",
        "NaN",
        "0",
        "y",
        "(",
        "16GB",
        "½",
        "r0",
        "lora r16 targets=",
        "x" * 300,
    ]
    for _ in range(400):
        row = dict(pick.choice(fields))
        for name in pick.sample(adapter.COLUMNS, 3):
            row[name] = pick.choice(rubbish) if pick.random() < 0.4 else pick.choice(cells[name])
        found = _without_estimate(row)
        assert found.kind != "error", (found.refused, row)


def _without_estimate(row):
    """As score.compare, without the allocator's replay, which takes a second."""
    try:
        adapter.setup(row)
    except (reading.RefusedError, score.MemplanError) as refusal:
        return score.Row(row, "OOM", None, refused=str(refusal), kind="refused")
    return score.Row(row, "OOM", None)


# -- the page ---------------------------------------------------------------------------------------------------------


def test_the_docs_show_these_rows(rows) -> None:
    generate = script("docs/generate_accuracy.py")
    page = generate.PAGE.read_text(encoding="utf-8")
    assert generate.block(page, "published") == generate.published(score, rows), generate.__doc__
    assert generate.plotted() == generate.digest(generate.points(rows)), generate.__doc__
    assert generate.block(page, "peers") == generate.peers(), generate.__doc__


def test_the_docs_show_the_oracles() -> None:
    """Three families and three engines; the others are compared byte by byte elsewhere."""
    generate = script("docs/generate_accuracy.py")
    page = generate.block(generate.PAGE.read_text(encoding="utf-8"), "oracles")
    lines = [
        *generate.oracle_lines(("gpt2", "llama", "t5")).values(),
        *generate.engine_lines(("zero2", "fsdp1", "eval")).values(),
    ]
    assert len(lines) >= 5
    assert [line for line in lines if line not in page] == []
