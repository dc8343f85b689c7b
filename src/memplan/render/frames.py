"""Results as pandas DataFrames: the ``notebook`` extra has it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from memplan.answers import Comparison, ComparisonRow, Finding, Plan
from memplan.errors import UnsupportedError
from memplan.results import (
    EstimateList,
)

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["comparison_frame", "estimates_frame", "findings_frame", "plan_frame"]


def estimates_frame(estimates: EstimateList) -> pd.DataFrame:
    """Return a row per estimate, place and component: bytes. Raises UnsupportedError without pandas, as all here do."""
    rows = [
        {
            "estimate": index,
            "strategy": estimate.setup.get("strategy"),
            "place": place,
            "component": name,
            "bytes": size,
        }
        for index, estimate in enumerate(estimates.estimates)
        for place, components in (
            ("gpu", dict(estimate.gpu.components)),
            ("host", estimate.host.components),
            ("nvme", estimate.nvme.components),
        )
        for name, size in components.items()
    ]
    return _frame(rows, ("estimate", "strategy", "place", "component", "bytes"))


def plan_frame(plan: Plan) -> pd.DataFrame:
    """Return a row per rung: its setup, bytes per GPU and node, seconds of a step, and why it was passed over."""
    rows = [
        {
            "rung": rung.name,
            "chosen": rung == plan.best,
            "micro_batch_size": rung.estimate.setup.get("micro_batch_size"),
            "grad_accum_steps": rung.estimate.setup.get("grad_accum_steps"),
            "seq_len": rung.estimate.setup.get("seq_len"),
            "low": rung.estimate.gpu.low,
            "peak_device": rung.estimate.gpu.peak_device,
            "high": rung.estimate.gpu.high,
            "host": rung.estimate.host.peak,
            "nvme": rung.estimate.nvme.bytes,
            "seconds": None if rung.estimate.step is None else rung.estimate.step.seconds,
            "tokens_per_second": None if rung.estimate.step is None else rung.estimate.step.tokens_per_second,
            "verdict": rung.estimate.verdict,
            "reason_passed_over": rung.reason_passed_over,
        }
        for rung in plan.rungs
    ]
    columns = (
        "rung", "chosen", "micro_batch_size", "grad_accum_steps", "seq_len", "low", "peak_device", "high", "host",
        "nvme", "seconds", "tokens_per_second", "verdict", "reason_passed_over",
    )  # fmt: skip
    return _frame(rows, columns)


def comparison_frame(comparison: Comparison) -> pd.DataFrame:
    """Return a row per figure of each tool, in bytes."""
    return _frame([dict(row) for row in comparison.rows], tuple(ComparisonRow.model_fields))


def findings_frame(findings: Iterable[Finding]) -> pd.DataFrame:
    """Return a row per finding."""
    return _frame([dict(finding) for finding in findings], tuple(Finding.model_fields))


def _frame(rows: Sequence[dict[str, Any]], columns: Sequence[str]) -> pd.DataFrame:
    try:
        import pandas as pd
    except ImportError:
        remedy = "Run pip install 'memplan[notebook]', or use to_dict."
        raise UnsupportedError(f"to_dataframe: pandas is not installed. {remedy}") from None
    return pd.DataFrame(rows, columns=list(columns))
