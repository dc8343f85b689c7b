from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.oracles.families import CONFIGS
from tests.oracles.real_run import real_step

from memplan.errors import SpecError, UnsupportedError
from memplan.introspect import trace
from memplan.introspect.trace import TraceEvent, TraceResult, trace_step

LLAMA = CONFIGS["llama"]["small"]
GPT2 = CONFIGS["gpt2"]["small"]
SIZE: dict[str, Any] = {"micro_batch_size": 2, "seq_len": 128, "num_layers": 2}
RNG_STATE = (
    5120  # torch.get_rng_state() of a CPU, 5056 bytes, which checkpointing keeps per block: host memory on a GPU
)
SCALAR = 512


def model_of(config: dict[str, Any], *, dtype: str = "float32", attn: str = "sdpa") -> Any:
    import transformers

    values = {**config, "num_hidden_layers": 2, "n_layer": 2}
    kind = values.pop("model_type")
    cls = getattr(transformers, values["architectures"][0])
    made = transformers.CONFIG_MAPPING[kind](**values)
    return cls._from_config(made, dtype=getattr(torch, dtype), attn_implementation=attn)


def peak_over_start(result: TraceResult) -> int:
    return result.steady_allocated - result.phases["idle"]


def alive_at_peak(events: list[TraceEvent]) -> Counter[int]:
    alive: dict[int, int] = {}
    peak, best = 0, Counter[int]()
    for event in events:
        if event.kind == "alloc":
            alive[event.storage] = event.bytes
        else:
            alive.pop(event.storage, None)
        if event.live > peak:
            peak, best = event.live, Counter(alive.values())
    return best


# ---- against a real run


@pytest.mark.oracle
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("config", [LLAMA, CONFIGS["mixtral"]["small"]], ids=["llama", "mixtral"])
@pytest.mark.parametrize("precision", ["fp32", "autocast"])
def test_trace_matches_the_allocator_of_a_real_trainer(
    tmp_path: Path, config: dict[str, Any], attn: str, precision: str
) -> None:
    bf16 = precision == "autocast"
    real = real_step(model_of(config, attn=attn), tmp_path, batch=2, length=128, vocab=1000, bf16=bf16)
    traced = trace_step(config, attn=attn, mixed_precision="bf16" if bf16 else "no", record_events=True, **SIZE)
    # A Python number in an operation is a tensor on the host in a real run: a few scalars are allowed.
    assert 0 <= real.peak - peak_over_start(traced) <= 4 * SCALAR
    sizes = Counter(size for size, _ in real.at_peak)
    assert {n: c for n, c in sizes.items() if n > SCALAR} == {
        n: c for n, c in alive_at_peak(traced.events).items() if n > SCALAR
    }


@pytest.mark.oracle
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_trace_of_checkpointing_matches_up_to_the_saved_rng_states(tmp_path: Path, dtype: str) -> None:
    real = real_step(
        model_of(LLAMA, dtype=dtype),
        tmp_path,
        batch=2,
        length=128,
        vocab=1000,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": False},
    )
    traced = trace_step(LLAMA, dtype=dtype, gradient_checkpointing=True, **SIZE)
    states = sum(size for size, _ in real.at_peak if size == RNG_STATE)
    assert states in (RNG_STATE, 2 * RNG_STATE)
    assert abs(real.peak - states - peak_over_start(traced)) <= 2 * SCALAR


@pytest.mark.oracle
def test_what_a_bf16_run_has_beyond_the_trace_is_workspace_of_matrix_products(tmp_path: Path) -> None:
    config = CONFIGS["bert"]["small"]
    real = real_step(model_of(config, dtype="bfloat16"), tmp_path, batch=2, length=128, vocab=1000, classes=True)
    traced = trace_step(config, dtype="bfloat16", record_events=True, **SIZE)
    known = alive_at_peak(traced.events)
    beyond = [(size, ops) for size, ops in real.at_peak if size > SCALAR and size not in known]
    assert all(ops[-1] == "aten::mm" for _, ops in beyond)
    workspace = sum(size for size, _ in beyond)
    assert abs(real.peak - workspace - peak_over_start(traced)) <= 2 * SCALAR


