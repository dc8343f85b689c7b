"""memplan's estimates beside the O1 archive: the same setup, ``--gpu cpu``, byte against byte."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from tests.oracles.o1 import Row

from memplan.catalog.gpus import find_gpu
from memplan.errors import MemplanError
from memplan.estimator import estimate, resolve
from memplan.introspect.trace import _set_depth
from memplan.micro_batch import micro_batch
from memplan.results import Estimate
from memplan.specs.hardware import ClusterSpec
from memplan.specs.model import ModelSpec
from memplan.specs.software import SoftwareSpec
from memplan.specs.strategy import Strategy
from memplan.specs.training import TrainingSpec
from memplan.tape.tape import INPUT

STEADY = ("forward", "loss", "backward", "step", "idle")
NOT_ASKED = ("freeze", "cuda_autocast", "experts", "max_grad_norm", "train_mode", "steps")
"""Options of a trace that an estimate has no option for; a row with one of them is compared elsewhere."""


@dataclass(frozen=True)
class Comparison:
    """One row of the archive with memplan's answer."""

    row: Row
    result: Estimate
    saved: int
    """Bytes that forward leaves alive for backward."""

    @property
    def error(self) -> float:
        """Relative error of ``steady_allocated``."""
        truth: int = (self.row.result or {})["steady_allocated"]
        return self.result.gpu.steady_allocated / truth - 1

    @property
    def phases(self) -> dict[str, tuple[int, int]]:
        """Phase -> (traced, estimated)."""
        mine = {p.name: p.allocated for p in self.result.gpu.phases}
        traced: dict[str, int] = (self.row.result or {})["phases"]
        return {name: (size, mine.get(name, 0)) for name, size in traced.items()}


def comparable(row: Row) -> bool:
    """Whether the row was traced, and asks for nothing that an estimate cannot be asked."""
    return row.result is not None and not any(name in row.setup.options for name in NOT_ASKED)


def compare(row: Row, software: SoftwareSpec | None = None) -> Comparison:
    """Estimate the row's setup, by default with the versions that memplan's rules were read from."""
    options: dict[str, Any] = dict(row.setup.options)
    config = {**row.setup.values}
    depth = options.pop("num_layers", None)
    if depth is not None:
        _set_depth(config, depth)
    lora = options.pop("lora", None)
    if lora is not None:
        targets = lora["targets"]
        lora = {**lora, "targets": (targets,) if isinstance(targets, str) else tuple(targets)}
        options["lora"] = lora
    options["packed"] = not options.pop("padded", False)
    if not options.pop("eval", False):
        options.pop("eval_batch_size", None)
    model = ModelSpec(
        id=row.setup.config,
        model_type=config["model_type"],
        architecture=config["architectures"][0],
        config=config,
        source="oracle",
    )
    cluster = ClusterSpec(gpu=find_gpu("cpu"))
    question = (model, TrainingSpec(**options), cluster, Strategy(), software or SoftwareSpec())
    micro = micro_batch(resolve(*question), full_depth=False, accumulated=False)
    saved = micro.unrolled.profile().saved
    return Comparison(row, estimate(*question), saved.total - saved.parts[INPUT])


def summary(comparisons: Iterable[Comparison]) -> tuple[int, float, float]:
    """Rows, median and worst relative error."""
    errors = [abs(c.error) for c in comparisons]
    return len(errors), statistics.median(errors), max(errors)


def main() -> None:
    """Print each family's errors and its worst rows: ``python -m tests.oracles.compare``."""
    import sys

    from tests.oracles.o1 import load_archives

    for family, archive in load_archives().items():
        if sys.argv[1:] and family not in sys.argv[1:]:
            continue
        found: list[Comparison] = []
        refused: dict[str, int] = {}
        for row in archive.rows:
            if comparable(row):
                try:
                    found.append(compare(row))
                except MemplanError as error:
                    refused[str(error)] = refused.get(str(error), 0) + 1
        if found:
            sys.stdout.write(f"{family}: %d rows, median %.4f %%, worst %.4f %%\n" % _percent(*summary(found)))
        for comparison in sorted(found, key=lambda c: -abs(c.error))[:5]:
            if abs(comparison.error) > 0.001:
                sys.stdout.write(f"   {comparison.error:+.4%} {comparison.row.setup.key}\n      {comparison.phases}\n")
        for message, count in refused.items():
            sys.stdout.write(f"   refused {count}: {message}\n")


def _percent(rows: int, median: float, worst: float) -> tuple[int, float, float]:
    return rows, median * 100, worst * 100


if __name__ == "__main__":
    main()
