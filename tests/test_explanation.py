"""``--explain``: every block of the peak by what it is, under engines that shard and without."""

from __future__ import annotations

import pytest

import memplan

MODEL = "HuggingFaceTB/SmolLM2-135M"
ENGINES = {
    "zero0": {"kind": "zero0"},
    "zero1": {"kind": "zero1"},
    "bf16": {"kind": "zero1", "zero": {"grad_accum_dtype": "fp32"}},
    "zero2": {"kind": "zero2", "zero": {"overlap_comm": True}},
    "zero2 offloaded": {"kind": "zero2", "offload_optimizer": "cpu"},
    "zero3": {"kind": "zero3"},
    "zero3 offloaded": {"kind": "zero3", "offload_optimizer": "cpu", "offload_param": "cpu"},
    "fsdp": {"kind": "fsdp"},
    "fsdp offloaded": {"kind": "fsdp", "offload_param": "cpu"},
    "fsdp1": {"kind": "fsdp", "fsdp": {"version": 1}},
}


@pytest.mark.parametrize("seq_len", [16, 2048])
@pytest.mark.parametrize("name", ENGINES)
def test_the_terms_sum_to_the_peak_and_say_what_they_are(name: str, seq_len: int) -> None:
    training = memplan.TrainingSpec(seq_len=seq_len)
    found = memplan.estimate(MODEL, training, "4xA100-80GB", memplan.Strategy(**ENGINES[name]), explain=True)
    assert sum(term.bytes for term in found.explanation) == found.gpu.peak_device
    parts = dict.fromkeys(dict(found.gpu.components), 0)
    for term in found.explanation:
        parts[term.name.split(":")[0]] += term.bytes
        assert ":" in term.name or term.name in ("fragmentation", "context", "nccl"), term
    assert parts == dict(found.gpu.components)


@pytest.mark.parametrize("kind", ["single", "ddp"])
@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("seq_len", [16, 2048])
def test_terms_without_sharding_sum_to_each_component(kind: str, steps: int, seq_len: int) -> None:
    """Where embeddings are shared and the text is short, the peak has every gradient that the tape has made."""
    training = memplan.TrainingSpec(seq_len=seq_len, gradient_checkpointing=True, grad_accum_steps=steps)
    gpus = "A100-80GB" if kind == "single" else "4xA100-80GB"
    found = memplan.estimate(MODEL, training, gpus, memplan.Strategy(kind=kind), explain=True)
    assert found.explanation is not None
    parts = dict.fromkeys(dict(found.gpu.components), 0)
    for term in found.explanation:
        assert term.bytes > 0, term
        parts[term.name.split(":")[0]] += term.bytes
    assert parts == dict(found.gpu.components)


def test_a_term_names_the_key_that_sizes_it() -> None:
    def bucket(size: int) -> int:
        strategy = memplan.Strategy(kind="zero3", zero={"reduce_bucket_size": size})
        found = memplan.estimate(MODEL, memplan.TrainingSpec(seq_len=64), "4xA100-80GB", strategy, explain=True)
        terms = [term for term in found.explanation if "reduce_bucket_size" in term.formula]
        return sum(term.bytes for term in terms)

    assert bucket(10_000_000) == 20_000_256
    assert bucket(1_000_000) == 2_000_384


@pytest.mark.parametrize("name", ENGINES)
def test_a_term_names_its_own_source(name: str) -> None:
    strategy = memplan.Strategy(**ENGINES[name])
    for length in (16, 2048):
        found = memplan.estimate(MODEL, memplan.TrainingSpec(seq_len=length), "4xA100-80GB", strategy, explain=True)
        for term in found.explanation:
            assert "{" not in term.source, term
            if term.name.startswith("workspace"):
                assert term.source.endswith("CublasHandlePool.cpp")
            if strategy.kind == "fsdp" and term.formula.startswith("blocks"):
                assert f"version {strategy.fsdp.version}" in term.source or term.name.startswith("workspace")
