"""What fuzzing has found, each as it was written."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from tests.fuzz.targets import HERE, LLAMA, SHORT

import memplan
from memplan import cli
from memplan.errors import MemplanError, SpecError, UnsupportedError

UNREACHED: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "vocab_size": 100,
    "max_position_embeddings": 64,
    "model_type": "deberta-v2",
    "architectures": ["DebertaV2ForSequenceClassification"],
    "relative_attention": True,
    "pos_att_type": None,
    "position_biased_input": False,
    "position_buckets": 8,
    "share_att_key": True,
    "norm_rel_ebd": "layer_norm",
    "type_vocab_size": 0,
}


@pytest.mark.parametrize("strategy", ["zero1", "zero2", "zero3"])
def test_a_weight_whose_gradient_is_late(strategy: str) -> None:
    """KeyError: without pos_att_type a layer projects positions that nothing looks at."""
    with pytest.raises(UnsupportedError, match="where the loss does not reach"):
        memplan.estimate(UNREACHED, SHORT, HERE, strategy)
    assert memplan.estimate(UNREACHED, SHORT, HERE, "ddp").verdict == "fits"


def test_a_long_name_is_not_repeated_whole(tmp_path: Path) -> None:
    """A message of 5000 letters: the keys that were there, of which one was as long."""
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"9" * 5000: 1, "architectures": ["A"]}))
    with pytest.raises(SpecError) as raised:
        memplan.estimate(path, SHORT, HERE, "single")
    assert len(str(raised.value)) < 500


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.yaml", "a: " + "[" * 10**6, "nested too deeply"),
        ("a.yaml", "".join(" " * depth + "a:\n" for depth in range(1000)), "nested too deeply"),
        ("a.json", "[" * 10**6, "nested too deeply"),
        ("a.json", '{"a":' * 10**5, "nested too deeply"),
        ("a.yaml", "a:\n" + "- 1\n" * 250_000, "more than 20000 values"),
        ("a.yaml", "\n".join(f"learning_rat{number}: 1" for number in range(9000)), "a section of 9000 keys"),
        ("a.json", json.dumps({f"learning_rat{number}": 1 for number in range(9000)}), "a section of 9000 keys"),
        ("a.json", '{"train_batch_size": ' + "9" * 10**6 + "}", "is not JSON that can be read"),
        ("a.sh", "A=aaaaaaaa\n" + "A=$A$A\n" * 40 + "torchrun a.py --output_dir $A", "grows beyond 65536 letters"),
        ("a.sh", "torchrun a.py " + "--bf16 " * 9000, "too many for a command"),
        ("a.sh", "torchrun a.py\n" + "#\n" * 400_000, "too many for a script"),
    ],
)
def test_what_takes_long_is_refused_soon(name: str, text: str, said: str, tmp_path: Path) -> None:
    """Minutes, or all memory: PyYAML's time grows with the square of the depth, a variable doubles forty times."""
    path = tmp_path / name
    path.write_text(text[: 2**20])
    start = time.process_time()
    with pytest.raises(SpecError, match=said):
        memplan.check(path, LLAMA, SHORT, HERE)
    assert time.process_time() - start < 10  # a second on a machine that does nothing else


