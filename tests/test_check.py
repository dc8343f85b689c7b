"""What the files of a run need."""

from __future__ import annotations

import json
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import memplan
from memplan import api, checks, cli, planning
from memplan.errors import SpecError
from memplan.render import table

CLUSTER = memplan.ClusterSpec(gpu="A100-80GB", gpus=2, host_memory="1TiB")
AUTO = {
    "zero_optimization": {"stage": 3},
    "bf16": {"enabled": "auto"},
    "train_micro_batch_size_per_gpu": "auto",
    "train_batch_size": "auto",
    "gradient_accumulation_steps": "auto",
}


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(AUTO))
    return path


def test_a_config_of_an_engine_is_what_estimate_says_of_it(config: Path) -> None:
    found = checks.check(config, "gpt2", {"seq_len": 128}, CLUSTER)
    assert found.estimate == api.estimate("gpt2", {"seq_len": 128}, CLUSTER, engine_config=config)
    assert (found.verdict, [each.code for each in found.findings]) == ("fits", ["no-weights-saved"])
    assert memplan.Check.from_json(found.to_json()) == found
    assert set(found.to_dict()) >= {"estimate", "verdict", "findings"}


def test_no_path_is_not_the_present_folder() -> None:
    with pytest.raises(SpecError, match=r"^path: '' names no file"):
        memplan.check("")


def test_a_folder_of_a_plan_needs_what_was_planned(tmp_path: Path) -> None:
    plan = planning.plan("gpt2", {"seq_len": 128}, CLUSTER, global_batch_size=4)
    plan.write(tmp_path / "run")
    assert plan.best is not None
    found = checks.check(tmp_path / "run", cluster={"gpu": "A100-80GB", "host_memory": "1TiB"})
    assert found.estimate.gpu == plan.best.estimate.gpu
    longer = checks.check(tmp_path / "run", None, {"seq_len": 512}, {"gpu": "A100-80GB", "gpus": 4})
    assert (longer.estimate.setup["seq_len"], longer.estimate.cluster["gpus"]) == (512, 4)


@pytest.mark.parametrize(
    ("path", "model", "message"),
    [
        ("ds.json", None, "ds.json: does not name the model. Give it, as in --model MODEL."),
        ("nothing.json", "gpt2", "path: "),
        (
            ".",
            None,
            "training_args.json: missing. Give a folder that memplan has written, or the file in it that starts the",
        ),
    ],
)
def test_bad_input(config: Path, path: str, model: Any, message: str) -> None:
    with pytest.raises(SpecError) as error:
        checks.check(config.parent / path, model, cluster=CLUSTER)
    assert message in str(error.value)


ARGUMENTS: dict[str, Any] = {"model_name_or_path": "gpt2", "seq_len": 64, "packed": True, "bf16": True}


