"""Whatever values a config holds, it is read or refused in one message: nothing else is ever raised."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import pytest

from memplan.configs.accelerate import parse_accelerate
from memplan.configs.deepspeed import parse_deepspeed
from memplan.configs.keys import ACCELERATE, DEEPSPEED, RENAMED
from memplan.configs.setup import with_cluster, with_training
from memplan.errors import MemplanError
from memplan.specs.hardware import ClusterSpec
from memplan.specs.training import TrainingSpec

VALUES = [
    None, True, False, 0, 1, 2, 3, -1, 1.5, 5e8, 1e30, float("nan"), float("inf"), 10**400, 2**63, 10**12, object(),
    "auto", "cpu", "nvme", "none", "", "x", "AdamW", "fp32", "3", "true", "\ud800", "NO", "FSDP", "DEEPSPEED",
    "FULL_SHARD", b"x", [], [1], {}, {"a": 1}, {1: 2}, {"enabled": True}, {"stage": 3},
]  # fmt: skip


def a_deepspeed_section(rng: random.Random, path: str = "") -> dict[Any, Any]:
    found: dict[Any, Any] = {}
    for _ in range(rng.randint(0, 5)):
        key = rng.choice([*DEEPSPEED[path], *RENAMED, "bogus", 5, None])
        below = f"{path}.{key}".removeprefix(".")
        found[key] = (
            a_deepspeed_section(rng, below) if below in DEEPSPEED and rng.random() < 0.8 else rng.choice(VALUES)
        )
    return found


def an_accelerate_config(rng: random.Random) -> dict[Any, Any]:
    found: dict[Any, Any] = {"num_processes": rng.choice([2, 4, rng.choice(VALUES)])}
    for key in rng.choices([*ACCELERATE[""], "bogus"], k=rng.randint(0, 4)):
        below: Mapping[str, Any] = ACCELERATE.get(key, {})
        found[key] = {name: rng.choice(VALUES) for name in rng.choices([*below, "bogus"], k=2)}
        if not below or rng.random() < 0.1:
            found[key] = rng.choice(VALUES)
    return found | {"distributed_type": rng.choice(["NO", "FSDP", "DEEPSPEED", "MULTI_GPU", rng.choice(VALUES)])}


@pytest.mark.parametrize("seed", range(8))
def test_any_values(seed: int) -> None:
    rng = random.Random(seed)
    taken = 0
    messages: list[str] = []
    for _ in range(250):
        deepspeed = {"train_micro_batch_size_per_gpu": 1, **a_deepspeed_section(rng)}
        for parse, data in ((parse_deepspeed, deepspeed), (parse_accelerate, an_accelerate_config(rng))):
            try:
                config = parse(data, "file")
                cluster, _ = with_cluster(config, ClusterSpec(gpus=4))
                with_training(config, TrainingSpec(), {}, cluster.gpus)
                taken += 1
            except MemplanError as error:
                messages.append(str(error))
    assert taken > 50
    assert max(map(len, messages)) < 1500
