"""What is wrong with a file is said with the file's own keys, in one message whatever the number of mistakes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import memplan
from memplan import cli
from memplan.errors import MemplanError

RUN = {"output_dir": "out", "per_device_train_batch_size": 1, "model_name_or_path": "gpt2"}
FACTORY = {"stage": "sft", "do_train": True, "finetuning_type": "lora", "model_name_or_path": "gpt2"}
ACCELERATE = {"distributed_type": "FSDP", "num_processes": 2}


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({**RUN, "per_device_train_batch_size": 0}, "per_device_train_batch_size: 0 is not a positive integer"),
        ({**RUN, "gradient_accumulation_steps": "x"}, "gradient_accumulation_steps: 'x' is not a positive integer"),
        ({**RUN, "max_seq_length": -5}, "max_seq_length: -5 is not a positive integer"),
        ({**RUN, "block_size": 0}, "block_size: 0 is not a positive integer"),
        ({**RUN, "max_length": 4096}, "max_length: 4096 is longer than the model's table of 1024 positions"),
        ({**RUN, "attn_implementation": "x"}, "attn_implementation: 'x' is not a choice"),
        ({**RUN, "lora_r": 0}, "lora_r: 0 is not a positive integer"),
        ({**RUN, "lora": {"r": 0}}, "lora.r: 0 is not a positive integer"),
        ({**RUN, "lora_r": 8, "lora_dropout": 2.0}, "lora_dropout: 2.0 is not a probability"),
        ({**RUN, "ddp_bucket_cap_mb": 0}, "ddp_bucket_cap_mb: 0 is not a positive integer"),
        ({**FACTORY, "cutoff_len": 0}, "cutoff_len: 0 is not a positive integer"),
        ({**FACTORY, "lora_rank": 0}, "lora_rank: 0 is not a positive integer"),
        (
            {**RUN, "fsdp": "full_shard", "fsdp_config": {"state_dict_type": "y"}},
            "fsdp_config.state_dict_type: 'Y' is not a choice",
        ),
        ({**RUN, "use_peft": True, "lora_target_modules": "qproj"}, "lora_target_modules: 'qproj' matches no module"),
        ({**RUN, "attn_implementation": "flash_attention_2"}, "attn_implementation: 'flash_attention_2' needs"),
        (
            {
                "zero_optimization": {
                    "stage": 3,
                    "offload_param": {"device": "nvme", "nvme_path": "/x", "buffer_size": 1000},
                },
                "bf16": {"enabled": True},
                "train_micro_batch_size_per_gpu": 1,
            },
            "zero_optimization.offload_param.buffer_size: 1000 is less than the largest partition",
        ),
        ({"zero_optimization": {"stage": 2}, "train_micro_batch_size_per_gpu": 0}, "train_micro_batch_size_per_gpu: 0"),
        (
            {"zero_optimization": {"stage": 2, "reduce_bucket_size": 10**14}, "train_micro_batch_size_per_gpu": 1},
            "zero_optimization.reduce_bucket_size: 100000000000000 is not an integer in range",
        ),
        ({**ACCELERATE, "num_machines": 3}, "num_processes: 2 cannot be shared evenly by 3 nodes"),
        (
            {**ACCELERATE, "fsdp_config": {"fsdp_min_num_params": 2**50, "fsdp_auto_wrap_policy": "SIZE_BASED_WRAP"}},
            f"fsdp_config.fsdp_min_num_params: {2**50} is not an integer in range",
        ),
    ],
    ids=lambda each: each if isinstance(each, str) else "",
)
def test_the_files_own_key_is_named(values: dict[str, Any], said: str, tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    path.write_text(json.dumps(values))
    with pytest.raises(MemplanError) as raised:
        memplan.check(
            path, "gpt2", cluster={"gpu": "T4", "gpus": 2} if "distributed_type" not in values else {"gpu": "T4"}
        )
    assert str(raised.value).startswith(f"{path}: {said}")


def test_two_mistakes_are_one_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run.json"
    path.write_text(json.dumps({**RUN, "per_device_train_batch_size": -1, "gradient_accumulation_steps": 0}))
    assert cli.main(["check", str(path), "--gpu", "T4"]) == 2
    said = capsys.readouterr().err
    assert said.count("per_device_train_batch_size: -1") == said.count("gradient_accumulation_steps: 0") == 1
    assert "micro_batch_size: -1" not in said.replace("per_device_train_batch", "")


def test_an_option_is_named_as_an_option(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run.json"
    path.write_text(json.dumps(RUN))
    assert cli.main(["check", str(path), "--gpu", "T4", "--seq-len", "4096"]) == 2
    assert capsys.readouterr().err.startswith("--seq-len: 4096 is longer")
