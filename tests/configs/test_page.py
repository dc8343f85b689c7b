"""The page about engine configs is executed: its files are read, its commands run and say what the page says."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from memplan import cli
from memplan.catalog import detect

PAGE = (Path(__file__).parents[2] / "docs" / "engine-config.md").read_text(encoding="utf-8")
FILES = dict(re.findall(r'```\w+ title="([^"]+)"\n(.*?)```', PAGE, re.DOTALL))
COMMANDS = re.findall(r"^memplan (estimate .*)$", PAGE, re.MULTILINE)
SAID = re.findall(r"^> (.*)$", PAGE, re.MULTILINE)


def test_the_page_has_examples() -> None:
    assert set(FILES) == {"ds_config.json", "fsdp.yaml"}
    assert len(COMMANDS) == 3
    assert len(SAID) == 1


def test_the_page_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(detect, "read_nvml", lambda: ())
    monkeypatch.chdir(tmp_path)
    for name, text in FILES.items():
        Path(name).write_text(text)
    out = ""
    for command in COMMANDS:
        assert cli.main([*shlex.split(command), "--no-replay"]) in (0, 1, 3)
        captured = capsys.readouterr()
        assert captured.err == ""
        out += captured.out
    for said in SAID:
        assert said in out
