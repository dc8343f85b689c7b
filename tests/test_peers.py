"""The arithmetic of DeepSpeed's and accelerate's estimators, beside their own functions."""

from __future__ import annotations

import argparse
import itertools
import os
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch

os.environ.setdefault("DS_ACCELERATOR", "cpu")  # read when DeepSpeed is imported
from accelerate import init_empty_weights
from accelerate.commands import estimate as accelerate_estimate
from deepspeed.runtime.zero import stage3, stage_1_and_2
from tests.oracles.families import CONFIGS, Config
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM

from memplan import peers
from memplan.architectures.nn import Build, Module
from memplan.architectures.registry import attention_implementations, build_model
from memplan.catalog.models import lookup
from memplan.specs.model import ModelSpec
from memplan.tape.dispatch import CPU
from memplan.tape.tape import Tape
from memplan.tape.tensor import float32

FAMILIES = [(family, name) for family, configs in CONFIGS.items() for name in configs]
# Of every family the config whose layers weigh most, or the one whose vocabulary does; of the many variants a draw.
SAMPLE = [(family, ("small", "wide")[number % 2]) for number, family in enumerate(CONFIGS)]
SAMPLE += random.Random(3).sample([(family, name) for family, name in FAMILIES if name not in ("small", "wide")], 24)
CATALOG = ("openai-community/gpt2", "google-bert/bert-base-uncased", "google-t5/t5-small", "distilbert-base-uncased")


def ours(config: Config, head: str = "base", *, full_depth: bool = False) -> Module:
    architecture = config["architectures"][0]
    spec = ModelSpec(id="m", model_type=config["model_type"], architecture=architecture, config=config, source="test")
    attn = attention_implementations(spec.model_type)[0]
    return build_model(Build(Tape(CPU), float32, attn=attn, full_depth=full_depth), spec, head)


def theirs(config: Config, make: Any = AutoModel) -> torch.nn.Module:
    model: torch.nn.Module = make.from_config(AutoConfig.for_model(**config), dtype=torch.float32)
    return model


def of_catalog(name: str) -> Config:
    row = lookup(name)
    assert row is not None
    return row.config


# -- DeepSpeed


def test_deepspeeds_figures_are_its_own_over_a_grid() -> None:
    draw = random.Random(7)
    sizes = [(0, 0), (1, 1), (2_783_959_040, 65_798_144), (6_738_415_616, 131_072_000), (1_000_000_000_001, 3)]
    sizes += [(total := draw.randrange(1, 10**12), draw.randrange(1, total + 1)) for _ in range(60)]
    for (total, largest), gpus, nodes in itertools.product(sizes, (1, 2, 3, 4, 7, 8, 16), (1, 2, 3, 5, 8, 64)):
        for offload in (False, True):
            expected = stage_1_and_2.estimate_zero2_model_states_mem_needs(total, gpus, nodes, cpu_offload=offload)
            states = peers.zero2_states(total, gpus, nodes, offload_optimizer=offload)
            assert (states.host, states.gpu) == expected, (total, gpus, nodes, offload)
        for optimizer, param, zero_init in itertools.product((False, True), repeat=3):
            expected = stage3.estimate_zero3_model_states_mem_needs(
                total, largest, gpus, nodes, cpu_offload=optimizer, cpu_offload_params=param, zero_init=zero_init
            )[:2]
            states = peers.zero3_states(
                peers.Counted(total, largest),
                gpus,
                nodes,
                offload_optimizer=optimizer,
                offload_param=param,
                zero_init=zero_init,
            )
            assert (states.host, states.gpu) == expected, (total, largest, gpus, nodes, optimizer, param, zero_init)


@pytest.mark.parametrize(("family", "name"), SAMPLE)
def test_deepspeed_counts_what_it_counts_in_the_real_model(family: str, name: str) -> None:
    config = CONFIGS[family][name]
    counted = peers.count(ours(config))
    assert counted == peers.count(ours(config, full_depth=True))
    assert (counted.parameters, counted.largest_layer) == stage3.model_to_params(theirs(config))


