"""Where the engine adds a gradient into one that it holds, and where into new memory: the tape beside real runs."""

from __future__ import annotations

import warnings
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
from tests.oracles.families import CONFIGS

from memplan.architectures.nn import Build
from memplan.architectures.registry import build_model
from memplan.specs.model import ModelSpec
from memplan.tape.dispatch import CPU
from memplan.tape.tape import Tape
from memplan.tape.tensor import float32

BATCH, LENGTH = 2, 24


def config_of(family: str) -> dict[str, Any]:
    config = {**CONFIGS[family]["small"]}
    depth = next(name for name in ("num_hidden_layers", "n_layer") if name in config)
    return {**config, depth: 2}


def on_the_tape(config: dict[str, Any]) -> Counter[int]:
    """Bytes of the sums that are new tensors -> how many, without the small ones."""
    name = config["architectures"][0]
    spec = ModelSpec(id="x", model_type=config["model_type"], architecture=name, config=config, source="test")
    tape = Tape(replace(CPU, accumulate_in_place=True))
    root: Any = build_model(Build(tape, float32), spec, None)
    loss, logits = root(*root.inputs(BATCH, LENGTH))
    del logits
    tape.backward(loss)
    births = zip(tape.births, tape.sizes, strict=True)
    return Counter(size for (name, _, _), size in births if name == "accumulate")


def in_torch(config: dict[str, Any]) -> Counter[int]:
    """The same of a real step on CPU: allocations of additions that the engine makes between two functions."""
    import torch
    import transformers
    from torch.profiler import ProfilerActivity, profile

    values = {name: value for name, value in config.items() if name not in ("model_type", "architectures")}
    made = transformers.CONFIG_MAPPING[config["model_type"]](**values, use_cache=False)
    model = getattr(transformers, config["architectures"][0])(made).train()
    ids = torch.zeros((BATCH, LENGTH), dtype=torch.int64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loss = model(input_ids=ids, labels=ids).loss
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
            loss.backward()
    events = profiled.profiler.kineto_results.events()  # type: ignore[union-attr]
    spans = [(e.start_ns(), e.start_ns() + e.duration_ns(), e.name()) for e in events if e.name() != "[memory]"]
    found: Counter[int] = Counter()
    for event in events:
        if event.name() == "[memory]" and event.nbytes() > 0:
            around = [name for start, end, name in spans if start <= event.start_ns() <= end]
            if len(around) == 2 and around[0].startswith("autograd::engine") and around[1] == "aten::add":
                found[-(-event.nbytes() // 512) * 512] += 1
    return found


@pytest.mark.parametrize(
    "family", ["llama", "qwen2", "gpt2", "phi3", "gpt_neox", "olmo2", "gemma", "opt", "stablelm", "gptj"]
)
def test_sums_in_new_memory_are_those_of_a_real_step(family: str) -> None:
    config = config_of(family)
    assert on_the_tape(config) == in_torch(config)


def test_there_are_such_sums() -> None:
    hidden = 4 * BATCH * LENGTH * 256
    assert in_torch(config_of("llama")) == {hidden: 4}  # query + key, and gate + up, in each of two layers
