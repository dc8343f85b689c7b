"""What older versions of torch kept: gradients through the next forward, and softmax's input."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.oracles import o1
from tests.oracles.compare import compare

import memplan
from memplan.results import Estimate
from memplan.specs.software import SoftwareSpec

CONFIG = {
    "model_type": "gpt2",
    "architectures": ["GPT2LMHeadModel"],
    "n_embd": 96,
    "n_layer": 3,
    "n_head": 6,
    "vocab_size": 1000,
    "n_positions": 64,
}


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize(("family", "lora"), [("llama", None), ("gpt2", None), ("bert", {"rank": 4})])
def test_gradients_that_zero_grad_keeps(
    family: str, lora: dict[str, Any] | None, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch 2.13 told to do what 1.13 did."""

    def zero_grad(self: torch.nn.Module, set_to_none: bool = False) -> None:
        for p in self.parameters():
            if p.grad is not None:
                p.grad.detach_().zero_()

    monkeypatch.setattr(torch.nn.Module, "zero_grad", zero_grad)
    options: dict[str, Any] = {"dtype": "float32", "mixed_precision": "no", "attn": "eager"}
    options |= {"micro_batch_size": 2, "seq_len": 16, "grad_accum_steps": steps}
    targets = {"targets": ["query"]} if family == "bert" else {}
    setup = o1.Setup(family, "small", options | ({"lora": lora | targets} if lora else {}))
    row, _ = o1.run(setup)
    old, new = (compare(row, SoftwareSpec(torch=version)) for version in ("1.13", "2.0"))
    for phase, (traced, estimated) in old.phases.items():
        assert estimated == pytest.approx(traced, rel=0.003), phase
    assert old.result.gpu.steady_allocated == pytest.approx(row.result["steady_allocated"], rel=0.001)
    traced, estimated = new.phases["idle"]
    assert estimated < traced


def estimated(version: str, *, replay: bool = True, gpus: int = 1, **training: Any) -> Estimate:
    spec = memplan.TrainingSpec(seq_len=64, micro_batch_size=4, attn="eager", **training)
    cluster, strategy = {"gpu": "V100-16GB", "gpus": gpus}, {"kind": "ddp" if gpus > 1 else "single"}
    return memplan.estimate(CONFIG, spec, cluster, strategy, replay=replay, software=f"torch={version}")


def levels(estimate: Estimate) -> dict[str, int]:
    """Without cuBLAS's workspaces, which differ too."""
    workspace = estimate.gpu.components.workspace
    return {phase.name: phase.allocated - (workspace if phase.name != "load" else 0) for phase in estimate.gpu.phases}


@pytest.mark.parametrize("gpus", [1, 2])
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_kept_gradients_are_replayed_and_bounded(steps: int, gpus: int) -> None:
    replayed, bound = (
        estimated("1.13", replay=flag, gpus=gpus, grad_accum_steps=steps, eval_batch_size=4) for flag in (True, False)
    )
    for phase, allocated in levels(bound).items():
        assert levels(replayed)[phase] == pytest.approx(allocated, rel=0.005), phase
    assert replayed.gpu.peak_allocated <= replayed.gpu.peak_reserved <= bound.gpu.peak_reserved
    later = levels(estimated("2.0", gpus=gpus, grad_accum_steps=steps, eval_batch_size=4))
    gradients = levels(replayed)["idle"] - later["idle"]
    assert gradients == pytest.approx(4 * replayed.model.parameters, rel=0.02)
    if steps == 1:
        assert levels(replayed)["forward"] - later["forward"] == pytest.approx(gradients, abs=4096)
        assert levels(replayed)["first_step"] == pytest.approx(later["first_step"], abs=4096)
    assert levels(replayed)["step"] == pytest.approx(later["step"], abs=4096)


@pytest.mark.parametrize("mixed_precision", ["no", "fp16"])
def test_softmax_kept_its_input(mixed_precision: str) -> None:
    old, new = (estimated(version, mixed_precision=mixed_precision) for version in ("1.10", "1.11"))
    scores = 4 * 6 * 64 * 64 * 4  # float32 under autocast too: they are scores of float16 and a float32 mask
    logits = 4 * 64 * 1000 * 4
    kept = levels(old)["forward"] - levels(new)["forward"]
    assert kept in (3 * scores, 3 * scores + logits)
    assert levels(old)["step"] == levels(new)["step"]


def test_bert_added_a_mask_of_ones() -> None:
    config = {"model_type": "bert", "architectures": ["BertForMaskedLM"], "num_hidden_layers": 3}
    training = memplan.TrainingSpec(seq_len=128, attn="eager", mixed_precision="fp16")
    old, new = (
        memplan.estimate(config, training, {"gpu": "V100-16GB"}, software=f"torch=1.10,transformers={version}")
        for version in ("4.56", "4.57")
    )
    # With the mask the scores are float32, which softmax then kept: without it, float16.
    assert levels(old)["forward"] - levels(new)["forward"] == pytest.approx(3 * 12 * 128 * 128 * (4 - 2), abs=4096)
    assert levels(old)["idle"] == levels(new)["idle"]
