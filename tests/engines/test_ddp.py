"""DDP beside torch's own, run for real with one process: whose memory the gradients are in."""

from __future__ import annotations

import contextlib
import json
import warnings
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
from tests.oracles.real_run import peak_of

import memplan

CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 128,
    "intermediate_size": 344,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 500,
    "max_position_embeddings": 64,
}
BATCH, LENGTH = 1, 16


@contextlib.contextmanager
def one_process() -> Iterator[None]:
    import torch.distributed as dist

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def backward_peak(directory: Path, micro_batches: int, bucket_view: bool) -> int:
    """The most bytes that the micro-batches of a third step need over the level at its start."""
    import torch
    import transformers
    from torch.nn.parallel import DistributedDataParallel
    from torch.profiler import ProfilerActivity, profile

    values = {name: value for name, value in CONFIG.items() if name not in ("model_type", "architectures")}
    config = transformers.AutoConfig.for_model("llama", **values, use_cache=False)
    tokens = torch.zeros((BATCH, LENGTH), dtype=torch.int64)
    with one_process(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = DistributedDataParallel(
            transformers.AutoModelForCausalLM.from_config(config), gradient_as_bucket_view=bucket_view
        )
        profiler = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
        for step in range(3):
            model.zero_grad()
            if step == 2:
                profiler.start()
            for number in range(micro_batches):
                last = number == micro_batches - 1
                with contextlib.nullcontext() if last else model.no_sync():
                    model(input_ids=tokens.clone(), labels=tokens).loss.backward()
        profiler.stop()
        path = directory / "trace.json"
        profiler.export_chrome_trace(str(path))
    return peak_of(json.loads(path.read_text(encoding="utf-8"))).peak


def estimated(gpu: str, replay: bool, micro_batches: int, bucket_view: bool) -> dict[str, int]:
    training = memplan.TrainingSpec(
        micro_batch_size=BATCH,
        seq_len=LENGTH,
        grad_accum_steps=micro_batches,
        optim="sgd",
        mixed_precision="no",
        dtype="float32",
    )
    ddp: Any = {"gradient_as_bucket_view": bucket_view}
    cluster = memplan.ClusterSpec(gpu=gpu, gpus=2)
    found = memplan.estimate(CONFIG, training, cluster, memplan.Strategy(kind="ddp", ddp=ddp), replay=replay)
    return {phase.name: phase.allocated for phase in found.gpu.phases}


ARCHIVE = Path(__file__).parents[2] / "benchmarks" / "measurements" / "ddp.json"
"""What torch's DDP has of buckets once it is made."""


def estimated_buckets(phase: str = "idle") -> int:
    levels = [
        {each.name: each.allocated for each in memplan.estimate(CONFIG, training, f"{gpus}xA100-80GB").gpu.phases}
        for training in [memplan.TrainingSpec(seq_len=LENGTH, mixed_precision="no")]
        for gpus in (1, 2)
    ]
    return levels[1][phase] - levels[0][phase]


def test_buckets_beside_torch(tmp_path: Path) -> None:
    import transformers
    from torch.nn.parallel import DistributedDataParallel
    from torch.profiler import ProfilerActivity, profile

    values = {name: value for name, value in CONFIG.items() if name not in ("model_type", "architectures")}
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model("llama", **values))
    with one_process(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        wrapped = DistributedDataParallel(model)
    profiler.export_chrome_trace(str(tmp_path / "trace.json"))
    events = json.loads((tmp_path / "trace.json").read_text(encoding="utf-8"))["traceEvents"]
    sizes = [event["args"]["Bytes"] for event in events if event.get("name") == "[memory]"]
    levels = list(accumulate(size for size in sizes if abs(size) >= 4096))  # c10d's threads allocate when they will
    buckets = levels[-1]
    del wrapped
    assert buckets == json.loads(ARCHIVE.read_text(encoding="utf-8"))["buckets"]
    assert estimated_buckets() == pytest.approx(buckets, rel=0.001)
    assert len(levels) > 2  # copies in which the model was sent came and went before
    assert estimated_buckets("load") == pytest.approx(max(levels), rel=0.001)


@pytest.mark.parametrize("micro_batches", [1, 3])
@pytest.mark.parametrize("bucket_view", [False, True])
def test_backward_beside_torch(tmp_path: Path, micro_batches: int, bucket_view: bool) -> None:
    levels = estimated("cpu", False, micro_batches, bucket_view)
    needed = max(levels[phase] for phase in ("forward", "loss", "backward")) - levels["idle"]
    assert needed == pytest.approx(backward_peak(tmp_path, micro_batches, bucket_view), rel=0.01)


@pytest.mark.parametrize("micro_batches", [1, 2, 3])
def test_the_replay_knows_where_the_gradients_are(micro_batches: int) -> None:
    replayed, closed = (estimated("A100-80GB", flag, micro_batches, True) for flag in (True, False))
    # All that the replay adds is what blocks are larger than their tensors.
    assert replayed == pytest.approx(closed, rel=0.02)


def test_without_bucket_views_the_step_has_a_copy_of_its_own() -> None:
    own, view = (estimated("A100-80GB", True, 1, flag)["step"] for flag in (False, True))
    assert own - view == pytest.approx(estimated("A100-80GB", True, 1, True)["load"] / 2, rel=0.05)
