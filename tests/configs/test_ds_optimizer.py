"""An optimizer that DeepSpeed makes gets one group of weights from the Trainer: the real engine's ledger (O2)."""

from __future__ import annotations

from typing import Any

import pytest
from tests.oracles import o2
from tests.oracles.families import CONFIGS
from tests.oracles.test_engines import estimated, measured

from memplan import estimator, sharded
from memplan.case import model_spec
from memplan.catalog.gpus import find_gpu
from memplan.configs.deepspeed import parse_deepspeed
from memplan.configs.setup import with_training
from memplan.memory.course import Ledger
from memplan.specs.hardware import ClusterSpec
from memplan.specs.software import SoftwareSpec
from memplan.specs.training import TrainingSpec

OPTIMIZER = {"type": "AdamW", "params": {"torch_adam": True, "lr": "auto"}}
"""DeepSpeed's own kernels need CUDA; torch's AdamW is made by DeepSpeed too."""
BASE = {
    "dtype": "bfloat16",
    "mixed_precision": "bf16",
    "micro_batch_size": 1,
    "seq_len": 16,
    "num_layers": 2,
    "deepspeed": {"optimizer": OPTIMIZER},
}


@pytest.mark.parametrize(
    "options",
    [
        {**BASE, "strategy": "zero1", "gpus": 4, "zero": {"grad_accum_dtype": "fp32"}},
        {**BASE, "strategy": "zero2", "gpus": 3},
    ],
    ids=lambda options: options["strategy"],
)
def test_one_group(options: dict[str, Any]) -> None:
    row = o2.run(o2.Setup("llama", "small", options))
    assert row.result is not None, row.unsupported
    truth = measured(row)

    config = o2.engine_config(options)
    config.pop("zero_force_ds_cpu_optimizer")
    asked = TrainingSpec(**{name: BASE[name] for name in ("dtype", "mixed_precision", "micro_batch_size", "seq_len")})
    training, strategy, _ = with_training(parse_deepspeed(config, "ds.json"), asked, {}, options["gpus"])
    cpu, values = find_gpu("cpu"), {**CONFIGS["llama"]["small"], "num_hidden_layers": 2}
    cluster = ClusterSpec(gpu=cpu, gpus=options["gpus"])
    setup = estimator.resolve(model_spec(values), training, cluster, strategy, SoftwareSpec())
    ledger = Ledger(pinned_in_powers_of_two=False)
    sharded.play_engine(setup, cpu, strategy, options["gpus"], options["gpus"], 0, ledger, full_depth=False)
    found = {name: size for name, size in estimated(ledger).items() if name in truth}
    assert found == {name: pytest.approx(size, rel=0.002 if name == "idle" else 0.005) for name, size in truth.items()}
