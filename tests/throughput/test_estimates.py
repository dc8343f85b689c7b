"""The time of a step as an estimate has it."""

from typing import Any

import pytest

import memplan

LLAMA = "meta-llama/Llama-2-7b"


def test_a_training_run_on_a_known_gpu_has_a_time() -> None:
    found = memplan.estimate(LLAMA, {"seq_len": 512}, "2xA100-80GB", "zero3")
    assert found.step is not None
    assert found.step.tokens_per_second == pytest.approx(2 * 512 / found.step.seconds)
    (interval,) = [each for each in found.assumptions if each.name == "step (s)"]
    assert interval.low < interval.value < interval.high
    assert interval.value == pytest.approx(found.step.seconds, rel=0.005)


def test_without_replay_there_is_none() -> None:
    """It would take four times as long as the rest, which is to be there within a millisecond."""
    assert memplan.estimate(LLAMA, {"seq_len": 512}, "2xA100-80GB", "zero3", replay=False).step is None
    assert all(each.step is None for each in memplan.ladder(LLAMA, {"seq_len": 512}, "2xT4", replay=False).estimates)


def test_every_rung_has_one() -> None:
    rungs = memplan.ladder(LLAMA, {"seq_len": 512}, "2xT4", processes=1).estimates
    assert len(rungs) > 5
    assert all(each.step for each in rungs)
    shared = memplan.ladder(LLAMA, {"seq_len": 512}, "2xT4", processes=2).estimates
    assert [each.step for each in shared] == [each.step for each in rungs]


def test_it_is_the_time_that_a_plan_has() -> None:
    model, training = "TinyLlama/TinyLlama-1.1B-Chat-v1.0", {"seq_len": 512}
    asked = memplan.plan(model, training, "2xA100-80GB").rungs[0].estimate
    assert asked.step == memplan.estimate(model, training, "2xA100-80GB").step


@pytest.mark.parametrize(
    ("training", "cluster"),
    [
        ({"seq_len": 64}, "1xcpu"),
        ({"task": "load"}, "1xA100-80GB"),
        ({"task": "generate", "seq_len": 8, "max_new_tokens": 8}, "1xA100-80GB"),
    ],
    ids=["cpu", "load", "generate"],
)
def test_without_a_gpu_or_a_training_run_there_is_none(training: dict[str, Any], cluster: str) -> None:
    assert memplan.estimate(LLAMA, training, cluster).step is None


def test_a_trace_has_one_too() -> None:
    config = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 256, "intermediate_size": 512,
        "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 512,
    }  # fmt: skip
    training = {"seq_len": 2048, "micro_batch_size": 8}
    written, traced = (memplan.estimate(config, training, "1xA100-80GB", trace=trace).step for trace in (False, True))
    assert written is not None
    assert traced is not None
    # What a causal kernel skips a trace does not see, nor the shapes of products.
    assert written.flops <= traced.flops <= 1.5 * written.flops
    assert traced.seconds == pytest.approx(written.seconds, rel=0.3)
