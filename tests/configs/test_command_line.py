"""``--engine-config`` and ``estimate(engine_config=...)``: what is answered, and what bad input ends with."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import memplan
from memplan import cli
from memplan.catalog import detect
from memplan.errors import SpecError

TINY = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "intermediate_size": 128,
    "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 500, "max_position_embeddings": 256,
}  # fmt: skip
AUTO: dict[str, Any] = {
    "bf16": {"enabled": "auto"},
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "zero_optimization": {
        "stage": 3,
        "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": "auto",
        "offload_optimizer": {"device": "cpu", "pin_memory": True},
        "sub_group_size": 1e9,
    },
}


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(detect, "read_nvml", lambda: ())
    monkeypatch.chdir(tmp_path)
    Path("config.json").write_text(json.dumps(TINY))

    def call(*arguments: str, gpu: str = "A100-80GB") -> tuple[int, str, str]:
        code = cli.main(["estimate", "config.json", "--seq-len", "64", "--gpu", gpu, *arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def write(name: str, content: object) -> str:
    Path(name).write_text(content if isinstance(content, str) else json.dumps(content))
    return name


def refused(result: tuple[int, str, str]) -> str:
    code, out, err = result
    assert (code, out) == (2, "")
    assert "Traceback" not in err
    assert err.endswith("\n")
    return err.removesuffix("\n")


def test_a_file_says_what_options_say(run: Callable[..., Any]) -> None:
    options = ["--strategy=zero3", "--offload-optimizer=cpu", "--mixed-precision=bf16", "--micro-batch-size=2"]
    written = {
        **AUTO,
        "bf16": {"enabled": True},
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 3,
        "zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}},
    }
    of_options = json.loads(run("--gpus", "4", *options, "--grad-accum-steps=3", "--json")[1])
    of_file = json.loads(run("--gpus", "4", "--engine-config", write("ds.json", written), "--json")[1])
    assert of_file == of_options


def test_an_option_wins_with_a_note(run: Callable[..., Any]) -> None:
    written = {**AUTO, "train_micro_batch_size_per_gpu": 4}
    code, out, _ = run("--gpus", "2", "--engine-config", write("ds.json", written), "--micro-batch-size", "1",
                       "--host-memory", "64")  # fmt: skip
    assert code == 0
    assert "micro_batch_size 1, as asked, in place of 4 in ds.json" in out
    answer = json.loads(run("--gpus", "2", "--engine-config", "ds.json", "--micro-batch-size", "1", "--json")[1])
    assert answer["setup"]["micro_batch_size"] == 1
    notes = [each["source"] for each in answer["assumptions"] if each["name"] == "engine config"]
    assert notes == ["micro_batch_size 1, as asked, in place of 4 in ds.json"]


def test_an_option_may_complete_a_strategy(run: Callable[..., Any]) -> None:
    answer = json.loads(run("--gpus", "2", "--engine-config", write("ds.json", AUTO), "--offload-param", "cpu",
                            "--json")[1])  # fmt: skip
    assert (answer["setup"]["offload_optimizer"], answer["setup"]["offload_param"]) == ("cpu", "cpu")
    assert answer["setup"]["engine_config"]["reduce_bucket_size"] == "auto"


def test_an_accelerate_file_names_gpus_and_nodes(run: Callable[..., Any]) -> None:
    text = (
        "distributed_type: FSDP\nnum_processes: 16\nnum_machines: 2\nmixed_precision: bf16\n"
        "fsdp_config:\n  fsdp_version: 2\n  fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP\n"
    )
    answer = json.loads(run("--engine-config", write("a.yaml", text), "--json")[1])
    setup = answer["setup"]
    assert (setup["strategy"], setup["gpus"], setup["nodes"], setup["mixed_precision"]) == ("fsdp", 16, 2, "bf16")


BAD: list[tuple[str, object, str]] = [
    ("ds.json", "{", "ds.json: is not JSON: "),
    ("ds.json", {**AUTO, "zero_optimisation": {}}, "ds.json: zero_optimisation: {} is given to a key that DeepSpeed"),
    (
        "ds.json",
        {**AUTO, "zero_optimization": {"stage": 3, "mics_shard_size": 2}},
        "key that DeepSpeed 0.19 has removed",
    ),
    ("ds.json", {**AUTO, "zero_optimization": {"stage": 7}}, "ds.json: zero_optimization.stage: 7 is not a stage"),
    (
        "ds.json",
        {**AUTO, "zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}},
        "ds.json: zero_optimization.offload_param.nvme_path: missing. Add the folder",
    ),
    ("ds.json", {**AUTO, "train_batch_size": 7}, "ds.json: train_batch_size: 7 is not 1 sequences x 1 accumulation"),
    ("ds.json", {**AUTO, "fp16": {"enabled": True}, "bf16": {"enabled": True}}, "cannot go with bf16, which is"),
    ("ds.json", '{"train_micro_batch_size_per_gpu": NaN}', "nan is not a positive integer"),
    ("ds.json", '{"train_micro_batch_size_per_gpu": 1e30}', "1e+30 is not a positive integer"),
    ("ds.json", '{"train_micro_batch_size_per_gpu": Infinity}', "inf is not a positive integer"),
    ("ds.json", '{"train_micro_batch_size_per_gpu": true}', "true is not a positive integer"),
    (
        "ds.json",
        {**AUTO, "zero_optimization": {"stage": 2, "reduce_bucket_size": 1e18}},
        "zero_optimization.reduce_bucket",
    ),
    ("a.yaml", "distributed_type: !!python/none\n", "a.yaml: is not plain YAML"),
    ("a.yaml", "distributed_type: FSDP\nnum_processes: 6\nnum_machines: 4\n", "6 cannot be shared evenly by 4 nodes"),
    ("a.yaml", "distributed_type: FSDP\nnum_processes: two\n", "a.yaml: num_processes: 'two' is not a positive"),
    ("a.yaml", "distributed_type: FSDP\n", "a.yaml: num_processes: missing, which accelerate refuses. Add it, or give"),
    ("a.yaml", "distributed_type: TPU\n", "a.yaml: distributed_type: 'TPU' is not a kind that accelerate knows"),
    ("a.yaml", "distributed_type: MEGATRON_LM\n", "'MEGATRON_LM' is not modelled"),
]


@pytest.mark.parametrize(("name", "content", "message"), BAD, ids=lambda value: str(value)[:50])
def test_bad_files(run: Callable[..., Any], name: str, content: object, message: str) -> None:
    assert message in refused(run("--engine-config", write(name, content)))


def test_bad_paths(run: Callable[..., Any]) -> None:
    assert refused(run("--engine-config", "none.json")).startswith("--engine-config: 'none.json' does not exist.")
    assert refused(run("--engine-config", ".")) == "--engine-config: '.' is a directory. Give the file in it."
    assert refused(run("--engine-config", "/dev/zero")).startswith("--engine-config: '/dev/zero' is not a regular file")
    Path("binary").write_bytes(bytes(range(256)))
    assert "is not UTF-8 text" in refused(run("--engine-config", "binary"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--strategy zero2 --offload-param cpu", "--offload-param: 'cpu' cannot go with zero2. Use --strategy zero3"),
        (
            "--strategy zero2 --offload-optimizer nvme",
            "--offload-optimizer: 'nvme' cannot go with zero2. Use --strategy",
        ),
        ("--strategy zero3 --gpus 6 --nodes 4", "--gpus: 6 cannot be shared evenly by 4 nodes. Use a multiple of 4"),
    ],
)
def test_bad_combinations_of_options(run: Callable[..., Any], arguments: str, message: str) -> None:
    assert message in refused(run(*arguments.split()))


def test_bf16_on_a_gpu_without_it_is_said(run: Callable[..., Any]) -> None:
    """As by the engine: torch emulates it, so that DeepSpeed's check passes (torch.cuda.is_bf16_supported)."""
    path = write("ds.json", {**AUTO, "bf16": {"enabled": True}})
    for arguments, said in (
        (["--engine-config", path], True),
        (["--engine-config", path, "--mixed-precision=fp16"], False),
    ):
        code, out, _ = run(*arguments, "--gpus=2", "--host-memory=64", gpu="T4")
        assert code == 0
        assert ("T4 has no units for it" in out.replace("\n", " ")) is said


