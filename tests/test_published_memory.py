"""What others have measured of memory beside the estimates (benchmarks/published): O5."""

from __future__ import annotations

import csv
import doctest
import json
import random
import re
from pathlib import Path

import pytest
from tests.oracles import o1, o2
from tests.scripts import script

ROOT = Path(__file__).parents[1]

score = script("benchmarks/published/score.py")
adapter, reading, releases = score.adapter, score.reading, script("benchmarks/published/releases.py")


@pytest.fixture(scope="module")
def rows():
    return [score.compare(fields) for fields in score.read()]


def of(rows, source: str, metric: str = "allocated"):
    return [row for row in rows if row.source.endswith(source) and row.metric == metric and row.ratio is not None]


def untaught(rows, metric: str):
    """Without the rows that a rule is from, where others are left."""
    return [row for row in rows if row.metric == metric and row.ratio and not row.is_taught] or rows


@pytest.mark.parametrize("module", [reading, releases, score], ids=lambda module: module.__name__)
def test_examples(module) -> None:
    failed, tried = doctest.testmod(module)
    assert tried
    assert not failed


def test_every_row_becomes_a_setup_or_says_why_not(rows) -> None:
    assert len(rows) == len({row.id for row in rows}) == 678
    assert all(row.fields["source"] for row in rows)
    assert score.counts(rows) == {
        "rows": 678,
        "setups": 266,
        "out_of_scope": 370,
        "not_stated": 40,
        "not_known": 2,
        "refused_by_memplan": 0,
        "errors": 0,
    }
    assert all(bool(row.refused) != (row.found is not None) for row in rows)


@pytest.mark.parametrize(
    ("metric", "most"),
    [("allocated", 0.04), ("allocated, probably", 0.1), ("reserved", 0.08), ("device", 0.08)],
)
def test_the_median_error_of_each_metric(rows, metric: str, most: float) -> None:
    assert score.grouped(metric, "", rows).median <= most
    assert score.grouped(metric, "", untaught(rows, metric)).median <= most


def test_a_figure_in_g_is_read_as_its_column_is_documented_first(rows) -> None:
    """So read, the metric misses its target of 8 %, and the page says so; the other readings stand beside."""
    assert reading.measured("81.0") == 81.0
    found = {unit: score.grouped("not stated", "", rows, unit) for unit in reading.UNIT_G}
    assert list(found) == ["GiB", "10^9 bytes", "1000 MiB"]
    assert {group.n for group in found.values()} == {57}
    assert 0.08 < score.grouped("not stated", "", rows).median < 0.0815
    assert found["10^9 bytes"].median < found["1000 MiB"].median < found["GiB"].median
    generate = script("docs/generate_accuracy.py")
    page = generate.PAGE.read_text(encoding="utf-8")
    (line,) = (line for line in page.splitlines() if line.startswith("| not stated: compared"))
    assert line.endswith("| 8.00 %, missed |")


def test_predictions_are_not_cut_at_what_a_gpu_has(rows) -> None:
    row = next(row for row in rows if row.id == "fms-a-011-nv")
    assert row.predicted * 2**30 > row.gpu.capacity
    assert row.ratio > 1 + score.FAR > row.ratio_cut > 1
    assert {row.id for row in rows if row.ratio_cut} == {
        "fms-a-011-nv", "qwen1-ft-78", "fsq-12", "fsq-15", "fsq-16", "fsq-17",
    }  # fmt: skip


def test_rows_that_taught_a_rule_are_named_and_left_out_once(rows) -> None:
    ids = {row.id: row for row in rows}
    assert set(ids) >= score.taught.IDS
    assert all(ids[id].found is not None for id in score.taught.IDS)
    # The context's constant is of the page that these rows are of, and no other row is older than torch 1.13.
    old = {row.id for row in rows if row.found and row.ratio and not row.setup.software.at_least("torch", "1.13")}
    assert old == {f"hf-bert-0{number}" for number in range(9)} <= score.taught.IDS
    generate = script("docs/generate_accuracy.py")
    section = "\n".join(generate._taught(score, rows))
    assert all(f" {id}" in section for id in score.taught.IDS)
    assert "| device | 9 |" in section


def test_the_ten_worst_rows_have_a_cause(rows) -> None:
    generate = script("docs/generate_accuracy.py")
    worst = sorted((row for row in rows if row.ratio), key=lambda row: -abs(row.ratio - 1))[:10]
    lines = {line.split(" | ")[0][2:]: line for line in generate._worst(score, rows) if line.startswith("| ")}
    assert all(row.id in lines for row in worst)
    assert [line for line in lines.values() if generate.UNEXPLAINED in line or line.endswith("|  |")] == []


