"""Other estimators on the published rows that memplan estimates: ``make bench-peers``.

``python benchmarks/peers.py --python PYTHON [--out FILE]``: PYTHON has fitcheck-llm, ftuneai and llm-analysis
(peers_drive.py); accelerate's and DeepSpeed's own functions run here, with the ``train`` extra. The result is archived
as JSON. docs/accuracy.md has their errors beside memplan's of the day on the rows that each of them takes; no test
needs the tools.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from itertools import product
from pathlib import Path
from statistics import mean, median
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "published"))

import score  # noqa: E402

OUT = HERE / "measurements" / "peers.json"
DRIVEN = {
    "fitcheck-llm": "TrainingConfig or ServingConfig of one GPU, the parameters' exact count as the hub would give it; "
    "its tensors beside allocated, its total beside the process.",
    "ftuneai": "MemoryEstimator with the model's own sizes; its total, less its overhead where allocated is asked for.",
    "llm-analysis": "weights, gradients, optimizer states and activations, dtype w16a16e16; layer norms in 16 bit, "
    "master weights only with mixed precision, gated MLPs as the model has them.",
    "accelerate": "estimate-memory's functions on the model of the config, on the meta device: its largest of "
    "training with Adam, or the weights alone for generation.",
    "deepspeed": "estimate_zero2/3_model_states_mem_needs with the model's exact counts: model states only.",
}
SYNONYMS = {
    "hidden_size": ("n_embd", "d_model"),
    "num_hidden_layers": ("n_layer", "num_layers"),
    "num_attention_heads": ("n_head", "num_heads"),
    "intermediate_size": ("n_inner", "d_ff", "ffn_dim"),
    "max_position_embeddings": ("n_positions",),
}
GATED = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "phi3", "mixtral")


def thawed(value: Any) -> Any:
    """A spec's values as JSON has them."""
    if isinstance(value, Mapping):
        return {name: thawed(each) for name, each in value.items()}
    return [thawed(each) for each in value] if isinstance(value, (list, tuple)) else value


def question(row: Any) -> dict[str, Any]:
    """A row's setup in plain words."""
    setup = row.setup
    training, config = setup.training, thawed(setup.model.config)
    for name, others in SYNONYMS.items():
        config.setdefault(name, next((config[other] for other in others if config.get(other)), None))
    config["intermediate_size"] = config["intermediate_size"] or 4 * config["hidden_size"]
    if config.get("multi_query"):
        config.setdefault("num_key_value_heads", 1)
    config = {name: value for name, value in config.items() if value is not None}
    strategy = setup.strategy
    return {
        "id": row.id,
        "metric": row.metric.partition(",")[0],
        "model": setup.model.id,
        "config": config | {"gated": config["model_type"] in GATED},
        "parameters": row.found.model.parameters,
        "gpu": setup.cluster.gpu.name,
        "gpu_memory": row.found.gpu.capacity,
        "gpus": setup.cluster.gpus,
        "task": training.task,
        "dtype": training.dtype,
        "mixed_precision": training.mixed_precision,
        "quantization": training.quantization.kind if training.quantization else None,
        "optim": training.optim,
        "batch": training.micro_batch_size,
        "seq_len": training.seq_len,
        "new": training.max_new_tokens or 0,
        "accumulation": training.grad_accum_steps,
        "checkpointing": training.gradient_checkpointing,
        "attn": training.attn,
        "lora_rank": training.lora.rank if training.lora else None,
        "lora_targets": list(training.lora.targets) if training.lora else [],
        "strategy": strategy.kind,
        "offload": (strategy.offload_optimizer, strategy.offload_param) != ("none", "none"),
    }


def model_of(q: dict[str, Any]) -> Any:
    """transformers' model, without memory."""
    import torch
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    values = {name: value for name, value in q["config"].items() if name not in ("model_type", "gated", "auto_map")}
    config = AutoConfig.for_model(q["config"]["model_type"], **values)
    with torch.device("meta"):
        kind = AutoModelForCausalLM if "CausalLM" in str(values.get("architectures")) else AutoModel
        return kind.from_config(config)


def accelerate(q: dict[str, Any]) -> float:
    """``accelerate estimate-memory``: the weights in the run's type, or the largest of its training with Adam."""
    from accelerate.commands.estimate import estimate_training_usage
    from accelerate.utils import calculate_maximum_sizes

    if q["task"] == "train" and (q["lora_rank"] or q["quantization"] or q["gpus"] > 1):
        raise ValueError("it has no adapters, no quantized training and one GPU")
    total, _ = calculate_maximum_sizes(model_of(q))  # in float32, as create_empty_model makes it
    dtype = {"no": q["dtype"], "bf16": "bfloat16", "fp16": "float16"}[q["mixed_precision"]]
    if q["task"] == "generate":
        share = {"int8": 1 / 4, "nf4": 1 / 8, "nf4-dq": 1 / 8, None: 1 if dtype == "float32" else 1 / 2}
        return float(total) * share[q["quantization"]] / 2**30
    return float(max(estimate_training_usage(total, dtype).values())) / 2**30


