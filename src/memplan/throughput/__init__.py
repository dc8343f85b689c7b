"""How long a step takes: kernels from the tape, rooflines from the catalog, transfers from the engines."""

from memplan.throughput.rates import Machine
from memplan.throughput.step import Part, Span, StepTiming, expected_seconds, least_seconds, step_time

__all__ = ["Machine", "Part", "Span", "StepTiming", "expected_seconds", "least_seconds", "step_time"]
