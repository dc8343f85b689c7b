"""Task generate, from options to the answer."""

from __future__ import annotations

import pytest

import memplan
from memplan.units import GiB

LLAMA = "meta-llama/Llama-2-7b"


def generate(model: str = LLAMA, cluster: str = "A100-80GB", **training: object) -> memplan.Estimate:
    spec = memplan.TrainingSpec(task="generate", **{"dtype": "bfloat16", **training})  # type: ignore[arg-type]
    return memplan.estimate(model, spec, cluster)


def phases(result: memplan.Estimate) -> dict[str, int]:
    return {phase.name: phase.allocated for phase in result.gpu.phases}


def test_weights_cache_and_prefill() -> None:
    result = generate(seq_len=2048, max_new_tokens=128)
    weights = 6_738_415_616 * 2
    assert result.kv_cache == 2 * 32 * (2048 + 127) * 4096 * 2
    found = phases(result)
    assert found["load"] == pytest.approx(weights, rel=1e-3)
    # In the prefill a layer holds its hidden states and an MLP's, both far smaller than the cache.
    assert weights + result.kv_cache * 2048 // 2175 < found["forward"] < weights + result.kv_cache + GiB // 2
    assert weights + result.kv_cache <= found["step"]
    assert found["idle"] < found["step"]
    assert result.verdict == "fits"


def test_a_longer_answer_moves_the_peak_to_the_last_step() -> None:
    short, long = generate(seq_len=512, max_new_tokens=16), generate(seq_len=512, max_new_tokens=3000)
    assert short.gpu.peak_phase == "forward"
    assert long.gpu.peak_phase == "step"
    assert long.gpu.peak_reserved >= long.gpu.peak_allocated


def test_what_the_growing_cache_leaves_behind_is_returned_when_memory_runs_short() -> None:
    """Segments that the cache has outgrown stay reserved as long as there is room; then torch frees them."""
    large, small = (
        generate(seq_len=1024, max_new_tokens=3000),
        generate(seq_len=1024, max_new_tokens=3000, cluster="RTX3090"),
    )
    assert large.gpu.peak_allocated == small.gpu.peak_allocated
    assert large.gpu.components.fragmentation > 8 * GiB
    assert small.gpu.peak_reserved < large.gpu.peak_reserved
    assert small.verdict == "fits"


def test_the_default_is_transformers_20_new_tokens() -> None:
    assert generate(seq_len=100).kv_cache == generate(seq_len=100, max_new_tokens=20).kv_cache


def test_grouped_queries_and_quantized_weights() -> None:
    full = generate("meta-llama/Llama-3.1-8B", seq_len=1024, max_new_tokens=1024)
    assert full.kv_cache == 2 * 32 * 2047 * 8 * 128 * 2
    packed = generate("meta-llama/Llama-3.1-8B", seq_len=1024, max_new_tokens=1024, quantization="nf4")
    assert packed.kv_cache == full.kv_cache
    assert packed.gpu.components.weights < 0.4 * full.gpu.components.weights


def test_spread_over_gpus_each_has_its_share() -> None:
    one, two = generate(cluster="A100-80GB"), generate(cluster="2xRTX3090", device_map="auto")
    assert two.device_map is not None
    assert set(two.device_map.values()) == {0, 1}
    assert 0.45 * one.gpu.peak_allocated < two.gpu.peak_allocated < 0.65 * one.gpu.peak_allocated
    assert two.kv_cache == one.kv_cache


def test_what_does_not_fit_on_the_gpus_is_refused_with_the_reason() -> None:
    with pytest.raises(memplan.UnsupportedError, match="modules on the CPU or the disk"):
        generate("meta-llama/Llama-2-13b", cluster="T4", device_map="auto")


def test_a_quantized_model_is_not_offloaded() -> None:
    spec = memplan.TrainingSpec(task="load", quantization="int8", device_map="auto")
    result = memplan.estimate("meta-llama/Llama-2-70b", spec, "RTX3090")
    assert result.device_map is not None
    assert "cpu" in result.device_map.values()
    assert result.verdict == "does-not-fit"  # transformers: "Some modules are dispatched on the CPU or the disk."