@pytest.mark.parametrize("name", CATALOG)
def test_deepspeed_counts_what_it_counts_in_a_model_of_the_catalog(name: str) -> None:
    counted = peers.count(ours(of_catalog(name)))
    assert (counted.parameters, counted.largest_layer) == stage3.model_to_params(theirs(of_catalog(name)))


def test_a_head_is_counted_where_it_is_asked_for() -> None:
    config = CONFIGS["gpt2"]["variant gpt2-untied-wide"]
    counted = peers.count(ours(config, "causal-lm"))
    assert counted.parameters > peers.count(ours(config)).parameters
    expected = stage3.model_to_params(theirs(config, AutoModelForCausalLM))
    assert (counted.parameters, counted.largest_layer) == expected


# -- accelerate


@pytest.fixture
def gather_data(monkeypatch: pytest.MonkeyPatch) -> Callable[[torch.nn.Module], list[list[Any]]]:
    """The command's own figures of a model: dtype, largest layer, total, training."""

    def gather(model: torch.nn.Module) -> list[list[Any]]:
        monkeypatch.setattr(accelerate_estimate, "create_empty_model", lambda *_, **__: model)
        arguments = accelerate_estimate.estimate_command_parser().parse_args(["model"])
        assert isinstance(arguments, argparse.Namespace)
        rows: list[list[Any]] = accelerate_estimate.gather_data(arguments)
        return rows

    return gather


def figures(sizes: peers.Sizes) -> list[list[Any]]:
    rows = []
    for dtype, share in peers.ACCELERATE_DTYPES.items():
        times = peers.ACCELERATE_TRAINING.get(dtype)
        training = -1 if times is None else sizes.total * times
        rows.append([dtype, sizes.largest_layer / share, sizes.total / share, training])
    return rows


def empty(config: Config, make: Any = AutoModel) -> torch.nn.Module:
    """As accelerate's create_empty_model does."""
    with init_empty_weights():
        return theirs(config, make)


def printed(rows: list[list[Any]]) -> list[list[Any]]:
    return [[*row[:3], max(row[3].values())] for row in rows]


@pytest.mark.parametrize(("family", "name"), FAMILIES)
def test_accelerates_figures_are_its_own(gather_data, family: str, name: str) -> None:
    config = CONFIGS[family][name]
    assert figures(peers.maximum_sizes(ours(config))) == printed(gather_data(empty(config)))


@pytest.mark.parametrize("name", [*CATALOG, "bigscience/T0_3B", "meta-llama/Llama-2-7b", "mistralai/Mixtral-8x7B-v0.1"])
def test_accelerates_figures_of_a_model_of_the_catalog(gather_data, name: str) -> None:
    config = of_catalog(name)
    assert figures(peers.maximum_sizes(ours(config))) == printed(gather_data(empty(config)))


@pytest.mark.parametrize(
    ("config", "head", "make"),
    [
        (CONFIGS["gpt2"]["small"], "causal-lm", AutoModelForCausalLM),
        (CONFIGS["llama"]["tied"], "causal-lm", AutoModelForCausalLM),
        (CONFIGS["bert"]["variant masked-lm"], "masked-lm", AutoModelForMaskedLM),
    ],
)
def test_accelerate_counts_a_tied_weight_under_each_name(gather_data, config: Config, head: str, make: Any) -> None:
    sizes = peers.maximum_sizes(ours(config, head))
    assert figures(sizes) == printed(gather_data(empty(config, make)))
    tied = theirs(config, make).get_input_embeddings().weight.numel()
    assert sizes.total >= 4 * (peers.count(ours(config, head)).parameters + tied)


# -- the rule of thumb


def test_the_rule_of_thumb() -> None:
    assert peers.rule_of_thumb(1000, 4, 7) == 16_000 + 1_300_000_000 + 7
