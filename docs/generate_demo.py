"""Write what README.md shows of memplan's answers, and its picture. Run it after changing a rule; tests compare.

Usage: python docs/generate_demo.py
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from memplan.render import svg, words
from memplan.results import Plan

ROOT = Path(__file__).parents[1]
PICTURE = Path(__file__).with_name("ladder.svg")
ACCURACY = Path(__file__).with_name("accuracy.md")
README = Path(__file__).parents[1] / "README.md"
ESTIMATE = ("estimate", "meta-llama/Llama-2-7b", "--gpus", "2")
PLAN = (
    "plan", "Qwen/Qwen2.5-7B", "--gpus", "2", "--gpu", "RTX4090", "--host-memory", "200",
    "--seq-len", "1024", "--global-batch-size", "8", "--out", "run",
)  # fmt: skip
SHOWN = {ESTIMATE: "The demo prints:\n\n```text\n", PLAN: "--global-batch-size 8 --out run\n"}
"""Arguments -> what comes before their answer in the README."""
AFTER = "```\n"
BEFORE_ACCURACY, AFTER_ACCURACY = "<!-- accuracy -->\n", "<!-- end -->\n"
_STYLE = """
.back{fill:#fff}text{fill:#1a1a1a;font:13px system-ui,sans-serif;dominant-baseline:central}
.halo{paint-order:stroke;stroke:#fff;stroke-width:4px}.grid{stroke:#d5d5d5;fill:none}
.around{stroke:#fff;stroke-width:5;stroke-opacity:.7;fill:none}.span{stroke:#1a1a1a;stroke-width:1.5;fill:none}
.capacity{stroke:#1a1a1a;stroke-width:1.5;stroke-dasharray:6 4;fill:none}
@media (prefers-color-scheme:dark){.back{fill:#16181b}text{fill:#ececec}.halo,.around{stroke:#16181b}
.grid{stroke:#45494f}.span,.capacity{stroke:#ececec}}"""


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


def picture(plan: Plan) -> str:
    """Return the rungs of a plan as a picture, for light and dark pages."""
    names = [f"{rung.name} (chosen)" if rung == plan.best else rung.name for rung in plan.rungs]
    bars = [
        svg.Bar(name, tuple(found.gpu.components), found.gpu.low, found.gpu.high, words.verdict_in_a_row(found))
        for name, found in zip(names, (rung.estimate for rung in plan.rungs), strict=True)
    ]
    first = plan.rungs[0].estimate
    label = f"What each setup takes of each GPU: {first.model.id} on {words.hardware(first)}"
    chart = svg.stacks(bars, first.gpu.capacity, label)
    there = [name for name, size in _most(plan).items() if size]
    return svg.alone(chart, label, there, _STYLE)


def _most(plan: Plan) -> dict[str, int]:
    """Each component's largest size among the rungs."""
    parts = [dict(rung.estimate.gpu.components) for rung in plan.rungs]
    return {name: max(each[name] for each in parts) for name in parts[0]}


def accuracy() -> str:
    """Return how far estimates were from what others have published, as docs/accuracy.md has it."""
    page = ACCURACY.read_text(encoding="utf-8")
    lines = []
    for metric in ("allocated", "reserved", "device"):
        row = re.search(rf"^\| {metric}: (.*)\|$", page, re.MULTILINE)
        if row is None:
            raise SystemExit(f"{ACCURACY}: no row of {metric}")
        counter, number, median, _, p95, under, over, _ = (cell.strip() for cell in row[1].split("|"))
        low, high = under.split()[0], over.split()[0]
        lines.append(
            f"* {counter}: {number} published figures, off by {median} in the median and {p95} at the 95th percentile; "
            f"predicted over measured is {low} at the lowest and {high} at the highest."
        )
    for name, what in (("o1", "traces of real models"), ("o2", "runs of real engines")):
        archives = (ROOT / "benchmarks" / "measurements" / name).glob("*.json")
        rows = sum(len(json.loads(path.read_text(encoding="utf-8"))["rows"]) for path in archives)
        lines.append(f"* {rows:,} archived {what} on CPU tensors: a test lets 1 % pass at the worst.")
    return "\n".join([*lines, ""])


def accuracy_block(readme: str) -> str:
    """Return what the README shows of it."""
    return readme.partition(BEFORE_ACCURACY)[2].partition(AFTER_ACCURACY)[0]


if __name__ == "__main__":
    text = README.read_text(encoding="utf-8")
    for each in SHOWN:
        text = text.replace(block(text, each), shown(each, answer(each)))
    old, new = (f"{BEFORE_ACCURACY}{lines}{AFTER_ACCURACY}" for lines in (accuracy_block(text), accuracy()))
    README.write_text(text.replace(old, new), encoding="utf-8")
    PICTURE.write_text(picture(Plan.from_json(answer((*PLAN[: PLAN.index("--out")], "--json")))), encoding="utf-8")
