"""Write the tables of docs/stories.md. Run it after changing an estimate; a test compares.

Usage: python docs/generate_stories.py
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import memplan
from memplan.results import Estimate
from memplan.units import GiB

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "stories.md"
ARCHIVE = ROOT / "benchmarks" / "measurements" / "stories" / "phi_2023.json"
PHI, LLAMA = "microsoft/phi-1_5", "meta-llama/Llama-2-7b"
LENGTHS = (1024, 1536, 1792, 2048)
OFFLOADED = {"kind": "zero2", "offload_optimizer": "cpu"}
ALL_ON_HOST = {"kind": "zero3", "offload_optimizer": "cpu", "offload_param": "cpu"}
CHATGLM3: dict[str, Any] = {
    "model_type": "glm", "architectures": ["GlmForCausalLM"], "hidden_size": 4096, "intermediate_size": 13696,
    "num_hidden_layers": 28, "num_attention_heads": 32, "num_key_value_heads": 2, "head_dim": 128, "vocab_size": 65024,
    "max_position_embeddings": 8192, "attention_bias": True, "partial_rotary_factor": 0.5, "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False, "hidden_act": "silu", "pad_token_id": 0, "dtype": "float16",
}  # fmt: skip
"""The shapes of THUDM/chatglm3-6b for the family of transformers that is nearest to it."""


def phi(seq_len: int, lora: bool, attn: str, checkpointed: bool, strategy: Any = None, gpus: int = 1) -> Estimate:
    """phi-1.5 on T4s of 64 GiB of host memory, one sequence, fp16."""
    training = {"seq_len": seq_len, "attn": attn, "gradient_checkpointing": checkpointed, "mixed_precision": "fp16"}
    if lora:
        training["lora"] = {"rank": 8}
    return memplan.estimate(PHI, training, {"gpu": "T4", "gpus": gpus, "host_memory": 64 * GiB}, strategy)


def llama(gpus: int, host: int, nvme: int | None = None) -> Sequence[Estimate]:
    """The ladder of Llama-2-7B on RTX 3090s, with GiB of host memory and NVMe."""
    cluster: dict[str, Any] = {"gpu": "RTX3090", "gpus": gpus, "host_memory": host * GiB}
    if nvme is not None:
        cluster |= {"nvme": nvme * GiB, "nvme_path": "/nvme"}
    return memplan.ladder(LLAMA, {}, cluster).estimates


def chatglm(seq_len: int, strategy: Any = None, software: str | None = None, **training: Any) -> Estimate:
    """LoRA of rank 8 on the shapes of ChatGLM3-6B on a T4, checkpointed, fp16."""
    lora = {"rank": 8, "targets": ["q_proj", "k_proj", "v_proj"]}
    known = {"seq_len": seq_len, "lora": lora, "gradient_checkpointing": True, "mixed_precision": "fp16"}
    cluster = {"gpu": "T4", "host_memory": 64 * GiB}
    return memplan.estimate(CHATGLM3, known | training, cluster, strategy, software=software)


def block(page: str, name: str) -> str:
    """Return what the page shows between the marks of a table."""
    return page.partition(f"<!-- {name} -->\n")[2].partition("<!-- end -->\n")[0]


def tables() -> Iterator[tuple[str, str]]:
    """The tables, by their names on the page."""
    for name, rows in (("phi", _phi()), ("phi-2023", _phi_2023()), ("phi-two", _phi_two()), ("phi-host", _phi_host())):
        yield name, "\n".join([*rows, ""])
    for name, rows in (("llama", _llama()), ("llama-host", _llama_host()), ("chatglm", _chatglm())):
        yield name, "\n".join([*rows, ""])


def _gib(nbytes: int) -> str:
    return f"{nbytes / GiB:.2f}"


def _span(gpu: Mapping[str, Any] | Any, verdict: str) -> str:
    low, high = (gpu["low"], gpu["high"]) if isinstance(gpu, Mapping) else (gpu.low, gpu.high)
    return f"{_gib(low)} to {_gib(high)}, {verdict}"


def _largest(found: Estimate) -> str:
    parts = {name: size for name, size in found.gpu.components.model_dump().items() if size > GiB // 4}
    return ", ".join(f"{name} {_gib(parts[name])}" for name in sorted(parts, key=lambda name: -parts[name])[:3])


def _phi() -> Iterator[str]:
    yield "| Setup | " + " | ".join(f"{length:,} tokens" for length in LENGTHS) + " | Host | Most of it at 2,048 |"
    yield "| :-- |" + " --: |" * (len(LENGTHS) + 1) + " :-- |"
    for strategy, name in ((OFFLOADED, "ZeRO-2, optimizer on the host"), (None, "one process")):
        for lora in (True, False):
            for attn in ("eager", "sdpa"):
                for checkpointed in (False, True):
                    found = [phi(length, lora, attn, checkpointed, strategy) for length in LENGTHS]
                    what = f"{'LoRA' if lora else 'full'}, {attn}{', checkpointed' if checkpointed else ''}, {name}"
                    spans = " | ".join(_span(each.gpu, each.verdict) for each in found)
                    host = _gib(max(each.host.peak for each in found))
                    yield f"| {what} | {spans} | {host} | {found[-1].gpu.peak_phase}: {_largest(found[-1])} |"


def _phi_2023() -> Iterator[str]:
    rows = json.loads(ARCHIVE.read_text(encoding="utf-8"))["rows"]
    yield "| Setup | " + " | ".join(f"{length:,} tokens" for length in LENGTHS) + " | Host |"
    yield "| :-- |" + " --: |" * (len(LENGTHS) + 1)
    for rank, name in ((8, "LoRA on Wqkv"), (None, "full")):
        found = [row for row in rows if row["lora_rank"] == rank]
        assert [row["seq_len"] for row in found] == list(LENGTHS)
        spans = " | ".join(_span(row, row["verdict"]) for row in found)
        yield f"| {name}, ZeRO-2, optimizer on the host | {spans} | {_gib(found[0]['host'])} |"


def _phi_two() -> Iterator[str]:
    yield "| 2 x T4, eager, not checkpointed | 1,024 tokens | 1,792 tokens | Host |"
    yield "| :-- | --: | --: | --: |"
    for name, strategy in (("ZeRO-3", {"kind": "zero3"}), ("ZeRO-3, all on the host", ALL_ON_HOST)):
        for lora in (True, False):
            found = [phi(length, lora, "eager", False, strategy, gpus=2) for length in (1024, 1792)]
            spans = " | ".join(_span(each.gpu, each.verdict) for each in found)
            yield f"| {name}, {'LoRA' if lora else 'full'} | {spans} | {_gib(found[-1].host.peak)} |"


def _phi_host() -> Iterator[str]:
    found = phi(1024, False, "eager", False, OFFLOADED)
    yield "| Phase | Host, GiB |"
    yield "| :-- | --: |"
    for phase in found.host.phases:
        if phase.name in ("load", "step", "save"):
            yield f"| {phase.name} | {_gib(phase.allocated)} |"
    yield f"| of it page-locked at the peak | {_gib(found.host.pinned)} |"
    yield f"| gradients, in float32, at the peak | {_gib(found.host.components['gradients'])} |"
    yield f"| masters and moments at the peak | {_gib(found.host.components['optimizer'])} |"
    pageable = phi(1024, False, "eager", False, OFFLOADED | {"zero": {"offload_optimizer": {"pin_memory": False}}})
    yield f"| the peak without pin_memory | {_gib(pageable.host.peak)} |"
    rows = memplan.compare(PHI, {"seq_len": 1024, "mixed_precision": "fp16"}, "1xT4", OFFLOADED).rows
    other = next(row for row in rows if row.tool == "DeepSpeed")
    assert other.host is not None
    yield f"| DeepSpeed's estimator, of the model without its head | {_gib(other.host)} |"


def _llama() -> Iterator[str]:
    yield "| Rung | 1 x RTX 3090 | Host | 2 x RTX 3090 | Host |"
    yield "| :-- | --: | --: | --: | --: |"
    found: dict[str, dict[int, str]] = {}
    for gpus in (2, 1):  # two have all rungs
        for each in llama(gpus, 256, 500):
            name = _rung(each)
            found.setdefault(name, {})[gpus] = f"{_span(each.gpu, each.verdict)} | {_gib(each.host.peak)}"
    for name, by_gpus in found.items():
        yield f"| {name} | {by_gpus.get(1, ' | ')} | {by_gpus.get(2, ' | ')} |"


def _rung(found: Estimate) -> str:
    setup = found.setup
    places = [f"{what} on {setup[f'offload_{what}']}" for what in ("optimizer", "param")]
    places = [place for place in places if not place.endswith("none")]
    kind = "one process or DDP" if setup["strategy"] in ("single", "ddp") else str(setup["strategy"])
    return ", ".join([kind, *places, *(["checkpointed"] if setup["gradient_checkpointing"] else [])])


def _llama_host() -> Iterator[str]:
    yield "| Host memory, GiB | 1 x RTX 3090 | 2 x RTX 3090 | 2 x RTX 3090, 500 GiB of NVMe |"
    yield "| --: | :-- | :-- | :-- |"
    for host in (32, 64, 128, 160, 256):
        cells = []
        for gpus, nvme in ((1, None), (2, None), (2, 500)):
            fitting = [each for each in llama(gpus, host, nvme) if each.verdict == "fits"]
            cells.append(_rung(fitting[0]) if fitting else "nothing fits")
        yield f"| {host} | {' | '.join(cells)} |"


def _chatglm() -> Iterator[str]:
    yield "| LoRA of rank 8 on one T4, checkpointed | 512 tokens | 1,024 tokens | 2,048 tokens |"
    yield "| :-- | --: | --: | --: |"
    old = "torch=1.12,cuda=11.3"
    setups: tuple[tuple[str, Any, str | None, dict[str, Any]], ...] = (
        ("weights in float32, autocast", None, None, {}),
        ("weights in float16, no autocast", None, None, {"dtype": "float16", "mixed_precision": "no"}),
        ("ZeRO-2", "zero2", None, {}),
        (f"ZeRO-2, {old}", "zero2", old, {}),
        ("int8 weights", None, None, {"quantization": "int8"}),
        ("nf4 weights", None, None, {"quantization": "nf4"}),
        ("ZeRO-3, all on the host", ALL_ON_HOST, None, {}),
    )
    for name, strategy, software, training in setups:
        found = [chatglm(length, strategy, software, **training) for length in (512, 1024, 2048)]
        yield f"| {name} | {' | '.join(_span(each.gpu, each.verdict) for each in found)} |"


if __name__ == "__main__":
    page = PAGE.read_text(encoding="utf-8")
    for name, new in tables():
        start = f"<!-- {name} -->\n"
        page = page.replace(f"{start}{block(page, name)}<!-- end -->\n", f"{start}{new}<!-- end -->\n")
    PAGE.write_text(page, encoding="utf-8")
