"""Write what `make demo` prints into README.md. Run it after changing a rule or the table; a test compares the two.

Usage: python docs/generate_demo.py
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"
ARGUMENTS = ("estimate", "meta-llama/Llama-2-7b", "--gpus", "2")
BEFORE, AFTER = "The demo prints:\n\n```text\n", "```\n"


def block(readme: str) -> str:
    """Return what the README shows."""
    return readme.partition(BEFORE)[2].partition(AFTER)[0]


def demo() -> str:
    """Return what the command prints 80 columns wide, on a machine without a GPU."""
    environment = os.environ | {"COLUMNS": "80", "CUDA_VISIBLE_DEVICES": "-1", "PYTHONIOENCODING": "utf-8"}
    command = [sys.executable, "-m", "memplan", *ARGUMENTS]
    return subprocess.run(command, env=environment, capture_output=True, encoding="utf-8", check=True).stdout


if __name__ == "__main__":
    text = README.read_text(encoding="utf-8")
    README.write_text(text.replace(block(text), demo()), encoding="utf-8")
