"""What becomes a unit of FSDP, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
from tests.oracles.families import CONFIGS

import memplan
from memplan.results import Estimate
from memplan.specs.strategy import FsdpSpec


def run(family: str = "llama", gpus: int = 4, offload: bool = False, training: Any = None, **keys: Any) -> Estimate:
    strategy = memplan.Strategy(kind="fsdp", offload_param="cpu" if offload else "none", fsdp=FsdpSpec(**keys))
    config = next(iter(CONFIGS[family].values()))
    spec = memplan.TrainingSpec(**{"seq_len": 64, **(training or {})})
    return memplan.estimate(config, spec, f"{gpus}xA100-80GB", strategy, replay=False)


BLOCKS = {
    "llama": "LlamaDecoderLayer",
    "qwen3_moe": "Qwen3MoeDecoderLayer",
    "gemma3_text": "Gemma3DecoderLayer",
    "gpt2": "GPT2Block",
    "gpt_bigcode": "GPTBigCodeBlock",
    "gpt_neox": "GPTNeoXLayer",
    "stablelm": "StableLmDecoderLayer",
}


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize(("family", "name"), BLOCKS.items(), ids=str)
def test_the_blocks_by_their_name_in_transformers_are_the_default(family: str, name: str, version: Any) -> None:
    named = run(family, version=version, transformer_layer_cls_to_wrap=(name,))
    assert named.gpu == run(family, version=version).gpu


@pytest.mark.parametrize("version", [1, 2])
def test_smaller_units_gather_less(version: Any) -> None:
    blocks = run(version=version)
    halves = run(version=version, transformer_layer_cls_to_wrap=("LlamaAttention", "LlamaMLP", "LlamaDecoderLayer"))
    whole = run(version=version, auto_wrap_policy="NO_WRAP")
    assert halves.gpu.steady_allocated < blocks.gpu.steady_allocated < whole.gpu.steady_allocated


@pytest.mark.parametrize("version", [1, 2])
def test_no_size_is_no_wrap(version: Any) -> None:
    assert (
        run(version=version, auto_wrap_policy="SIZE_BASED_WRAP").gpu
        == run(version=version, auto_wrap_policy="NO_WRAP").gpu
    )


def test_version_1_wraps_what_is_left_of_a_module_that_is_large_enough() -> None:
    """Linear layers of 176,128 elements are units, and a block's attention, whose layers are smaller, is one."""
    by_size = run(version=1, auto_wrap_policy="SIZE_BASED_WRAP", min_num_params=150_000)
    assert by_size.gpu.steady_allocated < run(version=1, auto_wrap_policy="NO_WRAP").gpu.steady_allocated


SPEC: list[tuple[dict[str, Any], str]] = [
    ({"transformer_layer_cls_to_wrap": ("LlamaDecoder",)}, "transformer_layer_cls_to_wrap: 'LlamaDecoder' is not"),
    ({"auto_wrap_policy": "SIZE_BASED_WRAP", "min_num_params": 100_000}, "list of blocks, which fully_shard refuses"),
    ({"family": "bert"}, "auto_wrap_policy.*transformer_layer_cls_to_wrap"),
    ({"family": "vit"}, "auto_wrap_policy.*transformer_layer_cls_to_wrap"),
    ({"family": "t5"}, "auto_wrap_policy.*which torch refuses. Use --strategy zero2"),
    ({"family": "gpt2", "transformer_layer_cls_to_wrap": ("Embedding", "GPT2Block")}, "which torch refuses"),
    ({"training": {"optim": "adafactor"}}, "optim: 'adafactor' cannot step on the DTensors"),
    ({"version": 1, "reshard_after_forward": False}, "reshard_after_forward.*SHARD_GRAD_OP"),
    ({"sharding_strategy": "FULL_SHARD"}, "sharding_strategy.*version 2"),
    ({"version": 1, "dp_replicate_size": 2}, "dp_replicate_size: 2 cannot go with version 1. Use sharding_strategy"),
    ({"dp_replicate_size": 3}, "dp_replicate_size: 3 cannot be: 3 groups of"),
    (
        {
            "training": {
                "lora": {"rank": 8, "modules_to_save": ["mlp.up_proj"]},
                "dtype": "bfloat16",
                "mixed_precision": "no",
            }
        },
        "dtype: 'bfloat16' leaves trained weights of several types in one unit",
    ),
    (
        {
            "version": 1,
            "auto_wrap_policy": "NO_WRAP",
            "training": {"gradient_checkpointing": True, "use_reentrant": True},
        },
        "use_reentrant: true fails in FSDP's version 1",
    ),
    ({"dp_replicate_size": 2, "dp_shard_size": 8}, "dp_shard_size: 8 cannot be: 2 groups of 8 ranks"),
    ({"dp_replicate_size": 4}, "dp_replicate_size: 4 leaves nothing to shard over with 4 GPUs"),
]
UNSUPPORTED: list[tuple[dict[str, Any], str]] = [
    ({"version": 1, "limit_all_gathers": False}, "limit_all_gathers"),
    ({"version": 1, "offload": True, "gpus": 1, "training": {"mixed_precision": "no"}}, "offload_param"),
    ({"version": 1, "training": {"lora": 8}, "transformer_layer_cls_to_wrap": ("LlamaMLP",)}, "PEFT"),
    ({"training": {"optim": "adagrad"}}, "optim: 'adagrad'"),
    ({"training": {"optim": "adamw_bnb_8bit"}}, "optim: 'adamw_bnb_8bit'"),
    ({"family": "gpt2", "version": 1, "transformer_layer_cls_to_wrap": ("Embedding", "GPT2Block")}, "share"),
    (
        {"training": {"gradient_checkpointing": True}, "transformer_layer_cls_to_wrap": ("LlamaMLP",)},
        "transformer_layer_cls_to_wrap",
    ),
    ({"activation_checkpointing": True, "transformer_layer_cls_to_wrap": ("LlamaMLP",)}, "activation_checkpointing"),
    ({"version": 1, "activation_checkpointing": True, "auto_wrap_policy": "NO_WRAP"}, "activation_checkpointing"),
]


@pytest.mark.parametrize(("keys", "message"), SPEC, ids=str)
def test_what_the_libraries_refuse_is_refused(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(memplan.SpecError, match=message):
        run(**keys)


@pytest.mark.parametrize(("keys", "message"), UNSUPPORTED, ids=str)
def test_what_is_not_modelled_is_refused_by_name(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(memplan.UnsupportedError, match=message):
        run(**keys)
