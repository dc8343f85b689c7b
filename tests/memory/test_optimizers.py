from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import transformers
from tests.oracles.families import CONFIGS
from torch.utils._python_dispatch import TorchDispatchMode

from memplan.architectures.nn import Build, Inventory, Module
from memplan.architectures.registry import build_model
from memplan.catalog.gpus import find_gpu
from memplan.errors import SpecError
from memplan.estimator import estimate
from memplan.memory.optimizers import Groups, Optimizer, clip_grad_norm, groups_of, make_optimizer, rounded
from memplan.specs.hardware import ClusterSpec
from memplan.specs.model import ModelSpec
from memplan.specs.software import SoftwareSpec
from memplan.specs.strategy import Strategy
from memplan.specs.training import OPTIMIZERS, TrainingSpec
from memplan.tape.dispatch import CPU, DeviceRules, cuda
from memplan.tape.tape import Tape
from memplan.tape.tensor import dtype_named

CUDA = cuda((8, 0))

# An embedding, unequal matrices with biases, experts and a head: what a loop holds depends on neighbours, which differ
# with and without the Trainer's groups.
SHAPES = ((700, 48), (64, 64), (64,), (200, 64), (200,), (64, 200), (64,), (3, 70, 64), (48, 64), (48,), (700, 48))
EMBEDDING, HEAD = 0, 10


class Live(TorchDispatchMode):
    """The running sum and the peak of storages that are made inside, those of at most ``ignored`` bytes left out."""

    def __init__(self, ignored: int = 8) -> None:
        super().__init__()
        self.ignored = ignored
        self.live = self.peak = 0
        self._refs: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {t.untyped_storage()._cdata for t in _tensors((args, kwargs or {}))}
        out = func(*args, **(kwargs or {}))
        for tensor in _tensors(out):
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key not in before and key not in self._refs and storage.nbytes() > self.ignored:
                size = rounded(storage.nbytes())
                self._refs[key] = weakref.ref(storage, partial(self._free, key, size))
                self.live += size
                self.peak = max(self.peak, self.live)
        return out

    def _free(self, key: int, size: int, _: Any) -> None:
        del self._refs[key]
        self.live -= size


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [t for item in value for t in _tensors(item)] if isinstance(value, (list, tuple)) else []


def real_parameters(dtype: str) -> list[torch.nn.Parameter]:
    parameters = [torch.nn.Parameter(torch.randn(shape).to(getattr(torch, dtype))) for shape in SHAPES]
    for p in parameters:
        p.grad = torch.randn_like(p)
    return parameters


def real_optimizers(name: str, parameters: list[Any], foreach: bool, weight_decay: float) -> list[Any]:
    """What the Trainer would make, or torch's documentation for Muon; foreach as torch chooses it on CUDA."""
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() == 1], "weight_decay": 0.0},
    ]
    hidden = [p for i, p in enumerate(parameters) if p.dim() == 2 and i not in (EMBEDDING, HEAD)]
    others = [p for p in parameters if all(p is not other for other in hidden)]
    optim = torch.optim
    makers: dict[str, Callable[[], list[Any]]] = {
        "adamw_torch": lambda: [optim.AdamW(groups, foreach=foreach)],
        "adamw_torch_fused": lambda: [optim.AdamW(groups, fused=True)],
        "adamw_torch_foreach": lambda: [optim.AdamW(groups, foreach=True)],
        "adamw_torch_loop": lambda: [optim.AdamW(groups, foreach=False)],
        "sgd": lambda: [optim.SGD(groups, lr=0.1, foreach=foreach)],
        "adagrad": lambda: [optim.Adagrad(groups, foreach=foreach)],
        "rmsprop": lambda: [optim.RMSprop(groups, foreach=foreach)],
        "adafactor": lambda: [
            transformers.Adafactor(groups, lr=0.1, scale_parameter=False, relative_step=False),
        ],
        "muon": lambda: [optim.Muon(hidden), optim.AdamW(others, foreach=foreach)],
    }
    return makers[name]()


def modelled(name: str, dtype: str, rules: DeviceRules, weight_decay: bool = False) -> Optimizer:
    tape = Tape(rules)
    parameters = [tape.parameter("", shape, dtype_named(dtype)) for shape in SHAPES]
    groups = Groups(
        parameters,
        undecayed={id(p) for p in parameters if len(p.shape) == 1},
        embeddings={id(parameters[EMBEDDING])},
        outputs={id(parameters[HEAD])},
    )
    return make_optimizer(name, rules, lambda: groups, weight_decay=weight_decay)


