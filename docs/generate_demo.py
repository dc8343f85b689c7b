"""Write what README.md shows of memplan's answers, and its picture. Run it after changing a rule; tests compare.

Usage: python docs/generate_demo.py
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

from memplan.answers import Plan
from memplan.render import svg, words

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
LEFT_OUT = "..."
BEFORE_ACCURACY, AFTER_ACCURACY = "<!-- accuracy -->\n", "<!-- end -->\n"
_STYLE = """
.back{fill:#fff}text{fill:#1a1a1a;font:13px system-ui,sans-serif;dominant-baseline:central}
.halo{paint-order:stroke;stroke:#fff;stroke-width:4px}.grid{stroke:#d5d5d5}
.around{stroke:#fff;stroke-width:5;stroke-opacity:.7}.span{stroke:#1a1a1a;stroke-width:1.5}
.capacity{stroke:#1a1a1a;stroke-width:2;stroke-dasharray:5 3}
@media (prefers-color-scheme:dark){.back{fill:#16181b}text{fill:#ececec}.halo,.around{stroke:#16181b}
.grid{stroke:#45494f}.span,.capacity{stroke:#ececec}}"""


def block(readme: str, arguments: tuple[str, ...]) -> str:
    """Return what the README shows of an answer."""
    return readme.partition(SHOWN[arguments])[2].partition(AFTER)[0]


def shown(arguments: tuple[str, ...], answer: str) -> str:
    """Return what of an answer is shown: of a plan the rungs, the chosen one's verdict, and how to run it.

    Three dots stand for what is left out.
    """
    if arguments == ESTIMATE:
        return answer
    head, table, chosen, *pages, run = answer.split("\n\n")
    parts = [head, table, chosen]
    for page in pages:
        if "  verdict " in page:
            parts.append(page)
        elif parts[-1] != LEFT_OUT:
            parts.append(LEFT_OUT)
    return "\n\n".join((*parts, run))


def answer(arguments: tuple[str, ...]) -> str:
    """Return what a command prints 80 columns wide, on a machine without a GPU."""
    environment = os.environ | {"COLUMNS": "80", "CUDA_VISIBLE_DEVICES": "-1", "PYTHONIOENCODING": "utf-8"}
    command = [sys.executable, "-m", "memplan", *arguments]
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, encoding="utf-8", check=True)
    return done.stdout


def picture(plan: Plan) -> str:
    """Return the rungs of a plan as a picture, for light and dark pages."""
    bars = []
    for rung in plan.rungs:
        name = f"{rung.name} (chosen)" if rung == plan.best else rung.name
        gpu, verdict = rung.estimate.gpu, words.verdict_in_a_row(rung.estimate)
        bars.append(svg.Bar(f"{name}: {verdict}", tuple(gpu.components), gpu.low, gpu.high))
    first = plan.rungs[0].estimate
    label = f"What each setup takes of each GPU: {first.model.id} on {words.hardware(first)}"
    chart = svg.stacks(bars, first.gpu.capacity, "GiB per GPU at the peak", label)
    there = [name for name, size in _most(plan).items() if size]
    return svg.alone(chart, label, there, _STYLE)


def _most(plan: Plan) -> dict[str, int]:
    """Each component's largest size among the rungs."""
    parts = [dict(rung.estimate.gpu.components) for rung in plan.rungs]
    return {name: max(each[name] for each in parts) for name in parts[0]}


def accuracy() -> str:
    """Return how far estimates were from what was measured, as docs/accuracy.md has it, by metric and by oracle."""
    page = ACCURACY.read_text(encoding="utf-8")
    lines = ["| Beside | n | Median error | Worst under | Worst over |", "| :-- | --: | --: | --: | --: |"]
    for row in _table(page, "## By metric"):
        under, over = (_percent(float(row[side].split()[0]) - 1) for side in ("Worst under", "Worst over"))
        name = row["Metric"].partition(":")
        lines.append(f"| published, {name[0]} ({name[2].strip()}) | {row['n']} | {row['median']} | {under} | {over} |")
    for heading, what in (
        ("### Traces of the real models (O1)", "real models, traced on CPU tensors"),
        (
            "### Real engines as rank 0 of N (O2)",
            "real engines on CPU tensors, phases of small models of at least 1 MiB",
        ),
    ):
        rows = _table(page, heading)
        number = sum(int(row["rows"]) for row in rows)
        least, most = (_sorted(row["median"] for row in rows)[end] for end in (0, -1))
        under, over = (_sorted(row[side] for row in rows) for side in ("Worst under", "Worst over"))
        ends = f"{_percent(_number(under[0]) / 100)} | {_percent(_number(over[-1]) / 100)}"
        lines.append(f"| {what} | {number:,} | {least} to {most}, by archive | {ends} |")
    return "\n".join([*lines, ""])


def _table(page: str, heading: str) -> list[dict[str, str]]:
    """The rows of the first table below a heading, by column."""
    _, found, rest = page.partition(f"\n{heading}\n")
    lines = list(itertools.takewhile(lambda line: line.startswith("|"), rest.lstrip("\n").splitlines()))
    if not found or len(lines) < 3:
        raise SystemExit(f"{ACCURACY}: no table below {heading!r}")
    names, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    return [dict(zip(names, row, strict=True)) for row in rows]


def _number(cell: str) -> float:
    return float(cell.removesuffix("%"))


def _sorted(cells: Iterable[str]) -> list[str]:
    return sorted(cells, key=_number)


def _percent(share: float) -> str:
    return f"{100 * share:+.2g} %" if abs(share) < 0.01 else f"{100 * share:+.1f} %"


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
