"""The notebooks run from a fresh kernel, and are kept without what they print."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
PLOTS = {"1": 5, "2": 2, "3": 2, "4": 0}


def cells(path: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return found


def test_there_are_four() -> None:
    assert [path.name[0] for path in NOTEBOOKS] == list(PLOTS)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_nothing_that_was_printed_is_kept(path: Path) -> None:
    code = [cell for cell in cells(path) if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)


# In a process of its own: what jupyter's client leaves open there warns nobody here. A socket's path must be short.
EXECUTE = """
import sys, tempfile, nbclient, nbformat
from jupyter_client import AsyncKernelManager
path, folder = sys.argv[1:]
book = nbformat.read(path, as_version=4)
with tempfile.TemporaryDirectory(prefix="nb-") as sockets:
    manager = AsyncKernelManager(kernel_name="python3", transport="ipc", ip=f"{sockets}/k")
    nbclient.NotebookClient(book, km=manager, timeout=150, resources={"metadata": {"path": folder}}).execute()
nbformat.write(book, sys.stdout)
"""


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs_from_a_fresh_kernel(path: Path, tmp_path: Path) -> None:
    pytest.importorskip("nbclient")
    own = {name: str(tmp_path / name) for name in ("JUPYTER_RUNTIME_DIR", "IPYTHONDIR", "MPLCONFIGDIR")}
    command = [sys.executable, "-c", EXECUTE, str(path), str(path.parent)]
    done = subprocess.run(command, env=os.environ | own, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr[-3000:]
    shown = [output for cell in json.loads(done.stdout)["cells"] for output in cell.get("outputs", [])]
    images = [each for each in shown if "image/png" in each.get("data", {})]
    assert len(images) == PLOTS[path.name[0]]
    assert not [each for each in shown if each["output_type"] == "error"]
    assert "Warning" not in "".join("".join(each["text"]) for each in shown if each.get("name") == "stderr")
    if path.name[0] == "1":  # what numbers rest on has units
        texts = ["".join(each["data"]["text/plain"]) for each in shown if "text/plain" in each.get("data", {})]
        assert re.search(r"cuda_context +0\.\d\d GiB", next(text for text in texts if "value (low .. high)" in text))
