"""Published memory beside the estimates (memory.csv): ``python benchmarks/published/memory.py`` prints every row."""

from __future__ import annotations

import csv
import sys
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

from compare import specs  # noqa: E402

from memplan.errors import UnsupportedError  # noqa: E402
from memplan.estimator import estimate  # noqa: E402
from memplan.results import Estimate  # noqa: E402
from memplan.specs.software import SoftwareSpec  # noqa: E402
from memplan.units import GiB  # noqa: E402


@dataclass(frozen=True)
class Row:
    """One published figure, with what memplan says of the setup."""

    fields: dict[str, str]
    found: Estimate | None
    """None where memplan refuses the setup."""
    refused: str = ""
    largest: int = 0
    """The largest batch that fits, where that is what was published."""

    @property
    def id(self) -> str:
        return self.fields["id"]

    @property
    def family(self) -> str:
        """Of rows by one source."""
        return self.id.split("-")[0]

    @property
    def metric(self) -> str:
        """allocated, reserved, process, not stated; oom or largest batch, which are no bytes."""
        return self.fields["metric"]

    @property
    def measured(self) -> float:
        """GiB of one GPU, or sequences."""
        return float(self.fields["measured_gib"] or self.fields["micro_batch_size"])

    @property
    def predicted(self) -> float:
        """As ``measured``; where the metric is not stated, what is allocated, the least that it can be."""
        assert self.found is not None
        gpu = self.found.gpu
        if self.metric == "largest batch":
            return float(self.largest)
        return {"process": gpu.peak_device, "reserved": gpu.peak_reserved}.get(self.metric, gpu.peak_allocated) / GiB

    @property
    def decoding(self) -> float:
        """GiB allocated at the fullest moment after the prompt, of a generation."""
        assert self.found is not None
        return next(phase.allocated for phase in self.found.gpu.phases if phase.name == "step") / GiB

    @property
    def ratio(self) -> float:
        """Predicted over measured."""
        return self.predicted / self.measured

    @property
    def agrees(self) -> bool:
        """Whether the verdict allows what was seen: of a run that died, that it may not fit."""
        assert self.found is not None
        gpu = self.found.gpu
        assert gpu.capacity is not None
        return gpu.high > gpu.capacity


def read() -> list[dict[str, str]]:
    """The rows of memory.csv."""
    with (HERE / "memory.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def compare(fields: dict[str, str]) -> Row:
    """Estimate a row."""
    try:
        found = _estimate(fields)
    except UnsupportedError as refusal:
        return Row(fields, None, str(refusal))
    largest = 0
    if fields["metric"] == "largest batch":
        sizes = range(1, 4 * int(fields["micro_batch_size"]))
        while sizes:
            middle = len(sizes) // 2
            gpu = _estimate(fields | {"micro_batch_size": str(sizes[middle])}).gpu
            assert gpu.capacity is not None
            if gpu.high <= gpu.capacity:
                largest, sizes = sizes[middle], sizes[middle + 1 :]
            else:
                sizes = sizes[:middle]
    return Row(fields, found, largest=largest)


def _estimate(fields: dict[str, str]) -> Estimate:
    replay = fields["metric"] in ("process", "reserved", "largest batch")
    setup = {name: value for name, value in fields.items() if name not in ("id", "source", "metric", "measured_gib")}
    return _of(tuple(setup.items()), replay)


@lru_cache
def _of(setup: tuple[tuple[str, str], ...], replay: bool) -> Estimate:
    fields = dict(setup)
    model, training, cluster, strategy, _ = specs(fields)
    return estimate(model, training, cluster, strategy, SoftwareSpec.parse(fields["software"]), replay=replay)


def main() -> None:
    """Print every row."""
    for row in map(compare, read()):
        f = row.fields
        setup = f"{f['gpus']} x {f['gpu']} {f['strategy']} {f['micro_batch_size']} x {f['seq_len']}"
        head = f"{row.id:18.18} {f['model'][-22:]:22} {setup:36} {row.metric:13}"
        if row.found is None:
            print(f"{head} refused: {row.refused}")
        elif row.metric == "oom":
            print(f"{head} {row.found.verdict}")
        else:
            print(f"{head} {row.measured:7.2f} {row.predicted:7.2f} {row.ratio:6.3f} {row.found.gpu.peak_phase}")


if __name__ == "__main__":
    main()
