"""Mixtures of experts: which layers have them, what is refused, and that balance does not matter."""

from __future__ import annotations

from typing import Any

import pytest
from tests.oracles.families import CONFIGS

from memplan.architectures.nn import Build
from memplan.architectures.registry import build_model
from memplan.catalog.gpus import find_gpu
from memplan.errors import MemplanError, SpecError, UnsupportedError
from memplan.estimator import estimate
from memplan.specs.hardware import ClusterSpec
from memplan.specs.model import ModelSpec
from memplan.specs.software import SoftwareSpec
from memplan.specs.strategy import Strategy
from memplan.specs.training import TrainingSpec
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


def test_experts_called_in_a_loop_are_refused() -> None:
    with pytest.raises(UnsupportedError, match=r"transformers.*4\.57"):
        build("mixtral", software=SoftwareSpec(transformers="4.57"))


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
