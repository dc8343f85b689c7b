"""Write the constants and the published rows into docs/throughput.md. Run it after changing either; a test compares.

Usage: python docs/generate_throughput.py
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from memplan.constants import Constant
from memplan.throughput import rates

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "throughput.md"
BEFORE, AFTER = "<!-- generated -->\n", "<!-- end -->\n"
CALIBRATED = "mosaic"
SOURCES = {
    "fms": "foundation-model-stack/fms-acceleration, reference runs",
    "mosaic": "mosaicml/llm-foundry, training benchmarks (calibrates two constants)",
    "qwen1": "QwenLM/Qwen, profile of memory and speed",
    "a800": "chenyaofo's gist on ZeRO stages and offloading",
    "bert": "transformers, training on one GPU (2022)",
    "titan": "transformers, NVLink and DDP",
    "titan8b": "pytorch/torchtitan, December 2024",
    "peft": "huggingface/peft, method comparison",
    "dgx2": "deepspeedai/DeepSpeed#1776",
    "torchtune": "pytorch/torchtune, README",
    "nanogpt": "karpathy/nanoGPT, README",
}


def block(page: str) -> str:
    """Return what the page shows."""
    return page.partition(BEFORE)[2].partition(AFTER)[0]


def published() -> Any:
    """The script that reads and predicts the rows."""
    path = ROOT / "benchmarks" / "published" / "compare.py"
    spec = importlib.util.spec_from_file_location("published_rows", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def tables(rows: Sequence[Any]) -> str:
    """Return the sections: agreement by source, constants, rows."""
    return "\n".join([*_agreement(rows), "", *_constants(), "", *_rows(rows), ""])


def _agreement(rows: Sequence[Any]) -> list[str]:
    spearman = published().spearman
    lines = [
        "## Agreement",
        "",
        "Tokens per second of a GPU; ratios are predicted over measured.",
        "",
        "| Rows | Number | Rank correlation | Median | 10 % to 90 % | Within 1.25 | Within 1.5 | In the interval |",
        "| :-- | --: | --: | --: | --: | --: | --: | --: |",
    ]
    held_out = [row for row in rows if row.family != CALIBRATED]
    parts = [("all", rows), ("all but the calibrating source", held_out)]
    parts += [(f"{name}: {words}", [row for row in rows if row.family == name]) for name, words in SOURCES.items()]
    for name, part in parts:
        ratios = sorted(row.ratio for row in part)
        tenth = len(ratios) // 10
        correlation = f"{spearman([row.per_gpu for row in part]):.3f}" if len(part) > 3 else ""
        shares = [_share(1 / f <= ratio <= f for ratio in ratios) for f in (1.25, 1.5)]
        shares.append(_share(row.within for row in part))
        spread = f"{ratios[tenth]:.2f} to {ratios[-1 - tenth]:.2f}"
        lines.append(
            f"| {name} | {len(part)} | {correlation} | {median(ratios):.2f} | {spread} | {' | '.join(shares)} |"
        )
    return lines


def _share(hits: Any) -> str:
    hits = list(hits)
    return f"{100 * sum(hits) / len(hits):.0f} %"


def _constants() -> list[str]:
    found = [value for value in vars(rates).values() if isinstance(value, Constant)]
    lines = ["## Constants", "", "| What | Value | Range | Unit | Source |", "| :-- | --: | --: | :-- | :-- |"]
    for each in found:
        span = "" if each.low == each.high else f"{each.low:g} to {each.high:g}"
        lines.append(f"| {each.name} | {each.value:g} | {span} | {each.unit} | {each.source} |")
    return lines


def _rows(rows: Sequence[Any]) -> list[str]:
    lines = [
        "## Rows",
        "",
        "Setups are in `benchmarks/published/throughput.csv`, shapes of models that are not in the catalog in "
        "`models.json` beside it. An asterisk: the measured value is outside the interval.",
        "",
        "| Row | Model | GPUs | Strategy | Batch x length x micro-batches | Measured | Predicted | Ratio | Bound by |",
        "| :-- | :-- | :-- | :-- | :-- | --: | --: | --: | :-- |",
    ]
    for row in rows:
        f = row.fields
        offloads = [
            f"{what} {f['offload_' + what]}" for what in ("optimizer", "param") if f["offload_" + what] != "none"
        ]
        marks = [f["strategy"], *offloads]
        marks += ["LoRA"] if f["lora_rank"] else []
        marks += [f["quantization"]] if f["quantization"] != "none" else []
        marks += ["checkpointed"] if f["gradient_checkpointing"] == "yes" else []
        gpus = f"{f['gpus']} x {f['gpu']}" + (f" on {f['nodes']} nodes" if f["nodes"] != "1" else "")
        shape = f"{f['micro_batch_size']} x {f['seq_len']} x {f['grad_accum_steps']}"
        ratio = f"{row.ratio:.2f}{'' if row.within else '*'}"
        lines.append(
            f"| {row.id} | {f['model']} | {gpus} | {', '.join(marks)} | {shape} | {row.measured:,.0f} | "
            f"{row.predicted:,.0f} | {ratio} | {row.timing.bound_by} |"
        )
    return lines


if __name__ == "__main__":
    script = published()
    page = PAGE.read_text(encoding="utf-8")
    new = tables([script.compare(fields) for fields in script.read()])
    PAGE.write_text(page.replace(BEFORE + block(page) + AFTER, BEFORE + new + AFTER), encoding="utf-8")
