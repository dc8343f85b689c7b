"""memplan.largest_batch and memplan.MemplanArguments, with the libraries' own objects."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")

import accelerate
import transformers
from tests.ranks import on_two_ranks

import memplan
from memplan import checks
from memplan.catalog import detect
from memplan.errors import MemplanError, PreflightError, SpecError, UnsupportedError
from memplan.integrations import largest

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore:memplan")

SMALL = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
}
ZERO: dict[str, Any] = {
    "zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}},
    "bf16": {"enabled": "auto"},
    "train_micro_batch_size_per_gpu": "auto",
    "train_batch_size": "auto",
    "gradient_accumulation_steps": "auto",
}
FSDP = {"fsdp": "full_shard", "fsdp_config": {"version": 2, "activation_checkpointing": True}}


@pytest.fixture(autouse=True)
def _bare(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    before = dict(os.environ)
    for name in list(os.environ):
        if name.startswith(("ACCELERATE_", "FSDP_")) or name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "RANK"):
            del os.environ[name]
    monkeypatch.setattr(detect, "read_nvml", lambda: ())
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    yield
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    transformers.integrations.deepspeed._hf_deepspeed_config_weak_ref = None
    os.environ.clear()
    os.environ.update(before)


def values(**fields: Any) -> dict[str, Any]:
    return {"output_dir": "out", "bf16": True, "optim": "adamw_torch", "per_device_train_batch_size": 3, **fields}


@pytest.mark.parametrize(
    ("fields", "cluster"),
    [
        ({}, "1xA100-40GB"),
        ({"gradient_checkpointing": True, "gradient_accumulation_steps": 4}, "1xRTX 3090"),
        ({"deepspeed": ZERO}, "4xRTX 3090"),
        (FSDP, "4xA100-40GB"),
        ({"eval_strategy": "steps", "per_device_eval_batch_size": 4}, "1xA100-80GB"),
    ],
    ids=["plain", "checkpointing", "zero3", "fsdp", "evaluation"],
)
def test_the_largest_fits_and_the_next_does_not(fields: dict[str, Any], cluster: str) -> None:
    told = {"seq_len": 1024, "packed": True}
    size = memplan.largest_batch(SMALL, values(**fields), training=told, cluster=cluster)
    assert size > 1
    for each, fits in ((size, True), (size + 1, False)):
        gpu = memplan.check(
            values(**fields), SMALL, {**told, "micro_batch_size": each}, cluster, software=checks.installed_software()
        ).estimate.gpu
        assert (gpu.high <= gpu.capacity) == fits


def test_the_batch_of_a_step_is_kept() -> None:
    found = [
        memplan.largest_batch(
            SMALL, values(deepspeed=ZERO), training={"seq_len": 1024}, cluster="4xRTX 3090", global_batch_size=total
        )
        for total in (64, 4 * 7, 4 * 13 * 64)
    ]
    assert [share % size for share, size in zip((16, 7, 13 * 64), found)] == [0, 0, 0]
    assert found[1] in (1, 7)
    any_size = memplan.largest_batch(SMALL, values(deepspeed=ZERO), training={"seq_len": 1024}, cluster="4xRTX 3090")
    assert max(found) <= any_size


def test_a_config_that_fixes_the_batch_of_a_step_is_heeded() -> None:
    config = {**ZERO, "train_batch_size": 48, "bf16": {"enabled": True}}
    size = memplan.largest_batch(SMALL, values(deepspeed=config), training={"seq_len": 512}, cluster="4xA100-80GB")
    assert 12 % size == 0
    with pytest.raises(SpecError, match="train_batch_size: 48 is not global_batch_size, 64"):
        memplan.largest_batch(SMALL, values(deepspeed=config), cluster="4xA100-80GB", global_batch_size=64)
    with pytest.raises(SpecError, match="train_micro_batch_size_per_gpu: 2 is fixed, and the Trainer refuses another"):
        memplan.largest_batch(
            SMALL, values(deepspeed={**ZERO, "train_micro_batch_size_per_gpu": 2}), cluster="4xA100-80GB"
        )


def test_deepspeed_without_a_trainer() -> None:
    config = {
        "zero_optimization": {"stage": 2},
        "train_micro_batch_size_per_gpu": 4,
        "train_batch_size": 96,
        "bf16": {"enabled": True},
    }
    size = memplan.largest_batch("gpt2", config, training={"seq_len": 1024}, cluster="4xRTX 3090")
    assert 24 % size == 0
    assert size > 1


def test_what_fits_with_no_batch_is_raised_with_what_does() -> None:
    with pytest.raises(PreflightError, match="Not even a micro-batch of 1 fits for certain") as raised:
        memplan.largest_batch("meta-llama/Llama-2-7b", values(), training={"seq_len": 4096}, cluster="1xA100-80GB")
    assert [each.code for each in raised.value.findings] == ["does-not-fit"]
    assert "GiB, fits" in str(raised.value)
    assert raised.value.report.setup["micro_batch_size"] == 1


def test_what_is_wrong_is_said() -> None:
    with pytest.raises(SpecError, match="gpu: none is known"):
        memplan.largest_batch(SMALL, values())
    with pytest.raises(SpecError, match="global_batch_size: 6 is no number of sequences that 4 ranks can share"):
        memplan.largest_batch(SMALL, values(), cluster="4xA100-80GB", global_batch_size=6)
    with pytest.raises(UnsupportedError):
        memplan.largest_batch(SMALL, values(optim="adalomo"), cluster="4xA100-80GB")
    with pytest.raises(PreflightError, match="quantized model that has no adapters"):
        memplan.largest_batch(SMALL, values(load_in_4bit=True), cluster="4xA100-80GB")


def test_it_takes_less_than_a_step_would() -> None:
    args = values(deepspeed=ZERO, gradient_checkpointing=True)
    memplan.largest_batch(SMALL, args, training={"seq_len": 64}, cluster="4xRTX 3090")  # imports
    start = time.process_time()
    memplan.largest_batch("meta-llama/Llama-2-70b", args, training={"seq_len": 4096}, cluster="16xH100-80GB")
    assert time.process_time() - start < 10  # a fourth of it on a machine that does nothing else


# -- a script's command line -------------------------------------------------------------------------------------------


def parsed(*words: str) -> memplan.MemplanArguments:
    (found,) = transformers.HfArgumentParser(memplan.MemplanArguments).parse_args_into_dataclasses(list(words))
    assert isinstance(found, memplan.MemplanArguments)
    return found


def test_the_defaults() -> None:
    found = parsed()
    assert found == memplan.MemplanArguments()
    assert (found.preflight, found.largest_batch) == ("exit", False)
    assert [type(each).__name__ for each in found.callbacks()] == ["MemoryCallback"]
    assert parsed("--watch_memory", "false").callbacks() == []


def test_it_stands_beside_training_arguments() -> None:
    parser = transformers.HfArgumentParser((transformers.TrainingArguments, memplan.MemplanArguments))
    assert "--preflight_seq_len" in parser.format_help()
    with pytest.raises(SystemExit):
        parsed("--preflight", "shout")
    with pytest.raises(SpecError, match="preflight: 'shout' is not known"):
        memplan.MemplanArguments(preflight="shout")


def test_what_it_says_wins(tmp_path: Path) -> None:
    args = transformers.TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[], bf16=True)
    ours = parsed("--preflight_seq_len", "4096", "--preflight_cluster", "1xA100-40GB", "--preflight", "raise")
    with pytest.raises(PreflightError):
        ours.prepare("meta-llama/Llama-2-7b", args, training={"seq_len": 16})
    off = parsed("--preflight", "off", "--preflight_cluster", "1xA100-40GB")
    assert off.prepare("meta-llama/Llama-2-7b", args) is args
    with pytest.raises(SystemExit) as ended:
        parsed("--preflight_cluster", "1xA100-40GB").prepare("meta-llama/Llama-2-7b", args)
    assert ended.value.code == 1


def test_arguments_with_the_largest_batch(tmp_path: Path) -> None:
    args = transformers.TrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, report_to=[], bf16=True, gradient_accumulation_steps=16,
        per_device_train_batch_size=2, deepspeed=ZERO,
    )  # fmt: skip
    ours = parsed("--largest_batch", "--preflight_cluster", "2xRTX 3090", "--preflight_seq_len", "1024")
    found = ours.prepare(transformers.LlamaConfig(**SMALL), args)
    size = found.per_device_train_batch_size
    assert size * found.gradient_accumulation_steps == 32
    assert size > 2
    config = found.hf_deepspeed_config.config
    assert (config["train_micro_batch_size_per_gpu"], config["train_batch_size"]) == (size, 32)
    assert (args.per_device_train_batch_size, args.gradient_accumulation_steps) == (2, 16)


SCRIPT = """
import json, sys
import torch, transformers
import memplan

