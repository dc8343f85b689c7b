"""Published throughputs beside the step-time model: ``python benchmarks/published/compare.py`` prints every row."""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

from memplan.case import model_spec
from memplan.catalog.gpus import find_gpu
from memplan.catalog.models import lookup
from memplan.estimator import resolve
from memplan.specs.hardware import ClusterSpec
from memplan.specs.model import ModelSpec
from memplan.specs.software import SoftwareSpec
from memplan.specs.strategy import FsdpSpec, Strategy, ZeroSpec
from memplan.specs.training import LoraSpec, QuantizationSpec, TrainingSpec
from memplan.throughput import Machine, StepTiming, step_time

HERE = Path(__file__).parent
AUTO = {
    "zero1": ("reduce_bucket_size",),
    "zero2": ("reduce_bucket_size",),
    "zero3": ("reduce_bucket_size", "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold"),
}
"""What the Trainer's templates leave to it."""


@dataclass(frozen=True)
class Row:
    """One published figure, with what the model says."""

    fields: dict[str, str]
    timing: StepTiming

    @property
    def id(self) -> str:
        return self.fields["id"]

    @property
    def measured(self) -> float:
        """Tokens per second of all GPUs."""
        return float(self.fields["tokens_per_second"])

    @property
    def predicted(self) -> float:
        return self.timing.tokens_per_second.expected

    @property
    def ratio(self) -> float:
        """Predicted over measured."""
        return self.predicted / self.measured

    @property
    def within(self) -> bool:
        """Whether the interval holds what was measured."""
        span = self.timing.tokens_per_second
        return span.low <= self.measured <= span.high

    @property
    def per_gpu(self) -> tuple[float, float]:
        """Tokens per second of a GPU: measured, predicted."""
        gpus = int(self.fields["gpus"])
        return self.measured / gpus, self.predicted / gpus

    @property
    def family(self) -> str:
        """Of rows by one source."""
        return self.id.split("-")[0]


def read() -> list[dict[str, str]]:
    """The rows of throughput.csv."""
    with (HERE / "throughput.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@cache
def _model_of(name: str) -> ModelSpec:
    shapes = json.loads((HERE / "models.json").read_text(encoding="utf-8"))
    if name in shapes:
        return replace_id(model_spec(shapes[name]), name)
    known = lookup(name)
    assert known is not None, name
    return replace_id(model_spec(known.config), name)


def replace_id(model: ModelSpec, name: str) -> ModelSpec:
    """The model under the name that the row has."""
    return model.replace(id=name)


def specs(fields: dict[str, str]) -> tuple[ModelSpec, TrainingSpec, ClusterSpec, Strategy, Machine]:
    """A row's setup."""
    options: dict[str, Any] = json.loads(fields["options"] or "{}")
    lora = None
    if fields["lora_rank"]:
        targets = tuple(fields["lora_targets"].split(","))
        lora = LoraSpec(rank=int(fields["lora_rank"]), targets=targets, **options.get("lora", {}))
    quantization = None
    if fields["quantization"] != "none":
        quantization = QuantizationSpec(kind=fields["quantization"], **options.get("quantization", {}))
    if fields.get("task") == "generate":
        task: dict[str, Any] = {"task": "generate", "max_new_tokens": int(fields["max_new_tokens"])}
    else:
        task = {
            "grad_accum_steps": int(fields["grad_accum_steps"]),
            "optim": fields["optim"],
            "liger": fields["liger"] == "yes",
            "gradient_checkpointing": fields["gradient_checkpointing"] == "yes",
        }
    training = TrainingSpec(
        micro_batch_size=int(fields["micro_batch_size"]),
        seq_len=int(fields["seq_len"]),
        dtype=fields["dtype"],
        mixed_precision=fields["mixed_precision"],
        attn=fields["attn"],
        lora=lora,
        quantization=quantization,
        **task,
        **options.get("training", {}),
    )
    gpu = find_gpu(fields["gpu"]).replace(**options.get("gpu", {}))
    cluster = ClusterSpec(gpu=gpu, gpus=int(fields["gpus"]), nodes=int(fields["nodes"]), nvme_path="/nvme")
    kind = fields["strategy"]
    strategy = Strategy(
        kind=kind,
        offload_optimizer=fields["offload_optimizer"],
        offload_param=fields["offload_param"],
        zero=ZeroSpec(**{**dict.fromkeys(AUTO.get(kind, ()), "auto"), **options.get("zero", {})}),
        fsdp=FsdpSpec(**options.get("fsdp", {})),
    )
    known = options.get("machine", {})
    defaults = Machine()
    machine = replace(
        defaults,
        **{
            name: replace(getattr(defaults, name), value=value, low=value, high=value, source="stated with the row")
            for name, value in known.items()
        },
    )
    return _model_of(fields["model"]), training, cluster, strategy, machine


def compare(fields: dict[str, str]) -> Row:
    """Predict a row."""
    model, training, cluster, strategy, machine = specs(fields)
    setup = resolve(model, training, cluster, strategy, SoftwareSpec())
    return Row(fields, step_time(setup, cluster, strategy, machine))


def spearman(pairs: list[tuple[float, float]]) -> float:
    """Rank correlation; ties share their ranks."""

    def ranks(values: list[float]) -> list[float]:
        order = sorted(values)
        return [order.index(value) + (order.count(value) - 1) / 2 for value in values]

    xs, ys = ranks([x for x, _ in pairs]), ranks([y for _, y in pairs])
    mean = (len(pairs) - 1) / 2
    covariance = sum((x - mean) * (y - mean) for x, y in zip(xs, ys))
    spread = sum((x - mean) ** 2 for x in xs) * sum((y - mean) ** 2 for y in ys)
    return covariance / spread**0.5


def main() -> None:
    """Print every row, the worst last."""
    found = [compare(fields) for fields in read()]
    for row in sorted(found, key=lambda row: row.ratio):
        f = row.fields
        setup = f"{f['gpus']} x {f['gpu']} {f['strategy']} {f['micro_batch_size']} x {f['seq_len']}"
        parts = " ".join(f"{part.name}={part.seconds.expected:.3g}" for part in row.timing.parts)
        inside = " " if row.within else "!"
        print(f"{row.ratio:5.2f}{inside} {row.id:12} {f['model'][-20:]:20} {setup:38} {row.timing.bound_by:9} {parts}")
    ratios = [row.ratio for row in found]
    print(f"{len(found)} rows, Spearman {spearman([row.per_gpu for row in found]):.3f}, median {median(ratios):.2f}")


if __name__ == "__main__":
    main()
