"""Write the tables of docs/accuracy.md and its plot. Run it after changing an estimate; a test compares.

Usage: python docs/generate_accuracy.py [--no-plot]   (the plot needs matplotlib, of the ``notebook`` extra)
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import median
from types import ModuleType
from typing import Any

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "accuracy.md"
PLOT = ROOT / "docs" / "accuracy.svg"
PEERS = ROOT / "benchmarks" / "measurements" / "peers.json"
TARGETS = {"allocated": 0.04}
"""Median error that the project promises by metric; of the others REST."""
REST = 0.08
COLORS = {"allocated": ("#0072B2", "o"), "reserved": ("#E69F00", "s"), "device": ("#009E73", "^"),
          "not stated": ("#CC79A7", "x"), "allocated, probably": ("#56B4E9", "D"),
          "reserved, probably": ("#D55E00", "P")}  # fmt: skip
"""Okabe and Ito's palette, which the colour-blind tell apart; the markers differ too."""


# -- the page ---------------------------------------------------------------------------------------------------------


def block(page: str, name: str) -> str:
    """What the page shows between its marks of that name."""
    return page.partition(f"<!-- {name} -->\n")[2].partition(f"<!-- end of {name} -->\n")[0]


def filled(page: str, name: str, text: str) -> str:
    """The page with another text there."""
    return page.replace(
        f"<!-- {name} -->\n{block(page, name)}<!-- end of {name} -->\n",
        f"<!-- {name} -->\n{text}<!-- end of {name} -->\n",
    )


