"""Files that cannot be read, or are not what they should be: one message that names file and remedy."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from memplan.configs.files import LARGEST_FILE, read_mapping
from memplan.configs.read import read_engine_config
from memplan.errors import SpecError


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b"{", "is not JSON: Expecting property name"),
        ("a.json", b'{"a": 1,}', "is not JSON: "),
        ("a.json", b"", "is not JSON: Expecting value at line 1, column 1. It ends too early."),
        ("a.json", b"[1]", "holds a list, where a config holds keys and values"),
        ("a.json", b'"x"', "holds text, where"),
        ("a.json", b'{"a": 1, "a": 2}', "'a' is given twice. Keep the one that is meant."),
        ("a.json", b'{"a": {"b": 1, "b": 2}}', "'b' is given twice"),
        ("a.json", b"\x80\x02ab", "is not UTF-8 text: byte 0 is 0x80"),
        ("a.json", b'{"a": ' + b"[" * 100_000, "nested too deeply"),
        ("a.json", b'{"a": ' + b"1" * 10_000 + b"}", "is not JSON that can be read"),
        ("a.yaml", b"a: [1", "is not plain YAML: "),
        ("a.yaml", b"", "holds nothing, where"),
        ("a.yaml", b"just words", "holds text, where"),
        ("a.yaml", b"- 1\n- 2\n", "holds a list, where"),
        ("a.yaml", b"a: 1\na: 2\n", "'a' is given twice"),
        ("a.yaml", b"1: 2\n", "is a key that is not text"),
        ("a.yaml", b"? [1, 2]\n: 3\n", "is not plain YAML: "),
        ("a.yaml", b"a: !!python/object/apply:os.system ['touch pwned']\n", "is not plain YAML: could not determine"),
        ("a.yaml", b"a: !own 1\n", "is not plain YAML: could not determine a constructor for the tag '!own'"),
        ("a.yaml", b"a: &x [1]\nb: *x\n", "has an alias (*)"),
        ("a.yaml", b"a: " + b"[" * 5000, "nested too deeply"),
        ("a.yaml", b"a: \x00\n", "is not plain YAML: "),
        ("a.yaml", b"a: 2020-13-45\n", "is not YAML that can be read: month must be in 1..12"),
        ("a.yaml", b"\xff\xfe", "is not UTF-8 text"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_malformed(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(SpecError) as caught:
        read_mapping(path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 500
    assert not (tmp_path / "pwned").exists()


def test_not_a_file(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"is a directory\. Give the file in it\."):
        read_mapping(tmp_path)
    with pytest.raises(SpecError, match=r"^engine_config: .* does not exist\."):
        read_mapping(tmp_path / "none")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(SpecError, match="is not a regular file"):
        read_mapping(tmp_path / "pipe")
    with pytest.raises(SpecError, match="cannot be read"):
        read_mapping("a\x00b")


def test_a_huge_file_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "huge.json"
    with path.open("wb") as file:
        file.truncate(2**30)
    with pytest.raises(SpecError, match=f"has {2**30} bytes, too many for a config"):
        read_mapping(path)
    assert LARGEST_FILE < 2**30


def test_an_unreadable_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "secret.json"
    path.write_text("{}")

    def denied(*arguments: object) -> None:  # root may read everything
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", denied)
    with pytest.raises(SpecError, match=r"cannot be read \(Permission denied\)\. Give a file that you may read\."):
        read_mapping(path)


def test_the_format_is_told_by_the_content(tmp_path: Path) -> None:
    path = tmp_path / "config"
    path.write_text('{"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 1}}')
    assert read_engine_config(path).strategy["kind"] == "zero1"
    path.write_text('{"distributed_type": "MULTI_GPU", "num_processes": 2}')
    assert read_engine_config(path).strategy["kind"] == "ddp"
    path.write_text("\ufeffdistributed_type: MULTI_GPU\nnum_processes: 2\n", encoding="utf-8")
    assert read_engine_config(path).strategy["kind"] == "ddp"
    path.write_text("zero_stage: 2\n")
    with pytest.raises(SpecError, match="distributed_type: missing, which accelerate refuses"):
        read_engine_config(path)


@pytest.mark.parametrize("config", [5, ["a"], b"x", True])
def test_neither_path_nor_values(config: object) -> None:
    with pytest.raises(SpecError, match=r"^engine_config: .* is not a config\."):
        read_engine_config(config)