def test_no_row_in_scope_is_refused_by_memplan(rows) -> None:
    assert [row.id for row in rows if row.kind == "memplan"] == []


def test_float32_adapters_of_16_bit_weights_under_fsdp_are_told(rows) -> None:
    """The rule is the real engine's (tests/oracles/o2.py, unmixed); these had been refused until it was there."""
    found = {row.id: row for row in rows}
    assert {id: round(found[f"fms-a-0{id}"].ratio, 2) for id in (34, 36, 42, 44)} == {
        34: 1.0,
        36: 1.0,
        42: 1.01,
        44: 1.0,
    }
    assert all(found[id].verdict == "does-not-fit" for id in ("fms-a-050", "fms-a-052"))  # which died


def test_memplans_column_beside_peers_is_of_today(rows) -> None:
    generate = script("docs/generate_accuracy.py")
    tools = json.loads(generate.PEERS.read_text())["tools"]
    assert all("summary" not in tool for tool in tools)
    answers = next(tool["answers"] for tool in tools if tool["name"] == "accelerate")
    part = [row for row in rows if row.ratio and row.metric == "allocated" and isinstance(answers.get(row.id), float)]
    errors = sorted(abs(row.ratio - 1) for row in part if row.setup.training.task == "generate")
    (line,) = (
        line for line in generate.peers(rows).splitlines() if "| accelerate" in line and "allocated, generation" in line
    )
    assert line.split(" | ")[2] == str(len(errors))
    assert line.split(" | ")[-2] == f"{100 * errors[len(errors) // 2]:.2f} %"
    figures = [row for row in rows if row.ratio]
    asked = {id for tool in tools for id in tool["answers"]}
    left = [row.id for row in figures if row.id not in asked]
    assert all(id in generate.peers(rows) for id in left)
    assert f"Of the {len(figures)} rows with a figure they were asked {len(figures) - len(left)}." in generate.peers(
        rows
    )


def test_rows_that_are_far_off_have_their_cause(rows) -> None:
    far = [row for row in rows if row.ratio is not None and abs(row.ratio - 1) > score.FAR]
    wrong = [row for row in rows if row.found is not None and not row.agrees]
    assert 0 < len(far) + len(wrong) < 25
    assert [row.id for row in far + wrong if not row.fields["note"]] == []


def test_full_and_lora_fine_tuning_of_one_source_agree(rows) -> None:
    """What fms-acceleration measured on one GPU and under FSDP1."""
    found = of(rows, "fms-acceleration")
    assert len(found) == 37
    experts_in_16_bit = [row for row in found if row.id in ("fms-a-042", "fms-a-044")]  # the first is 1.2 % high
    assert all(abs(row.ratio - 1) < 0.015 for row in experts_in_16_bit)
    found = [row for row in found if row not in experts_in_16_bit]
    on_one_gpu = [row for row in found if row.fields["n_gpus"] == "1" and row.setup.training.quantization]
    prepared = [row for row in on_one_gpu if "baseline" in row.fields["framework"]]
    assert len(prepared) == 4
    assert all(abs(row.ratio - 1) < 0.005 for row in found if row not in prepared)
    plain = [row for row in found if not row.setup.training.quantization and "santacoder" not in row.fields["model"]]
    assert len(plain) == 8
    assert all(abs(row.ratio - 1) < 0.001 for row in plain)
    # TRL has cast them back. Mixtral's backward is the fullest then, which grows with the busiest expert's tokens.
    assert all(abs(row.ratio - 1) < (0.01 if "Mixtral" in row.fields["model"] else 0.001) for row in prepared)
    # Found by these rows: frozen blocks under reentrant checkpointing. Before, Mistral's were 7 % low and Llama's 21 %.
    sharded = [row for row in found if row.setup.training.quantization and row.fields["n_gpus"] == "2"]
    assert len(sharded) == 12
    dense = [row for row in sharded if not re.search("santacoder|Mixtral", row.fields["model"])]
    assert len(dense) == 6
    assert all(abs(row.ratio - 1) < 0.0001 for row in dense)