@pytest.mark.parametrize(
    ("change", "memory", "code"),
    [
        ({}, "16", 0),
        ({"warmup_ratio": 0.1}, "16", 1),  # a finding that is an error
        ({"packed": False}, "16", 0),  # one that is not
        ({}, "1", 1),
        ({"bf16": True, "fp16": True}, "16", 2),
        ({"per_device_train_batch_size": 0}, "16", 2),
    ],
)
def test_exit_codes(
    change: dict[str, Any],
    memory: str,
    code: int,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    path = tmp_path / "args.json"
    path.write_text(json.dumps(ARGUMENTS | change))
    assert cli.main(["check", str(path), "--gpu", "A100-80GB", "--gpus", "2", "--gpu-memory", memory]) == code
    captured = capsys.readouterr()
    assert bool(captured.err) == (code == 2)
    assert captured.err.count("\n") == (code == 2)


def test_a_tight_one_exits_with_3(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    estimated = checks.check(ARGUMENTS, cluster={**CLUSTER.to_dict(), "gpu": "A100-80GB"}).estimate
    assert estimated is not None
    path = tmp_path / "args.json"
    path.write_text(json.dumps(ARGUMENTS))
    middle = (estimated.gpu.low + estimated.gpu.high) // 2 / 2**30
    assert cli.main(["check", str(path), "--gpu", "A100-80GB", "--gpus", "2", "--gpu-memory", f"{middle:.3f}"]) == 3
    capsys.readouterr()


@pytest.mark.parametrize("width", [80, 120])
def test_the_page_is_as_wide_as_the_terminal(width: int) -> None:
    change = {"warmup_ratio": 0.1, "packed": False, "device_map": "auto"}
    found = checks.check(ARGUMENTS | change, cluster=CLUSTER)
    lines = table.check_text(found, console=Console(width=width, no_color=True)).split("\n")
    assert max(map(len, lines)) <= width
    page = "\n".join(lines)
    assert "2 errors, 1 info in the files" in page
    assert "  error      removed-argument  values: warmup_ratio" in lines
    for finding in found.findings:
        assert " ".join(finding.remedy.split()) in " ".join(page.split())


def test_a_page_without_an_estimate() -> None:
    found = checks.check(ARGUMENTS | {"load_in_8bit": True}, cluster=CLUSTER)
    page = table.check_text(found, console=Console(width=80, no_color=True))
    assert page.startswith("1 error in the files\n  error      quantized-full  values: load_in_8bit")


def test_what_an_earlier_version_has_is_not_removed_there() -> None:
    values = ARGUMENTS | {"warmup_ratio": 0.1}
    assert [each.code for each in checks.check(values, cluster=CLUSTER).findings] == ["removed-argument"]
    assert checks.check(values, cluster=CLUSTER, software="transformers=4.57").findings == ()


def test_the_installed_libraries_are_what_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    values = ARGUMENTS | {"warmup_ratio": 0.1, "gradient_checkpointing": True}
    versions = {"transformers": "4.57.1", "torch": "2.8.0+cu128"}

    def version(library: str) -> str:
        if library not in versions:
            raise metadata.PackageNotFoundError(library)
        return versions[library]

    monkeypatch.setattr(metadata, "version", version)
    found = checks.check(values, cluster=CLUSTER)
    assert found.findings == ()
    assert found.estimate is not None
    assert found.estimate.setup["use_reentrant"]
    assert found == checks.check(values, cluster=CLUSTER, software="transformers=4.57.1,torch=2.8.0")


def test_only_training_has_files() -> None:
    with pytest.raises(SpecError, match="task: 'generate' is not a training run, which files are of"):
        checks.check(ARGUMENTS, None, {"task": "generate", "max_new_tokens": 8}, CLUSTER)


def test_a_total_that_no_micro_batch_makes_up_is_a_finding_too(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 2}, "train_batch_size": 7}))
    found = checks.check(path, "facebook/opt-1.3b", {"seq_len": 512}, "2xA100-80GB")
    assert [each.code for each in found.findings] == ["batch-product"]
    assert found.estimate is not None
    assert found.estimate.setup["micro_batch_size"] == 3


@pytest.mark.parametrize(
    ("more", "training", "lengths", "asked"),
    [
        ({}, {}, None, True),
        ({}, {"seq_len": 64}, None, False),
        ({}, {}, [20, 30], False),
        ({"max_length": 128}, {}, None, False),
    ],
)
def test_the_length_is_asked_for_where_nothing_says_it(
    more: dict[str, Any], training: dict[str, Any], lengths: list[int] | None, asked: bool
) -> None:
    arguments = {"output_dir": "out", "per_device_train_batch_size": 1} | more
    found = checks.check(arguments, "EleutherAI/pythia-70m", training, "1xT4", lengths=lengths)
    assert ("seq-len-unknown" in [each.code for each in found.findings]) == asked


FOR_16: dict[str, Any] = {
    "train_batch_size": 64,
    "train_micro_batch_size_per_gpu": 4,
    "gradient_accumulation_steps": 1,
    "bf16": {"enabled": True},
    "zero_optimization": {"stage": 2, "reduce_bucket_size": 10**6},
}
_REST = (
    "a.py --model_name_or_path gpt2 --output_dir o --bf16 True --model_max_length 512 "
    "--per_device_train_batch_size 4 --deepspeed ds.json"
)
_OF_SLURM = f"torchrun --nproc_per_node 8 --nnodes $SLURM_NNODES {_REST}"