@pytest.mark.oracle
@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("config", [LLAMA, GPT2], ids=["llama", "gpt2"])
def test_trace_equals_torch_mem_tracker(
    monkeypatch: pytest.MonkeyPatch, config: dict[str, Any], checkpointed: bool
) -> None:
    from torch.distributed._tools.mem_tracker import MemTracker
    from transformers import masking_utils

    monkeypatch.setattr(trace, "_BLOCK", 1)  # MemTracker does not round on CPU
    traced = trace_step(config, gradient_checkpointing=checkpointed, **SIZE)
    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", lambda position_ids: None)
    fake_mode = trace._fake_mode()
    with trace._quiet():
        model = trace._build_model(config, "float32", "sdpa", 2, None, None)
    if checkpointed:
        trace._enable_checkpointing(model, use_reentrant=False, frozen_inputs=False)
    model.config.use_cache = False
    trace._to_fake(model, fake_mode)
    step = trace._Step(
        model=model, tracker=_NoTracker(), mixed_precision="no", grad_accum_steps=1, max_grad_norm=1.0,
        optim="adamw_torch_fused",
    )  # fmt: skip
    with fake_mode, trace._like_a_real_run(), trace._quiet():
        step.make_inputs(2, 128, padded=False)
        step.make_optimizer()
        tracker = MemTracker()
        tracker.track_external(model, step.optimizer, *step.inputs[0].values())
        with tracker:
            step.run()
            tracker.reset_mod_stats()
            step.run()
    (snapshot,) = tracker.get_tracker_snapshot("peak").values()
    assert traced.steady_allocated == snapshot["Total"]


class _NoTracker:
    live = 0
    phase = ""

    def enter(self, phase: str) -> None: ...

    def bytes_of(self, tensors: Any) -> int:
        return 0


# ---- the result


def test_parts_of_a_small_llama_are_what_its_config_says() -> None:
    result = trace_step(LLAMA, dtype="bfloat16", **SIZE)
    h, i, v, kv = 256, 688, 1000, 128
    count = 2 * v * h + 2 * (2 * h * h + 2 * h * kv + 3 * h * i + 2 * h) + h
    assert (result.num_parameters, result.num_trainable) == (count, count)
    assert result.parameters == 2 * count  # every tensor is a multiple of 512 bytes
    assert result.gradients == 2 * count
    assert result.optimizer == 2 * 2 * count + result.optimizer_scalars
    assert result.optimizer_scalars == SCALAR * (2 * 9 + 3)
    assert result.inputs == 2 * (2 * 128 * 8)
    assert result.outputs == 2 * 128 * v * 2
    assert result.steady_allocated == max(result.phases.values())
    assert result.unreachable == 0


def test_events_add_up_to_the_level_and_do_not_change_the_result() -> None:
    plain = trace_step(LLAMA, **SIZE)
    recorded = trace_step(LLAMA, record_events=True, **SIZE)
    assert recorded.phases == plain.phases
    live = recorded.phases["idle"]
    for event in recorded.events:
        live += event.bytes if event.kind == "alloc" else -event.bytes
        assert event.live == live
    attention = [e for e in recorded.events if "flash_attention" in e.op and e.kind == "alloc" and e.phase == "forward"]
    assert attention[0].module == "model.layers.0.self_attn"
    assert "sdpa_attention.py" in attention[0].where


def test_a_trace_leaves_libraries_as_they_were() -> None:
    from transformers import masking_utils

    before = (masking_utils.is_tracing, torch.nn.functional.cross_entropy)
    trace_step(LLAMA, **SIZE)
    assert (masking_utils.is_tracing, torch.nn.functional.cross_entropy) == before


def test_gradient_accumulation_keeps_gradients_during_the_forward_pass() -> None:
    once, thrice = (trace_step(LLAMA, grad_accum_steps=n, **SIZE) for n in (1, 3))
    assert thrice.phases["forward"] - once.phases["forward"] == once.gradients + 2 * once.inputs


def test_a_padded_batch_carries_a_mask() -> None:
    packed, padded = (trace_step(LLAMA, padded=flag, **SIZE) for flag in (False, True))
    assert padded.inputs == packed.inputs + 2 * 128 * 8
    assert padded.saved_activations > packed.saved_activations


def test_lora_trains_adapters_only() -> None:
    result = trace_step(LLAMA, lora={"rank": 8, "targets": ["q_proj", "v_proj"]}, **SIZE)
    adapters = 2 * 8 * (256 + 256 + 256 + 128)
    assert result.num_trainable == adapters
    assert result.gradients == 4 * adapters


def test_frozen_parameters_have_neither_gradients_nor_states() -> None:
    result = trace_step(LLAMA, freeze=["*.mlp.*"], **SIZE)
    assert result.num_parameters - result.num_trainable == 2 * 3 * 256 * 688
    assert result.gradients == 4 * result.num_trainable


