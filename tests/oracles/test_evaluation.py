"""Evaluation beside Trainer.evaluate run for real: what it keeps of its batches on the device."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
from tests.oracles.real_run import peak_of

import memplan

CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 3000,
    "max_position_embeddings": 256,
}
BATCH, LENGTH = 4, 96


def evaluated(directory: Path, batches: int, accumulation_steps: int | None, metrics: bool) -> int:
    """Bytes that Trainer.evaluate allocates at most, over the level at its start."""
    import torch
    import transformers
    from torch.profiler import ProfilerActivity, profile

    class Rows(torch.utils.data.Dataset[dict[str, Any]]):
        def __len__(self) -> int:
            return batches * BATCH

        def __getitem__(self, index: int) -> dict[str, Any]:
            tokens = torch.randint(5, CONFIG["vocab_size"], (LENGTH,))  # type: ignore[call-overload]
            return {"input_ids": tokens, "labels": tokens.clone()}

    values = {name: value for name, value in CONFIG.items() if name not in ("model_type", "architectures")}
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model("llama", **values))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        arguments = transformers.TrainingArguments(
            output_dir=str(directory),
            use_cpu=True,
            per_device_eval_batch_size=BATCH,
            eval_accumulation_steps=accumulation_steps,
            report_to=[],
            disable_tqdm=True,
        )
        trainer = transformers.Trainer(
            model=model,
            args=arguments,
            eval_dataset=Rows(),
            compute_metrics=(lambda prediction: {"n": float(len(prediction.predictions))}) if metrics else None,
        )
        trainer.get_eval_dataloader()
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            trainer.evaluate()
        path = directory / "trace.json"
        profiler.export_chrome_trace(str(path))
    return peak_of(json.loads(path.read_text(encoding="utf-8"))).peak


def estimated(accumulation_steps: int | None) -> int:
    training = memplan.TrainingSpec(
        seq_len=LENGTH,
        eval_batch_size=BATCH,
        eval_accumulation_steps=accumulation_steps,
        mixed_precision="no",
        dtype="float32",
    )
    found = memplan.estimate(CONFIG, training, memplan.ClusterSpec(gpu="cpu"))
    level = {phase.name: phase.allocated for phase in found.gpu.phases}
    return level["eval"] - level["save"]


@pytest.mark.parametrize("steps", [1, 2, 3, 6])
def test_predictions_pile_up(tmp_path: Path, steps: int) -> None:
    assert estimated(steps) == pytest.approx(evaluated(tmp_path, steps, steps, metrics=True), rel=0.01)


def test_only_losses_are_kept_without_metrics(tmp_path: Path) -> None:
    assert estimated(None) == pytest.approx(evaluated(tmp_path, 6, None, metrics=False), rel=0.01)
