"""Mixtures of experts: which layers have them, what is refused, and that balance does not matter."""

from __future__ import annotations

from typing import Any

import pytest
from tests.oracles.families import CONFIGS

from memplan.architectures.moe import tokens_by_expert
from memplan.architectures.nn import Build
from memplan.architectures.registry import build_model
from memplan.catalog.gpus import find_gpu
from memplan.errors import MemplanError, SpecError, UnsupportedError
from memplan.estimator import estimate
from memplan.results import Estimate
from memplan.specs.hardware import ClusterSpec
from memplan.specs.model import ModelSpec
from memplan.specs.software import SoftwareSpec
from memplan.specs.strategy import Strategy
from memplan.specs.training import LoraSpec, QuantizationSpec, TrainingSpec
from memplan.tape.tape import Tape
from memplan.tape.tensor import float32

FAMILIES = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v2", "deepseek_v3")


def config_of(family: str, **values: Any) -> dict[str, Any]:
    return {**next(iter(CONFIGS[family].values())), **values}


def spec(family: str, **values: Any) -> ModelSpec:
    config = config_of(family, **values)
    return ModelSpec(
        id="config.json", model_type=family, architecture=config["architectures"][0], config=config, source="test"
    )


def build(family: str, software: SoftwareSpec | None = None, **values: Any) -> Any:
    return build_model(Build(Tape(), float32, software=software or SoftwareSpec()), spec(family, **values), None)


def layers_with_experts(family: str, **values: Any) -> list[int]:
    return [i for i, layer in enumerate(build(family, **values).model.layers) if hasattr(layer.mlp, "experts")]


def test_every_layer_of_mixtral_has_experts() -> None:
    assert layers_with_experts("mixtral", num_hidden_layers=3) == [0, 1, 2]


@pytest.mark.parametrize("family", ["qwen2_moe", "qwen3_moe"])
def test_qwen_names_its_dense_layers(family: str) -> None:
    assert layers_with_experts(family, num_hidden_layers=5, mlp_only_layers=[1, 4]) == [0, 2, 3]
    assert layers_with_experts(family, num_hidden_layers=5, decoder_sparse_step=2) == [1, 3]


@pytest.mark.parametrize("family", ["deepseek_v2", "deepseek_v3"])
def test_deepseek_begins_with_dense_layers(family: str) -> None:
    assert layers_with_experts(family, num_hidden_layers=4, first_k_dense_replace=3) == [3]


WRONG: list[tuple[str, dict[str, Any], type[MemplanError], str]] = [
    ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 5}, SpecError, "num_experts_per_tok: 5 is more than"),
    ("mixtral", {"num_local_experts": 0}, SpecError, "num_local_experts: 0"),
    ("mixtral", {"router_jitter_noise": 0.1}, UnsupportedError, "router_jitter_noise"),
    ("qwen3_moe", {"output_router_logits": True}, UnsupportedError, "output_router_logits"),
    ("qwen2_moe", {"mlp_only_layers": ["0"]}, SpecError, "mlp_only_layers"),
    ("deepseek_v2", {"num_key_value_heads": 1}, SpecError, "num_key_value_heads: 1"),
    ("deepseek_v2", {"topk_method": "best"}, SpecError, "topk_method: 'best'"),
    ("deepseek_v2", {"num_experts_per_tok": None}, SpecError, "num_experts_per_tok: is null"),
    ("deepseek_v2", {"topk_method": "group_limited_greedy", "n_group": 3, "topk_group": 1}, SpecError, "n_group: 3"),
    ("deepseek_v3", {"n_routed_experts": 8, "n_group": 8, "topk_group": 1}, SpecError, "n_group: 8"),
    ("deepseek_v3", {"n_group": 2, "topk_group": 3}, SpecError, "topk_group: 3"),
]


@pytest.mark.parametrize(("family", "values", "error", "message"), WRONG, ids=str)
def test_wrong_values_are_refused_by_name(
    family: str, values: dict[str, Any], error: type[MemplanError], message: str
) -> None:
    with pytest.raises(error, match=message) as raised:
        build(family, **values)
    assert "config.json" in str(raised.value)


NOT_MODELLED = [
    ("mixtral", "4.47.1", "tables of cosines"),
    ("qwen2_moe", "4.44.2", "tables of cosines"),
    ("qwen3_moe", "4.50", "does not have this model"),
    ("olmoe", "4.44", "does not have this model"),
    ("deepseek_v2", "4.57", "one by one"),
    ("deepseek_v3", "4.57", "one by one"),
]


@pytest.mark.parametrize(("family", "version", "reason"), NOT_MODELLED)
def test_versions_that_are_not_confirmed_are_refused(family: str, version: str, reason: str) -> None:
    with pytest.raises(UnsupportedError, match=rf"transformers: '{version}' .*{reason}.* Use \d\.\d+ or later"):
        build(family, software=SoftwareSpec(transformers=version))