def score() -> ModuleType:
    """The script that reads and estimates the rows."""
    path = ROOT / "benchmarks" / "published" / "score.py"
    spec = importlib.util.spec_from_file_location("published_score", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def published(script: Any, rows: Sequence[Any]) -> str:
    """The sections on published rows."""
    parts = (_by_metric, _by_slice, _verdicts, _worst, _scope, _rows)
    return "\n".join(line for part in parts for line in (*part(script, rows), ""))


def _table(head: str, *rows: str) -> list[str]:
    names = head.split(" | ")
    marks = [":--" if name[0].isupper() else "--:" for name in names]
    return [f"| {head[0].upper() + head[1:]} |", f"| {' | '.join(marks)} |", *(f"| {row} |" for row in rows)]


def _percent(value: float) -> str:
    return f"{100 * value:.2f} %"


def _by_metric(script: Any, rows: Sequence[Any]) -> Iterable[str]:
    yield from ("## By metric", "")
    lines = []
    for metric in script.BYTES:
        group = script.grouped(metric, "", rows)
        if group is not None:
            target = TARGETS.get(metric.partition(",")[0], REST)
            lines.append(f"{metric}: {script.METRICS[metric]} | {_errors(group)} | {_percent(target)}")
    yield from _table("Metric | n | median | mean | p95 | Worst under | Worst over | target of the median", *lines)
    for metric in ("OOM", "fits"):
        number = sum(row.metric == metric and row.found is not None for row in rows)
        yield from ("", f"{metric}: {script.METRICS[metric]}, {number} rows; see the verdicts below.")


def _errors(group: Any) -> str:
    under, over = (f"{row.ratio:.3f} {row.id}" for row in (group.under, group.over))
    return f"{group.n} | {_percent(group.median)} | {_percent(group.mean)} | {_percent(group.p95)} | {under} | {over}"


def _precision(row: Any) -> str:
    training = row.setup.training
    kind = training.quantization.kind if training.quantization else training.dtype
    return f"{kind}, mixed precision {training.mixed_precision}" if training.task == "train" else f"{kind}, generation"


def _method(row: Any) -> str:
    training = row.setup.training
    if training.task != "train":
        return "generation"
    return ("QLoRA" if training.quantization else "LoRA") if training.lora else "full fine-tuning"


SLICES: dict[str, Callable[[Any], str]] = {
    "source": lambda row: row.source,
    "family": lambda row: row.setup.model.model_type,
    "method": _method,
    "strategy": lambda row: (
        row.setup.strategy.kind + (str(row.setup.strategy.fsdp.version) if row.setup.strategy.kind == "fsdp" else "")
    ),
    "precision": _precision,
    "confidence": lambda row: row.fields["confidence"],
}


def _by_slice(script: Any, rows: Sequence[Any]) -> Iterable[str]:
    yield from ("## By slice", "")
    yield "Rows of one source share a harness with all its hidden settings: its error says nothing of another's."
    rows = [row for row in rows if row.ratio is not None]
    for name, key in SLICES.items():
        lines = []
        for metric in script.BYTES:
            for value in sorted({key(row) for row in rows if row.metric == metric}):
                group = script.grouped(metric, value, [row for row in rows if key(row) == value])
                lines.append(f"{value} | {metric} | {_errors(group)}")
        yield from (
            "",
            *_table(f"{name.capitalize()} | Metric | n | median | mean | p95 | Worst under | Worst over", *lines),
        )


def _verdicts(script: Any, rows: Sequence[Any]) -> Iterable[str]:
    found = script.boundaries(rows)
    yield from ("## Verdicts", "")
    yield "A run that was measured, or is said to fit, went through; OOM rows died. Judged by the GPU's memory alone."
    yield ""
    lines = []
    for what, words in (("died", "died of memory"), ("ran", "said to fit"), ("measured", "measured")):
        verdicts = found[f"{what}_verdicts"]
        lines.append(" | ".join([words, *(str(verdicts.get(name, 0)) for name in ("fits", "tight", "does-not-fit"))]))
    yield from _table("Runs that | fits | tight | does-not-fit", *lines)
    yield ""
    wrong = ", ".join(found["false_does_not_fit"]) or "none"
    yield f"False fits: {', '.join(found['false_fits']) or 'none'}. False does-not-fit: {wrong}."


def _worst(script: Any, rows: Sequence[Any]) -> Iterable[str]:
    far = sorted((row for row in rows if row.ratio is not None), key=lambda row: -abs(row.ratio - 1))
    yield from ("## The worst rows", "", "The ten worst, and all beyond 15 %, with their cause.", "")
    shown = [row for i, row in enumerate(far) if i < 10 or abs(row.ratio - 1) > script.FAR]
    shown += [row for row in rows if row.found is not None and not row.agrees]
    lines = [
        " | ".join((row.id, row.metric, f"{row.ratio:.3f}" if row.ratio else "", row.verdict, row.fields["note"]))
        for row in shown
    ]
    yield from _table("Row | Metric | ratio | Verdict | Cause", *lines)


_KINDS = {
    "scope": "out of the declared scope",
    "not stated": "the row says too little",
    "memplan": "memplan refuses the setup",
    "error": "an error",
}


def _scope(script: Any, rows: Sequence[Any]) -> Iterable[str]:
    found = script.counts(rows)
    yield from ("## Rows that are no setups", "")
    yield (
        f"Of {found['rows']} rows {found['setups']} are setups that are estimated. {found['out_of_scope']} are out of "
        f"the declared scope, {found['not_stated']} say too little, {found['refused_by_memplan']} are in scope and "
        "refused by memplan itself. `score.py` says of each which."
    )
    yield ""
    reasons = Counter((row.kind, re.sub(r"'[^']*'", "...", row.refused)) for row in rows if row.found is None)
    lines = [f"{number} | {_KINDS[kind]} | {reason}" for (kind, reason), number in reasons.most_common()]
    yield from _table("number | Kind | Reason", *lines)


def _rows(script: Any, rows: Sequence[Any]) -> Iterable[str]:
    yield from ("## All setups", "", "Their sources are in `benchmarks/published/memory.csv`. GiB of one GPU.", "")
    lines = []
    for row in rows:
        if row.found is None:
            continue
        training, cluster = row.setup.training, row.setup.cluster
        words = [SLICES["strategy"](row), _method(row)]
        words += ["checkpointed"] if training.gradient_checkpointing else []
        length = f"{training.micro_batch_size} x {training.seq_len}"
        length += f" + {training.max_new_tokens}" if training.max_new_tokens else ""
        numbers = " |  |  | " if row.ratio is None else f" | {row.measured:.2f} | {row.predicted:.2f} | {row.ratio:.3f}"
        lines.append(
            f"{row.id} | {row.setup.model.id} | {cluster.gpus} x {cluster.gpu.name} | {', '.join(words)} | {length} | "
            f"{row.metric}{numbers.rstrip()} | {row.verdict} | {row.found.gpu.peak_phase}"
        )
    head = "Row | Model | GPUs | Setup | Batch x length | Metric | measured | predicted | ratio | Verdict | Peak in"
    yield from _table(head, *lines)


# -- the oracles ------------------------------------------------------------------------------------------------------


def oracle_lines(families: Iterable[str] | None = None) -> dict[str, str]:
    """A line per family of O1's archive: steady_allocated of estimates and of traces."""
    from tests.oracles import o1
    from tests.oracles.compare import comparable, compare

    from memplan.errors import MemplanError

    found = {}
    for path in sorted(o1.ARCHIVE.glob("*.json")):
        if families is not None and path.stem not in families:
            continue
        errors, refused = [], 0
        for row in o1.load_archive(path).rows:
            if comparable(row):
                try:
                    errors.append(compare(row).error)
                except MemplanError:
                    refused += 1
        found[path.stem] = f"{path.stem} | {_spread(errors)} | {refused}"
    return found


def engine_lines(archives: Iterable[str] | None = None) -> dict[str, str]:
    """A line per archive of O2: all phases of every row, of estimates and of the real engines."""
    from tests.oracles import o2, test_engines

    from memplan.units import MiB

    found = {}
    for name, archive in sorted(o2.load_archives().items()):
        if archives is not None and name not in archives:
            continue
        errors, number = [], 0
        for row in archive.rows:
            if row.result is None or row.setup.options["strategy"] == "single":
                continue
            number += 1
            mine, truth = test_engines.estimated(test_engines.played(row)), test_engines.measured(row)
            errors += [
                _apart(mine[p], truth[p], test_engines.scratch(row, p))
                for p in truth.keys() - {"idle", "load", "save"}
                if truth[p] >= MiB
            ]
        if errors:
            found[name] = f"{name} | {number} | {_spread(errors)}"
    return found


def _apart(mine: int, truth: int, own: int) -> float:
    """The error; ``own`` bytes of CPU's kernels, which a GPU's do not take, may be missing."""
    return 0.0 if truth - own <= mine <= truth else min(mine / truth - 1, mine / (truth - own) - 1, key=abs)


def _spread(errors: Sequence[float]) -> str:
    sizes = [abs(error) for error in errors]
    return (
        f"{len(errors)} | {100 * median(sizes):.3f} % | {100 * sum(sizes) / len(sizes):.3f} % | "
        f"{100 * min(*errors, 0):+.3f} % | {100 * max(*errors, 0):+.3f} %"
    )


def oracles(lines: dict[str, str], engines: dict[str, str]) -> str:
    """The sections on O1 and O2."""
    spread = "median | mean | Worst under | Worst over"
    return "\n".join(
        [
            "### Traces of the real models (O1)",
            "",
            *_table(f"Family | rows | {spread} | refused", *lines.values()),
            "",
            "### Real engines as rank 0 of N (O2)",
            "",
            *_table(f"Archive | rows | phases | {spread}", *engines.values()),
            "",
            "Phases of at least 1 MiB: of smaller ones a tensor of one number, 512 bytes, is a large part.",
            "",
        ]
    )


# -- peers ------------------------------------------------------------------------------------------------------------


def peers(archive: Path = PEERS) -> str:
    """What other estimators said of the same rows, as ``make bench-peers`` archived it."""
    if not archive.exists():
        return "No run is archived.\n"
    found = json.loads(archive.read_text(encoding="utf-8"))
    lines = []
    for tool in found["tools"]:
        for metric, each in tool["summary"].items():
            errors = " | ".join(_percent(each[name]) for name in ("median_error", "mean_error", "p95_error"))
            ends = (each["worst_under"], each["worst_over"])
            worst = " | ".join(f"{end['ratio']:.3f} {end['id']}" for end in ends)
            own = " | ".join(_percent(each["memplan"][name]) for name in ("median_error", "mean_error"))
            lines.append(f"{tool['name']} {tool['version']} | {metric} | {each['n']} | {errors} | {worst} | {own}")
    head = "Tool | Metric | n | median | mean | p95 | Worst under | Worst over | median of memplan | mean of memplan"
    driven = [f"* {tool['name']} {tool['version']}: {tool['driven']}" for tool in found["tools"]]
    return "\n".join([*_table(head, *lines), "", *driven, ""])


# -- the plot ---------------------------------------------------------------------------------------------------------


def points(rows: Sequence[Any]) -> list[tuple[str, float, float]]:
    """Metric, measured and predicted of every row that has both."""
    return [(row.metric, round(row.measured, 2), round(row.predicted, 2)) for row in rows if row.ratio is not None]


def digest(found: Sequence[tuple[str, float, float]]) -> str:
    """Names what a plot shows."""
    return hashlib.sha256(repr(sorted(found)).encode()).hexdigest()[:16]


def plotted() -> str:
    """The digest that the plot there was written with."""
    match = re.search(r"points ([0-9a-f]{16})", PLOT.read_text(encoding="utf-8"))
    return match[1] if match else ""


def plot(found: Sequence[tuple[str, float, float]]) -> None:
    """Write the scatter plot: predicted over measured, both logarithmic, with 15 % either way."""
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams["svg.hashsalt"] = "memplan"
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 6))
    span = [1, 100]
    axes.plot(span, span, color="black", linewidth=1)
    axes.fill_between(span, [0.85 * x for x in span], [1.15 * x for x in span], color="0.88", label="within 15 %")
    for metric, (color, marker) in COLORS.items():
        part = [(x, y) for name, x, y in found if name == metric]
        if part:
            axes.scatter(*zip(*part), s=28, color=color, marker=marker, label=f"{metric} ({len(part)})", alpha=0.8)
    axes.set(
        xscale="log",
        yscale="log",
        xlim=span,
        ylim=span,
        xlabel="measured, GiB per GPU",
        ylabel="predicted, GiB per GPU",
    )
    ticks = [1, 2, 5, 10, 20, 50, 100]
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_ticks(ticks, [str(tick) for tick in ticks])
        axis.set_minor_locator(mpl.ticker.NullLocator())
    axes.set_title("Published measurements and memplan's estimates")
    axes.set_aspect("equal")
    axes.grid(color="0.9")
    axes.set_axisbelow(True)
    axes.legend(loc="upper left", frameon=False)
    figure.tight_layout()
    figure.savefig(PLOT, metadata={"Date": None, "Description": f"points {digest(found)}"})


def main(arguments: Sequence[str]) -> None:
    """Write the page, and the plot unless told not to."""
    sys.path.insert(0, str(ROOT))
    script = score()
    rows = [script.compare(fields) for fields in script.read()]
    page = PAGE.read_text(encoding="utf-8")
    page = filled(page, "published", published(script, rows))
    page = filled(page, "oracles", oracles(oracle_lines(), engine_lines()))
    page = filled(page, "peers", peers())
    PAGE.write_text(page, encoding="utf-8")
    if "--no-plot" not in arguments:
        plot(points(rows))


if __name__ == "__main__":
    main(sys.argv[1:])
