"""Generation against the real models' calls, and the laws of a cache."""

from __future__ import annotations

from typing import Any

import pytest
from tests.oracles.families import CONFIGS
from tests.oracles.generation import kept_by_generate, peak_of_generate, trace_generation

from memplan.architectures.cache import DynamicCache
from memplan.architectures.nn import Build
from memplan.architectures.registry import build_model
from memplan.errors import SpecError, UnsupportedError
from memplan.memory.allocator import CachingAllocator
from memplan.memory.generation import Generation, fullest, generate, replay
from memplan.specs.model import ModelSpec
from memplan.tape import tensor as dtypes
from memplan.tape.dispatch import CPU
from memplan.tape.tape import Tape

SMALL_TENSORS = 4096
"""Bytes within which peaks may differ: positions and masks, scalars."""
LLAMA: dict[str, Any] = CONFIGS["llama"]["small"]
WINDOW: dict[str, Any] = {**CONFIGS["mistral"]["small"], "sliding_window": 24}


def run(
    config: dict[str, Any],
    *,
    dtype: str = "bfloat16",
    attn: str = "sdpa",
    micro_batch_size: int = 2,
    seq_len: int = 60,
    new_tokens: int = 3,
    padded: bool = False,
) -> Generation:
    model = ModelSpec(
        id="test",
        model_type=config["model_type"],
        architecture=config["architectures"][0],
        config=config,
        source="test",
    )
    b = Build(Tape(CPU), dtypes.dtype_named(dtype), attn=attn, padded=padded, cache=DynamicCache())
    return generate(b, build_model(b, model, None), micro_batch_size, seq_len, new_tokens)


def peaks(generation: Generation) -> tuple[int, int]:
    one = [0] * (max(generation.prefill.layer.values()) + 2)
    prefill = fullest(generation, generation.prefill, one)[0].total
    decode = fullest(generation, generation.decode, one)[0].total if generation.decode is not None else 0
    return prefill, decode


CASES: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("llama", LLAMA, {"dtype": "bfloat16"}),
    ("llama, eager", LLAMA, {"dtype": "float32", "attn": "eager"}),
    ("llama, padded", LLAMA, {"dtype": "bfloat16", "padded": True}),
    ("window filled by the prompt", WINDOW, {"dtype": "bfloat16"}),
    ("window filled while generating", WINDOW, {"dtype": "bfloat16", "seq_len": 23, "new_tokens": 5}),
    ("window not filled", WINDOW, {"dtype": "bfloat16", "seq_len": 12, "attn": "eager"}),
    ("gemma3", CONFIGS["gemma3_text"]["variant window"], {"dtype": "bfloat16"}),
    ("gpt2", CONFIGS["gpt2"]["small"], {"dtype": "bfloat16"}),
    ("bloom", CONFIGS["bloom"]["small"], {"dtype": "bfloat16", "attn": "eager"}),
    ("falcon with alibi", CONFIGS["falcon"]["variant falcon-alibi-serial"], {"dtype": "bfloat16"}),
    ("gpt_bigcode", CONFIGS["gpt_bigcode"]["small"], {"dtype": "bfloat16", "padded": True}),
    ("deepseek_v2", CONFIGS["deepseek_v2"]["small"], {"dtype": "bfloat16"}),
]


@pytest.mark.parametrize(("config", "options"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_prefill_and_last_step_are_the_real_models(config: dict[str, Any], options: dict[str, Any]) -> None:
    options = {"micro_batch_size": 2, "seq_len": 60, "new_tokens": 3, **options}
    traced = trace_generation(config, **options)
    prefill, decode = peaks(run(config, **options))
    assert prefill == pytest.approx(traced.prefill, abs=SMALL_TENSORS)
    assert decode == pytest.approx(traced.decode, abs=SMALL_TENSORS)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "gpt_neox", "gptj", "smollm3"])
def test_the_real_generate_needs_as_much(family: str) -> None:
    """With several prompts: positions have a row for each, and a step's scores wait for the next one's."""
    config = CONFIGS[family]["small"] | {"vocab_size": 5003, "pad_token_id": 0}
    options: dict[str, Any] = {"dtype": "float32", "attn": "eager", "micro_batch_size": 3, "new_tokens": 6}
    for seq_len in (5, 150):
        real = peak_of_generate(config, **options, seq_len=seq_len)
        positions = 4 * 3 * (seq_len + options["new_tokens"]) * 8  # of tokens, masks and positions that it keeps
        assert 0 <= real - max(peaks(run(config, **options, seq_len=seq_len))) <= SMALL_TENSORS + positions


def test_the_cache_is_two_tensors_of_every_layer() -> None:
    layers, heads, head_dim = LLAMA["num_hidden_layers"], LLAMA["num_key_value_heads"], 64
    generation = run(LLAMA, micro_batch_size=3, seq_len=100, new_tokens=28)
    assert generation.kv_cache == 2 * layers * 3 * (100 + 27) * heads * head_dim * 2


