"""Score memplan on published measurements: ``python benchmarks/published/score.py [FILE.csv] [--json OUT]``.

FILE has the columns of memory.csv, which is taken without one. Each row becomes a setup, which is estimated, or says
why not. Printed are measured, predicted and their ratio by row; then per metric, and per metric and source, the number
of rows, the median, mean and 95th percentile of the error's size, and the worst estimates above and below. Metrics are
not mixed. Rows that died of memory (OOM), or only state that the run went through (fits), are tests of the verdict.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import math
import os
import re
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from statistics import mean, median
from typing import Any, NamedTuple

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
sys.path.append(str(HERE.parents[1] / "src"))  # where memplan is not installed

import adapter  # noqa: E402
import reading  # noqa: E402
import taught  # noqa: E402
from adapter import COLUMNS, Setup  # noqa: E402
from reading import METRICS, RefusedError  # noqa: E402

from memplan.errors import MemplanError  # noqa: E402
from memplan.estimator import estimate  # noqa: E402
from memplan.results import Estimate, GpuMemory  # noqa: E402
from memplan.specs.hardware import GPUSpec  # noqa: E402
from memplan.units import GiB  # noqa: E402

PUBLISHED = HERE / "memory.csv"
BYTES = tuple(name for name in METRICS if name not in ("OOM", "fits"))
"""Metrics that are bytes."""
FAR = 0.15
"""Rows beyond this have their cause in memory.csv's note."""


MOST = 1.1
"""Of what torch sees of a GPU, the most that a row may say was used: nvidia-smi counts what the driver keeps too, and
sources round, or mean 10^9 bytes."""


class UnreadableError(Exception):
    """A file that is no table of measurements."""


@dataclass(frozen=True)
class Row:
    """One published figure, and what memplan says of its setup."""

    fields: dict[str, str]
    metric: str
    """One of reading.METRICS."""
    measured: float | None
    """GiB of one GPU."""
    setup: Setup | None = None
    found: Estimate | None = field(default=None, repr=False)
    """None where the row became no setup, or memplan refuses it."""
    refused: str = ""
    kind: str = ""
    """Of a refusal: scope, not stated, not known (the model), memplan (which refuses the setup) or error."""

    @property
    def id(self) -> str:
        return self.fields["id"]

    @property
    def source(self) -> str:
        return source_of(self.fields["source"])

    @property
    def gpu(self) -> GpuMemory | None:
        return self.found.gpu if self.found else None

    @property
    def predicted(self) -> float | None:
        """GiB by the row's metric. It is not cut at what the GPU has, or an estimate of more would look like a hit."""
        if self.gpu is None or self.metric not in BYTES:
            return None
        kind = self.metric.partition(",")[0]
        if kind == "allocated":
            return self.gpu.peak_allocated / GiB
        return (self.gpu.peak_reserved if kind == "reserved" else self.gpu.peak_device) / GiB

    @property
    def ratio(self) -> float | None:
        """Predicted over measured."""
        if self.predicted is None or self.measured is None:
            return None
        return self.predicted / self.measured

    @property
    def ratio_cut(self) -> float | None:
        """The ratio with the prediction cut at what the GPU has, where that is less: the allocator gives its cache back
        before it gives up, so that a run that went through has had no more. None where nothing is cut."""
        capacity = self.gpu.capacity if self.gpu and self.setup and self.setup.capacity_known else None
        if self.ratio is None or self.predicted is None or self.measured is None or capacity is None:
            return None
        return capacity / GiB / self.measured if self.predicted * GiB > capacity else None

    @property
    def readings(self) -> dict[str, float]:
        """The ratio by what the unit G may be; nothing where the row states its unit."""
        if self.ratio is None or not reading.unit_is_open(self.fields["metric"]):
            return {}
        return {unit: self.ratio / size for unit, size in reading.UNIT_G.items()}

    @property
    def is_taught(self) -> bool:
        """Whether a rule was found on the row, or a constant has its source: see taught.py. Of memory.csv's rows."""
        return self.id in taught.IDS

    @property
    def verdict(self) -> str:
        """fits, tight or does-not-fit, by the GPU's memory alone; unknown where the row leaves open how much it has."""
        if self.gpu is None or self.gpu.capacity is None or not (self.setup and self.setup.capacity_known):
            return "unknown"
        if self.gpu.high <= self.gpu.capacity:
            return "fits"
        return "tight" if self.gpu.low <= self.gpu.capacity else "does-not-fit"

    @property
    def agrees(self) -> bool:
        """Whether the verdict allows what was seen."""
        return self.verdict != ("fits" if self.metric == "OOM" else "does-not-fit")

    def to_dict(self) -> dict[str, Any]:
        """The row of the JSON."""
        gib = lambda value: None if value is None else round(value / GiB, 4)  # noqa: E731
        gpu = self.gpu
        return {
            "id": self.id,
            "source": self.source,
            "metric": self.metric,
            "metric_stated": self.fields["metric"],
            "confidence": self.fields["confidence"],
            "measured_gib": self.measured,
            "predicted_gib": None if self.predicted is None else round(self.predicted, 4),
            "ratio": None if self.ratio is None else round(self.ratio, 4),
            "ratio_cut_at_capacity": None if self.ratio_cut is None else round(self.ratio_cut, 4),
            "ratio_by_unit": {unit: round(ratio, 4) for unit, ratio in self.readings.items()} or None,
            "verdict": self.verdict,
            "agrees": self.agrees if gpu else None,
            "peak_phase": gpu.peak_phase if gpu else None,
            "allocated_gib": gib(gpu.peak_allocated) if gpu else None,
            "reserved_gib": gib(gpu.peak_reserved) if gpu else None,
            "device_gib": gib(gpu.peak_device) if gpu else None,
            "low_gib": gib(gpu.low) if gpu else None,
            "high_gib": gib(gpu.high) if gpu else None,
            "capacity_gib": gib(gpu.capacity) if gpu else None,
            "setup": self.setup.to_dict() if self.setup else None,
            "notes": list(self.setup.notes) if self.setup else [],
            "refused": self.refused or None,
            "refused_kind": self.kind or None,
        }