def test_float16_keeps_t5_output_projections_in_float32() -> None:
    t5 = CONFIGS["t5"]["small"]
    half, brain = (trace_step(t5, dtype=dtype, **SIZE).parameters for dtype in ("float16", "bfloat16"))
    assert half - brain == 2 * 4 * 256 * 688  # wo of two encoder and two decoder layers


@pytest.mark.parametrize(
    "optim",
    ["adamw_torch", "adamw_torch_foreach", "adamw_torch_loop", "sgd", "adagrad", "rmsprop", "adafactor", "muon"],
)
def test_optimizers_take_their_step(optim: str) -> None:
    states = {"sgd": 0, "adagrad": 1, "rmsprop": 1, "adafactor": 0, "muon": 1}.get(optim, 2)
    result = trace_step(LLAMA, optim=optim, micro_batch_size=1, seq_len=8, num_layers=2)
    moments = (result.optimizer - result.optimizer_scalars) / result.parameters
    assert states <= moments < states + 0.3  # Muon's AdamW holds two for embeddings; Adafactor rows and columns


def test_evaluation_has_a_batch_of_its_own() -> None:
    small, large = (trace_step(LLAMA, eval=True, eval_batch_size=n, **SIZE).phases["eval"] for n in (1, 64))
    assert large > small
    assert "eval" not in trace_step(LLAMA, **SIZE).phases


@pytest.mark.parametrize("checkpointed", [False, True])
def test_cuda_rules_raise_what_cuda_raises(checkpointed: bool) -> None:
    options = {"mixed_precision": "bf16", "gradient_checkpointing": checkpointed, "record_events": True, **SIZE}
    cpu, cuda = (trace_step(GPT2, cuda_autocast=flag, **options) for flag in (False, True))

    def dtypes(result: TraceResult, op: str) -> set[str]:
        return {event.dtype for event in result.events if event.op.startswith(f"aten.{op}.")}

    assert dtypes(cpu, "pow") == {"bfloat16"}  # of gelu_new
    assert dtypes(cuda, "pow") == {"float32"}
    assert dtypes(cpu, "addmm") == dtypes(cuda, "addmm") == {"bfloat16"}
    assert cuda.steady_allocated > cpu.steady_allocated


def test_fp16_autocast_scales_its_loss() -> None:
    bf16, fp16 = (trace_step(LLAMA, mixed_precision=name, **SIZE) for name in ("bf16", "fp16"))
    assert 0 <= fp16.steady_allocated - bf16.steady_allocated <= 4 * SCALAR


def test_result_is_plain_data() -> None:
    result = trace_step(LLAMA, **SIZE)
    assert json.loads(json.dumps(result.to_dict()))["steady_allocated"] == result.steady_allocated
    assert result.versions["torch"] == torch.__version__


# ---- refusals


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"dtype": "int8"}, "dtype"),
        ({"mixed_precision": "fp8"}, "mixed_precision"),
        ({"optim": "adamw_tocrh"}, "optim"),
        ({"freeze": ["nothing"]}, "freeze"),
        ({"head": "regression"}, "head"),
        ({"lora": {"rnak": 8}}, "lora"),
        ({"lora": {"targets": ["q_proj"]}}, "lora"),
        ({"lora": {"rank": 8, "targets": ["nothing"]}}, "lora"),
    ],
)
def test_wrong_arguments_are_named(options: dict[str, Any], field: str) -> None:
    with pytest.raises(SpecError, match=f"^{field}: "):
        trace_step(LLAMA, **{**SIZE, **options})


def test_unknown_models_are_named() -> None:
    with pytest.raises(SpecError, match=r"^model_type: 'lama'.*llama"):
        trace_step({**LLAMA, "model_type": "lama"})
    with pytest.raises(SpecError, match=r"^architectures: "):
        trace_step({**LLAMA, "architectures": ["LlamaForNothing"]})


def test_attention_that_a_model_lacks_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="scaled_dot_product_attention"):
        trace_step(CONFIGS["bloom"]["small"], attn="sdpa", **SIZE)


def test_a_model_that_needs_values_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="value"):
        trace_step(CONFIGS["mixtral"]["small"], experts="eager", **SIZE)


def test_importing_the_module_imports_no_torch() -> None:
    code = "import sys, memplan.introspect.trace; print('torch' in sys.modules, 'transformers' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["False", "False"]