def test_int8_under_zero3_of_a_file_is_said_to_stay_whole(run: Callable[..., Any]) -> None:
    _, out, errors = run("--engine-config", write("ds.json", AUTO), "--quantization", "int8", "--lora-rank", "8")
    assert "int8 weights" in out
    assert not errors


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"zero_quantized_gradients": True, "reduce_scatter": False}, "zero_quantized_gradients: true is refused"),
        (
            {"zero_hpz_partition_size": 2, "offload_param": {"device": "nvme", "nvme_path": "/nvme"}},
            "zero_hpz_partition_size: 2 fails in DeepSpeed with offload_param nvme",
        ),
        (
            {"offload_optimizer": {"device": "nvme", "nvme_path": "/nvme", "ratio": 0.5}},
            "ratio: 'less than 1' is not modelled",
        ),
    ],
)
def test_keys_that_the_engine_refuses_or_memplan_does_not_model(
    run: Callable[..., Any], changes: dict[str, Any], message: str
) -> None:
    assert message in refused(
        run("--gpus=2", "--engine-config", write("ds.json", {**AUTO, "zero_optimization": {"stage": 3, **changes}}))
    )


@pytest.mark.parametrize(
    ("stage", "key", "value"),
    [
        (2, "communication_data_type", "fp32"),  # the bucket is cast to be reduced
        (3, "stage3_model_persistence_threshold", 300),  # of five norms of 64 weights, 320, one is no longer kept
    ],
)
def test_a_key_of_the_file_changes_the_answer(run: Callable[..., Any], stage: int, key: str, value: Any) -> None:
    def peak(changes: dict[str, Any]) -> Any:
        zero = {"stage": stage, **(changes if key.startswith("stage3") else {})}
        values = {**AUTO, "zero_optimization": zero, **(changes if not key.startswith("stage3") else {})}
        return json.loads(run("--gpus=2", "--engine-config", write("ds.json", values), "--json")[1])["gpu"]["phases"]

    assert peak({key: value}) != peak({})


