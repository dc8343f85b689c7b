from memplan.specs import ModelSpec


def test_the_config_is_a_frozen_copy_with_typed_fields() -> None:
    config = {"hidden_size": 64, "architectures": ["LlamaForCausalLM"]}
    model = ModelSpec(id="a/b", model_type="llama", architecture="LlamaForCausalLM", config=config, source="catalog")
    config["hidden_size"] = 1
    assert model.fields.int("hidden_size") == 64
    assert model.config["architectures"] == ("LlamaForCausalLM",)
    assert model.fields.source == "a/b"