# -- reading the file -------------------------------------------------------------------------------------------------


def read(path: Path = PUBLISHED) -> list[dict[str, str]]:
    """The rows of a file, every column there as text. Raises UnreadableError."""
    try:
        text = path.read_bytes().decode("utf-8-sig", errors="replace").replace("\0", "")
    except OSError as error:
        raise UnreadableError(f"{path}: {error.strerror or error}") from None
    csv.field_size_limit(10**8)
    try:
        lines = list(csv.reader(io.StringIO(text, newline=""), delimiter=_delimiter(text)))
    except csv.Error as error:
        raise UnreadableError(f"{path}: is not a CSV file: {error}") from None
    if not lines:
        raise UnreadableError(f"{path}: is empty. Its first line has to name the columns: {', '.join(COLUMNS)}.")
    known = {name.lower(): name for name in COLUMNS}
    names = [known.get(cell.strip().lower(), "") for cell in lines[0]]
    missing = [name for name in COLUMNS if name not in names]
    if "model" in missing or "metric" in missing:
        raise UnreadableError(f"{path}: its first line lacks the columns {', '.join(missing)}.")
    if missing:
        print(f"{path}: has no {', '.join(missing)}: taken as not stated", file=sys.stderr)
    rows = []
    for number, line in enumerate(lines[1:], 1):
        if not any(cell.strip() for cell in line):
            continue
        row = dict.fromkeys(COLUMNS, "")
        row.update({name: " ".join(cell.split()) for name, cell in zip(names, line) if name})
        row["id"] = row["id"] or f"row-{number}"
        rows.append(row)
    return rows


def _delimiter(text: str) -> str:
    head = text.partition("\n")[0].lower()
    return max(
        ",;\t", key=lambda mark: sum(cell.strip(' "\r') in {c.lower() for c in COLUMNS} for cell in head.split(mark))
    )


def source_of(text: str) -> str:
    """Whose measurement it is: rows of one repository share a harness.

    >>> source_of("github:QwenLM/Qwen README.md table"), source_of("a blog")
    ('QwenLM/Qwen', 'a blog')
    """
    found = re.match(r"(?:github:|https?://(?:www\.)?github\.com/)([\w.-]+/[\w.-]+)", text)
    if found:
        return found[1].removesuffix(".git")
    site = re.match(r"https?://(?:www\.)?([\w.-]+)", text)
    return site[1] if site else text[:40] or "not stated"


# -- comparing --------------------------------------------------------------------------------------------------------


