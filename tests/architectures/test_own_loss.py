"""How many copies of the logits are alive at once, by the version of transformers: each family's loss had its own code.

Read in modeling_*.py of the versions named: a model's own loss until it called ForCausalLMLoss, and that one's change.
"""

from __future__ import annotations

import pytest

import memplan

GPT2 = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 256}
NEOX = {
    "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32,
    "max_position_embeddings": 256,
}  # fmt: skip
CONFIGS = {
    "gpt2": {"architectures": ["GPT2LMHeadModel"], **GPT2},
    "gpt_bigcode": {"architectures": ["GPTBigCodeForCausalLM"], **GPT2},
    "gptj": {"architectures": ["GPTJForCausalLM"], **GPT2, "rotary_dim": 4},
    "gpt_neox": {"architectures": ["GPTNeoXForCausalLM"], **NEOX},
    "llama": {"architectures": ["LlamaForCausalLM"], **NEOX},
    "mistral": {"architectures": ["MistralForCausalLM"], **NEOX, "num_key_value_heads": 2},
    "stablelm": {"architectures": ["StableLmForCausalLM"], **NEOX, "num_key_value_heads": 2},
    "gpt_neo": {
        "architectures": ["GPTNeoForCausalLM"], "hidden_size": 16, "num_layers": 1, "num_heads": 2,
        "attention_types": [[["global"], 1]], "max_position_embeddings": 256,
    },
}  # fmt: skip
BATCH, LENGTH, VOCABULARY = 16, 256, 50_000


@pytest.mark.parametrize(
    ("model_type", "version", "copies"),
    [
        # As they are: logits, their copy without the last position, log_softmax; and in the backward three of them.
        ("gpt2", "4.48.2", 3), ("gpt_bigcode", "4.48.1", 3), ("stablelm", "4.47", 3), ("gpt_neox", "4.48.3", 3),
        # In float32, which counts for two: logits, copy, log_softmax.
        ("llama", "4.45.2", 6), ("mistral", "4.47.1", 6), ("gptj", "4.48.2", 6),
        ("gpt_neo", "4.48.2", 7),  # and back in 16 bit
        # ForCausalLMLoss has the logits in 16 bit, in float32 and as a copy; from 4.49 on there is no copy, and the
        # backward decides: log_softmax, and the gradients of the two.
        ("gpt2", "4.48.3", 7), ("llama", "4.46", 7), ("mistral", "4.48", 7), ("gptj", "4.48.3", 7),
        ("gpt2", "4.49", 6), ("gpt_neox", "4.49", 6), ("llama", "5.23", 6),
    ],
)  # fmt: skip
def test_copies_of_the_logits(model_type: str, version: str, copies: int) -> None:
    config = {"model_type": model_type, "vocab_size": VOCABULARY, "tie_word_embeddings": False} | CONFIGS[model_type]
    training = {"seq_len": LENGTH, "micro_batch_size": BATCH, "dtype": "bfloat16", "mixed_precision": "no"}
    estimate = memplan.estimate(config, training, "1xH200", software=f"transformers={version}", replay=False)
    most = max(phase.allocated for phase in estimate.gpu.phases if phase.name in ("loss", "backward"))
    held = estimate.gpu.components.weights + estimate.gpu.components.optimizer + estimate.gpu.components.workspace
    assert (most - held) / (BATCH * LENGTH * VOCABULARY * 2) == pytest.approx(copies, abs=0.1)


LAYERS, HIDDEN, KEYS = 5, 64, 8
BIGCODE = {
    "model_type": "gpt_bigcode", "architectures": ["GPTBigCodeForCausalLM"], "vocab_size": 50, "n_embd": HIDDEN,
    "n_layer": LAYERS, "n_head": HIDDEN // KEYS, "n_positions": LENGTH,
}  # fmt: skip


@pytest.mark.parametrize(
    ("training", "size"),
    [
        ({"dtype": "bfloat16", "mixed_precision": "no"}, 2),
        ({"dtype": "bfloat16", "mixed_precision": "no", "attn": "flash_attention_2"}, 2),
        ({"dtype": "float32", "mixed_precision": "no"}, 4),
        # bitsandbytes gives back what it was given, which a LayerNorm under autocast made float32.
        ({"dtype": "bfloat16", "mixed_precision": "bf16", "quantization": "nf4", "lora": 4}, 4),
    ],
)
def test_a_checkpointed_gpt_bigcode_gave_out_its_cache(training, size: int) -> None:
    """modeling_gpt_bigcode.py until 4.53: each layer's is a view of all that c_attn gave, alive until the loss is."""
    asked = {"seq_len": LENGTH, "micro_batch_size": BATCH, "gradient_checkpointing": True, **training}
    before, since = (
        memplan.estimate(BIGCODE, asked, "1xH200", software=f"transformers={version}") for version in ("4.52.4", "4.53")
    )
    levels = [{phase.name: phase.allocated for phase in each.gpu.phases} for each in (before, since)]
    kept = LAYERS * BATCH * LENGTH * (HIDDEN + 2 * KEYS) * size
    assert levels[0]["loss"] - levels[1]["loss"] == pytest.approx(kept, rel=0.12)
    assert levels[0]["idle"] == levels[1]["idle"]


def test_without_checkpointing_that_cache_needs_nothing() -> None:
    asked = {"seq_len": LENGTH, "micro_batch_size": BATCH}
    before, since = (
        memplan.estimate(BIGCODE, asked, "1xH200", software=f"transformers={v}") for v in ("4.52.4", "4.53")
    )
    assert before.gpu == since.gpu


@pytest.mark.parametrize(
    ("model_type", "version", "size"),
    [
        # In 16 bit and in float32; then of the last position alone.
        ("llama", "4.44.2", 6), ("llama", "4.45", 0), ("gpt_neox", "4.48", 2), ("gpt_neox", "4.49", 0),
        ("gpt2", "4.48", 2), ("gpt2", "4.53", 0), ("gpt_bigcode", "4.57", 2), ("gpt_bigcode", "5.0", 0),
    ],
)  # fmt: skip
def test_a_prompts_logits_in_generation(model_type: str, version: str, size: int) -> None:
    config = {"model_type": model_type, "vocab_size": VOCABULARY, "tie_word_embeddings": False} | CONFIGS[model_type]
    asked = {
        "task": "generate",
        "seq_len": LENGTH - 8,
        "max_new_tokens": 4,
        "micro_batch_size": BATCH,
        "dtype": "bfloat16",
    }
    levels = {
        phase.name: phase.allocated
        for phase in memplan.estimate(config, asked, "1xH200", software=f"transformers={version}").gpu.phases
    }
    logits = BATCH * (LENGTH - 8) * VOCABULARY
    assert (levels["forward"] - levels["idle"]) / logits == pytest.approx(size, abs=0.1)
