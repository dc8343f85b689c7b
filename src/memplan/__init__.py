"""Know before you launch: the memory that a training run will need on every GPU, in host RAM and on NVMe.

The public names are imported when they are first used, so that ``import memplan`` costs next to nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from memplan.answers import Check, Comparison, Finding, Plan, Report, Rung
    from memplan.api import compare, estimate, ladder
    from memplan.checks import check, preflight
    from memplan.errors import MemplanError, PreflightError, ResolutionError, SpecError, UnsupportedError
    from memplan.integrations.callback import MemoryCallback
    from memplan.integrations.largest import largest_batch
    from memplan.integrations.script_arguments import MemplanArguments
    from memplan.integrations.watch import watch
    from memplan.interactive import what_if
    from memplan.measuring import measure
    from memplan.planning import plan
    from memplan.reporting import report
    from memplan.results import (
        Estimate,
        EstimateList,
    )
    from memplan.specs import (
        ClusterSpec,
        GPUSpec,
        LoraSpec,
        ModelSpec,
        QuantizationSpec,
        SoftwareSpec,
        Strategy,
        TrainingSpec,
    )

__version__ = "0.1.0"

_HOME = {
    "check": "checks",
    "compare": "api",
    "estimate": "api",
    "ladder": "api",
    "measure": "measuring",
    "plan": "planning",
    "preflight": "checks",
    "MemoryCallback": "integrations.callback",
    "MemplanArguments": "integrations.script_arguments",
    "largest_batch": "integrations.largest",
    "watch": "integrations.watch",
    "report": "reporting",
    "what_if": "interactive",
    "MemplanError": "errors",
    "PreflightError": "errors",
    "ResolutionError": "errors",
    "SpecError": "errors",
    "UnsupportedError": "errors",
    "Check": "answers",
    "Comparison": "answers",
    "Estimate": "results",
    "EstimateList": "results",
    "Finding": "answers",
    "Plan": "answers",
    "Report": "answers",
    "Rung": "answers",
    "ClusterSpec": "specs",
    "GPUSpec": "specs",
    "LoraSpec": "specs",
    "ModelSpec": "specs",
    "QuantizationSpec": "specs",
    "SoftwareSpec": "specs",
    "Strategy": "specs",
    "TrainingSpec": "specs",
}
"""Public name -> the module it lives in."""

__all__ = [
    "Check",
    "ClusterSpec",
    "Comparison",
    "Estimate",
    "EstimateList",
    "Finding",
    "GPUSpec",
    "LoraSpec",
    "MemoryCallback",
    "MemplanArguments",
    "MemplanError",
    "ModelSpec",
    "Plan",
    "PreflightError",
    "QuantizationSpec",
    "Report",
    "ResolutionError",
    "Rung",
    "SoftwareSpec",
    "SpecError",
    "Strategy",
    "TrainingSpec",
    "UnsupportedError",
    "check",
    "compare",
    "estimate",
    "ladder",
    "largest_batch",
    "measure",
    "plan",
    "preflight",
    "report",
    "watch",
    "what_if",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'memplan' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"memplan.{_HOME[name]}"), name)
    globals()[name] = value  # the next access does not come here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
