"""Write the terms of estimates, with formula and source, into docs/terms.md. Run it after a change; a test compares.

Usage: python docs/generate_terms.py
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from inspect import getsource
from pathlib import Path
from typing import Any

import memplan
from memplan.constants import Constant
from memplan.errors import MemplanError
from memplan.memory import runtime
from memplan.results import COMPONENTS, Components, Term

PAGE = Path(__file__).with_name("terms.md")
BEFORE, AFTER = "<!-- generated -->\n", "<!-- end -->\n"
LLAMA: dict[str, Any] = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 1024, "intermediate_size": 2816,
    "num_hidden_layers": 2, "num_attention_heads": 16, "num_key_value_heads": 4, "vocab_size": 32000,
}  # fmt: skip
CLUSTER = {"gpu": "A100-80GB", "gpus": 4, "host_memory": "512GiB", "nvme": "1TiB", "nvme_path": "/nvme"}
SHARDED: tuple[dict[str, Any], ...] = (
    {"kind": "ddp"}, {"kind": "zero0"}, {"kind": "zero1"}, {"kind": "zero2"},
    {"kind": "zero2", "offload_optimizer": "cpu"}, {"kind": "zero3"},
    {"kind": "zero3", "offload_optimizer": "cpu", "offload_param": "cpu"},
    {"kind": "zero3", "offload_optimizer": "nvme", "offload_param": "nvme"},
    {"kind": "fsdp"}, {"kind": "fsdp", "fsdp": {"version": 1}}, {"kind": "fsdp", "offload_param": "cpu"},
)  # fmt: skip
ALONE: tuple[dict[str, Any], ...] = (
    {}, {"gradient_checkpointing": True, "micro_batch_size": 4}, {"attn": "eager"}, {"optim": "sgd"},
    {"optim": "adafactor"}, {"optim": "adamw_8bit"}, {"grad_accum_steps": 4},
    {"quantization": "nf4", "lora": {"rank": 16}}, {"eval_batch_size": 8}, {"liger": True}, {"task": "load"},
    {"task": "generate", "max_new_tokens": 64},
)  # fmt: skip


def block(page: str) -> str:
    """Return what the page shows."""
    return page.partition(BEFORE)[2].partition(AFTER)[0]


def terms() -> Iterator[Term]:
    """The terms of the setups above."""
    for setup in ALONE:
        yield from memplan.estimate(LLAMA, {"seq_len": 512, **setup}, "1xA100-80GB", explain=True).explanation
    for strategy in SHARDED:
        for checkpointing in (False, True):
            run = {"seq_len": 512, "gradient_checkpointing": checkpointing}
            try:
                found = memplan.estimate(LLAMA, run, CLUSTER, strategy, explain=True)
            except MemplanError as error:
                raise SystemExit(f"{strategy}: {error}") from None
            yield from found.explanation


def tables() -> str:
    """Return the components with their terms, and the constants."""
    rows: dict[str, dict[tuple[str, str], list[str]]] = {name: {} for name in COMPONENTS}
    for term in terms():
        component = term.name.partition(":")[0]
        name, source = term.name, term.source
        if term.formula.startswith("tensors x shape"):  # one rule for all operations
            name, source = f"{component}: of each operation", re.sub(r"what \w+ saves", "what it saves", source)
        sources = rows[component].setdefault((name, term.formula), [])
        sources += [source] if source not in sources else []
    lines: list[str] = []
    documented = _docstrings()
    for component, found in rows.items():
        lines += [f"### {component}", "", documented[component], ""]
        if found:
            lines += ["| Term | Formula | Source |", "| :-- | :-- | :-- |"]
            cells = ((*row, "; ".join(sorted(sources))) for row, sources in sorted(found.items()))
            lines += [f"| {' | '.join(row)} |" for row in cells]
            lines.append("")
    lines += ["## Constants", "", "What is measured outside of memplan, and no rule of a library.", ""]
    lines += ["| What | Value | Range | Unit | Source |", "| :-- | --: | --: | :-- | :-- |"]
    for each in (value for value in vars(runtime).values() if isinstance(value, Constant)):
        span = "" if each.low == each.high else f"{each.low:g} to {each.high:g}"
        lines.append(f"| {each.name} | {each.value:g} | {span} | {each.unit} | {each.source} |")
    return "\n".join([*lines, ""])


def _docstrings() -> dict[str, str]:
    """What the class of the components says of each."""
    found = re.findall(r'(\w+): Bytes = 0\n\s+"""(.*?)"""', getsource(Components), re.DOTALL)
    return {name: " ".join(text.split()) for name, text in found}


if __name__ == "__main__":
    page = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(page.replace(BEFORE + block(page) + AFTER, BEFORE + tables() + AFTER), encoding="utf-8")
