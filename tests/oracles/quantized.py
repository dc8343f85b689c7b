"""bitsandbytes on CPU: what its layers, and a small QLoRA model, really allocate; measured and archived.

    python -m tests.oracles.quantized        measures every case; needs bitsandbytes, peft and transformers

Every allocation and free that torch's profiler reports within a call is kept in order, in bytes (a free is negative).
oneDNN is switched off, since it takes scratch memory that a GPU's kernels do not; attention is eager for the same
reason. The model is trained one step before it is measured, as its layers settle their dtypes in the first call.
Nothing here knows memplan's rules.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

ARCHIVE = Path(__file__).parents[2] / "benchmarks" / "measurements" / "bitsandbytes" / "cpu.json"
SCHEMA = 1

LAYER: dict[str, Any] = {
    "kind": "nf4",
    "n_in": 192,
    "n_out": 320,
    "bias": False,
    "dtype": "bfloat16",
    "compute_dtype": "bfloat16",
    "input_dtype": "bfloat16",
    "autocast": False,
    "shape": [2, 50],
}
"""A layer's case; ``dtype`` is that of the weights before they are quantized."""
LAYERS: list[dict[str, Any]] = [
    {**LAYER, **case}
    for kind in ("nf4", "nf4-dq", "int8")
    for case in (
        {"kind": kind},
        {"kind": kind, "bias": True},
        {"kind": kind, "input_dtype": "float32"},
        {"kind": kind, "input_dtype": "float32", "bias": True, "autocast": True},
        {"kind": kind, "input_dtype": "float32", "compute_dtype": "float32", "dtype": "float32"},
        {"kind": kind, "input_dtype": "float32", "compute_dtype": "float32", "autocast": True},
        {"kind": kind, "n_in": 1024, "n_out": 2816, "shape": [1, 384]},
        {"kind": kind, "n_in": 100, "n_out": 36, "shape": [3, 7]},
    )
]

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 1000,
    "hidden_size": 192,
    "intermediate_size": 320,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
MODEL: dict[str, Any] = {
    "kind": "nf4",
    "dtype": "bfloat16",
    "compute_dtype": "bfloat16",
    "mixed_precision": "no",
    "gradient_checkpointing": False,
    "targets": ["q_proj", "v_proj"],
    "dropout": 0.0,
    "micro_batch_size": 2,
    "seq_len": 48,
}
"""A model's case: loaded, prepared for k-bit training, and given adapters of rank 8."""
MODELS: list[dict[str, Any]] = [
    {**MODEL, **case}
    for kind in ("nf4", "nf4-dq", "int8")
    for case in (
        {"kind": kind},
        {"kind": kind, "gradient_checkpointing": True},
        {"kind": kind, "mixed_precision": "bf16"},
        {"kind": kind, "mixed_precision": "bf16", "gradient_checkpointing": True, "targets": ["all-linear"]},
        {"kind": kind, "mixed_precision": "bf16", "dtype": "float32", "dropout": 0.1},
        {"kind": kind, "mixed_precision": "bf16", "compute_dtype": "float32", "targets": ["all-linear"]},
        {"kind": kind, "mixed_precision": "bf16", "micro_batch_size": 1, "seq_len": 200},
    )
]
RANK = 8


def profiled(call: Callable[[], Any]) -> tuple[list[int], Any]:
    """Run ``call``; return the bytes of its allocations and frees in order, and its result."""
    from torch.profiler import ProfilerActivity, profile

    gc.collect()
    gc.disable()
    try:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            result = call()
    finally:
        gc.enable()
    events = profiler.profiler.kineto_results.events()
    return [event.nbytes() for event in events if event.name() == "[memory]"], result


def measure_layer(case: dict[str, Any]) -> dict[str, Any]:
    """Forward and backward of one layer, with the bytes of every tensor that it keeps."""
    import bitsandbytes as bnb
    import torch

    dtype = getattr(torch, case["dtype"])
    weight = torch.randn(case["n_out"], case["n_in"], dtype=dtype)
    if case["kind"] == "int8":
        layer = bnb.nn.Linear8bitLt(case["n_in"], case["n_out"], case["bias"], has_fp16_weights=False, threshold=6.0)
        layer.weight = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False).to("cpu")
        kept = [layer.weight, layer.weight.SCB]
    else:
        options = {"compress_statistics": case["kind"] == "nf4-dq", "quant_type": "nf4"}
        compute_dtype = getattr(torch, case["compute_dtype"])
        layer = bnb.nn.Linear4bit(case["n_in"], case["n_out"], case["bias"], compute_dtype=compute_dtype, **options)
        layer.weight = bnb.nn.Params4bit(weight, requires_grad=False, module=layer, **options).to("cpu")
        state = layer.weight.quant_state
        kept = [layer.weight, state.absmax, state.code]
        kept += [state.offset, state.state2.absmax, state.state2.code] if state.nested else []
    if case["bias"]:
        layer.bias = torch.nn.Parameter(torch.zeros(case["n_out"], dtype=dtype), requires_grad=False)
    at_rest = [tensor.untyped_storage().nbytes() for tensor in kept]
    x = torch.randn(*case["shape"], case["n_in"], dtype=getattr(torch, case["input_dtype"]), requires_grad=True)

    def forward() -> Any:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=case["autocast"]):
            return layer(x)

    forward().sum().backward()
    x.grad = None
    events, out = profiled(forward)
    gradient = torch.ones_like(out)
    return {"at_rest": at_rest, "forward": events, "backward": profiled(lambda: out.backward(gradient))[0]}


