"""Write the published rows into docs/accuracy.md. Run it after changing an estimate; a test compares.

Usage: python docs/generate_accuracy.py
"""

from __future__ import annotations

import importlib.util
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "accuracy.md"
BEFORE, AFTER = "<!-- generated -->\n", "<!-- end -->\n"
SOURCES = {
    "fms": "foundation-model-stack/fms-acceleration, reference runs",
    "qwen3": "QwenLM/Qwen3, speed benchmark",
    "hf": "transformers, training on one GPU (2022); inference of OctoCoder",
    "peft": "huggingface/peft, method comparison",
    "qwen1": "QwenLM/Qwen, profile of memory and speed",
    "llf": "hiyouga/LLaMA-Factory, performance comparison",
    "hfz": "transformers, ZeRO blog (2021)",
    "hfd": "accelerate, DeepSpeed and FSDP blogs (2022)",
}


def block(page: str) -> str:
    """Return what the page shows."""
    return page.partition(BEFORE)[2].partition(AFTER)[0]


def published() -> Any:
    """The script that reads and estimates the rows."""
    path = ROOT / "benchmarks" / "published" / "memory.py"
    spec = importlib.util.spec_from_file_location("published_memory", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def tables(rows: Sequence[Any]) -> str:
    """Return the sections: agreement by source and metric, refusals, rows."""
    return "\n".join([*_agreement(rows), "", *_refused(rows), "", *_rows(rows), ""])


def _agreement(rows: Sequence[Any]) -> list[str]:
    lines = [
        "## Agreement",
        "",
        "Ratios are predicted over measured. Metrics are torch's `max_memory_allocated` and `max_memory_reserved`, and "
        "what nvidia-smi shows of the process. Where the source does not state it, what is allocated is set beside the "
        "figure: that is the least that it can be.",
        "",
        "| Rows | Metric | Number | Median | 10 % to 90 % | Worst | Within 5 % | Within 10 % |",
        "| :-- | :-- | --: | --: | --: | --: | --: | --: |",
    ]
    for family, words in SOURCES.items():
        for metric in ("allocated", "reserved", "process", "not stated", "largest batch"):
            part = [row for row in rows if row.family == family and row.metric == metric and row.found]
            if part:
                lines.append(_line(f"{family}: {words}", metric, [row.ratio for row in part]))
    decoding = [row.decoding / row.measured for row in rows if row.family == "qwen3"]
    lines.append(_line("qwen3, without the prompt's forward (see below)", "allocated", decoding))
    for metric in ("allocated", "reserved", "process"):
        ratios = [row.ratio for row in rows if row.metric == metric and row.found]
        lines.append(_line("all that state it", metric, ratios))
    died = [row for row in rows if row.metric == "oom" and row.found]
    agreeing = sum(row.agrees for row in died)
    return [*lines, "", f"Of {len(died)} runs that died of memory, memplan lets {len(died) - agreeing} fit."]


def _line(name: str, metric: str, ratios: Sequence[float]) -> str:
    ratios = sorted(ratios)
    tenth = len(ratios) // 10
    worst = max(ratios, key=lambda ratio: abs(ratio - 1))
    spread = f"{ratios[tenth]:.3f} to {ratios[-1 - tenth]:.3f}"
    shares = [f"{100 * sum(abs(r - 1) <= limit for r in ratios) / len(ratios):.0f} %" for limit in (0.05, 0.1)]
    return (
        f"| {name} | {metric} | {len(ratios)} | {median(ratios):.3f} | {spread} | {worst:.3f} | {' | '.join(shares)} |"
    )


def _refused(rows: Sequence[Any]) -> list[str]:
    found = Counter(row.refused for row in rows if row.found is None)
    lines = ["## Refused", "", "Rows whose setup memplan does not model.", "", "| Number | Message |", "| --: | :-- |"]
    return [*lines, *(f"| {number} | {message} |" for message, number in found.most_common())]


def _rows(rows: Sequence[Any]) -> list[str]:
    lines = [
        "## Rows",
        "",
        "Setups, software and sources are in `benchmarks/published/memory.csv`. GiB of one GPU, or sequences.",
        "",
        "| Row | Model | GPUs | Setup | Batch x length | Metric | Measured | Predicted | Ratio | Peak in |",
        "| :-- | :-- | :-- | :-- | :-- | :-- | --: | --: | --: | :-- |",
    ]
    for row in rows:
        f = row.fields
        marks = [f["strategy"]] if f["task"] == "train" else ["generation"]
        for what in ("optimizer", "param"):
            marks += [f"{what} {f['offload_' + what]}"] if f["offload_" + what] != "none" else []
        marks += [f"LoRA {f['lora_rank']}"] if f["lora_rank"] else []
        marks += [f["quantization"]] if f["quantization"] != "none" else []
        marks += ["checkpointed"] if f["gradient_checkpointing"] == "yes" else []
        gpus, length = f"{f['gpus']} x {f['gpu']}", f["seq_len"]
        length += f" + {f['max_new_tokens']}" if f["max_new_tokens"] else ""
        measured = "died" if row.metric == "oom" else f"{row.measured:.2f}"
        if row.found is None:
            said = "refused | | "
        elif row.metric == "oom":
            said = f"{row.found.verdict} | | {row.found.gpu.peak_phase}"
        else:
            said = f"{row.predicted:.2f} | {row.ratio:.3f} | {row.found.gpu.peak_phase}"
        shape = f"{f['micro_batch_size']} x {length}"
        lines.append(
            f"| {row.id} | {f['model']} | {gpus} | {', '.join(marks)} | {shape} | {row.metric} | {measured} | {said} |"
        )
    return lines


if __name__ == "__main__":
    script = published()
    page = PAGE.read_text(encoding="utf-8")
    new = tables([script.compare(fields) for fields in script.read()])
    PAGE.write_text(page.replace(BEFORE + block(page) + AFTER, BEFORE + new + AFTER), encoding="utf-8")