def compare(fields: dict[str, str]) -> Row:
    """Make a row's setup and estimate it. Raises nothing: what goes wrong is the row's refusal."""
    metric, number = "not stated", None
    try:
        metric = reading.metric(fields["metric"])
        if metric in BYTES:
            number = reading.measured(fields["measured_GiB"])
            if number is None:
                reading.not_stated("measured_GiB", fields["measured_GiB"])
    except RefusedError as refusal:
        return Row(fields, metric, None, refused=str(refusal), kind=refusal.kind)
    row = Row(fields, metric, number)
    try:
        setup = adapter.setup(fields)
        _within(fields["measured_GiB"], number, setup)
    except RefusedError as refusal:
        return Row(row.fields, row.metric, row.measured, refused=str(refusal), kind=refusal.kind)
    except MemplanError as refusal:
        return Row(row.fields, row.metric, row.measured, refused=str(refusal), kind="memplan")
    except Exception as error:  # a row is somebody else's text: whatever it breaks, the others are scored
        return Row(row.fields, row.metric, row.measured, refused=f"{type(error).__name__}: {error}", kind="error")
    try:
        found = _estimated(setup.model, setup.training, setup.cluster, setup.strategy, setup.software)
    except MemplanError as refusal:
        return Row(row.fields, row.metric, row.measured, setup, refused=str(refusal), kind="memplan")
    except Exception as error:
        return Row(
            row.fields, row.metric, row.measured, setup, refused=f"{type(error).__name__}: {error}", kind="error"
        )
    return Row(row.fields, row.metric, row.measured, setup, found)


def _within(text: str, measured: float | None, setup: Setup) -> None:
    """Refuse what no GPU of the row has, which is of another unit, or of several GPUs."""
    gpu = setup.cluster.gpu
    memory = setup.cluster.gpu_memory or (gpu.memory_bytes if isinstance(gpu, GPUSpec) else None)
    if measured is not None and memory is not None and measured * GiB > MOST * memory:
        reading.not_stated("measured_GiB", text, f"is more than the {memory / GiB:.4g} GiB of the GPU")


@lru_cache(maxsize=256)
def _estimated(*specs: Any) -> Estimate:
    return estimate(*specs, replay=True)


# -- judging ----------------------------------------------------------------------------------------------------------


class Group(NamedTuple):
    """How far off the rows of one metric are, or of one slice of it. Errors are sizes, shares of what was measured."""

    metric: str
    slice: str
    n: int
    median: float
    mean: float
    p95: float
    middle: float
    """Of the ratios: which side the rows lie on."""
    under: Row
    """The row whose estimate is lowest beside what was measured."""
    over: Row
    lowest: float
    """Its ratio."""
    highest: float


def grouped(metric: str, slice: str, rows: Iterable[Row], unit: str | None = None) -> Group | None:
    """The errors of the rows of a metric that have both numbers; of a ``unit`` those whose G may be that."""
    ratio_of = (lambda row: row.ratio) if unit is None else (lambda row: row.readings.get(unit))
    pairs = [(ratio, row) for row in rows if row.metric == metric and (ratio := ratio_of(row)) is not None]
    if not pairs:
        return None
    errors = sorted(abs(ratio - 1) for ratio, _ in pairs)
    low, high = min(pairs, key=lambda pair: pair[0]), max(pairs, key=lambda pair: pair[0])
    at = math.ceil(0.95 * len(errors)) - 1
    middle = median(ratio for ratio, _ in pairs)
    sizes = (median(errors), mean(errors), errors[at], middle)
    return Group(metric, slice, len(errors), *sizes, low[1], high[1], low[0], high[0])


def summary(rows: Sequence[Row]) -> list[Group]:
    """Per metric, and per metric and source."""
    found = []
    for metric in BYTES:
        sources = dict.fromkeys(row.source for row in rows if row.metric == metric and row.ratio is not None)
        groups = [grouped(metric, "", rows)]
        groups += [grouped(metric, source, [row for row in rows if row.source == source]) for source in sources]
        found += [group for group in groups if group is not None]
    return found


def boundaries(rows: Sequence[Row]) -> dict[str, Any]:
    """What the verdicts are worth. A run that was measured went through as well."""
    judged = [row for row in rows if row.verdict != "unknown"]
    died = [row for row in judged if row.metric == "OOM"]
    ran = [row for row in judged if row.metric == "fits"]
    measured = [row for row in judged if row.metric in BYTES and row.measured is not None]
    return {
        "died": len(died),
        "died_verdicts": dict(Counter(row.verdict for row in died)),
        "false_fits": [row.id for row in died if not row.agrees],
        "ran": len(ran),
        "ran_verdicts": dict(Counter(row.verdict for row in ran)),
        "measured": len(measured),
        "measured_verdicts": dict(Counter(row.verdict for row in measured)),
        "false_does_not_fit": [row.id for row in (*ran, *measured) if not row.agrees],
    }


