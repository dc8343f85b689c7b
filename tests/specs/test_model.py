import pytest
from tests.oracles.families import CONFIGS
from transformers import AutoConfig

from memplan.specs import ModelSpec


def test_the_config_is_a_frozen_copy_with_typed_fields() -> None:
    config = {"hidden_size": 64, "architectures": ["LlamaForCausalLM"]}
    model = ModelSpec(id="a/b", model_type="llama", architecture="LlamaForCausalLM", config=config, source="catalog")
    config["hidden_size"] = 1
    assert model.fields.int("hidden_size") == 64
    assert model.config["architectures"] == ("LlamaForCausalLM",)
    assert model.fields.source == "a/b"


@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_the_hidden_size_is_that_of_the_config_class(family: str) -> None:
    for values in CONFIGS[family].values():
        real = AutoConfig.for_model(**{name: value for name, value in values.items() if name != "architectures"})
        model = ModelSpec(id="a", model_type=family, architecture="A", config=values, source="test")
        assert model.hidden_size == real.hidden_size


def test_a_config_without_a_hidden_size_has_none() -> None:
    for config in ({}, {"hidden_size": [64]}, {"width": 64}):
        model = ModelSpec(id="a", model_type="swin", architecture="A", config=config, source="test")
        assert model.hidden_size is None