@pytest.mark.parametrize(
    ("config", "seq_len", "new_tokens"),
    [
        (LLAMA, 50, 5),
        (LLAMA, 50, 1),
        (WINDOW, 20, 3),
        (WINDOW, 20, 4),
        (WINDOW, 20, 5),
        (WINDOW, 20, 9),
        (WINDOW, 40, 1),
        ({**WINDOW, "sliding_window": 2}, 6, 3),
        ({**WINDOW, "sliding_window": 1}, 6, 3),
        (CONFIGS["gemma3_text"]["variant window"], 60, 7),
        (CONFIGS["gpt2"]["small"], 30, 4),
    ],
)
def test_the_cache_holds_what_the_real_generate_leaves(config: dict[str, Any], seq_len: int, new_tokens: int) -> None:
    shape = {"micro_batch_size": 2, "seq_len": seq_len, "new_tokens": new_tokens}
    assert run(config, dtype="float32", **shape).kv_cache == kept_by_generate(config, **shape)


def test_tuples_hold_what_they_were_handed_until_the_step_is_over() -> None:
    """Before transformers 4.42: then there are two caches at a step's end, one of them a position shorter."""
    grown = run(LLAMA, seq_len=400, new_tokens=9)
    b = Build(Tape(CPU), dtypes.bfloat16, cache=DynamicCache(tuples=True))
    model = ModelSpec(id="test", model_type="llama", architecture="LlamaForCausalLM", config=LLAMA, source="test")
    handed = generate(b, build_model(b, model, None), 2, 400, 9)
    assert handed.kv_cache == grown.kv_cache
    assert peaks(handed)[0] == peaks(grown)[0]
    more = peaks(handed)[1] - peaks(grown)[1]
    assert 0.4 * grown.kv_cache < more <= grown.kv_cache


def test_a_sliding_layer_caches_no_more_than_its_window() -> None:
    short, long = (run(WINDOW, seq_len=seq_len).kv_cache for seq_len in (21, 400))
    assert short == long


def test_latent_attention_caches_its_latents() -> None:
    config = CONFIGS["deepseek_v2"]["small"]
    generation = run(config, micro_batch_size=1, seq_len=50, new_tokens=15)
    per_token = config["kv_lora_rank"] + config["qk_rope_head_dim"]
    assert generation.kv_cache == config["num_hidden_layers"] * 64 * per_token * 2


def test_one_new_token_needs_no_step() -> None:
    assert run(LLAMA, new_tokens=1).decode is None


def test_the_last_step_grows_with_the_new_tokens() -> None:
    few, many = (peaks(run(LLAMA, new_tokens=new_tokens))[1] for new_tokens in (2, 300))
    keys = 2 * LLAMA["num_key_value_heads"] * 64 * 2  # of one layer and one position, in a batch of 2
    # One layer's keys are there twice while they are joined to the new ones; the tokens are int64.
    per_token = keys * (2 * LLAMA["num_hidden_layers"] + 1) + 2 * 8
    assert many - few == pytest.approx(298 * per_token, rel=0.001)


def test_layers_on_two_devices_share_the_cache() -> None:
    generation = run(LLAMA, seq_len=200)
    layers = LLAMA["num_hidden_layers"]
    spread = [0] * (1 + layers // 2) + [1] * (1 + layers - layers // 2)
    by_device = fullest(generation, generation.prefill, spread)
    one = peaks(generation)[0]
    assert all(0 < moment.total < one for moment in by_device.values())
    assert sum(moment.total for moment in by_device.values()) >= generation.kv_cache * 200 // 202


def test_the_replay_reserves_at_least_what_is_allocated() -> None:
    generation = run(LLAMA, seq_len=200, new_tokens=40)
    devices = [0] * (LLAMA["num_hidden_layers"] + 2)
    replayed = replay(generation, CachingAllocator(), devices, 0)
    prefill, decode = peaks(generation)
    assert replayed.peak_allocated["forward"] >= prefill
    assert replayed.peak_allocated["step"] >= decode
    assert replayed.peak_reserved >= max(replayed.peak_allocated.values())


def test_a_prompt_and_answer_longer_than_the_position_table_are_refused() -> None:
    config = {**CONFIGS["gpt2"]["small"], "n_positions": 64}
    run(config, seq_len=60, new_tokens=5)
    with pytest.raises(SpecError, match="table of 64 positions"):
        run(config, seq_len=60, new_tokens=6)


def test_an_encoder_with_a_decoder_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="generation with an encoder and a decoder"):
        run(CONFIGS["t5"]["small"])


def test_an_architecture_that_keeps_no_cache_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DynamicCache, "update", lambda self, key, value: (key, value))
    with pytest.raises(UnsupportedError, match="keeps no key-value cache"):
        run(LLAMA)
