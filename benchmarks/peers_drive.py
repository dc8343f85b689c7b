"""Ask fitcheck-llm, ftuneai and llm-analysis. Runs in the environment of ``make bench-peers``, without memplan.

Reads questions as JSON from standard input, and writes what each tool says of each: GiB, or why it refuses. A tool is
handed what it has a word for, and is asked for the number that its own documents compare with the metric.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

MIB, GIB = 2**20, 2**30
Question = dict[str, Any]


class NoWordError(Exception):
    """The tool cannot be asked that."""


def fitcheck(q: Question) -> float:
    """Tensors where allocated is asked for, else the process; its own checks of the model apply."""
    from fitcheck import config_parser, estimator
    from fitcheck.gpu_db import GPU_DB, GpuSpec

    _one_gpu(q)
    raw = q["config"]
    config_parser._reject_unsupported(raw, q["model"])
    fields = config_parser._parse_fields(raw)
    count = config_parser._reconcile_param_count(q["model"], q["parameters"], config_parser._count_params(fields))
    names = ("hidden_size", "num_layers", "num_attention_heads", "num_kv_heads", "intermediate_size", "vocab_size")
    model = config_parser.ModelConfig(
        name=q["model"],
        num_params=count,
        head_dim=fields.head_dim,
        tie_word_embeddings=fields.tie_word_embeddings,
        **{name: getattr(fields, name) for name in names},
    )
    known = {"A100-80GB": "a100-80", "A100-40GB": "a100-40", "L40S": "l40s", "V100-16GB": "v100-16"}
    size = q["gpu_memory"] // MIB
    gpu = GPU_DB.get(known.get(q["gpu"], ""), GpuSpec(q["gpu"], size, int(0.95 * size)))
    quantized = {"quantization": (q["quantization"] or "none").removesuffix("-dq")}
    quantized["double_quant"] = (q["quantization"] or "").endswith("-dq")
    precision = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
    if q["task"] == "generate":
        serving = estimator.ServingConfig(
            precision=precision[q["dtype"]], seq_len=q["seq_len"] + q["new"], num_concurrent=q["batch"], **quantized
        )
        found = estimator.estimate_inference(model, serving, gpu)
        return (found.total_mib - (found.overhead_mib if q["metric"] == "allocated" else 0)) / 1024
    optimizers = {"adamw_torch": "adamw", "adamw_torch_fused": "adamw", "adamw_bnb_8bit": "adam8bit", "sgd": "sgd"}
    targets = list(q["lora_targets"]) or ["q_proj", "v_proj"]
    training = estimator.TrainingConfig(
        precision={"bf16": "bf16", "fp16": "fp16"}.get(q["mixed_precision"], precision[q["dtype"]]),
        optimizer=_word(optimizers, q["optim"], "optimizer"),
        optimizer_dtype="bf16" if q["dtype"] == "bfloat16" and not q["lora_rank"] else "fp32",
        batch_size=q["batch"],
        seq_len=q["seq_len"],
        lora_rank=q["lora_rank"],
        lora_targets=targets,
        grad_checkpoint=q["checkpointing"],
        flash_attn=q["attn"] != "eager",
        grad_accum_steps=q["accumulation"],
        **quantized,
    )
    report = estimator.estimate(model, training, gpu)
    return (report.total_mib - (report.overhead_mib if q["metric"] == "allocated" else 0)) / 1024


def ftune(q: Question) -> float:
    """Its total; without the overhead that it adds for CUDA and the allocator where allocated is asked for."""
    from ftuneai.core.memory import MemoryEstimator
    from ftuneai.core.models import (
        FineTuneMethod,
        LoRATarget,
        ModelSpec,
        OptimizerType,
        Quantization,
        ShardingStrategy,
        TrainingConfig,
    )  # fmt: skip

    if q["task"] != "train":
        raise NoWordError("generation")
    if q["offload"]:
        raise NoWordError("offloading")
    raw = q["config"]
    spec = ModelSpec(
        name=q["model"],
        parameters=q["parameters"],
        hidden_size=raw["hidden_size"],
        num_layers=raw["num_hidden_layers"],
        num_attention_heads=raw["num_attention_heads"],
        num_kv_heads=raw.get("num_key_value_heads") or raw["num_attention_heads"],
        intermediate_size=raw["intermediate_size"],
        vocab_size=raw["vocab_size"],
        max_seq_length=max(q["seq_len"], raw.get("max_position_embeddings") or 0),
        default_dtype=q["dtype"],
    )
    targets = set(q["lora_targets"])
    target = "all_linear" if targets & {"gate_proj", "up_proj", "all-linear"} else "attention"
    target = "attention_all" if target == "attention" and targets & {"k_proj", "o_proj", "c_attn"} else target
    optimizers = {"adamw_torch": "adamw", "adamw_torch_fused": "adamw", "adamw_bnb_8bit": "adam_8bit", "sgd": "sgd"}
    strategies = {"single": "none", "ddp": "none", "fsdp": "fsdp"} | {f"zero{n}": f"zero_{n}" for n in (1, 2, 3)}
    quantization = {None: "none", "int8": "8bit", "nf4": "4bit", "nf4-dq": "4bit"}[q["quantization"]]
    config = TrainingConfig(
        model=q["model"],
        method=FineTuneMethod(("qlora" if q["quantization"] else "lora") if q["lora_rank"] else "full"),
        quantization=Quantization(quantization),
        batch_size=q["batch"],
        seq_length=q["seq_len"],
        gradient_checkpointing=q["checkpointing"],
        optimizer=OptimizerType(_word(optimizers | {"adafactor": "adafactor"}, q["optim"], "optimizer")),
        lora_rank=q["lora_rank"] or 16,
        lora_target=LoRATarget(target),
        flash_attention=q["attn"] != "eager",
        sharding=ShardingStrategy(_word(strategies, q["strategy"], "strategy")),
        num_gpus=q["gpus"],
    )
    found = MemoryEstimator(spec, config).estimate()
    return float(found.total_gb - (found.overhead_gb if q["metric"] == "allocated" else 0))


def llm_analysis(q: Question) -> float:
    """Weights, gradients, optimizer states and activations, "a lower bound": 16-bit weights and Adam, no adapters."""
    from llm_analysis.analysis import ActivationRecomputation, DSZeRO, LLMAnalysis
    from llm_analysis.config import (
        ModelConfig,
        ParallelismConfig,
        get_dtype_config_by_name,
        get_gpu_config_by_name,
    )  # fmt: skip

    if q["lora_rank"] or q["quantization"] or q["offload"]:
        raise NoWordError("adapters, quantization or offloading")
    if q["dtype"] == "float32":
        raise NoWordError("weights in float32")
    if not q["optim"].startswith("adamw_torch"):
        raise NoWordError("another optimizer than Adam")
    raw = q["config"]
    model = ModelConfig(
        name=q["model"],
        num_layers=raw["num_hidden_layers"],
        n_head=raw["num_attention_heads"],
        hidden_dim=raw["hidden_size"],
        vocab_size=raw["vocab_size"],
        max_seq_len=raw.get("max_position_embeddings"),
        num_key_value_heads=raw.get("num_key_value_heads"),
        ffn_embed_dim=raw["intermediate_size"],
        expansion_ratio=raw["intermediate_size"] / raw["hidden_size"],
        model_type=raw["model_type"],
    )
    gpus = {"A100-80GB": "a100-sxm-80gb", "A100-40GB": "a100-sxm-40gb", "H100-80GB": "h100-sxm-80gb"}
    analysis = LLMAnalysis(
        model,
        get_gpu_config_by_name(gpus.get(q["gpu"], "a100-sxm-80gb")),
        get_dtype_config_by_name("w16a16e16"),
        ParallelismConfig(dp_size=q["gpus"]),
        flops_efficiency=0.5,
    )
    stages = {"single": 0, "ddp": 0, "zero1": 1, "zero2": 2, "zero3": 3, "fsdp": 3}
    if q["task"] == "generate":
        found = analysis.inference(batch_size_per_gpu=q["batch"], seq_len=q["seq_len"], num_tokens_to_generate=q["new"])
        return float(found["weight_memory_per_gpu"] + found["kv_cache_memory_per_gpu"]) / GIB
    found = analysis.training(
        batch_size_per_gpu=q["batch"],
        gradient_accumulation_steps=q["accumulation"],
        seq_len=q["seq_len"],
        total_num_tokens=10**9,
        activation_recomputation=ActivationRecomputation.FULL if q["checkpointing"] else ActivationRecomputation.NONE,
        ds_zero=DSZeRO(stages[q["strategy"]]),
        layernorm_dtype_bytes=2,
        master_weights_dtype_bytes=0 if q["mixed_precision"] == "no" else 4,
        other_op_bytes=4 if q["mixed_precision"] == "no" else None,
        flash_attn=q["attn"] != "eager",
        mlp_gated_linear_units=raw["gated"],
    )
    return float(found["(weight+op_state+grad+act)_memory_per_gpu"]) / GIB


def _one_gpu(q: Question) -> None:
    if q["gpus"] > 1 or q["strategy"] != "single":
        raise NoWordError("several GPUs")


def _word(words: dict[str, str], ours: str, what: str) -> str:
    if ours not in words:
        raise NoWordError(f"{what} {ours}")
    return words[ours]


TOOLS: dict[str, tuple[str, Callable[[Question], float]]] = {
    "fitcheck-llm": ("fitcheck-llm", fitcheck),
    "ftuneai": ("ftuneai", ftune),
    "llm-analysis": ("llm-analysis", llm_analysis),
}


def main() -> None:
    """Answer all questions."""
    questions = json.load(sys.stdin)
    said: dict[str, Any] = {}
    for name, (package, ask) in TOOLS.items():
        answers: dict[str, Any] = {}
        for question in questions:
            try:
                with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                    answers[question["id"]] = ask(question)
            except Exception as error:  # a tool's refusals are of many types
                answers[question["id"]] = f"{type(error).__name__}: {error}"
        said[name] = {"version": version(package), "answers": answers}
    json.dump(said, sys.stdout)


if __name__ == "__main__":
    main()
