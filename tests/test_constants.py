import dataclasses

import pytest

from memplan.constants import Constant, exact


def test_a_constant_keeps_its_range_and_source() -> None:
    constant = Constant("context", 500, 400, 600, "MiB", "nvidia-smi")
    assert (constant.low, constant.value, constant.high) == (400, 500, 600)
    with pytest.raises(dataclasses.FrozenInstanceError):
        constant.value = 1  # type: ignore[misc]


@pytest.mark.parametrize("source", ["", "  \n"])
def test_no_source_no_constant(source: str) -> None:
    with pytest.raises(ValueError, match="'context' has no source"):
        Constant("context", 500, 400, 600, "MiB", source)


@pytest.mark.parametrize("value", [399, 601, float("nan")])
def test_the_value_is_within_its_range(value: float) -> None:
    with pytest.raises(ValueError, match="not 400 <= "):
        Constant("context", value, 400, 600, "MiB", "nvidia-smi")


def test_exact_has_no_range() -> None:
    constant = exact("block", 512, "B", "c10/cuda/CUDACachingAllocator.h: kMinBlockSize")
    assert constant.low == constant.value == constant.high == 512
