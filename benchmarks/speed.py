"""How long an estimate takes, beside accelerate, DeepSpeed's estimator and a FakeTensor trace: ``make bench``.

Prints one table; writes nothing. Tools that are not installed are left out of it by name.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from itertools import count

from memplan.catalog.gpus import find_gpu
from memplan.catalog.hub import resolve_config
from memplan.estimator import estimate
from memplan.micro_batch import recordings
from memplan.specs.hardware import ClusterSpec
from memplan.specs.model import ModelSpec
from memplan.specs.software import SoftwareSpec
from memplan.specs.strategy import Strategy
from memplan.specs.training import TrainingSpec

MODEL = "meta-llama/Llama-2-7b"
BASELINE = "import pydantic.main, typer, rich.table"


def milliseconds(function: Callable[[], object], repeats: int) -> float:
    """Median wall time of one call."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e3


def process(*arguments: str, repeats: int = 7) -> tuple[float, int]:
    """Median wall time in milliseconds of a fresh process, and its peak resident bytes."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}

    def run() -> None:
        subprocess.run([sys.executable, *arguments], check=False, stdout=subprocess.DEVNULL, env=environment)

    run()
    median = milliseconds(run, repeats)
    code = (
        "import resource, subprocess, sys; subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL);"
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    )
    peak = subprocess.run(
        [sys.executable, "-c", code, sys.executable, *arguments], capture_output=True, text=True, env=environment
    )
    return median, int(peak.stdout.split()[-1]) * 1024


PLAIN = Strategy()
ENGINES = {
    "zero1": Strategy(kind="zero1"),
    "zero2": Strategy(kind="zero2"),
    "zero2, optimizer offloaded": Strategy(kind="zero2", offload_optimizer="cpu"),
    "zero3": Strategy(kind="zero3"),
    "zero3, all offloaded": Strategy(kind="zero3", offload_optimizer="cpu", offload_param="cpu"),
    "zero3, optimizer on NVMe": Strategy(kind="zero3", offload_optimizer="nvme", offload_param="cpu"),
    "fsdp": Strategy(kind="fsdp"),
}


def in_process(
    model: ModelSpec, *, replay: bool, repeats: int, first: bool = False, strategy: Strategy = PLAIN
) -> float:
    """Median milliseconds of an estimate; every call has another sequence length. What was recorded at some is used for
    others, as in a search, unless each is to be as the ``first`` of its setup.
    """
    cluster = ClusterSpec(gpu=find_gpu("A100-80GB"), gpus=4 if strategy.shards else 1, nvme="1TB")
    lengths = count(1024, 8)

    def run() -> None:
        if first:
            recordings.cache_clear()
        training = TrainingSpec(seq_len=next(lengths))
        estimate(model, training, cluster, strategy, SoftwareSpec(), replay=replay)

    for _ in range(5):
        run()
    return milliseconds(run, repeats)


TWO = "dict(gpu='RTX4090', gpus=2, host_memory='256GiB')"
SIDES = "dict(global_batch_size=1024, allow=('liger', 'flash_attention_2', 'adamw_8bit'))"
SEARCHES: dict[str, tuple[str, str]] = {
    "memplan plan, 2 x RTX4090, one sequence a rank": (TWO, "dict()"),
    "  16 sequences": (TWO, "dict(global_batch_size=16)"),
    "  1,024 sequences, liger, flash_attention_2, adamw_8bit": ("dict(gpu='RTX4090', gpus=2)", SIDES),
    "  the same on 8 x A100-80GB, where nearly everything fits": ("dict(gpu='A100-80GB', gpus=8)", SIDES),
    "  and with 1 TiB on the host": ("dict(gpu='A100-80GB', gpus=8, host_memory='1TiB')", SIDES),
}
"""A row, the cluster, and the plan's options."""


