"""Liger's fused loss, which reads the head's weight without calling the head, under engines that shard it."""

from __future__ import annotations

from typing import Any

import pytest
from tests.oracles.families import CONFIGS

import memplan
from memplan.errors import SpecError
from memplan.results import Estimate
from memplan.specs.strategy import FsdpSpec, ZeroSpec

HEAD = 32003 * 384
"""Elements of the wide config's."""
LINEAR: dict[str, Any] = {"version": 2, "transformer_layer_cls_to_wrap": ("LlamaDecoderLayer", "Linear")}
BY_SIZE: dict[str, Any] = {"version": 1, "auto_wrap_policy": "SIZE_BASED_WRAP", "min_num_params": 5_000_000}


def run(kind: str, family: str = "llama", *, zero: Any = None, fsdp: Any = None, **training: Any) -> Estimate:
    strategy = memplan.Strategy(kind=kind, zero=ZeroSpec(**(zero or {})), fsdp=FsdpSpec(**(fsdp or {})))
    spec = memplan.TrainingSpec(**{"seq_len": 64, "liger": True, **training})
    config = {**CONFIGS[family]["wide"], "num_hidden_layers": 2}
    return memplan.estimate(config, spec, "1xA100-80GB" if kind == "single" else "4xA100-80GB", strategy, replay=False)


def above_idle(found: Estimate, name: str) -> int:
    phases = {each.name: each.allocated for each in found.gpu.phases}
    return phases[name] - phases["idle"]


@pytest.mark.parametrize(("family", "keys"), [("llama", LINEAR), ("qwen2", BY_SIZE)])
def test_a_head_in_a_unit_of_its_own_is_never_gathered(family: str, keys: dict[str, Any]) -> None:
    assert run("fsdp", family, fsdp=keys, liger=False).gpu.peak_allocated > 0
    with pytest.raises(SpecError, match=r"^auto_wrap_policy: .* puts the head into a unit of its own"):
        run("fsdp", family, fsdp=keys)


def test_but_where_liger_redirects_the_loss_to_it() -> None:
    assert run("fsdp", "llama", fsdp=BY_SIZE).gpu.peak_allocated > 0


def test_under_zero_3_the_head_stays_through_the_backward() -> None:
    keys = {"stage3_prefetch_bucket_size": 0, "stage3_max_reuse_distance": 0, "reduce_bucket_size": 1000}
    frozen = {"lora": 8, "zero": keys}  # no gradient of the head beside it
    assert above_idle(run("zero3", **frozen), "backward") > 2 * HEAD


@pytest.mark.parametrize("kind", ["single", "zero3", "fsdp"])
def test_an_evaluation_makes_the_logits_that_training_does_not(kind: str) -> None:
    """Liger's forward skips them only while it trains."""
    logits = 64 * 64 * 32003 * 4
    assert above_idle(run(kind, eval_batch_size=64), "eval") > logits > above_idle(run(kind), "loss")
