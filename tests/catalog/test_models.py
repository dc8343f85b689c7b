from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import pytest

from memplan.catalog import models
from memplan.catalog.models import CatalogModel, all_models, build_index, lookup, nearest

DATA = Path(models.__file__).with_name("data") / "models"
MODELS = all_models()
# What a training run reads from the config, beside the model type, in each family's own words.
SIZES = [
    {"hidden_size", "n_embd", "d_model", "dim"},
    {"num_hidden_layers", "n_layer", "num_layers", "n_layers"},
    {"num_attention_heads", "n_head", "num_heads", "n_heads"},
]
# transformers 5 sets tie_word_embeddings in these configs whatever the file says, so from_config ties the head.
# from_pretrained leaves it untied: the checkpoint has both tensors, and they differ ("we will NOT tie them").
UNTIED_ON_LOAD = {"t5", "mt5"}


@pytest.mark.parametrize(
    ("name", "id"),
    [
        ("meta-llama/Llama-2-7b", "meta-llama/Llama-2-7b-hf"),
        ("meta-llama/Llama-2-7b-hf", "meta-llama/Llama-2-7b-hf"),
        ("META-LLAMA/llama-2-7B-hf", "meta-llama/Llama-2-7b-hf"),
        (" meta-llama/Llama-2-7b-chat-hf\n", "meta-llama/Llama-2-7b-hf"),
        ("gpt2", "openai-community/gpt2"),
        ("openai-community/gpt2", "openai-community/gpt2"),
        ("bert-base-cased", "google-bert/bert-base-cased"),
        ("roberta-large", "FacebookAI/roberta-large"),
        ("t5-3b", "google-t5/t5-3b"),
        ("bigscience/mt0-xxl", "google/mt5-xxl"),
        ("bigscience/bloomz-7b1", "bigscience/bloom-7b1"),
        ("meta-llama/Meta-Llama-3.1-8B", "meta-llama/Llama-3.1-8B"),
        ("THUDM/chatglm3-6b", "zai-org/chatglm3-6b"),
        ("deepseek-ai/DeepSeek-R1", "deepseek-ai/DeepSeek-V3"),
    ],
)
def test_ids_and_aliases_resolve_whatever_their_case(name: str, id: str) -> None:
    found = lookup(name)
    assert found is not None
    assert found.id == id


@pytest.mark.parametrize("name", ["", " ", "llama", "Llama-2-7b", "meta-llama/Llama-2-8b", "../index", "index"])
def test_other_names_are_not_guessed(name: str) -> None:
    assert lookup(name) is None


def test_a_known_row() -> None:
    model = lookup("meta-llama/Llama-2-70b")
    assert model is not None
    assert model.config == {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "max_position_embeddings": 4096,
        "num_attention_heads": 64,
        "num_hidden_layers": 80,
        "num_key_value_heads": 8,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
        "use_cache": True,
        "vocab_size": 32000,
    }
    assert model.verified
    assert model.parameters_published == 68_976_648_192
    assert model.remote_code is None


def test_a_caller_cannot_change_the_catalog() -> None:
    first = lookup("gpt2")
    assert first is not None
    first.config["architectures"].append("Other")
    first.config["n_embd"] = 1
    second = lookup("gpt2")
    assert second is not None
    assert second.config["n_embd"] == 768
    assert second.config["architectures"] == ["GPT2LMHeadModel"]
    with pytest.raises(dataclasses.FrozenInstanceError):
        second.id = "other"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        ("meta-llama/Llama-2-7b-hff", "meta-llama/Llama-2-7b-hf"),
        ("meta-lama/llama-2-13b", "meta-llama/Llama-2-13b"),
        ("Qwen/Qwen2.5-7", "Qwen/Qwen2.5-7B"),
        ("mistral-7b", "mistralai/Mistral-7B-v0.1"),
        ("llama-3.1-8b", "meta-llama/Llama-3.1-8B"),
        ("bert-base", "google-bert/bert-base-cased"),
        ("pythia-1.4", "EleutherAI/pythia-1.4b"),
    ],
)
def test_nearest_offers_the_meant_name_first(wanted: str, expected: str) -> None:
    assert nearest(wanted)[0] == expected


def test_nearest_is_bounded_and_offers_nothing_for_nonsense() -> None:
    assert len(nearest("llama", n=3)) == 3
    assert len(nearest("llama-2", n=5)) == len(set(nearest("llama-2", n=5))) == 5
    assert nearest("llama", n=0) == nearest("") == nearest("qqqqqqqqqq") == []
    names = build_index()
    assert all(name in names for name in nearest("meta-llama/Llama", n=50))