def search(cluster: str, options: str) -> str:
    """Median of three fresh processes that have imported all and planned something else; alone, and as the CLI does.

    Of the process alone its CPU time too, which other work on the machine lengthens less.
    """
    code = f"""
import json, resource, sys, time
import memplan
memplan.plan("gpt2", {{"seq_len": 64}}, "1xT4", advise=False)
start, cpu = time.perf_counter(), time.process_time()
found = memplan.plan({MODEL!r}, {{"seq_len": 2048}}, {cluster}, advise=False, processes=int(sys.argv[1]), **{options})
seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
counts = [found.searched.setups, found.searched.estimated, found.searched.replayed]
print(json.dumps([seconds, cpu, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, counts]))
"""
    shown = []
    processes = min(len(os.sched_getaffinity(0)), 4) if hasattr(os, "sched_getaffinity") else 1
    for number in dict.fromkeys((1, processes)):
        runs = [
            json.loads(
                subprocess.run([sys.executable, "-c", code, str(number)], capture_output=True, check=True).stdout
            )
            for _ in range(3)
        ]
        shown.append(f"{statistics.median(seconds for seconds, *_ in runs) * 1e3:.0f} ms")
        if number == 1:
            shown[0] += f" ({min(cpu for _, cpu, *_ in runs) * 1e3:.0f} ms of CPU at the least)"
    _, _, peak, (setups, estimated, replayed) = runs[0]
    counts = f"{setups:,} setups, {estimated} estimated, {replayed} replayed"
    together = f", {shown[1]} by {processes} processes" if len(shown) > 1 else ""
    return f"{shown[0]}{together}; {counts}; {peak // 1024} MB"


def accelerate_meta(model: ModelSpec) -> float:
    """accelerate's way: the model on the meta device, then the size of its layers."""
    import torch
    from accelerate.utils import calculate_maximum_sizes
    from transformers import AutoConfig, AutoModelForCausalLM

    values = {key: value for key, value in model.config.items() if key not in ("model_type", "architectures")}
    config = AutoConfig.for_model(model.model_type, **values)

    def run() -> None:
        with torch.device("meta"):
            calculate_maximum_sizes(AutoModelForCausalLM.from_config(config))

    return milliseconds(run, 3)


def deepspeed_formula() -> float:
    """DeepSpeed's ``*_cold`` formula, from a parameter count."""
    from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs

    def run() -> None:
        estimate_zero3_model_states_mem_needs(6_738_415_616, 131_072_000, 2, 1, True, True, True, 1.5)

    return milliseconds(run, 1000)


def trace(model: ModelSpec) -> float:
    """The O1 oracle: the real model under FakeTensor."""
    from memplan.introspect.trace import trace_step

    config = {key: list(value) if isinstance(value, tuple) else value for key, value in model.config.items()}
    return milliseconds(lambda: trace_step(config, mixed_precision="bf16", seq_len=2048), 1)


def main() -> None:
    model = resolve_config(MODEL)
    rows: list[tuple[str, str]] = []
    rows.append(("memplan, in process, without replay", f"{in_process(model, replay=False, repeats=200):.2f} ms"))
    alone = in_process(model, replay=False, repeats=200, first=True)
    rows.append(("  the first of its setup", f"{alone:.2f} ms"))
    rows += [
        (f"  {name}, on 4 GPUs", f"{in_process(model, replay=False, repeats=20, strategy=each):.1f} ms")
        for name, each in ENGINES.items()
    ]
    alone = in_process(model, replay=False, repeats=5, strategy=ENGINES["zero3"], first=True)
    rows.append(("  zero3, the first of its setup", f"{alone:.1f} ms"))
    rows.append(("memplan, in process, with replay", f"{in_process(model, replay=True, repeats=20):.1f} ms"))
    rows += [
        (f"  {name}, on 4 GPUs", f"{in_process(model, replay=True, repeats=5, strategy=each):.1f} ms")
        for name, each in ENGINES.items()
    ]
    rows += [(name, search(*case)) for name, case in SEARCHES.items()]
    base, base_bytes = process("-c", BASELINE)
    cold, cold_bytes = process("-m", "memplan", "estimate", MODEL, "--json")
    rows.append((f'python -c "{BASELINE}"', f"{base:.0f} ms, {base_bytes / 1e6:.0f} MB"))
    rows.append(("memplan estimate --json, cold", f"{cold:.0f} ms, {cold_bytes / 1e6:.0f} MB"))
    rows.append(("  allowed: 1.5 x the line above + 80 ms", f"{1.5 * base + 80:.0f} ms, 100 MB"))
    for name, module, run in (
        ("accelerate, model on meta", "accelerate", lambda: accelerate_meta(model)),
        ("DeepSpeed's ZeRO-3 formula", "deepspeed", deepspeed_formula),
        ("FakeTensor trace (O1), 32 layers", "torch", lambda: trace(model)),
    ):
        rows.append((name, f"{run():.3g} ms" if find_spec(module) else f"{module} is not installed"))
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        sys.stdout.write(f"{name:<{width}}  {value}\n")
    sys.stdout.write(json.dumps({"own_peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024}) + "\n")


if __name__ == "__main__":
    main()