def test_experts_called_one_by_one(rows) -> None:
    """Mixtral under transformers 4.48; how its tokens spread widens the interval."""
    found = of(rows, "fms-acceleration") + of(rows, "fms-acceleration", "device")
    found = [row for row in found if "Mixtral" in row.fields["model"]]
    assert len(found) == 20
    prepared = [row for row in found if "baseline" in row.fields["framework"] and row.fields["n_gpus"] == "1"]
    told = [
        row for row in found if row.metric == "allocated" and row not in prepared and row.setup.training.quantization
    ]
    assert len(told) == 6
    assert all(abs(row.ratio - 1) < (0.0001 if row.fields["n_gpus"] == "1" else 0.001) for row in told)
    on_one_gpu = [row for row in found if row.metric == "device" and row.fields["n_gpus"] == "1"]
    assert len(on_one_gpu) == 4
    assert all(row.gpu.low <= row.measured * 2**30 <= row.gpu.high for row in on_one_gpu)


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
    assert found["died"] == 22
    # tight: fms-a-068 and -096, of 68 of 79 GiB
    assert found["died_verdicts"] == {"does-not-fit": 20, "tight": 2}
    assert found["false_fits"] == []
    assert found["false_does_not_fit"] == ["hfz-0", "hfz-1", "hfz-4", "hfz-5"]


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


QLORA = {
    "n_gpus": "1", "zero_stage_or_fsdp": "none", "weight_dtype": "nf4, bf16", "mixed_precision": "bf16",
    "method": "qlora r8 targets=q_proj", "framework": "TRL SFTTrainer",
}  # fmt: skip


@pytest.mark.parametrize(
    ("values", "casts"),
    [
        ({"framework_version_if_known": "2023-10"}, (True, False, False)),
        ({"framework_version_if_known": "trl 0.8.6, torch 2.2"}, (True, True, True)),
        ({"framework_version_if_known": "trl 0.13.0, torch 2.4"}, (True, True, False)),
        ({"framework_version_if_known": "trl 0.13.0, torch 2.4", "mixed_precision": "no"}, (True, False, False)),
        ({"framework_version_if_known": "trl 0.26.2, torch 2.9"}, (False, False, True)),
        (
            {"framework": "HF Trainer + PEFT", "weight_dtype": "nf4, bf16, heads bf16, adapters bf16"},
            (True, True, True),
        ),
    ],
)
def test_the_version_of_trl_or_the_cell_decides_what_is_cast(values: dict, casts: tuple[bool, ...]) -> None:
    found = one(**QLORA | values).setup.training.quantization
    assert (found.prepare_for_kbit_training, found.peft_module_casting_to_bf16, found.bf16_adapters) == casts


def test_what_a_cell_says_of_an_engine_and_of_a_loop_is_taken() -> None:
    assert one(zero_stage_or_fsdp="FSDP1, cpu_ram_efficient_loading").setup.strategy.fsdp.cpu_ram_efficient_loading
    said = "DeepSpeed ZeRO-2 (reduce_bucket_size=1e9, allgather_bucket_size=2e8, overlap_comm=false)"
    zero = one(zero_stage_or_fsdp=said).setup.strategy.zero
    assert (zero.reduce_bucket_size, zero.allgather_bucket_size, zero.overlap_comm) == (10**9, 2 * 10**8, False)
    assert one(gradient_checkpointing="yes (non-reentrant)").setup.training.use_reentrant is False
    assert one(framework="PyTorch, own loop that keeps outputs").setup.training.keeps_outputs
    assert one(framework="PyTorch, own loop, own loss").refused.endswith("does not take the loss from the model")
    gemma2 = one(model="google/gemma-2-2b", attention="default", framework_version_if_known="transformers 4.45")
    assert gemma2.setup.training.attn == "eager"


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
        ({"model": "acme/unheard-of-7b"}, "not known", "not in the catalog"),
        ({"n_gpus": "two"}, "not stated", "n_gpus"),
        ({"zero_stage_or_fsdp": "none"}, "not stated", "how 2 GPUs share"),
        ({"micro_batch": "1-4"}, "not stated", "micro_batch"),
        ({"micro_batch": "0"}, "not stated", "micro_batch"),
        ({"weight_dtype": "bf16 or fp16"}, "not stated", "weight_dtype"),
        ({"zero_stage_or_fsdp": "FSDP2 x TP2"}, "scope", "not modelled"),
        ({"compile": "y"}, "scope", "compile"),
        ({"weight_dtype": "gptq-int4"}, "scope", "gptq"),
        ({"framework": "torchtitan"}, "scope", "its own"),
        ({"framework": "HF Trainer + torch.compile"}, "scope", "compiles the model"),
        ({"method": "dora r16"}, "scope", "dora"),
        ({"gradient_checkpointing": "selective"}, "scope", "gradient_checkpointing"),
        ({"optimizer": "galore_adamw"}, "scope", "optimizer"),
        ({"fused_loss": "y (cut cross-entropy)"}, "scope", "fused_loss"),
        ({"framework_version_if_known": "transformers 4.47", "model": "Mixtral-8x7B-v0.1"}, "memplan", "cosines"),
    ],
)
def test_what_a_row_lacks_or_memplan_does_not_model_is_said(values: dict[str, str], kind: str, words: str) -> None:
    row = one(**values)
    assert row.found is None
    assert row.kind == kind
    assert words in row.refused


