"""Plain training: what is there between micro-batches and between steps."""

from __future__ import annotations

from typing import Any

import pytest

from memplan import Strategy, TrainingSpec, api
from memplan.memory.optimizers import rounded

VIT: dict[str, Any] = {
    "model_type": "vit",
    "architectures": ["ViTForImageClassification"],
    "hidden_size": 96,
    "intermediate_size": 200,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 128,
}


def phases(estimate: Any) -> dict[str, int]:
    return {phase.name: phase.allocated for phase in estimate.gpu.phases}


@pytest.mark.parametrize("steps", [2, 5])
def test_the_inputs_of_all_micro_batches_are_there_throughout(steps: int) -> None:
    one, more = (
        phases(api.estimate(VIT, TrainingSpec(micro_batch_size=6, grad_accum_steps=n), "cpu")) for n in (1, steps)
    )
    waiting = (steps - 1) * (rounded(6 * 3 * 128 * 128 * 4) + rounded(6 * 8))
    for name in ("step", "idle", "save"):
        assert more[name] - one[name] == waiting, name


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_the_replay_has_them_too_and_stays_below_its_bound(steps: int) -> None:
    training = TrainingSpec(micro_batch_size=6, grad_accum_steps=steps)
    replayed, bound = (
        api.estimate(VIT, training, "A100-80GB", Strategy(), replay=flag).gpu.peak_reserved for flag in (True, False)
    )
    images = steps * 6 * 3 * 128 * 128 * 4
    assert images < replayed <= bound


def test_the_explanation_names_them() -> None:
    training = TrainingSpec(micro_batch_size=6, grad_accum_steps=5)
    terms = api.estimate(VIT, training, "A100-80GB", Strategy(), explain=True).explanation
    (waiting,) = [term for term in terms or () if "other micro-batches" in term.name]
    assert waiting.bytes == 4 * (rounded(6 * 3 * 128 * 128 * 4) + rounded(6 * 8))