def measure_model(case: dict[str, Any]) -> dict[str, Any]:
    """One step of a QLoRA model, with its footprint as loaded and the bytes of its parameters in training."""
    import peft
    import torch

    model = _load(case)
    footprint = model.get_memory_footprint()
    checkpointing = case["gradient_checkpointing"]
    # The states of the random number generators would be tensors of the host.
    options = {"use_reentrant": False, "preserve_rng_state": False}
    model = peft.prepare_model_for_kbit_training(model, checkpointing, options)
    targets = case["targets"][0] if case["targets"] == ["all-linear"] else case["targets"]
    model = peft.get_peft_model(model, peft.LoraConfig(r=RANK, target_modules=targets, lora_dropout=case["dropout"]))
    if checkpointing:
        model.enable_input_require_grads()
    model.config.use_cache = False
    model.train()
    ids = torch.randint(0, CONFIG["vocab_size"], (case["micro_batch_size"], case["seq_len"]))
    autocast = case["mixed_precision"] == "bf16"

    def forward() -> Any:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            outputs = model(input_ids=ids, labels=ids)
        if autocast:
            outputs["logits"].float()  # accelerate's ConvertOutputsToFp32
        return outputs["loss"]

    forward().backward()
    model.zero_grad(set_to_none=True)
    forward_events, loss = profiled(forward)
    backward_events, _ = profiled(loss.backward)  # loss is alive in it, as in Trainer.training_step
    return {
        "footprint": footprint,
        "parameters": sorted(p.nbytes for p in model.parameters()),
        "forward": forward_events,
        "backward": backward_events,
    }


def _load(case: dict[str, Any]) -> Any:
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

    if case["kind"] == "int8":
        quantization = BitsAndBytesConfig(load_in_8bit=True)
    else:
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=case["kind"] == "nf4-dq",
            bnb_4bit_compute_dtype=getattr(torch, case["compute_dtype"]),
        )
    dtype = getattr(torch, case["dtype"])
    config = LlamaConfig(**{name: value for name, value in CONFIG.items() if name != "model_type"})
    with tempfile.TemporaryDirectory() as folder:
        LlamaForCausalLM(config).to(dtype).save_pretrained(folder)
        return AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=quantization, dtype=dtype, device_map={"": "cpu"}, attn_implementation="eager"
        )


def measure() -> dict[str, Any]:
    """Measure every case."""
    import torch

    torch.manual_seed(0)
    torch.set_num_threads(1)
    torch.backends.mkldnn.enabled = False
    packages = ("torch", "transformers", "peft", "bitsandbytes")
    return {
        "schema": SCHEMA,
        "versions": {name: metadata.version(name) for name in packages},
        "config": CONFIG,
        "rank": RANK,
        "layers": [{"case": case, "measured": measure_layer(case)} for case in LAYERS],
        "models": [{"case": case, "measured": measure_model(case)} for case in MODELS],
    }


def write(archive: dict[str, Any], path: Path) -> None:
    """Write the archive with a case per line, so that a diff shows what changed."""
    head = {name: value for name, value in archive.items() if name not in ("layers", "models")}
    parts = [json.dumps(head)[:-1]]
    for name in ("layers", "models"):
        rows = ",\n".join(json.dumps(row, separators=(",", ":")) for row in archive[name])
        parts.append(f'"{name}": [\n{rows}\n]')
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(", ".join(parts) + "}\n", encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, and write the archive."""
    description = (__doc__ or "").split("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m tests.oracles.quantized", description=description)
    parser.add_argument("--out", type=Path, default=ARCHIVE, help="the archive")
    archive = measure()
    write(archive, parser.parse_args(arguments).out)
    sys.stdout.write(f"{len(archive['layers'])} layers, {len(archive['models'])} models\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