@pytest.mark.parametrize(
    ("column", "text", "left"),
    [
        ("metric", "did not run out of memory", "did not"), ("metric", "max_allocated, no OOM", "no oom"),
        ("metric", "max_memory_allocated (reserved 75)", "75"), ("optimizer", "adamw_torch (not fused)", "not"),
        ("zero_stage_or_fsdp", "ZeRO-2 or ZeRO-3", "or 3"),
        ("zero_stage_or_fsdp", "FSDP or DeepSpeed ZeRO-3", "fsdp or"),
        ("zero_stage_or_fsdp", "without ZeRO-3", "without"), ("zero_stage_or_fsdp", "ZeRO-3 hpZ 8", "hpz 8"),
        ("zero_stage_or_fsdp", "DDP (not FSDP)", "not fsdp"), ("zero_stage_or_fsdp", "ZeRO 1.5", "stage"),
        ("zero_stage_or_fsdp", "FSDP1 FULL_SHARD, n=4", "4 ranks, of 2 GPUs"),
        ("attention", "no flash attention", "no"), ("attention", "eager, without sdpa", "without"),
        ("method", "full, embeddings frozen", "embeddings frozen"),
        ("method", "full fine-tuning of the last 2 layers", "of the last 2 layers"),
        ("method", "full + EMA copy", "ema copy"), ("method", "not full: head only", "not head only"),
        ("method", "lora r8-16", "rank"), ("method", "lora rank 8.5", "rank"),
        ("method", "lora r8 bias=all", "bias all"), ("task", "training (DPO)", "dpo"),
        ("model", "Mistral-7B-v0.1 (16 of 32 layers)", "16 of 32 layers"), ("offload", "not to CPU", "not"),
        ("model", "Mistral-7B-v0.1 (vocab extended to 64k)", "vocab extended"),
        ("packed_or_padded", "fixed-length padding", "both"),
        ("fused_loss", "y (liger without fused linear CE)", "without"), ("n_gpus", "12", "nodes"),
        ("measured_GiB", "67,46", "number"), ("measured_GiB", "60-70", "number"), ("measured_GiB", "-5", "number"),
        ("measured_GiB", "", "not stated"), ("gpu", "A100-80GB (memory fraction 0.5)", "fraction"),
        ("gradient_checkpointing", "full but the last 2", "but the last 2"),
        ("weight_dtype", "BF16 (embeddings float32)", "embeddings"),
        ("mixed_precision", "No, except norms", "except norms"),
        ("micro_batch", "2 (last one smaller)", "last one smaller"),
    ],
)  # fmt: skip
def test_a_word_that_is_not_known_makes_no_setup(column: str, text: str, left: str) -> None:
    row = one(**{column: text})
    assert row.found is None
    assert row.kind == "not stated"
    assert row.refused.startswith(f"{column}: {text!r} " if text else f"{column}: ")
    assert left in row.refused
    assert row.ratio is None


ZERO3 = {"zero_stage_or_fsdp": "ZeRO-3"}


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"zero_stage_or_fsdp": "DeepSpeed ZeRO-3 (CPU offload)"}, "contradicts 'DeepSpeed ZeRO-3 (CPU offload)'"),
        ({"zero_stage_or_fsdp": "ZeRO-Infinity", "offload": "none"}, "'none' contradicts 'ZeRO-Infinity'"),
        (ZERO3 | {"optimizer": "DeepSpeedCPUAdam"}, "contradicts the optimizer 'DeepSpeedCPUAdam'"),
        (ZERO3 | {"offload": "optimizer to CPU, params to NVMe"}, "names several places"),
        ({"weight_dtype": "bf16 weights, fp32 master"}, "has masters, which fsdp keeps of no 16-bit weights"),
        ({"weight_dtype": "fp32 master, bf16 weights"}, "names several types, with 'No'"),
        ({"weight_dtype": "bf16+fp32"}, "names several types, with 'No'"),
        ({"weight_dtype": "fp32", "mixed_precision": "none (pure bf16)"}, "contradicts weights in 'fp32'"),
        ({"attention": "sdpa (math)"}, "names a kernel of its own beside"),
        ({"n_gpus": "8 (3 nodes)"}, "cannot be spread evenly over 3 nodes"),
        ({"method": "lora r8 targets=.*"}, "does not state the targets in words"),
        ({"measured_GiB": "40960", "metric": "allocated (MiB)"}, "is more than the 79.15 GiB of the GPU"),
        ({"gpu": "8x A100-80GB"}, "says another number than 2"),
        ({"gpu": "A100-80GB x 4"}, "says another number than 2"),
    ],
)
def test_cells_that_contradict_each_other_make_no_setup(values: dict[str, str], words: str) -> None:
    row = one(**values)
    assert row.found is None
    assert row.kind == "not stated"
    assert words in row.refused