def test_a_window_of_qwen2_moe_is_refused_where_all_layers_share_a_mask() -> None:
    window = {"use_sliding_window": True, "max_window_layers": 1}
    build("qwen2_moe", **window)
    with pytest.raises(UnsupportedError, match="use_sliding_window"):
        build("qwen2_moe", SoftwareSpec(transformers="4.57"), **window)


@pytest.mark.parametrize("busiest", [False, True])
@pytest.mark.parametrize(("tokens", "top_k", "experts"), [(100, 2, 8), (7, 3, 5), (1, 2, 8), (8, 8, 8)])
def test_every_token_goes_to_as_many_experts(tokens: int, top_k: int, experts: int, busiest: bool) -> None:
    taken = tokens_by_expert(tokens, top_k, experts, busiest)
    assert len(taken) == experts
    assert sum(taken) == tokens * top_k
    assert max(taken) <= tokens
    assert busiest or max(taken) - min(taken) <= 1


def of(software: str, lora: LoraSpec | None = None, **training: Any) -> Estimate:
    cluster = ClusterSpec(gpu=find_gpu("A100-80GB"))
    asked = TrainingSpec(seq_len=512, micro_batch_size=16, lora=lora, **training)
    return estimate(spec("mixtral", vocab_size=256), asked, cluster, Strategy(), SoftwareSpec(transformers=software))


def test_the_busiest_expert_widens_the_interval_upwards() -> None:
    looped, grouped = of("4.57", gradient_checkpointing=True), of("5.23", gradient_checkpointing=True)
    (load,) = [a for a in looped.assumptions if a.name.startswith("busiest_expert_load")]
    assert "high counts" in load.source
    widened = looped.gpu.high - looped.gpu.peak_reserved - (grouped.gpu.high - grouped.gpu.peak_reserved)
    config = spec("mixtral").config
    share = config["num_experts_per_tok"] / config["num_local_experts"]
    in_others = 16 * 512 * (1 - share)
    assert widened >= 2 * in_others * config["intermediate_size"] * 2  # of what one expert makes: two tensors of bf16
    assert looped.gpu.low - looped.gpu.peak_allocated == grouped.gpu.low - grouped.gpu.peak_allocated


def test_adapters_stand_beside_the_linear_layers_of_experts() -> None:
    lora = LoraSpec(rank=4, targets=("w1", "gate"))
    config = spec("mixtral").config
    layers, experts = config["num_hidden_layers"], config["num_local_experts"]
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    adapted = layers * 4 * (experts * (hidden + inner) + hidden + experts)
    assert of("4.57", lora).model.trainable_parameters == adapted
    with pytest.raises(UnsupportedError, match="fused 3-D weights"):
        of("5.23", lora)


def test_experts_are_quantized_where_they_are_linear_layers() -> None:
    quantized = {"quantization": QuantizationSpec(kind="nf4"), "lora": LoraSpec(rank=4)}
    old, new = (of(version, **quantized) for version in ("4.57", "5.23"))
    assert old.model.parameters == new.model.parameters
    assert old.gpu.components.weights < 0.6 * new.gpu.components.weights


@pytest.mark.parametrize("family", FAMILIES)
def test_the_load_of_experts_is_an_assumption(family: str) -> None:
    model = spec(family)
    result = estimate(model, TrainingSpec(seq_len=16), ClusterSpec(gpu=find_gpu("cpu")), Strategy(), SoftwareSpec())
    (load,) = [a for a in result.assumptions if a.name.startswith("busiest_expert_load")]
    names = ("num_local_experts", "num_experts", "n_routed_experts")
    experts = next(model.config[name] for name in names if name in model.config)
    balanced = model.config["num_experts_per_tok"] / experts
    assert (load.value, load.low, load.high) == (balanced, balanced, 1.0)


def allocations(balanced: bool) -> list[int]:
    """Every allocation of one real step, as large as it is, with a router that is random or prefers two experts."""
    import torch
    import transformers
    from torch.utils._python_dispatch import TorchDispatchMode

    sizes: list[int] = []

    class Sizes(TorchDispatchMode):  # type: ignore[no-untyped-call]
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            results = out if isinstance(out, (tuple, list)) else [out]
            sizes.extend(x.untyped_storage().nbytes() for x in results if torch.is_tensor(x))
            return out

    torch.manual_seed(0)
    values = config_of("mixtral", num_hidden_layers=1, use_cache=False)
    del values["model_type"], values["architectures"]
    model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**values)).train()
    gate = model.model.layers[0].mlp.gate
    if not balanced:
        torch.nn.init.zeros_(gate.weight)  # equal scores: topk takes the same experts for every token
    loads: list[int] = []
    gate.register_forward_hook(lambda _m, _i, out: loads.extend(torch.bincount(out[2].flatten(), minlength=4).tolist()))
    ids = torch.arange(64).view(2, 32)
    with Sizes():  # type: ignore[no-untyped-call]
        model(input_ids=ids, labels=ids).loss.backward()
    assert (max(loads) == ids.numel()) is not balanced
    assert all(p.grad is not None for p in model.parameters())
    return sizes


def test_no_byte_depends_on_how_the_router_spreads_the_tokens() -> None:
    assert allocations(balanced=True) == allocations(balanced=False)
