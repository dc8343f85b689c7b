"""Configs whose rotary positions transformers itself cannot compute, and those it can."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from tests.oracles.families import CONFIGS

import memplan


def runs(config: dict[str, Any]) -> bool:
    """Whether the real model makes a step."""
    fields = {name: value for name, value in deepcopy(config).items() if name not in ("model_type", "architectures")}
    try:
        made = transformers.AutoConfig.for_model(config["model_type"], **fields)
        model = getattr(transformers, config["architectures"][0])._from_config(made)
        ids = torch.zeros((1, 8), dtype=torch.int64)
        model(input_ids=ids, labels=ids).loss.backward()
    except (RuntimeError, KeyError, StrictDataclassError):
        return False
    return True


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("llama", {"head_dim": 15}, "head_dim: 15 dimensions are rotated, and an odd number cannot be. Correct it"),
        ("cohere", {"head_dim": 15}, "head_dim: 15"),
        ("gemma3_text", {"head_dim": 15}, "head_dim: 15"),
        ("stablelm", {"partial_rotary_factor": 0.33}, "partial_rotary_factor: 21 of a head's 64 dimensions"),
        ("phi", {"partial_rotary_factor": 0.33}, "partial_rotary_factor: 21 of a head's 64"),
        ("gptj", {"rotary_dim": 7}, "rotary_dim: 7"),
        ("falcon", {"hidden_size": 60, "alibi": False}, "hidden_size / num_attention_heads: 15"),
        ("deepseek_v2", {"qk_rope_head_dim": 15}, "qk_rope_head_dim: 15"),
        ("llama", {"rope_scaling": {"type": "zzz"}}, "rope_scaling: rope_type: 'zzz' does not exist in .* Known:"),
        (
            "phi",
            {"rope_parameters": {"rope_type": "lineal"}},
            "rope_parameters: rope_type: 'lineal' .* Did you mean",
        ),
        ("falcon", {"rope_scaling": {"type": "zzz"}, "alibi": False}, "rope_scaling: rope_type: 'zzz'"),
        ("gpt_neox", {"rope_scaling": {"type": "zzz"}}, "rope_scaling: rope_type: 'zzz'"),
    ],
)
def test_what_transformers_cannot_compute_is_refused(family: str, changes: dict[str, Any], message: str) -> None:
    config = {**CONFIGS[family]["small"], **changes}
    with pytest.raises(memplan.SpecError, match=f"^config: {message}"):
        memplan.estimate(config, memplan.TrainingSpec(seq_len=8), "T4", replay=False)
    assert not runs(config)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("phi3", {"partial_rotary_factor": 0.33}),
        ("glm", {"partial_rotary_factor": 0.33}),
        ("gpt_neox", {"rotary_pct": 0.33}),
        ("stablelm", {"partial_rotary_factor": 0.5}),
        ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0}}),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}}),
    ],
)
def test_what_it_can_is_estimated(family: str, changes: dict[str, Any]) -> None:
    config = {**CONFIGS[family]["small"], **changes}
    assert runs(config)
    memplan.estimate(config, memplan.TrainingSpec(seq_len=8), "T4", replay=False)


def test_phi3_calls_longrope_su_too() -> None:
    config = {**CONFIGS["phi3"]["small"], "rope_scaling": {"type": "su"}}
    memplan.estimate(config, memplan.TrainingSpec(seq_len=8), "T4", replay=False)
    with pytest.raises(memplan.SpecError, match="rope_type: 'su'"):
        memplan.estimate({**CONFIGS["llama"]["small"], "rope_scaling": {"type": "su"}}, None, "T4", replay=False)
