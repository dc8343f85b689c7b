"""ZeRO++'s sizes beside DeepSpeed's own functions, and what its keys do to a small model."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import pytest
from tests.oracles.families import CONFIGS

import memplan
from memplan.engines.zeropp import quantization_groups, reduces_quantized
from memplan.errors import SpecError
from memplan.specs.strategy import ZeroSpec

os.environ.setdefault("DS_ACCELERATOR", "cpu")  # read when DeepSpeed is imported

ELEMENTS = [7, 8, 12, 64, 1000, 8000, 8008, 15_992, 16_000, 44_032, 64_000, 100_000, 250_008, 4096 * 1376, 32_000 * 512]


@pytest.mark.parametrize("elements", ELEMENTS)
def test_weights_are_quantized_in_as_many_groups_as_deepspeed_makes(elements: int) -> None:
    import torch
    from deepspeed.runtime.zero.partition_parameters import CUDAQuantizer

    quantizer = CUDAQuantizer.__new__(CUDAQuantizer)  # its constructor compiles CUDA kernels
    quantizer.group_size_cache = {}
    quantizer.quantizer_cuda_module = SimpleNamespace(quantize=lambda _, groups, *__: groups, Symmetric=None)
    try:
        groups = quantizer.quantize(torch.empty(elements, dtype=torch.half))
    except AssertionError:
        with pytest.raises(SpecError, match="zero_quantized_weights"):
            quantization_groups(elements)
    else:
        assert quantization_groups(elements) == groups


def test_vectors_and_what_does_not_divide_are_reduced_as_ever() -> None:
    assert reduces_quantized((8, 4), 32, 16)
    assert not reduces_quantized((32,), 32, 16)
    assert not reduces_quantized((8, 3), 24, 16)


def run(nodes: int = 2, **keys: Any) -> memplan.Estimate:
    cluster = memplan.ClusterSpec(gpu="A100-80GB", gpus=8, nodes=nodes)
    strategy = memplan.Strategy(kind="zero3", zero=ZeroSpec(reduce_bucket_size=100_000, **keys))
    training = memplan.TrainingSpec(seq_len=16)
    return memplan.estimate(dict(CONFIGS["llama"]["small"]), training, cluster, strategy, replay=False)


def test_a_second_partition_is_gone_between_steps() -> None:
    plain, second = run(), run(zero_hpz_partition_size=4)
    assert second.gpu.components.weights >= plain.gpu.components.weights
    assert _phase(second, "idle") == _phase(plain, "idle")
    assert _phase(second, "step") > _phase(plain, "step")


def test_gradients_are_quantized_between_nodes_only() -> None:
    one = run(nodes=1, zero_quantized_gradients=True)
    assert one.gpu.phases == run(nodes=1).gpu.phases
    assert run(zero_quantized_gradients=True).gpu.phases != run().gpu.phases


def test_weights_that_are_trained_are_never_kept_quantized() -> None:
    assert run(zero_quantized_nontrainable_weights=True).gpu == run().gpu


def _phase(found: memplan.Estimate, name: str) -> int:
    return next(phase.allocated for phase in found.gpu.phases if phase.name == name)