@pytest.mark.parametrize(
    ("command", "nodes"),
    [
        (f"deepspeed {_REST}", 2),
        (f"torchrun --nproc_per_node gpu {_REST}", 2),
        (f"torchrun --nproc_per_node $(nvidia-smi -L | wc -l) {_REST}", 2),
        (f"srun {_OF_SLURM}", 2),
        (f"#!/bin/bash\n#SBATCH --nodes=2\nsrun {_OF_SLURM}", 2),
        (f"#!/bin/bash\n#SBATCH --nodes=4\nsrun {_OF_SLURM.replace('8 ', '4 ', 1)}", 4),
        (f"deepspeed --hostfile hosts {_REST}", 2),
        (f"deepspeed -H hosts4 --num_gpus 4 {_REST}", 4),
        (f"deepspeed --hostfile elsewhere {_REST}", 2),
    ],
)
def test_a_batch_is_of_the_ranks_that_are_not_said(command: str, nodes: int, tmp_path: Path) -> None:
    """The files are right for 16 GPUs, and no error rests on a number of them that nobody gave."""
    (tmp_path / "ds.json").write_text(json.dumps(FOR_16))
    (tmp_path / "hosts").write_text("# two\na slots=8\nb slots=8\n")
    (tmp_path / "hosts4").write_text("".join(f"{name} slots=8\n" for name in "abcd"))
    (tmp_path / "run.sh").write_text(command + "\n")
    found = checks.check(tmp_path / "run.sh", cluster={"gpu": "A100-80GB"})
    assert [each.code for each in found.findings] == ["padding"]
    assert found.estimate is not None
    assert (found.estimate.cluster["gpus"], found.estimate.cluster["nodes"]) == (16, nodes)
    said = any("do not say on how many GPUs" in each.source for each in found.estimate.assumptions)
    assert said == ("hosts" not in command and "#SBATCH" not in command)


def test_a_batch_of_deepspeeds_own_is_of_the_ranks_that_are_not_said() -> None:
    def codes(**changes: Any) -> list[str]:
        found = checks.check({**FOR_16, **changes}, "gpt2", {"seq_len": 512}, memplan.ClusterSpec(gpu="A100-80GB"))
        return [each.code for each in found.findings]

    assert codes() == []
    assert codes(train_batch_size=20, gradient_accumulation_steps="auto") == []
    assert codes(train_batch_size=63) == ["batch-product"]  # which no number of GPUs makes it
    known = memplan.ClusterSpec(gpu="A100-80GB", gpus=8)
    found = checks.check(FOR_16, "gpt2", {"seq_len": 512}, known)
    assert [each.code for each in found.findings] == ["batch-product"]
    arguments = {**ARGUMENTS, "per_device_train_batch_size": 5, "deepspeed": FOR_16}
    found = checks.check(arguments, cluster=memplan.ClusterSpec(gpu="A100-80GB"))
    assert (
        "train_batch_size is 64, but batch x accumulation, of which it is no multiple, is 5"
        in found.findings[0].message
    )


def test_a_hostfile_is_read_as_deepspeed_reads_it(tmp_path: Path) -> None:
    (tmp_path / "ds.json").write_text(json.dumps({**FOR_16, "train_batch_size": "auto"}))
    (tmp_path / "run.sh").write_text(f"deepspeed --hostfile hosts {_REST}\n")
    for text, problem in (("a slots=8\na slots=8\n", "names a host twice"), ("a 8\n", "is no line"), ("", "no host")):
        (tmp_path / "hosts").write_text(text)
        with pytest.raises(SpecError, match=problem):
            checks.check(tmp_path / "run.sh", cluster={"gpu": "A100-80GB"})
    (tmp_path / "hosts").write_text("a slots=8\nb slots=4\n")
    found = checks.check(tmp_path / "run.sh", cluster={"gpu": "A100-80GB"})
    assert found.estimate is not None
    assert any("different numbers of GPUs" in each.source for each in found.estimate.assumptions)


@pytest.mark.parametrize("said", [{}, {"packing": False}, {"max_length": 128}])
def test_a_trainers_texts_are_padded_in_its_files_as_in_its_script(said: dict[str, Any]) -> None:
    values = {"output_dir": "out", "bf16": True, **said}
    asked = {"seq_len": 128, "dtype": "bfloat16"}
    found = memplan.check(values, "google-t5/t5-small", asked, "1xA100-80GB")
    assert found.estimate is not None
    assert found.estimate.setup["packed"] is False
    before = memplan.preflight("google-t5/t5-small", values, training=asked, cluster="1xA100-80GB")
    assert before.check is not None
    assert before.check.estimate == found.estimate
    assert [each.code for each in found.findings] == ["padding"]


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"fsdp": True, "fsdp_config": {"transformer_layer_cls_to_wrap": ["No"]}, "bf16": True}, "fsdp_config."),
        (
            {
                "distributed_type": "FSDP",
                "num_processes": 2,
                "fsdp_config": {
                    "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
                    "fsdp_transformer_layer_cls_to_wrap": "No",
                },
            },
            "fsdp_config.fsdp_",
        ),
    ],
)
def test_an_error_of_the_engine_names_the_key(values: dict[str, Any], key: str) -> None:
    with pytest.raises(SpecError, match=rf"^values: {key}transformer_layer_cls_to_wrap: 'No' is not a class"):
        memplan.check({**values}, "gpt2", {"seq_len": 64}, "2xA100-80GB")
