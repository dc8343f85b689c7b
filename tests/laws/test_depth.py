"""The closed form over repeated layers equals a tape on which every layer ran, for every family."""

from __future__ import annotations

from typing import Any

import pytest
from tests.oracles.families import CONFIGS, LORA_TARGETS

from memplan.architectures.registry import FAMILIES
from memplan.catalog.gpus import find_gpu
from memplan.errors import MemplanError
from memplan.estimator import _micro_batch, resolve
from memplan.specs.hardware import ClusterSpec
from memplan.specs.model import ModelSpec
from memplan.specs.software import SoftwareSpec
from memplan.specs.strategy import Strategy
from memplan.specs.training import TrainingSpec

SETUPS: list[dict[str, Any]] = [
    {"attn": "sdpa"},
    {"attn": "eager", "gradient_checkpointing": True, "packed": False},
    {"attn": "eager", "lora": 4, "dtype": "bfloat16"},
    {"attn": "sdpa", "gradient_checkpointing": True, "dtype": "bfloat16", "mixed_precision": "no"},
]
DEPTHS = ("num_hidden_layers", "n_layer", "num_layers", "num_decoder_layers")


def deepened(config: dict[str, Any]) -> dict[str, Any]:
    """The config with seven layers, where its layers are not listed one by one."""
    if any(isinstance(value, (list, tuple)) and name != "architectures" for name, value in config.items()):
        return config
    return {name: 7 if name in DEPTHS else value for name, value in config.items()}


@pytest.mark.parametrize("gpu", ["cpu", "A100-80GB"])
@pytest.mark.parametrize("training", SETUPS, ids=str)
@pytest.mark.parametrize("family", sorted(set(CONFIGS) & set(FAMILIES)))
def test_closed_form_equals_every_layer(family: str, training: dict[str, Any], gpu: str) -> None:
    for name, values in CONFIGS[family].items():
        if name in ("7b", "8b"):
            continue
        config = deepened(values)
        model = ModelSpec(
            id=name, model_type=family, architecture=config["architectures"][0], config=config, source="test"
        )
        if "lora" in training:
            targets = tuple(LORA_TARGETS.get(family, ["q_proj", "v_proj"]))
            training = {**training, "lora": {"rank": 4, "targets": targets}}
        spec = TrainingSpec(seq_len=24, micro_batch_size=2, **training)
        try:
            setup = resolve(model, spec, ClusterSpec(gpu=find_gpu(gpu)), Strategy(), SoftwareSpec())
            every, closed = (_micro_batch(setup, full_depth=full, accumulated=False) for full in (True, False))
        except MemplanError:
            continue
        exact = every.unrolled.profile()
        found = closed.unrolled.profile()
        for phase, moment in exact.peaks.items():
            assert found.peaks[phase].total == moment.total
            assert min(found.peaks[phase].parts) >= 0
        assert found.forward_flops == exact.forward_flops
        assert found.backward_flops == exact.backward_flops
