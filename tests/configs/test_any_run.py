"""Whatever a file or a list of arguments holds, a setup or an error of memplan's comes of it."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import yaml

from memplan import checks, findings
from memplan.configs import llama_factory
from memplan.configs.argument_keys import REMOVED_ARGUMENTS, SCRIPT_ARGUMENTS, TRAINING_ARGUMENTS
from memplan.configs.keys import ACCELERATE, DEEPSPEED
from memplan.configs.run import read_run, setup_of
from memplan.errors import MemplanError
from memplan.specs.training import TrainingSpec

VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, 8, -1, 2**70, 0.5, 1e300, float("nan"), "", "auto", "true", "no", "cpu", "nvme", "4"),
    *("bf16", "full_shard auto_wrap", "$X", "a/b", "{", "{}", '{"stage": 3}', "\0", "../x.json", "é", [], [1], ["a"]),
    *({}, {"a": 1}, {"enabled": "auto"}, {"stage": 3}, {"device": "cpu"}, {"r": 8}, {"load_in_4bit": True}),
)
NAMES = [
    *(*TRAINING_ARGUMENTS, *SCRIPT_ARGUMENTS, *REMOVED_ARGUMENTS, *llama_factory.known_names()),
    *(*DEEPSPEED[""], *DEEPSPEED["zero_optimization"], *ACCELERATE[""], *ACCELERATE["fsdp_config"], "base_model", "x"),
]
SEEDS: tuple[dict[str, Any], ...] = (
    {"model_name_or_path": "gpt2", "per_device_train_batch_size": 1, "seq_len": 8},
    {"stage": "sft", "do_train": True, "finetuning_type": "lora", "model_name_or_path": "gpt2", "cutoff_len": 8},
    {"zero_optimization": {"stage": 2}, "train_micro_batch_size_per_gpu": 1},
    {"distributed_type": "FSDP", "num_processes": 2, "fsdp_config": {"fsdp_version": 2}},
    {},
)


def values(rng: random.Random) -> dict[str, Any]:
    data = dict(rng.choice(SEEDS))
    for name in rng.sample(NAMES, rng.randrange(1, 8)):
        data[name] = rng.choice(VALUES)
    if rng.random() < 0.2:
        data["deepspeed"] = {"zero_optimization": {rng.choice(NAMES): rng.choice(VALUES)}, "bf16": rng.choice(VALUES)}
    if rng.random() < 0.2:
        data |= {"fsdp": rng.choice(VALUES), "fsdp_config": {rng.choice(NAMES): rng.choice(VALUES)}}
    return data


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.mark.parametrize("seed", range(20))
def test_values(seed: int) -> None:
    rng, messages = random.Random(seed), list[str]()
    for _ in range(150):
        data = values(rng)
        try:
            run = read_run(data)
            setup_of(run, TrainingSpec(), {}, rng.choice([1, 2, 8]), [])
        except MemplanError as error:
            messages.append(str(error))
    assert all(messages)


@pytest.mark.parametrize("seed", range(5))
def test_checks_of_what_can_be_read(seed: int) -> None:
    """The findings of any setup that can be estimated."""
    rng = random.Random(1000 + seed)
    estimated = 0
    for _ in range(60):
        try:
            found = checks.check(values(rng), None, {"seq_len": 8, "micro_batch_size": 1}, {"gpu": "T4", "gpus": 2})
        except MemplanError:
            continue
        estimated += 1
        assert all(finding.message and finding.remedy and finding.path for finding in found.findings)
        assert found == type(found).from_json(found.to_json())
    assert estimated
    assert len(findings.CHECKS) == len(set(findings.CHECKS))


@pytest.mark.parametrize("seed", range(10))
def test_texts(seed: int, tmp_path: Path) -> None:
    """Files of any format, whole and cut off, and commands."""
    rng, messages = random.Random(2000 + seed), list[str]()
    words = ("torchrun", "deepspeed", "accelerate launch", "a.py", "--nproc_per_node", "--deepspeed", "'", '"', "\\\n")
    words += ("$X", "X=1", "export A=$A", "#", "\n", "&&", "--bf16", "true", "=", "--=", "--config_file", "-m", "2>&1")
    for number in range(60):
        data = values(rng)
        text = rng.choice(
            (
                lambda data=data: json.dumps(data),
                lambda data=data: yaml.safe_dump(json.loads(json.dumps(data))),
                lambda: " ".join(rng.choices(words, k=rng.randrange(1, 15))),
            )
        )()
        path = tmp_path / f"{number}.{rng.choice(('json', 'yaml', 'sh'))}"
        path.write_text(text[: rng.randrange(1, len(text) + 1)] if rng.random() < 0.3 else text)
        try:
            setup_of(read_run(path), TrainingSpec(), {}, 2, [])
        except MemplanError as error:
            messages.append(str(error))
    assert all(messages)


@pytest.mark.parametrize("seed", range(5))
def test_lists_of_arguments(seed: int) -> None:
    rng, messages = random.Random(3000 + seed), list[str]()
    for _ in range(100):
        arguments: list[Any] = []
        for name, value in values(rng).items():
            arguments += [f"--{name}", str(value)] if rng.random() < 0.8 else [f"--{name}"]
        try:
            setup_of(read_run(arguments), TrainingSpec(), {}, 2, [])
        except MemplanError as error:
            messages.append(str(error))
    assert all(messages)
