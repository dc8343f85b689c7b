"""Parameter counts: every catalog model against transformers on the meta device, every oracle config too."""

from __future__ import annotations

import pytest
from tests.catalog.test_models import _count_parameters
from tests.oracles.families import CONFIGS

from memplan.architectures.nn import Build, Inventory
from memplan.architectures.registry import FAMILIES, attention_implementations, build_model
from memplan.catalog.hub import resolve_config
from memplan.catalog.models import CatalogModel, all_models
from memplan.errors import SpecError
from memplan.specs.model import ModelSpec
from memplan.tape.tape import Tape
from memplan.tape.tensor import float32

WRITTEN = [m for m in all_models() if not m.remote_code and m.config["model_type"] in FAMILIES]


def count(model: ModelSpec) -> int:
    build = Build(Tape(), float32, attn=attention_implementations(model.model_type)[0], full_depth=False)
    return sum(p.numel * times for p, times in Inventory(build_model(build, model, None)).parameters)


def test_most_of_the_catalog_is_written() -> None:
    assert len(WRITTEN) >= 150


@pytest.mark.parametrize("row", WRITTEN, ids=lambda row: row.id)
def test_catalog_model_has_its_parameters(row: CatalogModel) -> None:
    expected = row.parameters_published
    if expected is None:
        expected = _count_parameters(dict(row.config))
    assert count(resolve_config(row.id)) == expected


@pytest.mark.parametrize("family", sorted(set(CONFIGS) & set(FAMILIES)))
def test_config_has_the_parameters_of_transformers(family: str) -> None:
    for name, config in CONFIGS[family].items():
        model = ModelSpec(
            id=name, model_type=family, architecture=config["architectures"][0], config=config, source="test"
        )
        assert count(model) == _count_parameters(dict(config)), name


@pytest.mark.parametrize("family", sorted(set(CONFIGS) & set(FAMILIES)))
def test_more_layers_than_any_model_has_are_refused_at_once(family: str) -> None:
    config = CONFIGS[family]["small"]
    names = {"num_hidden_layers", "num_layers", "num_decoder_layers", "n_layer", "n_layers"} & set(config)
    assert names
    for name in names:
        many = ModelSpec(
            id="deep",
            model_type=family,
            architecture=config["architectures"][0],
            config={**config, name: 2**40},
            source="test",
        )
        with pytest.raises(SpecError, match=rf"deep: {name}: 1099511627776 is out of range\. Use .* 1 to 4096"):
            count(many)