def test_five_hundred_keys_are_read(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    values = {"per_device_train_batch_size": 1, "output_dir": "out", **{f"own_{number}": 1 for number in range(498)}}
    path.write_text(json.dumps(values))
    assert memplan.check(path, LLAMA, SHORT, HERE).verdict == "fits"


@pytest.mark.parametrize(
    "content",
    [
        b"\xff\xfe{}", b"\0", b"{\"a\": \"\0\"}", b"\xef\xbb\xbf", b"per_device_train_batch_size: &a 1\nb: *a",
        b"a: !!python/object/apply:os.system ['touch done']", b"? [a]\n: b", b"a: 2001-99-99", b"<<: {a: 1}\nb: 1",
        b'{"zero_optimization": {"stage": 1e308}}', b'{"zero_optimization": {"stage": NaN}}', b"--- a\n--- b",
    ],
)  # fmt: skip
@pytest.mark.parametrize("name", ["a.json", "a.yaml", "a.sh"])
def test_odd_files_are_refused(content: bytes, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(MemplanError):
        memplan.check(name, LLAMA, SHORT, HERE)
    assert not (tmp_path / "done").exists()


RUN: dict[str, Any] = {"output_dir": "o", "bf16": True, "per_device_train_batch_size": 1, "seq_len": 16}


@pytest.mark.parametrize("number", [10**400, -(10**400), 10**5000, float("inf"), float("nan")], ids=range(5))
@pytest.mark.parametrize(
    "path",
    [
        *("optimizer.params.lr", "optimizer.params.eps", "optimizer.params.weight_decay", "optimizer.params.betas"),
        *("gradient_clipping", "scheduler.params.warmup_max_lr", "scheduler.params.warmup_num_steps"),
    ],
)
def test_a_number_beyond_all_floats_is_another_one(path: str, number: Any) -> None:
    """OverflowError: a DeepSpeed config's numbers are compared with the Trainer's arguments."""
    config: dict[str, Any] = {
        "train_batch_size": "auto",
        "optimizer": {"type": "AdamW", "params": {}},
        "scheduler": {"type": "WarmupLR", "params": {}},
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 1},
    }
    *sections, key = path.split(".")
    section = config
    for name in sections:
        section = section[name]
    section[key] = [number, number] if key == "betas" else number
    found = memplan.check({**RUN, "deepspeed": config}, LLAMA, cluster=HERE)
    assert found.findings[0].code == "trainer-mismatch"
    assert len(found.findings[0].message) < 500


@pytest.mark.parametrize("steps", [10**400, float("inf"), float("nan")])
def test_a_warm_up_beyond_all_steps_is_read(steps: Any) -> None:
    memplan.check({**RUN, "warmup_steps": steps, "deepspeed": {"zero_optimization": {"stage": 1}}}, LLAMA, cluster=HERE)


def test_a_yaml_number_of_thousands_of_parts_is_refused(tmp_path: Path) -> None:
    """OverflowError: 1:1:1.5 is a number of YAML 1.1, with the base 60."""
    (tmp_path / "a.yaml").write_text("output_dir: o\nbf16: true\nlearning_rate: " + "1:" * 3000 + "1.5\n")
    with pytest.raises(SpecError, match="is not YAML that can be read"):
        memplan.check(tmp_path / "a.yaml", LLAMA, cluster=HERE)


@pytest.mark.parametrize(
    "content",
    [
        '{"zero_optimization": {"stage": 3, "%s": 1}, "train_micro_batch_size_per_gpu": 1}',
        '{"output_dir": "o", "%s": 1}',
    ],
)
def test_a_key_as_long_as_a_file_is_named_by_its_beginning(content: str, tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    path.write_text(content % ("1:" * 3000))
    with pytest.raises(MemplanError) as raised:
        memplan.estimate("gpt2", None, "1xT4", engine_config=path)
    said = [str(raised.value)]
    try:
        said += [each.path + each.message for each in memplan.check(path, model="gpt2", cluster="1xT4").findings]
    except MemplanError as error:
        said.append(str(error))
    assert max(map(len, said)) < 1000


def test_a_name_that_no_disk_takes_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    long = "1" + 300 * "0"
    (tmp_path / "ta.json").write_text(json.dumps({"output_dir": "o", "deepspeed": long}))
    (tmp_path / "a.yaml").write_text(
        f"distributed_type: DEEPSPEED\ndeepspeed_config:\n  deepspeed_config_file: '{long}'\n"
    )
    for words in (
        ["check", long],
        ["check", f"{long}/x.json"],
        ["check", str(tmp_path / "ta.json"), "--model", "gpt2"],
        ["check", str(tmp_path / "a.yaml"), "--model", "gpt2"],
        ["report", "gpt2", "--gpu", "T4", "--html", str(tmp_path / long)],
    ):
        assert cli.main(words) in (1, 2)
        assert "bug" not in capsys.readouterr().err


def test_a_column_as_long_as_a_file_is_named_by_its_beginning(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("1:" * 3000 + "\n3\n")
    with pytest.raises(MemplanError) as raised:
        memplan.check({"output_dir": "o"}, model="gpt2", lengths=path)
    assert len(str(raised.value)) < 1000


@pytest.mark.parametrize("word", ["1" * 4000, "a " * 2000, "--" + "b" * 4000])
def test_a_word_that_the_parser_refuses_is_named_by_its_beginning(
    word: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["compare", "gpt2", "--optim", "sgd", word]) == 2
    assert len(capsys.readouterr().err) < 1000
