"""A rehearsal of train.py, which `bash launch.sh --smoke` runs: 3 steps of a tiny model, under the engine of the plan.

The model has 2 small layers with random weights, and learns random tokens: neither hub nor tokenizer is asked. On CPU,
where there is no GPU, what has no CPU code is replaced, and said. All else is as in the run. What ran is written to
smoke.json.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import train
import transformers


def main() -> None:
    """Run it; raise if a loss is not finite."""
    values = json.loads(Path("training_args.json").read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as folder:
        # Before there is a process group, in which rank 0 alone would save.
        attention = save_tiny_model(values, folder)
        replaced = [] if torch.cuda.is_available() else run_on_cpu(values, attention)
        values |= {"model_name_or_path": folder, "vocab_size": None, "dataset": None, "output_dir": f"{folder}/output"}
        values |= {"max_steps": 3, "logging_steps": 1, "save_strategy": "no", "report_to": [], "disable_tqdm": True}
        if values.get("eval_strategy", "no") != "no":
            values |= {"eval_strategy": "steps", "eval_steps": 3}
        trainer = train.main(values)
        if trainer.args.use_cpu and facts(trainer).get("fsdp_version") == 1:
            replaced.append("FSDP1 cannot gather the model on CPU, so it is not saved")
        else:
            trainer.save_model()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    if trainer.is_world_process_zero():
        report = {**facts(trainer), "losses": losses, "replaced": replaced}
        Path("smoke.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        print(json.dumps(report, indent=2))
    if len(losses) != 3 or not all(map(math.isfinite, losses)):
        raise SystemExit(f"losses {losses}: three finite ones were expected")
    if torch.distributed.is_initialized():
        torch.distributed.barrier()  # nobody leaves while another rank is still at work


def save_tiny_model(values: dict[str, Any], folder: str) -> str:
    """Write what from_pretrained will load in the model's place: each rank its own, with the same weights.

    Return the attention that the family has by itself: sdpa, or where it has none eager.
    """
    config = transformers.AutoConfig.for_model(**json.loads(Path("smoke_config.json").read_text(encoding="utf-8")))
    transformers.set_seed(0)
    model = getattr(transformers, values["model_class"]).from_config(config)
    model.save_pretrained(folder)
    return str(model.config._attn_implementation)


def run_on_cpu(values: dict[str, Any], attention: str) -> list[str]:
    """Replace what needs a GPU; return what was replaced."""
    values["use_cpu"] = True
    replaced: list[str] = []
    changes = [("attn_implementation", "flash_attention_2", attention), ("use_liger_kernel", True, False)]
    if values.get("fp16"):
        changes += [("fp16", True, False), ("bf16", False, True), ("dtype", "float16", "bfloat16")]
        os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16"
    for name, on_gpu, on_cpu in changes:
        if values.get(name) == on_gpu:
            replaced.append(f"{name}: {json.dumps(on_gpu)} -> {json.dumps(on_cpu)}")
            values[name] = on_cpu
    if "deepspeed" in values:
        import deepspeed

        # DeepSpeed would compile collectives of its own for CPU, which takes minutes.
        importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None
        deepspeed.init_distributed("gloo")  # which TrainingArguments do on a GPU
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        from accelerate import DistributedType, PartialState

        # accelerate takes CPU ranks for plain data parallelism, and would ignore FSDP.
        os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
        torch.distributed.init_process_group("gloo")
        # There is no device to pin memory for, nor a stream of its work, which CPU offload asks for.
        torch.Tensor.pin_memory = lambda self, *_, **__: self
        torch.cpu.Stream.synchronize = lambda _: None
        PartialState._prepare_backend = lambda *_, **__: ("gloo", DistributedType.MULTI_GPU)
    return replaced


def facts(trainer: transformers.Trainer) -> dict[str, Any]:
    """What ran: the engine, and the optimizer with what wraps it, outermost first."""
    engine = trainer.model_wrapped
    optimizers, wrapper = [], trainer.optimizer
    while wrapper is not None and wrapper not in optimizers:
        optimizers.append(wrapper)
        wrapper = getattr(wrapper, "optimizer", None)
    found: dict[str, Any] = {
        "engine": type(engine).__name__,
        "ranks": trainer.args.world_size,
        "device": str(trainer.args.device),
        "optimizer": [type(each).__name__ for each in optimizers],
        "trainable": sorted({str(p.dtype) for p in engine.parameters() if p.requires_grad}),
    }
    if trainer.is_deepspeed_enabled:
        zero = engine._config.zero_config
        found["stage"] = engine.zero_optimization_stage()
        for name in ("offload_optimizer", "offload_param"):
            found[name] = str(getattr(getattr(zero, name), "device", "none")).rpartition(".")[2]
    if trainer.is_fsdp_enabled:
        plugin = trainer.accelerator.state.fsdp_plugin
        offloads = getattr(
            plugin.cpu_offload, "offload_params", type(plugin.cpu_offload).__name__ == "CPUOffloadPolicy"
        )
        found |= {"fsdp_version": plugin.fsdp_version, "offload_param": "cpu" if offloads else "none"}
    return found


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    sys.stderr.flush()
    # gloo's threads outlive their group: one that frees a tensor after the interpreter aborts the rank, and one that
    # frees it while the group is destroyed waits for ever.
    os._exit(0)