class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 32
    def __getitem__(self, index):
        tokens = torch.arange(24) + index
        return {"input_ids": tokens, "labels": tokens}

parser = transformers.HfArgumentParser((transformers.TrainingArguments, memplan.MemplanArguments))
args, memory = parser.parse_args_into_dataclasses()
config = transformers.LlamaConfig(
    hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    vocab_size=256, max_position_embeddings=64,
)
args = memory.prepare(config, args)
seen = []
class Look(transformers.TrainerCallback):
    def on_train_begin(self, args, state, control, model=None, **_):
        look = lambda _, given, named: seen.append(list(named["input_ids"].shape))
        model.register_forward_pre_hook(look, with_kwargs=True)
model = transformers.LlamaForCausalLM(config)
trainer = transformers.Trainer(model=model, args=args, train_dataset=Rows(), callbacks=[*memory.callbacks(), Look()])
trainer.train()
if trainer.is_world_process_zero():
    print("SEEN", json.dumps(seen))
"""


@pytest.mark.parametrize("stage", [None, 2], ids=["ddp", "zero2"])
def test_a_script_trains_with_the_batch_that_was_found(stage: int | None, tmp_path: Path) -> None:
    words = ["--output_dir", str(tmp_path), "--use_cpu", "--bf16", "--report_to", "none", "--max_steps", "2"]
    words += ["--per_device_train_batch_size", "1", "--gradient_accumulation_steps", "4", "--save_strategy", "no"]
    words += ["--largest_batch", "--preflight_cluster", "2xT4", "--preflight_seq_len", "24", "--disable_tqdm", "true"]
    if stage is not None:
        (tmp_path / "ds.json").write_text(json.dumps({**ZERO, "zero_optimization": {"stage": stage}}))
        words += ["--deepspeed", str(tmp_path / "ds.json")]
    ended = on_two_ranks(SCRIPT, tmp_path, *words)
    assert ended.returncode == 0, ended.stderr[-3000:]
    seen = json.loads(next(line for line in ended.stdout.split("\n") if line.startswith("SEEN"))[5:])
    assert seen == [[4, 24]] * 2


def test_an_object_that_cannot_be_read_is_no_error_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """On one rank alone it would leave the others in all_reduce."""

    class Broken:
        def __getattr__(self, name: str) -> Any:
            raise RuntimeError("gone")

    asked = []
    monkeypatch.setattr(largest, "_least_of_all_ranks", lambda size: asked.append(size) or size)
    for given in ((Broken(), values()), ("meta-llama/Llama-3.2-1B", Broken())):
        with pytest.raises(MemplanError, match=r"^memplan: The run was not checked: RuntimeError: gone"):
            memplan.largest_batch(*given, cluster="1xA100-40GB")
    assert asked == [0, 0]


@pytest.mark.parametrize("total", [2 * (2**61 - 1), 10**400, -2, 0, True, "8", 2**40 + 2])
def test_a_batch_that_no_run_has_is_refused_soon(total: Any) -> None:
    start = time.process_time()
    with pytest.raises(SpecError, match=r"^global_batch_size: "):
        memplan.largest_batch(
            "gpt2", values(), training={"seq_len": 64}, cluster="2xA100-40GB", global_batch_size=total
        )
    assert time.process_time() - start < 5


def test_the_largest_batch_that_is_taken_is_shared_out() -> None:
    found = memplan.largest_batch(
        "gpt2", values(), training={"seq_len": 64}, cluster="2xA100-40GB", global_batch_size=2**16
    )
    assert 2**16 % found == 0


@pytest.mark.parametrize(
    ("name", "value"),
    [("per_device_train_batch_size", -3), ("gradient_accumulation_steps", 0), ("gradient_accumulation_steps", "2")],
)
def test_a_batch_of_a_script_is_refused_by_its_name(name: str, value: Any) -> None:
    from types import SimpleNamespace

    args = SimpleNamespace(**{"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, name: value})
    with pytest.raises(SpecError, match=f"^{name}: "):
        memplan.MemplanArguments(largest_batch=True).prepare("gpt2", args)
