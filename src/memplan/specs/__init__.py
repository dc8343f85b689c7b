"""The inputs, split by who decides: model, training and cluster are given; the strategy may be chosen."""

from memplan.specs.fields import Fields
from memplan.specs.hardware import ClusterSpec, GPUSpec
from memplan.specs.model import ModelSpec
from memplan.specs.software import SoftwareSpec
from memplan.specs.strategy import (
    DdpSpec,
    FsdpSpec,
    OffloadOptimizerSpec,
    OffloadParamSpec,
    Strategy,
    ZeroSpec,
)
from memplan.specs.training import LoraSpec, QuantizationSpec, TrainingSpec

__all__ = [
    "ClusterSpec",
    "DdpSpec",
    "Fields",
    "FsdpSpec",
    "GPUSpec",
    "LoraSpec",
    "ModelSpec",
    "OffloadOptimizerSpec",
    "OffloadParamSpec",
    "QuantizationSpec",
    "SoftwareSpec",
    "Strategy",
    "TrainingSpec",
    "ZeroSpec",
]