def test_gradients_reduced_in_the_models_type_are_the_default(run: Callable[..., Any]) -> None:
    plain = json.loads(run("--gpus=2", "--engine-config", write("a.json", AUTO), "--json")[1])
    same = json.loads(
        run("--gpus=2", "--engine-config", write("b.json", {**AUTO, "communication_data_type": "bf16"}), "--json")[1]
    )
    assert same["gpu"] == plain["gpu"]


def test_in_python(run: Callable[..., Any]) -> None:
    cluster = {"gpu": "A100-80GB", "gpus": 2}
    of_values = memplan.estimate("config.json", {"seq_len": 64}, cluster, engine_config=AUTO)
    of_path = memplan.estimate("config.json", {"seq_len": 64}, cluster, engine_config=Path(write("ds.json", AUTO)))
    assert of_values == of_path
    assert of_values.setup["strategy"] == "zero3"
    both = memplan.estimate("config.json", {"seq_len": 64}, cluster, "zero2", engine_config=AUTO)
    assert both.setup["strategy"] == "zero2"
    assert both.assumptions[-1].source == "strategy zero2, as asked, in place of zero3 in engine_config"
    with pytest.raises(SpecError, match="is not a config"):
        memplan.estimate("config.json", engine_config=[1])  # type: ignore[arg-type]


def test_a_name_of_a_gpu_says_nothing_about_their_number(run: Callable[..., Any]) -> None:
    values = {"distributed_type": "MULTI_GPU", "num_processes": 4}
    assert memplan.estimate("config.json", {"seq_len": 64}, "A100-80GB", engine_config=values).setup["gpus"] == 4
    assert memplan.estimate("config.json", {"seq_len": 64}, "2xA100-80GB", engine_config=values).setup["gpus"] == 2


@pytest.mark.parametrize("task", ["load", "generate"])
def test_a_config_is_of_training(run: Callable[..., Any], task: str) -> None:
    message = refused(run("--engine-config", write("ds.json", AUTO), "--task", task))
    assert message == (
        f"--engine-config: 'ds.json' has no use in task {task}: it is of a training run. "
        "Leave it out, or use --task train."
    )
