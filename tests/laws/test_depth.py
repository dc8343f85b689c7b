"""What is told of all layers by a few equals a tape on which every layer ran, for every family."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import cycle, product
from typing import Any

import pytest
from tests.oracles.families import CONFIGS, EAGER_ONLY, LORA_TARGETS

from memplan.adapters.liger import FAMILIES as LIGER
from memplan.architectures.registry import FAMILIES
from memplan.catalog.gpus import find_gpu
from memplan.errors import MemplanError
from memplan.estimator import resolve
from memplan.memory.course import course
from memplan.memory.depth import EveryLayer, as_it_ran
from memplan.memory.timeline import StepProfile
from memplan.micro_batch import MicroBatch, micro_batch, replayable
from memplan.specs.hardware import ClusterSpec
from memplan.specs.model import ModelSpec
from memplan.specs.software import SoftwareSpec
from memplan.specs.strategy import FsdpSpec, Strategy
from memplan.specs.training import TrainingSpec

LAYERS = {"cpu": 5, "A100-80GB": 4}
"""GPU -> how many layers: odd and even, as sums of gradients take turns between old memory and new."""
PRECISIONS: list[dict[str, Any]] = [
    {"attn": "eager", "packed": False},
    {"attn": "sdpa", "dtype": "bfloat16", "mixed_precision": "no"},
    {"attn": "sdpa", "mixed_precision": "no"},
]
ADAPTERS: list[dict[str, Any]] = [
    {},
    {"lora": 4},
    {"lora": 4, "quantization": "int8"},
    {"lora": 4, "quantization": "nf4"},
]
DEPTHS = ("num_hidden_layers", "n_layer", "num_layers", "num_decoder_layers")
LISTS = ("architectures", "pos_att_type")
"""Lists that do not have an entry for each layer."""


def deepened(config: dict[str, Any], layers: int) -> dict[str, Any]:
    """The config with so many layers, where they are not listed one by one."""
    if any(isinstance(value, (list, tuple)) and name not in LISTS for name, value in config.items()):
        return config
    return {name: layers if name in DEPTHS else value for name, value in config.items()}


def models(family: str, layers: int) -> list[ModelSpec]:
    """One of each layout: "wide" differs from "small" by its widths alone."""
    return [
        ModelSpec(
            id=name,
            model_type=family,
            architecture=config["architectures"][0],
            config=deepened(config, layers),
            source="test",
        )
        for name, config in CONFIGS[family].items()
        if name not in ("7b", "8b", "wide")
    ]


def trainings(family: str, turn: int) -> Iterator[dict[str, Any]]:
    """Every way to train, each in one of the precisions, batch sizes and accumulations by turns."""
    targets = tuple(LORA_TARGETS.get(family, ["q_proj", "v_proj"]))
    kernels = (False, True) if family in LIGER else (False,)
    for number, (checkpointed, liger, adapter) in enumerate(product((False, True), kernels, ADAPTERS), start=turn):
        yield {
            "gradient_checkpointing": checkpointed,
            "use_reentrant": bool(number // 3 % 2) if checkpointed else None,
            "liger": liger,
            "micro_batch_size": 1 + number // 2 % 2,
            "grad_accum_steps": 1 + number // 5 % 2,
            **adapter,
            **({"lora": {"rank": 4, "targets": targets}} if adapter else {}),
            **PRECISIONS[number % len(PRECISIONS)],
            **({"attn": "eager"} if family in EAGER_ONLY else {}),
        }


def check_parts(profile: StepProfile) -> None:
    for moment in (*profile.peaks.values(), profile.saved, profile.end):
        assert min(moment.parts) >= 0
        assert sum(moment.parts) == moment.total


RELEASES = [(family, SoftwareSpec()) for family in sorted(set(CONFIGS) & set(FAMILIES))]
RELEASES += [("mixtral", SoftwareSpec(transformers="4.57")), ("olmoe", SoftwareSpec(transformers="4.51"))]
"""Families, and those whose experts older versions of transformers called one by one."""


def release_id(value: object) -> str:
    return value.transformers if isinstance(value, SoftwareSpec) else str(value)


@pytest.mark.parametrize("gpu", LAYERS)
@pytest.mark.parametrize(("family", "software"), RELEASES, ids=release_id)
def test_closed_form_equals_every_layer(family: str, software: SoftwareSpec, gpu: str) -> None:
    compared = 0
    found = models(family, LAYERS[gpu])
    for turn, model in enumerate(found):
        for training in trainings(family, turn):
            spec = TrainingSpec(seq_len=24, **training)
            accumulated = spec.grad_accum_steps > 1
            try:
                setup = resolve(model, spec, ClusterSpec(gpu=find_gpu(gpu)), Strategy(), software)
                every, closed = (micro_batch(setup, full_depth=full, accumulated=accumulated) for full in (True, False))
            except MemplanError:  # what Liger or the GPU refuses
                continue
            exact = every.unrolled.profile()
            assert closed.unrolled.profile() == exact, training
            check_parts(exact)
            compared += 1
    assert compared >= len(ADAPTERS) * len(found)


STRATEGIES = [
    Strategy(),
    Strategy(kind="zero2"),
    Strategy(kind="zero3"),
    Strategy(kind="fsdp"),
    Strategy(kind="fsdp", fsdp=FsdpSpec(version=1)),
]
BEFORE_CHECKPOINTING_LAYERS = SoftwareSpec(transformers="4.52")
"""There FSDP1 holds what frozen blocks are given, until the whole backward is over."""
UNTOLD = {"deberta-v2"}
"""Families of which every layer adds to a gradient of one that stands before all."""


def moments(micro: MicroBatch, every: EveryLayer) -> list[tuple[object, ...]]:
    """The moments at which an engine acts, each with its layer, its gradient and its place in the log."""
    found: list[tuple[object, ...]] = []
    position = 0
    legs = course(micro.unrolled, micro.layout().numbers).legs
    for (leg, key), stretch, gradient in zip(legs, every.stretches, every.gradients, strict=True):
        position += len(stretch)
        if leg.event is not None:
            found.append((leg.event.kind, None if key is None else key[1], gradient, position))
    return found


@pytest.mark.parametrize("family", sorted(set(CONFIGS) & set(FAMILIES)))
def test_unrolled_log_is_that_of_every_layer(family: str) -> None:
    told, strategies = 0, cycle(STRATEGIES)
    for turn, model in enumerate(models(family, 5)[:2]):
        for number, training in enumerate(trainings(family, turn)):
            spec, strategy = TrainingSpec(seq_len=24, **training), next(strategies)
            cluster = ClusterSpec(gpu=find_gpu("A100-80GB"), gpus=1 if strategy.kind == "single" else 4)
            accumulated, evaluation = spec.grad_accum_steps > 1, number % 5 == 4
            software = BEFORE_CHECKPOINTING_LAYERS if strategy.fsdp.version == 1 else SoftwareSpec()
            try:
                setup = resolve(model, spec, cluster, strategy, software)
                ((found, every),) = replayable(setup, [(accumulated, evaluation)])
                whole = micro_batch(setup, full_depth=True, accumulated=accumulated, evaluation=evaluation)
            except MemplanError:  # what Liger, the engine or the GPU refuses
                continue
            exact = as_it_ran(whole.unrolled)
            assert every.log == exact.log == whole.tape.log, training
            assert every.sizes(found.tape) == whole.tape.sizes, training
            assert (every.phases, every.left_alive) == (exact.phases, exact.left_alive), training
            assert moments(found, every) == moments(whole, exact), training
            told += len(found.tape.log) < len(whole.tape.log)
    assert told or family in UNTOLD
