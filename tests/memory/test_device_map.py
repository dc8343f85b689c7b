"""Device maps against transformers' own placement of models on the meta device."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers.integrations.accelerate as real
from tests.oracles.families import CONFIGS

from memplan.adapters.quantization import quantize
from memplan.architectures.nn import Build, Module
from memplan.architectures.registry import FAMILIES, build_model
from memplan.errors import UnsupportedError
from memplan.introspect.trace import _build_model
from memplan.memory.device_map import Kind, Model, Place, device_map
from memplan.memory.loading import device_of, footprint, placed_model, tensors
from memplan.specs.model import ModelSpec
from memplan.specs.training import QuantizationSpec
from memplan.tape import tensor as dtypes
from memplan.tape.dispatch import CPU
from memplan.tape.tape import Tape
from memplan.tape.tensor import Parameter

KINDS: tuple[Kind, ...] = ("auto", "balanced", "balanced_low_0", "sequential")
DEPTH = 6
SETUPS = 25
"""Random machines for each model."""


def deep(config: dict[str, Any]) -> dict[str, Any]:
    """The config with more layers, all of its default kinds."""
    if "attention_types" in config:
        return {**config, "attention_types": [[["global", "local"], DEPTH // 2]], "num_layers": DEPTH}
    depth = {name: DEPTH for name in ("num_hidden_layers", "n_layer", "num_layers") if name in config}
    return {name: value for name, value in config.items() if name != "layer_types"} | depth


def ours(config: dict[str, Any], dtype: str = "float32", quantization: str | None = None) -> Module:
    spec = ModelSpec(
        id="test", model_type=config["model_type"], architecture=config["architectures"][0], config=config, source="x"
    )
    b = Build(Tape(CPU), dtypes.dtype_named(dtype), attn="eager", full_depth=False)
    root = build_model(b, spec, None)
    if quantization is not None:
        quantize(b, root, QuantizationSpec(kind=quantization), dtypes.bfloat16)
    return root


def machines(seed: int, total: int) -> Iterator[tuple[Kind, list[int], int]]:
    """Kind of map, bytes of each GPU, bytes of the host: from far too little to more than enough."""
    rng = random.Random(seed)
    for _ in range(SETUPS):
        shares = (0.05, 0.2, 0.3, 0.5, 0.8, 1.2, 2.0)
        gpus = [int(total * rng.choice(shares) * rng.uniform(0.8, 1.2)) for _ in range(rng.choice((1, 2, 3, 4)))]
        if rng.random() < 0.5:
            gpus = gpus[:1] * len(gpus)
        yield rng.choice(KINDS), gpus, int(total * rng.choice((0.2, 0.6, 2, 50)))


def real_map(model: Any, kind: Kind, gpus: list[int], cpu: int, quantizer: Any = None) -> dict[str, Any] | None:
    """What from_pretrained(device_map=kind) computes; None where it fails."""
    available = {**dict(enumerate(gpus)), "cpu": cpu}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(real, "accelerate_max_memory", lambda given=None: dict(available if given is None else given))
        try:
            return real._get_device_map(model, kind, None, quantizer)  # type: ignore[no-any-return]
        except (IndexError, KeyError):
            return None


def my_map(model: Model, kind: Kind, gpus: list[int], cpu: int, quantized: bool = False) -> dict[str, Any] | None:
    try:
        return device_map(model, kind, dict(enumerate(gpus)), cpu, quantized)
    except UnsupportedError:
        return None


HAS_BOTH = {"mt5"}
"""Its checkpoints have a head and embeddings, which transformers 5 lists as tied until it finds both."""
WITHOUT_BLOCKS = {"distilbert", "deberta-v2"}
"""No module is listed as one piece: a dropout may stand between two parts and keep them from being one entry."""
FAMILY_CONFIGS = [
    (family, name)
    for family, named in CONFIGS.items()
    for name in list(named)[:1]
    if next(iter(named.values()))["model_type"] in FAMILIES
]


@pytest.mark.parametrize(("family", "name"), FAMILY_CONFIGS)
def test_modules_go_where_transformers_puts_them(family: str, name: str) -> None:
    config = deep(CONFIGS[family][name])
    model = _build_model(config, "float32", "eager", None, None, None)
    if family in HAS_BOTH:
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())
    root = ours(config)
    placed = placed_model(root)
    names = [n for n, _ in model.named_parameters(remove_duplicate=False)]
    names += [n for n, _ in model.named_buffers(remove_duplicate=False)]
    total = footprint(tensors(root))
    assert total == model.get_memory_footprint()
    untie(model)
    for kind, gpus, cpu in machines(FAMILY_CONFIGS.index((family, name)), total):
        mine, theirs = my_map(placed, kind, gpus, cpu), real_map(model, kind, gpus, cpu)
        assert (mine is None) == (theirs is None)
        if mine is not None and theirs is not None:
            assert {n: device_of(n, mine) for n in names} == {n: real.get_device(theirs, n) for n in names}
            assert set(mine) <= set(theirs) or family in WITHOUT_BLOCKS  # modules without tensors are theirs alone


@pytest.mark.parametrize("head", ["MaskedLM", "SequenceClassification"])
def test_a_head_that_is_made_before_its_encoder_is_placed_before_it(head: str) -> None:
    config = deep(CONFIGS["xlm-roberta"]["small"]) | {"architectures": [f"XLMRobertaFor{head}"]}
    model, root = _build_model(config, "float32", "eager", None, None, None), ours(config)
    own = [each.name for each in tensors(root) if isinstance(each.tensor, Parameter)]
    assert [name for name, _ in model.named_parameters()] == own
    untie(model)
    names = [n for n, _ in model.named_parameters()]
    total = footprint(tensors(root))
    for kind, gpus, cpu in machines(3, total):
        mine, theirs = my_map(placed_model(root), kind, gpus, cpu), real_map(model, kind, gpus, cpu)
        assert (mine is None) == (theirs is None)
        if mine is not None and theirs is not None:
            assert {n: device_of(n, mine) for n in names} == {n: real.get_device(theirs, n) for n in names}


def untie(model: Any) -> None:
    """As from_pretrained has it when it places modules: tied weights are tied once they are loaded."""
    for name in list(model.all_tied_weights_keys):
        path, _, own = name.rpartition(".")
        module = model.get_submodule(path)
        setattr(module, own, torch.nn.Parameter(torch.empty_like(getattr(module, own))))


class Quantizer:
    """As much of a bitsandbytes quantizer as placement asks for."""

    def __init__(self, size: float, names: set[str]) -> None:
        self.size = size
        self.names = names

    def param_element_size(self, model: Any, name: str, tensor: Any) -> float:
        return self.size if name in self.names else tensor.element_size()  # type: ignore[no-any-return]

    def adjust_max_memory(self, max_memory: dict[Any, float]) -> dict[Any, float]:
        from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer

        return Bnb4BitHfQuantizer.adjust_max_memory(None, max_memory)  # type: ignore[arg-type]

    def validate_environment(self, **_: Any) -> None:
        pass


@pytest.mark.parametrize(("kind", "size"), [("nf4", 0.5), ("int8", 1)])
@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2"])
def test_quantized_modules_go_where_transformers_puts_them(family: str, kind: str, size: float) -> None:
    config = deep(CONFIGS[family]["small"])
    model = _build_model(config, "bfloat16", "eager", None, None, None)
    root = ours(config, "bfloat16", kind)
    packed = {each.name for each in tensors(root) if each.tensor.dtype.name in ("uint8", "int8") and each.registered}
    quantizer = Quantizer(size, packed)
    names = [each.name for each in tensors(root) if each.registered]
    for map_kind, gpus, cpu in machines(7, footprint(tensors(root))):
        mine, theirs = (
            my_map(placed_model(root), map_kind, gpus, cpu, True),
            real_map(model, map_kind, gpus, cpu, quantizer),
        )
        assert (mine is None) == (theirs is None)
        if mine is not None and theirs is not None:
            assert {n: device_of(n, mine) for n in names} == {n: real.get_device(theirs, n) for n in names}


def block(nbytes: int) -> Place:
    return Place(children={"a": Place({"weight": nbytes // 2}), "b": Place({"weight": nbytes // 2})}, whole=True)


def test_a_block_is_never_taken_apart() -> None:
    model = Model(Place(children={str(i): block(100) for i in range(4)}))
    found = device_map(model, "sequential", {0: 260, 1: 260}, None)
    assert found == {"0": 0, "1": 1, "2": 1, "3": "cpu"}  # the first GPU keeps room for a block that comes back


def test_without_a_gpu_everything_is_on_the_host() -> None:
    model = Model(Place(children={str(i): block(100) for i in range(4)}))
    assert device_map(model, "auto", {}, None) == {"": "cpu"}


def test_what_fits_nowhere_goes_to_the_disk() -> None:
    model = Model(Place(children={str(i): block(100) for i in range(4)}))
    found = device_map(model, "auto", {0: 10}, 10)
    assert found == {"": "disk"}