def counts(rows: Sequence[Row]) -> dict[str, int]:
    """How many rows became setups that are estimated, and why the others did not."""
    kinds = Counter(row.kind for row in rows if row.found is None)
    return {
        "rows": len(rows),
        "setups": sum(row.found is not None for row in rows),
        "out_of_scope": kinds["scope"],
        "not_stated": kinds["not stated"],
        "not_known": kinds["not known"],
        "refused_by_memplan": kinds["memplan"],
        "errors": kinds["error"],
    }


# -- showing ----------------------------------------------------------------------------------------------------------


def to_dict(name: str, rows: Sequence[Row]) -> dict[str, Any]:
    """The JSON."""
    worst = lambda row: {"id": row.id, "ratio": round(row.ratio or 0, 4)}  # noqa: E731
    return {
        "schema_version": 1,
        "file": name,
        "counts": counts(rows),
        "summary": [
            {
                "metric": group.metric,
                "source": group.slice or None,
                "n": group.n,
                "median_error": round(group.median, 5),
                "mean_error": round(group.mean, 5),
                "p95_error": round(group.p95, 5),
                "median_ratio": round(group.middle, 5),
                "worst_under": worst(group.under),
                "worst_over": worst(group.over),
            }
            for group in summary(rows)
        ],
        "boundaries": boundaries(rows),
        "rows": [row.to_dict() for row in rows],
    }


def line(row: Row) -> str:
    """One row as text."""
    setup = ""
    if row.setup is not None:
        training, cluster = row.setup.training, row.setup.cluster
        kind = training.task if training.task == "generate" else row.setup.strategy.kind
        batch = f"{training.micro_batch_size} x {training.seq_len}"
        setup = f"{cluster.gpus} x {getattr(cluster.gpu, 'name', '?')} {kind} {batch}"
    head = f"{row.id[:26]:26} {row.fields['model'][-24:]:24} {setup:38} {row.metric:19}"
    if row.found is None:
        return f"{head} refused ({row.kind}): {row.refused}"
    if row.metric not in BYTES or row.ratio is None:
        wrong = "" if row.agrees else f"  FALSE {row.verdict.upper()}"
        predicted = "" if row.predicted is None else f" {row.predicted:.2f} predicted, nothing measured"
        return f"{head} {row.verdict}{predicted}{wrong}"
    return f"{head} {row.measured:8.2f} {row.predicted:8.2f} {row.ratio:6.3f} {row.found.gpu.peak_phase}"


def shown(rows: Sequence[Row]) -> Iterable[str]:
    """The summary as text."""
    yield f"{'metric':20} {'source':42} {'n':>4} {'median':>7} {'mean':>7} {'p95':>7}  worst under, worst over"
    for group in summary(rows):
        worst = f"{group.under.ratio:.3f} {group.under.id}, {group.over.ratio:.3f} {group.over.id}"
        errors = " ".join(f"{100 * value:6.2f}%" for value in (group.median, group.mean, group.p95))
        yield f"{group.metric:20} {group.slice or '(all)':42.42} {group.n:4} {errors}  {worst}"
    found = boundaries(rows)
    yield f"died: {found['died']}, of which memplan lets fit: {', '.join(found['false_fits']) or 'none'}"
    said = found["ran"] + found["measured"]
    yield f"went through: {said}, of which memplan says do not fit: {', '.join(found['false_does_not_fit']) or 'none'}"
    yield "rows: " + ", ".join(f"{number} {name.replace('_', ' ')}" for name, number in counts(rows).items())


def main(arguments: Sequence[str] | None = None) -> int:
    """Score a file. Returns the exit code: 2 for a file that cannot be read or written, else 0."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("file", nargs="?", type=Path, metavar="FILE.csv")
    parser.add_argument(
        "--json",
        nargs="?",
        const="-",
        metavar="OUT",
        help="also write rows, summary and counts; without OUT print them",
    )
    parser.add_argument("--quiet", action="store_true", help="print the summary only")
    given = parser.parse_args(arguments)
    if given.file is None and given.json is not None and given.json.lower().endswith(".csv"):
        given.file, given.json = Path(given.json), "-"  # --json FILE.csv
    file, printed = given.file or PUBLISHED, given.json == "-"
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        fields = read(file)
    except UnreadableError as error:
        print(error, file=sys.stderr)
        return 2
    rows = []
    for each in fields:
        rows.append(compare(each))
        if not given.quiet and not printed:
            print(line(rows[-1]), flush=True)
    found = json.dumps(to_dict(file.name, rows), indent=1)
    if printed:
        print(found)
        return 0
    print(*shown(rows), sep="\n")
    if given.json is not None:
        try:
            Path(given.json).write_text(found + "\n", encoding="utf-8")
        except OSError as error:
            print(f"{given.json}: {error.strerror or error}", file=sys.stderr)
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
