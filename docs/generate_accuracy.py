"""Write the tables of docs/accuracy.md and its plot. Run it after changing an estimate; a test compares.

Usage: python docs/generate_accuracy.py [--no-plot]   (the plot needs matplotlib, of the ``notebook`` extra)
"""

from __future__ import annotations

import contextlib
import functools
import gc
import hashlib
import importlib.util
import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from statistics import median
from types import ModuleType
from typing import Any

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "accuracy.md"
PLOT = ROOT / "docs" / "accuracy.svg"
PEERS = ROOT / "benchmarks" / "measurements" / "peers.json"
UNEXPLAINED = "cause unknown, and not looked for"
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


def script(path: str) -> ModuleType:
    """A script of benchmarks/, which is no package."""
    spec = importlib.util.spec_from_file_location(f"accuracy_{Path(path).stem}", ROOT / "benchmarks" / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def published(script: Any, rows: Sequence[Any]) -> str:
    """The sections on published rows."""
    parts = (_by_metric, _taught, _units, _by_slice, _verdicts, _worst, _scope, _rows)
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
            missed = ", missed" if group.median > target else ""
            lines.append(f"{metric}: {script.METRICS[metric]} | {_errors(group)} | {_percent(target)}{missed}")
    yield from _table("Metric | n | median | mean | p95 | Worst under | Worst over | target of the median", *lines)
    device = [row for row in rows if row.ratio and row.metric == "device"]
    inside = sum(row.gpu.low <= row.measured * 2**30 <= row.gpu.high for row in device)
    above = sum(row.measured * 2**30 > row.gpu.high for row in device)
    yield from ("", f"Of {len(device)} figures of the device {inside} lie in memplan's interval, {above} above it.")
    for metric in ("OOM", "fits"):
        number = sum(row.metric == metric and row.found is not None for row in rows)
        yield from ("", f"{metric}: {script.METRICS[metric]}, {number} rows; see the verdicts below.")


def _errors(group: Any) -> str:
    ends = ((group.lowest, group.under), (group.highest, group.over))
    under, over = (f"{ratio:.3f} {row.id}" for ratio, row in ends)
    return f"{group.n} | {_percent(group.median)} | {_percent(group.mean)} | {_percent(group.p95)} | {under} | {over}"


def _taught(script: Any, rows: Sequence[Any]) -> Iterable[str]:
    """The same without the rows that a rule is from."""
    used = [row for row in rows if row.is_taught and row.found is not None]
    yield from ("## What is from these rows", "")
    yield (
        f"Rules were found on some of the rows, and a constant is from the page of others: {len(used)} of the "
        f"{sum(row.found is not None for row in rows)} setups. Of those the error says whether a rule is met, not "
        "whether memplan would have known it without them."
    )
    yield ""
    lines = []
    for what, ids in script.taught.TAUGHT.items():
        lines.append(f"{what} | {', '.join(row.id for row in used if row.id in ids)}")
    yield from (*_table("Rule or constant | Rows", *lines), "", "Without these rows:", "")
    lines = []
    for metric in script.BYTES:
        group = script.grouped(metric, "", [row for row in rows if not row.is_taught])
        lines.append(f"{metric} | {_errors(group) if group else '0 |  |  |  |  | '}")
    yield from _table("Metric | n | median | mean | p95 | Worst under | Worst over", *lines)


def _units(script: Any, rows: Sequence[Any]) -> Iterable[str]:
    """The figures whose unit is not stated, by what it may be."""
    yield from ("## The unit G", "")
    yield (
        "One source says G, and not what that is. Above it is GiB, as the column is documented and as its collector "
        "found it to be in another table of the same page. Against that speaks one figure, 81.0 on a GPU of 79.15 GiB, "
        "which 10^9 bytes explain, and 1000 MiB too, if somebody took nvidia-smi's MiB and three digits off; and that "
        "nearly all estimates are lower than the figures."
    )
    yield ""
    lines = []
    for unit in script.reading.UNIT_G:
        group = script.grouped("not stated", "", rows, unit)
        if group is not None:
            lines.append(f"{unit} | {_percent(group.middle - 1)} | {_errors(group)}")
    yield from _table("G is | median of signed errors | n | median | mean | p95 | Worst under | Worst over", *lines)


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
    number = lambda ratio: "" if ratio is None else f"{ratio:.3f}"  # noqa: E731
    lines = [
        " | ".join((row.id, row.metric, number(row.ratio), row.verdict, row.fields["note"] or UNEXPLAINED))
        for row in shown
    ]
    yield from _table("Row | Metric | ratio | Verdict | Cause", *lines)
    yield ""
    cut = ", ".join(f"{row.id} {number(row.ratio)}, cut {number(row.ratio_cut)}" for row in rows if row.ratio_cut)
    yield (
        "Predictions are not cut at what a GPU has, though a run that went through has had no more: the allocator "
        "gives its cache back before it gives up, which the replay does not play. More than the GPU has: "
        f"{cut or 'none'}."
    )


_KINDS = {
    "scope": "out of the declared scope",
    "not stated": "the row says too little, or what the adapter does not know",
    "not known": "the model is not known offline",
    "memplan": "in scope, and refused by memplan",
    "error": "an error",
}


def _scope(script: Any, rows: Sequence[Any]) -> Iterable[str]:
    found = script.counts(rows)
    yield from ("## Rows that are no setups", "")
    yield (
        f"Of {found['rows']} rows {found['setups']} are setups that are estimated. {found['out_of_scope']} are out of "
        f"the declared scope, {found['not_stated']} say too little, {found['not_known']} name a model of which no "
        f"config is known offline, and {found['refused_by_memplan']} are in scope and refused by memplan itself. "
        "`score.py` says of each which."
    )
    yield ""
    reasons = Counter((row.kind, re.sub(r"'[^']*'", "...", row.refused)) for row in rows if row.found is None)
    lines = [f"{number} | {_KINDS[kind]} | {reason}" for (kind, reason), number in reasons.most_common()]
    yield from (*_table("number | Kind | Reason", *lines), "", "Those in scope that memplan refuses:", "")
    refused: dict[str, list[str]] = {}
    for row in rows:
        if row.kind == "memplan":
            refused.setdefault(row.refused, []).append(row.id)
    lines = [f"{len(ids)} | {reason} | {', '.join(ids)}" for reason, ids in refused.items()]
    yield from _table("number | Reason | Rows", *lines)


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


# -- the archives -----------------------------------------------------------------------------------------------------


def archives(judge: Any, found: Sequence[Any]) -> str:
    """The section on what ``memplan measure`` has measured, from replay.py's archives."""
    lines: list[str] = []
    for archive in found:
        lines += [*_archive(judge, archive), ""]
    return "\n".join(lines) if lines else "None is archived.\n"


def _archive(judge: Any, archive: Any) -> Iterable[str]:
    runs, bounds = archive.runs, archive.boundaries
    devices = sorted({run.measurement.device.get("name", "?") for run in runs})
    yield from (f"### {archive.path.name}", "")
    held = sum(bool(run.row.get("holdout")) for run in runs)
    yield (
        f"{len(runs)} runs on {', '.join(devices) or 'no device'}, of which {held} are held out: no rule was made from "
        f"them. {len(bounds)} boundaries. {len(archive.refused)} rows were not run or failed."
    )
    yield ""
    lines = []
    for holdout in (True, False):
        part = [run for run in runs if bool(run.row.get("holdout")) == holdout]
        for metric in judge.METRICS:
            pairs = judge.errors_of(part, metric)
            if pairs:
                sizes = sorted(abs(error) for error, _ in pairs)
                p95 = sizes[-(-95 * len(sizes) // 100) - 1]
                ends = (f"{pick([0.0, *(error for error, _ in pairs)]):+.3%}" for pick in (min, max))
                numbers = " | ".join(f"{value:.3%}" for value in (median(sizes), sum(sizes) / len(sizes), p95))
                which = "holdout" if holdout else "others"
                lines.append(f"{metric} | {which} | {len(pairs)} | {numbers} | {' | '.join(ends)}")
    yield from _table("Metric | Rows | n | median | mean | p95 | Worst under | Worst over", *lines)
    yield ""
    yield from _judged(judge, archive)


def _judged(judge: Any, archive: Any) -> Iterable[str]:
    died = [run for run in archive.runs if run.measurement.status == "out-of-memory"]
    lived = [run for run in archive.runs if run.measurement.status == "ok"]
    capped = [run for run in lived if run.measurement.device.get("name") != "cpu"]
    fits = sum(run.estimate.verdict == "fits" for run in died)
    wrong = sum(run.estimate.verdict == "does-not-fit" for run in capped)
    yield (
        f"* False fits: {fits} of {len(died)} that died. False does-not-fit: {wrong} of {len(capped)} that had a limit."
    )
    for holdout in (True, False):
        told = [run for run in archive.runs if bool(run.row.get("holdout")) == holdout and run.inside is not None]
        name = "held out" if holdout else "others"
        if told:
            inside = sum(bool(run.inside) for run in told)
            width = median(run.width for run in told)
            yield f"* Intervals, {name}: {inside} of {len(told)} hold the device's memory; median width {width:.1%}."
        else:
            yield f"* Intervals, {name}: no run has the device's memory."
    exact, near = (sum(getattr(each, name) for each in archive.boundaries) for name in ("is_exact", "is_near"))
    number = len(archive.boundaries)
    yield f"* Boundaries: {exact} of {number} exact, {near} within a step." if number else "* Boundaries: none."
    missed = judge.complaints(archive)
    yield f"* Beyond the targets of `benchmarks/replay.py`: {'; '.join(missed) or 'nothing'}."


# -- the oracles ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def without_collection() -> Iterator[None]:
    """Rows are estimated by the thousand: looking through them all, again and again, takes most of the time."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


@without_collection()
def oracle_lines(families: Iterable[str] | None = None) -> dict[str, str]:
    """A line per family of O1's archive: steady_allocated of estimates and of traces."""
    from tests.oracles import o1
    from tests.oracles.compare import comparable, compare

    from memplan.errors import MemplanError

    found = {}
    for path in sorted(o1.ARCHIVE.glob("*.json")):
        if families is not None and path.stem not in families:
            continue
        rows, errors, refused = o1.load_archive(path).rows, list[float](), 0
        traced = [row for row in rows if row.result is not None]
        asked = [row for row in traced if comparable(row)]
        for row in asked:
            try:
                errors.append(compare(row).error)
            except MemplanError:
                refused += 1
        counted = f"{len(rows)} | {len(rows) - len(traced)} | {len(traced) - len(asked)} | {refused}"
        found[path.stem] = f"{path.stem} | {_spread(errors)} | {counted}"
    return found


@without_collection()
def engine_lines(archives: Iterable[str] | None = None) -> dict[str, str]:
    """A line per archive of O2: all phases of every row, of estimates and of the real engines."""
    from tests.oracles import o2, test_engines

    from memplan.units import MiB

    found = {}
    for name, archive in sorted(o2.load_archives().items()):
        if archives is not None and name not in archives:
            continue
        ran = [row for row in archive.rows if row.result is not None]
        rows = [row for row in ran if row.setup.options["strategy"] != "single"]
        errors = []
        for row in rows:
            mine, truth = test_engines.estimated(test_engines.played(row)), test_engines.measured(row)
            own = {phase: functools.partial(test_engines.scratch, row, phase) for phase in truth}
            own |= {"idle": int, "save": functools.partial(test_engines.others, row, "device")}
            if "load" in truth:  # quantizing on a CPU takes temporaries in float32, which CUDA's kernels do not
                whole = test_engines.measured(row, quantizing=True)["load"]
                own["load"] = functools.partial(int, whole - truth["load"])
                truth["load"] = whole
            errors += [_apart(mine[phase], truth[phase], own[phase]) for phase in truth if truth[phase] >= MiB]
        if rows or len(ran) < len(archive.rows):
            counted = f"{len(archive.rows)} | {len(archive.rows) - len(ran)} | {len(ran) - len(rows)}"
            found[name] = f"{name} | {len(rows)} | {_spread(errors) if errors else '0 |  |  |  | '} | {counted}"
    return found


def _apart(mine: int, truth: int, own: Callable[[], int]) -> float:
    """The error; ``own`` bytes of CPU's kernels, which a GPU's do not take, may be missing."""
    if mine >= truth:
        return mine / truth - 1
    least = truth - own()
    return 0.0 if least <= mine else mine / least - 1


def _spread(errors: Sequence[float]) -> str:
    sizes = [abs(error) for error in errors]
    return (
        f"{len(errors)} | {100 * median(sizes):.3f} % | {100 * sum(sizes) / len(sizes):.3f} % | "
        f"{100 * min(*errors, 0):+.3f} % | {100 * max(*errors, 0):+.3f} %"
    )


ABOUT_TRACES = """\
The metric is `steady_allocated`, the most that is allocated in any step but the first. Of the rows in the
archive the library has no such run of some (*none*); others ask for what an estimate cannot be asked,
such as frozen parts, CUDA's autocast or a clipped norm, and are compared elsewhere in the tests (*elsewhere*);
others memplan refuses.
"""
ABOUT_ENGINES = """\
Of each row the phases that it has: loading and saving, where they were looked at; the first step; forward,
backward and step of a later one; evaluation; and what is held between steps (idle). The engine refuses some
rows (*none*); plain rows, whose host memory alone is the matter, have a test of their own (*elsewhere*).
"""


def oracles(lines: dict[str, str], engines: dict[str, str]) -> str:
    """The sections on O1 and O2."""
    spread = "median | mean | Worst under | Worst over"
    return "\n".join(
        [
            "### Traces of the real models (O1)",
            "",
            *_table(f"Family | rows | {spread} | archived | none | elsewhere | refused", *lines.values()),
            "",
            ABOUT_TRACES,
            "### Real engines as rank 0 of N (O2)",
            "",
            *_table(f"Archive | rows | phases | {spread} | archived | none | elsewhere", *engines.values()),
            "",
            ABOUT_ENGINES,
            "Phases of at least 1 MiB: of smaller ones a tensor of one number, 512 bytes, is a large part.",
            "",
        ]
    )


# -- peers ------------------------------------------------------------------------------------------------------------


def peers(rows: Sequence[Any], archive: Path = PEERS) -> str:
    """What other estimators said of the rows that they were asked, as archived, beside what memplan says now."""
    if not archive.exists():
        return "No run is archived.\n"
    tools = json.loads(archive.read_text(encoding="utf-8"))["tools"]
    rows = [row for row in rows if row.ratio is not None]
    summarized = script("peers.py").summarized
    lines = []
    for tool in tools:
        for metric, each in summarized(rows, tool["answers"]).items():
            errors = " | ".join(_percent(each[name]) for name in ("median_error", "mean_error", "p95_error"))
            ends = (each["worst_under"], each["worst_over"])
            worst = " | ".join(f"{end['ratio']:.3f} {end['id']}" for end in ends)
            own = " | ".join(_percent(each["memplan"][name]) for name in ("median_error", "mean_error"))
            lines.append(f"{tool['name']} {tool['version']} | {metric} | {each['n']} | {errors} | {worst} | {own}")
    head = "Tool | Metric | n | median | mean | p95 | Worst under | Worst over | median of memplan | mean of memplan"
    driven = [f"* {tool['name']} {tool['version']}: {tool['driven']}" for tool in tools]
    asked = {id for tool in tools for id in tool["answers"]}
    left = [row.id for row in rows if row.id not in asked]
    note = (
        f"Of the {len(rows)} rows with a figure they were asked {len(rows) - len(left)}. Not asked, since memplan "
        f"itself had no word on them when they were: {', '.join(left) or 'none'}."
    )
    return "\n".join([*_table(head, *lines), "", note, "", *driven, ""])


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
    scored, judge = script("published/score.py"), script("replay.py")
    rows = [scored.compare(fields) for fields in scored.read()]
    page = PAGE.read_text(encoding="utf-8")
    page = filled(page, "archives", archives(judge, [judge.replay(folder) for folder in judge.folders()]))
    page = filled(page, "published", published(scored, rows))
    page = filled(page, "oracles", oracles(oracle_lines(), engine_lines()))
    page = filled(page, "peers", peers(rows))
    PAGE.write_text(page, encoding="utf-8")
    if "--no-plot" not in arguments:
        plot(points(rows))


if __name__ == "__main__":
    main(sys.argv[1:])
