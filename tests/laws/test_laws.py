"""Laws that hold whatever the setup: sums, growth, round trips, and the closed form against every layer."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import memplan
from memplan.catalog.gpus import find_gpu
from memplan.estimator import estimate
from memplan.results import Estimate, GpuMemory
from memplan.specs.hardware import ClusterSpec
from memplan.specs.model import ModelSpec
from memplan.specs.software import SoftwareSpec
from memplan.specs.strategy import Strategy
from memplan.specs.training import TrainingSpec

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 1000,
    "hidden_size": 128,
    "intermediate_size": 344,
    "num_hidden_layers": 5,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
}
GPT2: dict[str, Any] = {
    "model_type": "gpt2",
    "architectures": ["GPT2LMHeadModel"],
    "vocab_size": 1000,
    "n_embd": 128,
    "n_layer": 4,
    "n_head": 4,
    "n_positions": 1024,
}
GEMMA2: dict[str, Any] = {
    "model_type": "gemma2",
    "architectures": ["Gemma2ForCausalLM"],
    "vocab_size": 2000,
    "hidden_size": 96,
    "intermediate_size": 200,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "sliding_window": 64,
}
CONFIGS = [LLAMA, GPT2, GEMMA2]
GPUS = ["cpu", "T4", "RTX3090", "A100-80GB", "H100-80GB"]
GROWTH = {"micro_batch_size": 8, "seq_len": 512, "vocab_size": 4000, "rank": 64, "eval_batch_size": 16}
"""What may grow, with the largest value that the laws try."""


def spec(config: dict[str, Any]) -> ModelSpec:
    return ModelSpec(
        id="law", model_type=config["model_type"], architecture=config["architectures"][0], config=config, source="test"
    )


def run(config: dict[str, Any], gpu: str, strategy: str = "single", replay: bool = False, **training: Any) -> Estimate:
    training.setdefault("attn", "eager" if config is GEMMA2 else "sdpa")
    cluster = ClusterSpec(gpu=find_gpu(gpu), gpus=1 if strategy == "single" else 4)
    return estimate(
        spec(config), TrainingSpec(**training), cluster, Strategy(kind=strategy), SoftwareSpec(), replay=replay
    )


setups = st.fixed_dictionaries(
    {
        "config": st.sampled_from(CONFIGS),
        "gpu": st.sampled_from(GPUS),
        "strategy": st.sampled_from(["single", "ddp"]),
        "micro_batch_size": st.integers(1, 4),
        "seq_len": st.integers(1, 200),
        "gradient_checkpointing": st.booleans(),
        "use_reentrant": st.sampled_from([None, True]),
        "grad_accum_steps": st.sampled_from([1, 3]),
        "lora": st.sampled_from([None, 4]),
        "eval_batch_size": st.sampled_from([None, 8]),
    }
)


@given(setups, st.sampled_from(sorted(GROWTH)), st.data())
@settings(max_examples=120, deadline=None)
def test_more_of_anything_never_needs_less(setup: dict[str, Any], what: str, data: st.DataObject) -> None:
    small, large = sorted(data.draw(st.lists(st.integers(1, GROWTH[what]), min_size=2, max_size=2), label=what))
    if what == "rank":
        less, more = {**setup, "lora": small}, {**setup, "lora": large}
    else:
        less, more = {**setup, what: small}, {**setup, what: large}
    a, b = run(**less).gpu, run(**more).gpu
    assert a.peak_allocated <= b.peak_allocated
    assert a.steady_allocated <= b.steady_allocated


@given(setups, st.booleans())
@settings(max_examples=40, deadline=None)
def test_parts_sum_and_json_round_trips(setup: dict[str, Any], replay: bool) -> None:
    result = run(**setup, replay=replay)
    gpu = result.gpu
    parts = dict(gpu.components)
    outside = ("fragmentation", "context", "nccl")
    assert sum(size for name, size in parts.items() if name not in outside) == gpu.peak_allocated
    assert gpu.peak_allocated + parts["fragmentation"] == gpu.peak_reserved
    assert sum(parts.values()) == gpu.peak_device
    assert gpu.low <= gpu.peak_device <= gpu.high
    assert Estimate.from_json(result.to_json()) == result


@given(setups)
@settings(max_examples=25, deadline=None)
def test_the_bound_without_replay_is_never_below_the_replay(setup: dict[str, Any]) -> None:
    assert run(**setup, replay=False).gpu.peak_reserved >= run(**setup, replay=True).gpu.peak_reserved


@given(setups)
@settings(max_examples=25, deadline=None)
def test_checkpointing_never_saves_more_for_backward(setup: dict[str, Any]) -> None:
    plain = run(**{**setup, "gradient_checkpointing": False}).gpu
    checkpointed = run(**{**setup, "gradient_checkpointing": True}).gpu
    phases = {p.name: p.allocated for p in plain.phases}
    for phase in checkpointed.phases:
        if phase.name in ("loss", "idle", "step"):
            assert phase.allocated <= phases[phase.name]


@pytest.mark.parametrize("gpu", GPUS)
def test_ddp_adds_one_copy_of_the_gradients(gpu: str) -> None:
    single, ddp = run(LLAMA, gpu).gpu, run(LLAMA, gpu, "ddp").gpu
    assert ddp.components.communication == pytest.approx(single.components.weights, rel=0.01)
    assert ddp.peak_allocated == single.peak_allocated + ddp.components.communication


def test_fragmentation_comes_from_the_replay_alone() -> None:
    """Without the allocator's replay there is no figure for reserved but the proven bound."""
    replayed = run(LLAMA, "A100-80GB", replay=True).gpu
    bound = run(LLAMA, "A100-80GB", replay=False).gpu
    assert 0 < replayed.components.fragmentation < bound.components.fragmentation


def test_bf16_can_need_more_than_float32_on_a_turing_gpu() -> None:
    """A finding, not a law: without bf16 kernels attention falls to math, which keeps S^2 scores in float32."""
    mha = {**LLAMA, "num_key_value_heads": 8}
    half = run(mha, "T4", dtype="bfloat16", mixed_precision="no", seq_len=1024, micro_batch_size=4).gpu
    full = run(mha, "T4", dtype="float32", mixed_precision="no", seq_len=1024, micro_batch_size=4).gpu
    assert half.peak_allocated > full.peak_allocated


def test_what_is_reserved_can_fall_with_the_vocabulary() -> None:
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }

    def estimated(vocab_size: int, *, replay: bool) -> GpuMemory:
        return memplan.estimate({**config, "vocab_size": vocab_size}, {"seq_len": 64}, "1xA100-80GB", replay=replay).gpu

    small, large = (estimated(size, replay=True) for size in (7_000, 10_000))
    assert small.peak_allocated < large.peak_allocated
    assert small.peak_reserved > large.peak_reserved
    small, large = (estimated(size, replay=False) for size in (7_000, 10_000))
    assert small.peak_reserved < large.peak_reserved