TORCH_OPTIMIZERS = [name for name in OPTIMIZERS if "bnb" not in name and "bit" not in name]


@pytest.mark.parametrize("rules", [CPU, CUDA], ids=["loop", "foreach"])
@pytest.mark.parametrize("weight_decay", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", TORCH_OPTIMIZERS)
def test_states_and_temporaries_are_the_real_optimizers(
    name: str, dtype: str, weight_decay: bool, rules: DeviceRules
) -> None:
    parameters = real_parameters(dtype)
    ours = modelled(name, dtype, rules, weight_decay)
    with Live() as construction:
        real = real_optimizers(name, parameters, rules is CUDA, 0.01 if weight_decay else 0.0)
    with Live() as first:
        for optimizer in real:
            optimizer.step()
    with Live() as second:
        for optimizer in real:
            optimizer.step()
    states = sum(rounded(size) for p in ours.groups.parameters for size in ours.states(p) if size > 8)
    assert construction.live + first.live == states
    assert (construction.live > 0) == ours.made_at_construction
    assert second.live == 0
    assert second.peak == ours.step().peak == ours.temporaries.peak


@pytest.mark.parametrize("name", TORCH_OPTIMIZERS)
def test_scalar_states_are_on_the_device_where_torch_puts_them(name: str) -> None:
    parameters = real_parameters("float32")
    real = real_optimizers(name, parameters, foreach=False, weight_decay=0.0)
    for optimizer in real:
        optimizer.step()
    scalars = [
        value
        for optimizer in real
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor) and value.numel() == 1
    ]
    on_cpu = modelled(name, "float32", CPU)
    assert len(scalars) == sum(on_cpu.states(p).count(4) for p in on_cpu.groups.parameters)
    # On CUDA, step counts stay on the host, except fused AdamW's; Adafactor's RMS is computed on the device.
    on_cuda = modelled(name, "float32", CUDA)
    expected = len(SHAPES) if name in ("adamw_torch_fused", "adafactor") else 0
    assert sum(on_cuda.states(p).count(4) for p in on_cuda.groups.parameters) == expected


def test_first_step_makes_the_states_and_leaves_them() -> None:
    for name in OPTIMIZERS:
        ours = modelled(name, "float32", CUDA)
        counted = [(p, 1) for p in ours.groups.parameters]
        states = sum(sum(ours.state_bytes(p)) for p, _ in counted) + sum(ours.shared_bytes(counted))
        log, sizes = ours.step(first=True).log, ours.step(first=True).sizes
        left = sum(sizes[e] if e >= 0 else -sizes[~e] for e in log)
        assert left == (0 if ours.made_at_construction else states)
        assert sum(e >= 0 for e in ours.step().log) == sum(e < 0 for e in ours.step().log)


def test_bitsandbytes_steps_without_temporaries() -> None:
    for name in set(OPTIMIZERS) - set(TORCH_OPTIMIZERS):
        assert modelled(name, "bfloat16", CUDA).temporaries.peak == 0


@pytest.mark.parametrize(
    ("model", "name", "expected"),
    [
        ("llama", "adamw_bnb_8bit", 9576448),
        ("llama", "adamw_8bit", 9576448),
        ("llama", "paged_adamw_32bit", 25606144),
        ("llama", "paged_adamw_8bit", 9576448),
        ("llama", "lion_32bit", 12803072),
        ("llama", "lion_8bit", 4788224),
        ("tied", "adamw_bnb_8bit", 8536064),
        ("tied", "paged_lion_8bit", 4268032),
        ("gpt2", "adamw_bnb_8bit", 8511488),
        ("gpt2", "paged_lion_32bit", 9530368),
        ("gpt2", "lion_8bit", 4255744),
    ],
)
def test_bitsandbytes_states_as_measured(model: str, name: str, expected: int) -> None:
    """Bytes of all state tensors, each rounded up to 512, after one step of the optimizer that
    ``Trainer.create_optimizer`` made on a CPU: bitsandbytes 0.50.2, transformers 5.23.0, torch 2.13.0. The weights'
    dtype, float32 or bfloat16, makes no difference."""
    for full_depth in (True, False):
        root = build(MEASURED[model], full_depth=full_depth)
        parameters = Inventory(root).parameters
        ours = make_optimizer(name, CPU, partial(groups_of, root))
        found = sum(sum(ours.state_bytes(p)) * count for p, count in parameters)
        assert found + sum(ours.shared_bytes(parameters)) == expected


LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 2000,
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
}
MEASURED: dict[str, dict[str, Any]] = {
    "llama": LLAMA,
    "tied": {**LLAMA, "tie_word_embeddings": True},
    "gpt2": {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "vocab_size": 3001,
        "n_positions": 128,
        "n_embd": 192,
        "n_layer": 4,
        "n_head": 6,
    },
}


def model_spec(config: dict[str, Any]) -> ModelSpec:
    (architecture,) = config["architectures"]
    kind = config["model_type"]
    return ModelSpec(id="tiny", model_type=kind, architecture=architecture, config=config, source="test")


def build(config: dict[str, Any], *, full_depth: bool, rules: DeviceRules = CPU) -> Module:
    b = Build(Tape(rules), dtype_named("float32"), attn="eager", full_depth=full_depth)
    return build_model(b, model_spec(config), None)


def test_paged_states_leave_the_device_from_100_000_elements_on() -> None:
    tape = Tape(CUDA)
    float32 = dtype_named("float32")
    small, large = (tape.parameter("", (n,), float32) for n in (99_999, 100_000))
    for name, moments, scales, host in (
        ("paged_adamw_32bit", (400_384, 400_384), (), 800_000),
        ("paged_adamw_8bit", (100_352, 100_352), (2048, 2048), 200_000),
        ("paged_lion_32bit", (400_384,), (), 400_000),
    ):
        ours = make_optimizer(name, CUDA, Groups)
        assert (ours.state_bytes(small), ours.paged_bytes(small)) == (moments + scales, 0)
        assert (ours.state_bytes(large), ours.paged_bytes(large)) == (scales, host)
        on_cpu = make_optimizer(name, CPU, Groups)
        assert (on_cpu.state_bytes(large), on_cpu.paged_bytes(large)) == (moments + scales, 0)


def test_8bit_states_from_4096_elements_on_in_blocks_of_256() -> None:
    tape = Tape(CUDA)
    ours = make_optimizer("adamw_8bit", CUDA, Groups)
    states = {n: ours.states(tape.parameter("", (n,), dtype_named("bfloat16"))) for n in (4095, 4096, 37_000)}
    assert states == {4095: (16380, 16380), 4096: (4096, 4096, 64, 64), 37_000: (37_000, 37_000, 580, 580)}


def test_paged_states_count_as_host_memory() -> None:
    def setup(name: str) -> Any:
        cluster = ClusterSpec(gpu=find_gpu("A100-80GB"), gpus=2)
        training = TrainingSpec(optim=name, seq_len=16, mixed_precision="bf16", dtype="float32")
        return estimate(model_spec(LLAMA), training, cluster, Strategy(kind="ddp"), SoftwareSpec(), replay=False)

    paged, plain = setup("paged_adamw_32bit"), setup("adamw_torch_fused")
    read = {phase.name: phase.allocated for phase in plain.host.phases}
    told = {phase.name: phase.allocated for phase in paged.host.phases}
    assert read["idle"] == 0
    assert told["idle"] == 2 * 20_873_216
    assert {name: told[name] - read[name] for name in read} == {name: (name != "load") * told["idle"] for name in read}
    assert paged.gpu.components.optimizer < plain.gpu.components.optimizer - 20_000_000


def test_host_memory_that_paged_states_do_not_fit_in_decides_the_verdict() -> None:
    def setup(host_memory: str | None) -> Any:
        cluster = ClusterSpec(gpu=find_gpu("A100-80GB"), host_memory=host_memory)
        training = TrainingSpec(optim="paged_adamw_32bit", seq_len=16, mixed_precision="no", dtype="float32")
        return estimate(model_spec(LLAMA), training, cluster, Strategy(), SoftwareSpec(), replay=False)

    verdicts = {room: setup(room).verdict for room in ("8GiB", "19MiB", None)}
    assert verdicts == {"8GiB": "fits", "19MiB": "does-not-fit", None: "unknown"}


