"""Write what README.md shows of memplan's answers. Run it after changing a rule or a table; a test compares the two.

Usage: python docs/generate_demo.py
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"
ESTIMATE = ("estimate", "meta-llama/Llama-2-7b", "--gpus", "2")
PLAN = (
    "plan", "Qwen/Qwen2.5-7B", "--gpus", "2", "--gpu", "RTX4090", "--host-memory", "200",
    "--seq-len", "1024", "--global-batch-size", "8", "--out", "run",
)  # fmt: skip
SHOWN = {ESTIMATE: "The demo prints:\n\n```text\n", PLAN: "--global-batch-size 8 --out run\n"}
"""Arguments -> what comes before their answer in the README."""
AFTER = "```\n"


def block(readme: str, arguments: tuple[str, ...]) -> str:
    """Return what the README shows of an answer."""
    return readme.partition(SHOWN[arguments])[2].partition(AFTER)[0]


def shown(arguments: tuple[str, ...], answer: str) -> str:
    """Return what of an answer is shown: of a plan the rungs, the chosen one's verdict, and how to run it."""
    if arguments == ESTIMATE:
        return answer
    head, table, chosen, *pages, run = answer.split("\n\n")
    verdict = next(page[page.index("  verdict ") :] for page in pages if "  verdict " in page)
    return "\n\n".join((head, table, chosen, verdict, run))


def answer(arguments: tuple[str, ...]) -> str:
    """Return what a command prints 80 columns wide, on a machine without a GPU."""
    environment = os.environ | {"COLUMNS": "80", "CUDA_VISIBLE_DEVICES": "-1", "PYTHONIOENCODING": "utf-8"}
    command = [sys.executable, "-m", "memplan", *arguments]
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, encoding="utf-8", check=True)
    return done.stdout


if __name__ == "__main__":
    text = README.read_text(encoding="utf-8")
    for each in SHOWN:
        text = text.replace(block(text, each), shown(each, answer(each)))
    README.write_text(text, encoding="utf-8")