def test_a_first_lookup_reads_one_family_and_is_quick() -> None:
    seconds = []
    for _ in range(5):
        for cached in (models._index, models._families, models._rows):
            cached.cache_clear()
        start = time.perf_counter()
        lookup("meta-llama/Llama-2-7b")
        seconds.append(time.perf_counter() - start)
    assert models._rows.cache_info().currsize == 1
    assert min(seconds) < 3e-3


def test_the_index_is_the_one_the_family_files_call_for() -> None:
    assert json.loads((DATA / "index.json").read_text(encoding="utf-8")) == build_index(), (
        "regenerate: (DATA / 'index.json').write_text(json.dumps(build_index(), indent=0, ensure_ascii=False) + '\\n')"
    )


def test_names_are_unique_whatever_their_case() -> None:
    names = [name.lower() for model in MODELS for name in (model.id, *model.aliases)]
    assert len(set(names)) == len(names)
    assert set(names) == {name.lower() for name in build_index()}


def test_the_catalog_has_what_people_fine_tune() -> None:
    assert len(MODELS) >= 95
    built = {model.config["model_type"] for model in MODELS if model.remote_code is None}
    assert built >= {
        *("llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe", "gemma", "gemma2", "gemma3_text"),
        *("phi", "phi3", "gpt2", "gptj", "gpt_neox", "opt", "bloom", "falcon", "gpt_bigcode", "starcoder2"),
        *("olmo", "olmo2", "smollm3", "stablelm", "cohere", "deepseek_v2", "deepseek_v3", "glm", "glm4"),
        *("bert", "roberta", "xlm-roberta", "distilbert", "deberta-v2", "t5", "mt5", "vit"),
    }


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.id)
def test_a_row_has_its_sources_and_sizes(model: CatalogModel) -> None:
    assert len(model.source) > 10
    assert isinstance(model.verified, bool)
    assert (model.parameters_published is None) == (model.parameters_source is None)
    assert model.parameters_published is None or (model.parameters_published > 10**6 and model.parameters_source)
    assert model.id not in model.aliases
    architectures = model.config["architectures"]
    assert len(architectures) == 1
    assert isinstance(architectures[0], str)
    for names in SIZES:
        sizes = [model.config[name] for name in names if name in model.config]
        assert sizes
        assert all(isinstance(size, int) and size > 0 for size in sizes)
    assert not {"_name_or_path", "transformers_version", "bos_token_id", "eos_token_id"} & set(model.config)


def test_remote_code_rows_say_why_and_name_the_code() -> None:
    remote = [model for model in MODELS if model.remote_code is not None]
    assert {model.config["model_type"] for model in remote} == {"baichuan", "chatglm", "internlm", "internlm2", "qwen"}
    for model in remote:
        assert model.remote_code is not None
        assert "its own repository" in model.remote_code
        # The key by which a config is refused, wherever it comes from.
        assert model.config["auto_map"]
    assert not [model.id for model in MODELS if model.remote_code is None and "auto_map" in model.config]


def test_transformers_knows_every_other_model_type() -> None:
    from transformers import CONFIG_MAPPING

    for model in MODELS:
        assert (model.config["model_type"] in CONFIG_MAPPING) == (model.remote_code is None), model.id


def test_parameter_counts_are_the_published_ones() -> None:
    counted: dict[str, int] = {}
    wrong = []
    for model in MODELS:
        if model.remote_code is not None:
            continue
        key = json.dumps(model.config, sort_keys=True)
        if key not in counted:
            counted[key] = _count_parameters(model.config)
        if model.parameters_published not in (None, counted[key]):
            wrong.append(f"{model.id}: {counted[key]:,} built, {model.parameters_published:,} published")
    assert not wrong
    assert len(counted) > 150


def _count_parameters(config: dict[str, Any]) -> int:
    """Count the parameters of the class that the config names, built without memory; tied tensors count once."""
    import torch
    import transformers

    values = dict(config)
    built = transformers.AutoConfig.for_model(values.pop("model_type"), **values)
    with torch.device("meta"):
        model = getattr(transformers, config["architectures"][0])._from_config(built)
    if config["model_type"] in UNTIED_ON_LOAD and config.get("tie_word_embeddings") is False:
        model.lm_head.weight = torch.nn.Parameter(torch.empty_like(model.lm_head.weight))
    return int(model.num_parameters())