# -- the whole model ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "t5", "gemma2"])
def test_groups_are_the_trainers_in_its_order(family: str) -> None:
    config = CONFIGS[family]["small"]
    (name,) = config["architectures"]
    values = {key: value for key, value in config.items() if key not in ("model_type", "architectures")}
    with torch.device("meta"):
        model = getattr(transformers, name)(transformers.AutoConfig.for_model(config["model_type"], **values))
    decay = set(transformers.Trainer.get_decay_parameter_names(None, model))
    named = list(model.named_parameters())
    embeddings = [m.weight for m in model.modules() if isinstance(m, torch.nn.Embedding)]
    for full_depth in (True, False):
        groups = groups_of(build(config, full_depth=full_depth))
        assert [p.shape for p in groups.decay] == [tuple(p.shape) for n, p in named if n in decay]
        assert [p.shape for p in groups.no_decay] == [tuple(p.shape) for n, p in named if n not in decay]
        found = {p.shape for p in groups.parameters if id(p) in groups.embeddings}
        assert found == {tuple(p.shape) for p in embeddings}


@pytest.mark.parametrize("rules", [CPU, CUDA], ids=["cpu", "cuda"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_repeated_layers_step_like_all_layers(name: str, rules: DeviceRules) -> None:
    """One layer that stands for many, and equal turns of a loop once, give what the whole loop gives."""
    for config in (MEASURED["llama"], MEASURED["gpt2"], {**CONFIGS["gemma2"]["small"], "num_hidden_layers": 7}):
        whole = make_optimizer(name, rules, partial(groups_of, build(config, full_depth=True))).step()
        short = make_optimizer(name, rules, partial(groups_of, build(config, full_depth=False)))
        assert short.step() == whole
        assert short.temporaries.peak == whole.peak
        assert short.temporaries.counts == whole.counts


def test_the_head_is_adamws_and_the_blocks_matrices_are_muons() -> None:
    root = build(LLAMA, full_depth=True)
    ours = make_optimizer("muon", CUDA, partial(groups_of, root))
    muons = [p for p in ours.groups.parameters if len(ours.states(p)) == 1]
    adamws = [p for p in ours.groups.parameters if len(ours.states(p)) == 2]
    assert len(muons) == 3 * 7
    assert [p.shape for p in adamws if len(p.shape) == 2] == [(2000, 256)] * 2


def test_frozen_parameters_are_in_no_group() -> None:
    root = build(LLAMA, full_depth=True)
    for p, _ in Inventory(root).parameters:
        if len(p.shape) == 2:
            p.node = None
    groups = groups_of(root)
    assert len(groups.parameters) == len(groups.no_decay) == 7
    assert make_optimizer("adamw_torch", CUDA, lambda: groups).step().peak == 7 * 1024


# -- clipping ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_clipping_is_torchs(dtype: str) -> None:
    parameters = [p for _ in range(20) for p in real_parameters(dtype)]  # a stack of more than 512 bytes
    with Live(ignored=0) as live:
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    tape = Tape()
    counted = [(tape.parameter("", shape, dtype_named(dtype)), 20) for shape in SHAPES]
    assert sum(size * count for size, count in clip_grad_norm(counted, CPU)) == live.peak


def test_cudas_partial_norms_have_a_column_for_each_chunk_of_the_largest_tensor() -> None:
    tape = Tape(CUDA)
    large = tape.parameter("", (65536 * 20 + 1,), dtype_named("bfloat16"))
    small = tape.parameter("", (8,), dtype_named("bfloat16"))
    assert clip_grad_norm([(large, 1), (small, 99)], CUDA) == [(rounded(4 * 100 * 21), 1), (512, 100)]
    assert clip_grad_norm([(small, 100)], CUDA) == [(512, 1), (512, 101)]
    other = tape.parameter("", (65536 * 4,), dtype_named("float32"))
    assert clip_grad_norm([(large, 1), (other, 100)], CUDA) == [(1600 + 448, 1), (512, 101)]
    assert clip_grad_norm([], CUDA) == []


# -- names -------------------------------------------------------------------------------------------------------------


def test_every_optimizer_of_the_specs_can_be_made() -> None:
    for name in OPTIMIZERS:
        assert isinstance(make_optimizer(name, CUDA, Groups), Optimizer)


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(SpecError, match="optim"):
        make_optimizer("adamw_torch_fuse", CUDA, Groups)