def deepspeed(q: dict[str, Any]) -> float:
    """The estimators of ZeRO 2 and 3, for a model that is there."""
    from deepspeed.runtime.zero import stage3, stage_1_and_2

    if q["strategy"] not in ("zero2", "zero3"):
        raise ValueError("it is ZeRO 2's or 3's")
    per_node = min(q["gpus"], 8)
    nodes = q["gpus"] // per_node
    if q["strategy"] == "zero2":
        found = stage_1_and_2.estimate_zero2_model_states_mem_needs(
            q["parameters"], num_gpus_per_node=per_node, num_nodes=nodes, cpu_offload=q["offload"],
            additional_buffer_factor=1.5,
        )  # fmt: skip
        return float(found[1]) / 2**30
    total, largest = stage3.model_to_params(model_of(q))
    found = stage3.estimate_zero3_model_states_mem_needs(
        total, largest, num_gpus_per_node=per_node, num_nodes=nodes, cpu_offload=q["offload"], cpu_offload_params=False,
        zero_init=True, additional_buffer_factor=1.5,
    )  # fmt: skip
    return float(found[1]) / 2**30


def asked(questions: Sequence[dict[str, Any]], ask: Callable[[dict[str, Any]], float]) -> dict[str, Any]:
    """What a tool in this process says of each."""
    answers: dict[str, Any] = {}
    for q in questions:
        try:
            answers[q["id"]] = ask(q)
        except Exception as error:  # a tool's refusals are of many types
            answers[q["id"]] = f"{type(error).__name__}: {error}"
    return answers


def summarized(rows: Sequence[Any], answers: dict[str, Any]) -> dict[str, Any]:
    """By metric and task: the tool's errors, and memplan's on the rows that it takes."""
    found: dict[str, Any] = {}
    kinds = {"train": "training", "generate": "generation"}
    for metric, task in product(score.BYTES, kinds):
        pairs = [
            (answers[row.id] / row.measured, row)
            for row in rows
            if (row.metric, row.setup.training.task) == (metric, task) and isinstance(answers.get(row.id), float)
        ]
        if pairs:
            pairs.sort(key=lambda pair: pair[0])
            ends = [{"id": row.id, "ratio": round(ratio, 4)} for ratio, row in (pairs[0], pairs[-1])]
            found[f"{metric}, {kinds[task]}"] = {
                "n": len(pairs),
                **errors([ratio for ratio, _ in pairs]),
                "worst_under": ends[0],
                "worst_over": ends[1],
                "memplan": errors([row.ratio for _, row in pairs]),
            }
    return found


def errors(ratios: Sequence[float]) -> dict[str, float]:
    """Of sizes of errors."""
    sizes = sorted(abs(ratio - 1) for ratio in ratios)
    p95 = sizes[-(-95 * len(sizes) // 100) - 1]
    return {"median_error": round(median(sizes), 5), "mean_error": round(mean(sizes), 5), "p95_error": round(p95, 5)}


def main(arguments: Sequence[str] | None = None) -> None:
    """Ask all tools and archive what they say."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--python", required=True, help="the environment of the tools of peers_drive.py")
    parser.add_argument("--out", type=Path, default=OUT)
    given = parser.parse_args(arguments)
    os.environ["HF_HUB_OFFLINE"] = "1"
    rows = [row for row in map(score.compare, score.read()) if row.ratio is not None]
    questions = [question(row) for row in rows]
    command = [given.python, str(HERE / "peers_drive.py")]
    ran = subprocess.run(command, input=json.dumps(questions), stdout=subprocess.PIPE, text=True, check=True)
    said = json.loads(ran.stdout)
    for name, ask in (("accelerate", accelerate), ("deepspeed", deepspeed)):
        said[name] = {"version": version(name), "answers": asked(questions, ask)}
    tools = [
        {
            "name": name,
            "version": each["version"],
            "driven": DRIVEN[name],
            "answers": {id: round(x, 3) if isinstance(x, float) else x[:160] for id, x in each["answers"].items()},
        }
        for name, each in said.items()
    ]
    found = {"schema_version": 1, "rows": "benchmarks/published/memory.csv", "tools": tools}
    given.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    for tool in tools:
        for metric, each in summarized(rows, tool["answers"]).items():
            sys.stdout.write(
                f"{tool['name']:14} {metric:32} {each['n']:3} median {each['median_error']:.1%}, "
                f"memplan's {each['memplan']['median_error']:.1%}\n"
            )


if __name__ == "__main__":
    main()