@pytest.mark.parametrize(
    ("options", "phase"),
    [({"seq_len": 256, "max_new_tokens": 2000}, "step"), ({"seq_len": 2048, "max_new_tokens": 2}, "forward")],
)
@pytest.mark.parametrize("cluster", ["A100-80GB", "cpu"])
def test_the_explanation_tells_the_whole_peak(options: dict, phase: str, cluster: str) -> None:
    spec = memplan.TrainingSpec(task="generate", dtype="bfloat16", **options)
    result = memplan.estimate("TinyLlama/TinyLlama-1.1B-Chat-v1.0", spec, cluster, explain=True)
    assert result.gpu.peak_phase == phase
    assert sum(term.bytes for term in result.explanation) == result.gpu.peak_device
    terms = {term.name: term for term in result.explanation}
    assert terms["weights: bfloat16"].bytes == 2 * result.model.parameters
    held = [term for term in result.explanation if term.name == "activations: keys and values"]
    positions = 256 + 1999 if phase == "step" else 2048
    assert any(f" x 1 x 4 x {positions} x 64 x 2" in term.filled for term in held)
    rest = terms["temporaries: on top of the tensors"].bytes if "temporaries: on top of the tensors" in terms else 0
    assert rest < 32 * 2**20


def test_loading_is_explained_by_its_dtypes() -> None:
    spec = memplan.TrainingSpec(task="load", quantization="nf4", dtype="bfloat16")
    result = memplan.estimate("TinyLlama/TinyLlama-1.1B-Chat-v1.0", spec, "T4", explain=True)
    assert sum(term.bytes for term in result.explanation) == result.gpu.peak_device
    terms = {term.name: term.bytes for term in result.explanation}
    assert terms["weights: uint8"] == 968_884_224 // 2  # the linear layers of 22 blocks, two weights to a byte
    assert terms["weights: bfloat16"] == 2 * (result.model.parameters - 968_884_224)


@pytest.mark.parametrize("task", ["load", "generate"])
@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"grad_accum_steps": 2}, "grad_accum_steps: 2"),
        ({"optim": "sgd"}, "optim: 'sgd'"),
        ({"optim": "adamw_torch_fused"}, "optim: 'adamw_torch_fused'"),
        ({"gradient_checkpointing": True}, "gradient_checkpointing: true"),
        ({"liger": True}, "liger: true"),
        ({"eval_batch_size": 2}, "eval_batch_size: 2"),
        ({"eval_accumulation_steps": 2}, "eval_accumulation_steps: 2"),
    ],
)
def test_options_of_a_training_step_are_refused(task: str, options: dict, name: str) -> None:
    message = f"^{name} has no use in task {task}. Leave it out, or use --task train.$"
    with pytest.raises(memplan.SpecError, match=message):
        memplan.TrainingSpec(task=task, **options)


@pytest.mark.parametrize("task", ["load", "generate"])
def test_one_process_on_one_machine_holds_the_model(task: str) -> None:
    spec = memplan.TrainingSpec(task=task, dtype="bfloat16")
    for kind in ("ddp", "zero2"):
        with pytest.raises(memplan.SpecError, match=f"^strategy: '{kind}' has no use in task {task}. Leave it out, or"):
            memplan.estimate(LLAMA, spec, "A100-80GB", memplan.Strategy(kind=kind))
    with pytest.raises(memplan.SpecError, match=f"^nodes: 2 is more than task {task} uses"):
        memplan.estimate(LLAMA, spec.replace(device_map="auto"), "2x1xA100-80GB")


def test_only_language_models_generate() -> None:
    with pytest.raises(memplan.SpecError, match=r"^head: 'base' does not generate text"):
        generate(head="base")


def test_under_cpu_rules_nothing_is_rounded_up_by_a_caching_allocator() -> None:
    result = generate(cluster="cpu", seq_len=64, max_new_tokens=2)
    assert result.gpu.components.fragmentation == 0
    assert result.gpu.peak_reserved == result.gpu.peak_allocated