def test_the_order_of_words_changes_nothing() -> None:
    words = {
        "fused AdamW": "adamw_torch_fused", "AdamW fused": "adamw_torch_fused",
        "single-tensor AdamW": "adamw_torch_loop", "AdamW (foreach=False)": "adamw_torch_loop",
        "foreach AdamW": "adamw_torch", "adamw_torch (HF default, foreach)": "adamw_torch",
    }  # fmt: skip
    assert {text: reading.optimizer(text, []) for text in words} == words
    assert reading.attention("flash (sdpa)", True, []) == reading.attention("sdpa (flash)", True, []) == "sdpa"
    sharded = one(weight_dtype="fp32 (sharded master), bf16 compute", mixed_precision="bf16").setup.training
    assert (sharded.dtype, sharded.mixed_precision) == ("float32", "bf16")
    masters = one(**ZERO3, weight_dtype="fp16 + fp32 master", mixed_precision="fp16").setup.training
    assert (masters.dtype, masters.mixed_precision) == ("float16", "fp16")
    moved = one(zero_stage_or_fsdp="ZeRO-3 (CPU offload)", optimizer="Adam CPU", offload="optimizer to CPU")
    assert moved.setup.strategy.offload_optimizer == "cpu"
    assert one(gpu="2x A100-80GB").found is not None
    assert one(n_gpus="8 (2 nodes)").setup.cluster.nodes == 2
    assert one(n_gpus="16").setup.cluster.nodes == 2
    assert one(measured_GiB="81").found is not None  # as a page has it of a GPU of 79.15


def test_forms_that_are_known() -> None:
    assert reading.precision("nf4 (no double quant)", "bf16", "qlora r8", False, True, []).quantization == "nf4"
    assert reading.optimizer("AdamW foreach=False", []) == "adamw_torch_loop"


def test_versions_that_are_older_than_all_known_and_those_that_are_not_known() -> None:
    """Rows of 2021 had today's torch and DeepSpeed, without a word."""
    old = one(framework_version_if_known="transformers 4.2").setup
    assert old.software.torch == "1.10"
    assert any(note.startswith("software: of 2021-02: cuda 11.1, deepspeed 0.10") for note in old.notes)
    open_ = one(framework_version_if_known="accelerate 1.0").setup
    assert any("neither a date nor versions of torch" in note and "today's" in note for note in open_.notes)


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
    assert generate.block(page, "peers") == generate.peers(rows), generate.__doc__


def test_the_docs_count_every_row_of_the_oracles() -> None:
    """Of all archives: compared, refused, and those that are neither add up to what is archived."""
    generate = script("docs/generate_accuracy.py")
    page = generate.block(generate.PAGE.read_text(encoding="utf-8"), "oracles")
    traced, engines = page.split("### Real engines")
    for part, load, rest in ((traced, o1.load_archives, (7, 8, 9)), (engines, o2.load_archives, (8, 9))):
        table = [line for line in part.splitlines() if line.startswith("| ")]
        lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
        shown = {cells[0]: cells for cells in lines[2:]}
        archives = {name: len(archive.rows) for name, archive in load().items()}
        assert {name: int(cells[rest[0] - 1]) for name, cells in shown.items()} == archives
        assert all(
            int(cells[1]) + sum(int(cells[place]) for place in rest) == archives[name] for name, cells in shown.items()
        )


def test_the_docs_show_the_oracles() -> None:
    """Three families and three engines; the others are compared byte by byte elsewhere."""
    generate = script("docs/generate_accuracy.py")
    page = generate.block(generate.PAGE.read_text(encoding="utf-8"), "oracles")
    lines = [
        *generate.oracle_lines(("gpt2", "t5", "vit")).values(),
        *generate.engine_lines(("zero2", "fsdp1", "eval")).values(),
    ]
    assert len(lines) >= 5
    assert [line for line in lines if line not in page] == []
