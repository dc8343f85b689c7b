"""Traces extrapolated from a few layers, against traces of all layers and against the architecture files."""

from __future__ import annotations

import importlib
import itertools
import subprocess
import sys
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.oracles.families import CONFIGS
from torch import nn
from torch.nn import functional

from memplan import api, case, estimator
from memplan.catalog.gpus import find_gpu
from memplan.errors import SpecError, UnsupportedError
from memplan.introspect import extrapolate, recording
from memplan.introspect.recording import same_log
from memplan.micro_batch import Setup
from memplan.results import Estimate
from memplan.specs.hardware import ClusterSpec
from memplan.specs.model import ModelSpec
from memplan.specs.software import SoftwareSpec
from memplan.specs.strategy import DdpSpec, Strategy, ZeroSpec
from memplan.specs.training import TrainingSpec

GPU = "A100-80GB"
SHORT = TrainingSpec(micro_batch_size=2, seq_len=96)


def deep(family: str, depth: int, **changes: Any) -> dict[str, Any]:
    """A small config of the family with ``depth`` layers."""
    config = {**next(iter(CONFIGS[family].values())), **changes}
    names = ("num_hidden_layers", "n_layer", "num_layers", "num_decoder_layers")
    return config | {name: depth for name in names if name in config}


def resolved(
    config: dict[str, Any], training: TrainingSpec = SHORT, gpu: str = GPU, strategy: Strategy | None = None
) -> Setup:
    spec = ModelSpec(
        id="m", model_type=config["model_type"], architecture=config["architectures"][0], config=config, source="test"
    )
    return estimator.resolve(spec, training, ClusterSpec(gpu=find_gpu(gpu)), strategy or Strategy(), SoftwareSpec())


def how(result: Estimate) -> str:
    """What the assumption says of the trace."""
    return next(assumption.source for assumption in result.assumptions if assumption.name == "trace")


def phases(result: Estimate) -> dict[str, int]:
    return {phase.name: phase.allocated for phase in result.gpu.phases}


HYBRID: dict[str, Any] = {
    "model_type": "qwen3_next",
    "architectures": ["Qwen3NextForCausalLM"],
    "num_hidden_layers": 32,
    "hidden_size": 32,
    "head_dim": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
}


# -- which layers stand for which


def test_templates_have_equal_neighbours_and_the_ends_stand_for_themselves() -> None:
    kinds = "dddmmmmmmmm"
    assert extrapolate.templates(kinds, 6) is None  # nothing between a first and a last m
    assert extrapolate.templates(kinds, 7) == [0, 1, 2, 3, 4, 4, 4, 4, 4, 5, 6]


@given(st.lists(st.sampled_from("ab"), min_size=3, max_size=20), st.integers(2, 20))
def test_templates_are_of_the_same_kind_as_what_they_stand_for(kinds: list[str], short: int) -> None:
    found = extrapolate.templates(kinds, min(short, len(kinds)))
    if found is not None:
        assert [kinds[i] for i in found] == kinds
        assert max(found) < short
        for here, there in itertools.pairwise(found):
            # Whoever is looked for next door is there: the neighbour's template is of the neighbour's kind.
            assert kinds[here + 1] == kinds[there] if here + 1 < short else there == short - 1


def test_a_setting_that_numbers_some_of_the_layers_makes_them_no_kinds() -> None:
    assert extrapolate._numbers_layers([0, 1, 2, 3])
    assert extrapolate._numbers_layers([None, 1, None, 3])  # a module that only every second layer has
    assert not extrapolate._numbers_layers([4, 4, 4, 4])
    assert not extrapolate._numbers_layers([None, 1, None, 1])
    assert not extrapolate._numbers_layers([True, True])


# -- against traces of all layers


@pytest.mark.parametrize(
    ("family", "changes", "training"),
    [
        ("llama", {}, {}),
        ("llama", {}, {"gradient_checkpointing": True, "attn": "eager", "packed": False}),
        ("llama", {}, {"lora": {"rank": 8}, "grad_accum_steps": 2, "eval_batch_size": 3}),
        ("gpt2", {}, {"dtype": "bfloat16", "mixed_precision": "no"}),
        ("mixtral", {}, {}),
        ("gemma3_text", {"num_hidden_layers": 34}, {}),
        ("deepseek_v3", {"first_k_dense_replace": 3}, {}),
        ("t5", {}, {}),
        ("t5", {}, {"gradient_checkpointing": True}),
        ("vit", {}, {}),
        # Three layers in four with one kind of module, which has a number there.
        ("llama", HYBRID, {}),
    ],
)
def test_the_extrapolated_log_is_the_log_of_all_layers(
    family: str, changes: dict[str, Any], training: dict[str, Any]
) -> None:
    tracing = extrapolate._tracing(resolved(deep(family, 20) | changes, SHORT.replace(**training)))
    stacks = extrapolate._find_stacks(tracing.model)
    assert all(sum(stack.lengths) < stack.depth for stack in stacks)
    short = extrapolate._extrapolated(tracing, stacks)
    full = extrapolate._in_full(tracing, stacks)
    assert short is not None
    assert short.keys() == full.keys()
    for name in full:
        assert same_log(short[name], full[name]), name


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_the_extrapolated_gradients_are_those_of_all_layers(family: str) -> None:
    setup = resolved(deep(family, 20), SHORT.replace(grad_accum_steps=2), strategy=Strategy(kind="zero2"))
    tracing = extrapolate._tracing(setup)
    short = extrapolate._extrapolated(tracing, extrapolate._find_stacks(tracing.model))
    full = extrapolate._in_full(tracing, [])
    assert short is not None
    weights = sum(p.requires_grad for p in tracing.model.parameters())
    for name, recording_ in full.items():
        assert same_log(short[name], recording_), name
        *acts, last = [act for segment in recording_.segments for act in segment.acts]
        assert last.kind == "step"
        assert len(acts) == len({act.subject.path for act in acts}) == weights
        assert all((act.storage >= 0) is (name == "first") for act in acts)  # later ones are added to those


# -- against the architecture files


@pytest.mark.parametrize("gpu", ["cpu", GPU, "T4", "H100-80GB"])
@pytest.mark.parametrize(
    ("family", "training"),
    [
        ("llama", {}),
        ("gpt2", {"packed": False}),
        ("falcon", {"grad_accum_steps": 2}),
        ("t5", {"gradient_checkpointing": True, "attn": "eager"}),
        # A tied weight's gradients are summed outside of any layer; a norm's statistics are float32 on a GPU only.
        ("gpt2", {"dtype": "bfloat16", "mixed_precision": "no", "gradient_checkpointing": True}),
        # A checkpointed attention's tensors are there until its backward has run.
        ("cohere", {"dtype": "bfloat16", "mixed_precision": "no", "gradient_checkpointing": True}),
        # The layout of the gradient decides what attention's backward copies.
        ("gpt_neox", {"dtype": "bfloat16", "mixed_precision": "no", "gradient_checkpointing": True}),
        # PEFT casts an adapter's input unless CUDA's autocast is on.
        ("llama", {"lora": {"rank": 8, "targets": ["all-linear"]}}),
    ],
)
def test_a_trace_says_what_the_architecture_file_says(family: str, training: dict[str, Any], gpu: str) -> None:
    config, asked = deep(family, 16), SHORT.replace(**training)
    traced, written = api.estimate(config, asked, gpu, trace=True), api.estimate(config, asked, gpu)
    assert "of 16 layers" in how(traced)
    assert traced.model == written.model
    assert traced.gpu.steady_allocated == pytest.approx(written.gpu.steady_allocated, rel=2e-4)
    for name, size in phases(written).items():
        assert phases(traced)[name] == pytest.approx(size, rel=1e-3), name
    assert traced.gpu.peak_reserved == pytest.approx(written.gpu.peak_reserved, rel=0.02)
    assert not any(assumption.name == "written family" for assumption in traced.assumptions)


SMALL_BUCKETS = ZeroSpec(reduce_bucket_size=200_000)
"""Smaller than a block's weights: what is saved shows beside them."""


@pytest.mark.parametrize(
    ("family", "training", "strategy", "gpu"),
    [
        ("llama", {"grad_accum_steps": 3}, Strategy(kind="zero0"), GPU),
        ("gpt2", {"packed": False}, Strategy(kind="zero1", zero=SMALL_BUCKETS), "cpu"),
        ("falcon", {"grad_accum_steps": 2}, Strategy(kind="zero1", zero=SMALL_BUCKETS), "H100-80GB"),
        (
            "llama",
            {"grad_accum_steps": 2},
            Strategy(kind="zero1", zero=SMALL_BUCKETS.replace(grad_accum_dtype="fp32")),
            GPU,
        ),
        ("llama", {"grad_accum_steps": 2}, Strategy(kind="zero2", zero=SMALL_BUCKETS), GPU),
        ("t5", {"gradient_checkpointing": True, "attn": "eager"}, Strategy(kind="zero2", zero=SMALL_BUCKETS), GPU),
        ("llama", {"lora": {"rank": 8, "targets": ["all-linear"]}}, Strategy(kind="zero2", zero=SMALL_BUCKETS), "T4"),
        (
            "cohere",
            {"gradient_checkpointing": True, "eval_batch_size": 3},
            Strategy(kind="zero2", offload_optimizer="cpu", zero=SMALL_BUCKETS),
            GPU,
        ),
        ("gpt_neox", {"dtype": "float32", "mixed_precision": "no"}, Strategy(kind="zero2", zero=SMALL_BUCKETS), GPU),
        ("mixtral", {"mixed_precision": "fp16"}, Strategy(kind="zero2", zero=SMALL_BUCKETS), GPU),
        ("llama", {}, Strategy(kind="ddp", ddp=DdpSpec(gradient_as_bucket_view=True)), GPU),
    ],
    ids=str,
)
def test_a_trace_gives_an_engine_its_gradients(
    family: str, training: dict[str, Any], strategy: Strategy, gpu: str
) -> None:
    config, asked, cluster = deep(family, 16), SHORT.replace(**training), ClusterSpec(gpu=gpu, gpus=4)
    traced, written = (api.estimate(config, asked, cluster, strategy, trace=flag) for flag in (True, False))
    assert "of 16 layers" in how(traced)
    assert traced.gpu.steady_allocated == pytest.approx(written.gpu.steady_allocated, rel=2e-4)
    for name, size in phases(written).items():
        assert phases(traced)[name] == pytest.approx(size, rel=1e-3), name
    assert traced.host.peak == pytest.approx(written.host.peak, rel=1e-3)
    assert traced.gpu.peak_reserved == pytest.approx(written.gpu.peak_reserved, rel=0.02)


@pytest.mark.parametrize("kind", ["zero3", "fsdp"])
def test_an_engine_that_hooks_into_modules_is_not_traced(kind: str) -> None:
    with pytest.raises(UnsupportedError, match=r"^trace: under .* modules"):
        api.estimate(deep("llama", 4), SHORT, ClusterSpec(gpu=GPU, gpus=4), Strategy(kind=kind), trace=True)


def test_the_8b_model_is_traced_on_a_few_layers() -> None:
    result = api.estimate(CONFIGS["llama"]["8b"], cluster=GPU, trace=True)
    written = api.estimate(CONFIGS["llama"]["8b"], cluster=GPU)
    assert "at 5 and 6 of 32 layers" in how(result)
    assert result.model.parameters == 8_030_261_248
    assert result.gpu.steady_allocated == pytest.approx(written.gpu.steady_allocated, rel=1e-5)


def test_every_term_of_a_trace_can_be_explained() -> None:
    result = api.estimate(deep("llama", 16), SHORT, GPU, trace=True, explain=True)
    assert sum(term.bytes for term in result.explanation) == result.gpu.peak_device
    assert any(term.name == "activations: sdpa" for term in result.explanation)


def test_without_the_replay_reserved_is_a_bound() -> None:
    config = deep("llama", 16)
    bound = api.estimate(config, SHORT, GPU, trace=True, replay=False).gpu.peak_reserved
    assert bound >= api.estimate(config, SHORT, GPU, trace=True).gpu.peak_reserved


def test_an_answer_names_the_architecture_file_that_disagrees(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(case, "DISAGREEMENT", -1.0)
    result = api.estimate(deep("llama", 2), SHORT, "cpu", trace=True)
    assumption = result.assumptions[-1]
    assert assumption.name == "written family"
    assert assumption.value == api.estimate(deep("llama", 2), SHORT, "cpu").gpu.steady_allocated
    assert "llama.py" in assumption.source


def test_a_family_that_is_not_written_is_traced() -> None:
    config = deep("llama", 16) | {"model_type": "apertus", "architectures": ["ApertusForCausalLM"]}
    with pytest.raises(UnsupportedError, match="--trace"):
        api.estimate(config, SHORT, GPU)
    result = api.estimate(config, SHORT, GPU, trace=True)
    assert result.model.parameters > 10**6


# -- modules


class Block(nn.Module):
    def __init__(self, width: int, rate: float = 0.0) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)
        self.dropout = nn.Dropout(rate)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.dropout(self.down(functional.gelu(self.up(self.norm(x)))))


class Net(nn.Module):
    def __init__(self, depth: int = 20, width: int = 64, rate: float = 0.0) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(Block(width, rate) for _ in range(depth)))
        self.head = nn.Linear(width, 10)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return functional.cross_entropy(self.head(self.blocks(x).mean(1)), labels)


class Dense(Net):
    """Every block sees the sum of all blocks before it, and the head all of them beside each other."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(20 * 64, 10)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        seen = []
        for block in self.blocks:
            x = block(x)
            seen.append(x)
        together = torch.cat([*seen, *[x] * (20 - len(seen))], dim=-1)
        return functional.cross_entropy(self.head(together.mean(1)), labels)


def made(batch_size: int, seq_len: int) -> dict[str, torch.Tensor]:
    return {"x": torch.randn(batch_size, seq_len, 64), "labels": torch.zeros(batch_size, dtype=torch.int64)}


def test_a_module_is_traced_with_its_inputs_and_left_as_it_is() -> None:
    net = Net().eval()
    before = {name: (tensor, tensor.data_ptr()) for name, tensor in net.state_dict(keep_vars=True).items()}
    result = api.estimate(net, SHORT, "cpu", inputs=made)
    assert "at 5 and 6 of 20 layers" in how(result)
    assert result.model.parameters == sum(p.numel() for p in net.parameters())
    assert (result.model.id, result.model.source, result.setup["dtype"]) == ("Net", "module", "float32")
    assert len(net.blocks) == 20
    assert not net.training
    assert "forward" not in net.__dict__
    assert before == {name: (tensor, tensor.data_ptr()) for name, tensor in net.state_dict(keep_vars=True).items()}


def test_a_module_keeps_what_it_saves_for_its_backward() -> None:
    training = TrainingSpec(micro_batch_size=64, seq_len=256, mixed_precision="no")
    cpu = api.estimate(Net(rate=0.5), training, "cpu", inputs=made).gpu
    tokens = 64 * 256
    # Per block and token: the norm's input, mean, rstd and output, up's output and gelu's, and dropout's noise, which
    # on a CPU is as wide as the block. The first norm's input is the batch, beside its labels.
    saved = 20 * tokens * 4 * (64 + 1 + 1 + 64 + 256 + 256 + 64) + 64 * 8
    head = 64 * 64 * 4 + 2 * 64 * 10 * 4 + 2 * 512  # the mean; logits and their logarithm; the loss and its weight
    states = cpu.components.weights + cpu.components.optimizer
    assert {phase.name: phase.allocated for phase in cpu.phases}["loss"] == states + saved + head
    # CUDA's mask has a byte in place of four. By the peak, within the last block's backward, the mask of that one is
    # gone, so the components of the peak have one less.
    gpu = api.estimate(Net(rate=0.5), training, GPU, inputs=made, replay=False).gpu
    assert (cpu.peak_phase, gpu.peak_phase) == ("backward", "backward")
    assert cpu.components.activations - gpu.components.activations == 19 * tokens * 64 * 3
    loss = {phase.name: phase.allocated for phase in gpu.phases}["loss"]
    assert loss == states + saved + head + gpu.components.workspace - 20 * tokens * 64 * 3


def test_a_module_is_traced_under_an_engine() -> None:
    training = TrainingSpec(micro_batch_size=64, seq_len=256)
    cluster, strategy = ClusterSpec(gpu=GPU, gpus=4), Strategy(kind="zero2", zero=SMALL_BUCKETS)
    gpu = api.estimate(Net(), training, cluster, strategy, inputs=halved, replay=False).gpu
    loss = {phase.name: phase.allocated for phase in gpu.phases}["loss"]
    tokens = 64 * 256
    # As below, in 16 bit: what DeepSpeed has cast; norms keep mean and rstd in float32.
    saved = 20 * tokens * (2 * (64 + 64 + 256 + 256) + 4 * 2)
    states = gpu.components.weights + gpu.components.optimizer + gpu.components.workspace
    assert 0 <= loss - states - saved < 2**16  # the head


def halved(batch_size: int, seq_len: int) -> dict[str, torch.Tensor]:
    return made(batch_size, seq_len) | {"x": torch.randn(batch_size, seq_len, 64, dtype=torch.bfloat16)}


class RMSNormed(Net):
    def __init__(self) -> None:
        super().__init__()
        for block in self.blocks:
            block.norm = nn.RMSNorm(64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_keep_what_the_kernels_of_a_gpu_keep(dtype: torch.dtype) -> None:
    """layer_norm keeps mean and rstd in float32, rms_norm its rstd."""

    def half(batch_size: int, seq_len: int) -> dict[str, torch.Tensor]:
        return {"x": torch.randn(batch_size, seq_len, 64, dtype=dtype), "labels": torch.zeros(batch_size).long()}

    training = TrainingSpec(micro_batch_size=64, seq_len=256, mixed_precision="no")
    size, tokens = dtype.itemsize, 64 * 256
    for net, statistics in ((Net(), 2), (RMSNormed(), 1)):
        gpu = api.estimate(net.to(dtype), training, GPU, inputs=half, replay=False).gpu
        loss = {phase.name: phase.allocated for phase in gpu.phases}["loss"]
        states = gpu.components.weights + gpu.components.optimizer + gpu.components.workspace
        saved = 20 * tokens * (size * (64 + 64 + 256 + 256) + 4 * statistics)
        assert 0 <= loss - states - saved < 2**16  # the head


class Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.feed = Block(width, 0.1)
        self.register_buffer("mask", torch.ones(96, 96).tril().bool())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        q, k, v = self.qkv(self.norm(x)).view(batch, length, 3, 4, width // 4).permute(2, 0, 3, 1, 4)
        y = functional.scaled_dot_product_attention(q, k, v, attn_mask=self.mask)
        return self.feed(x + self.out(y.transpose(1, 2).reshape(batch, length, width)))


class GPT(nn.Module):
    """A decoder that is not of transformers, with tied embeddings and a buffer in every layer."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(500, 64)
        self.positions = nn.Parameter(torch.zeros(96, 64))
        self.layers = nn.ModuleList(Attention(64) for _ in range(20))
        self.head = nn.Linear(64, 500, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> dict[str, torch.Tensor]:
        x = self.tokens(tokens) + self.positions
        for layer in self.layers:
            x = layer(x)
        logits = self.head(x)
        return {"logits": logits, "loss": functional.cross_entropy(logits.flatten(0, 1), targets.flatten())}


def tokens(batch_size: int, seq_len: int) -> dict[str, torch.Tensor]:
    ids = torch.zeros(batch_size, seq_len, dtype=torch.int64)
    return {"tokens": ids, "targets": ids.clone()}


@pytest.mark.parametrize("gpu", ["cpu", GPU])
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_decoder_of_ones_own_is_extrapolated(gpu: str, precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, training = GPT(), SHORT.replace(mixed_precision=precision, eval_batch_size=4, grad_accum_steps=2)
    short = api.estimate(model, training, gpu, inputs=tokens)
    assert "at 5 and 6 of 20 layers" in how(short)
    assert short.model.parameters == sum(p.numel() for p in model.parameters())  # the tied weight once
    assert short.gpu.components.weights >= 4 * short.model.parameters + 20 * 96 * 96
    monkeypatch.setattr(extrapolate, "_find_stacks", lambda model: [])
    full = api.estimate(model, training, gpu, inputs=tokens)
    assert how(full).startswith("the real model under FakeTensor, traced in full")
    assert phases(short) == phases(full)
    assert short.gpu.peak_reserved == full.gpu.peak_reserved


class Remembers(Block):
    """Leaves a tensor on itself, as recurrent models do."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.state = x.detach().sum(1)
        return super().forward(x)


class Recurrent(Net):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(Remembers(64) for _ in range(20)))


def test_what_a_forward_leaves_on_its_module_counts_once(monkeypatch: pytest.MonkeyPatch) -> None:
    short = api.estimate(Recurrent(), SHORT, "cpu", inputs=made)
    assert "at 5 and 6 of 20 layers" in how(short)
    assert short.gpu.components.weights == api.estimate(Net(), SHORT, "cpu", inputs=made).gpu.components.weights
    monkeypatch.setattr(extrapolate, "_find_stacks", lambda model: [])
    assert phases(short) == phases(api.estimate(Recurrent(), SHORT, "cpu", inputs=made))


def test_a_module_that_does_not_repeat_is_traced_in_full() -> None:
    result = api.estimate(Dense(), SHORT, "cpu", inputs=made)
    assert "in full, since its layers do not repeat" in how(result)
    assert result.model.parameters == sum(p.numel() for p in Dense().parameters())


def test_a_module_too_deep_to_trace_in_full_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extrapolate, "_MOST_LAYERS", 10)
    with pytest.raises(UnsupportedError, match="20 layers do not repeat"):
        api.estimate(Dense(), SHORT, "cpu", inputs=made)


def test_a_module_of_transformers_decides_dtype_and_attention() -> None:
    import transformers

    config = deep("llama", 2)
    values = {name: value for name, value in config.items() if name not in ("model_type", "architectures")}
    module = transformers.LlamaForCausalLM(transformers.LlamaConfig(**values, attn_implementation="eager"))
    module = module.to(torch.bfloat16)
    result = api.estimate(module, SHORT, GPU)
    asked = SHORT.replace(dtype="bfloat16", attn="eager")
    assert result.gpu == api.estimate(config, asked, GPU, trace=True).gpu
    assert (result.setup["dtype"], result.setup["attn"]) == ("bfloat16", "eager")
    other = api.estimate(module, SHORT.replace(dtype="float32", attn="sdpa"), GPU)
    assert other.gpu == api.estimate(config, SHORT, GPU, trace=True).gpu
    assert next(module.parameters()).dtype is torch.bfloat16
    assert module.config._attn_implementation == "eager"


def test_a_module_has_rungs_of_its_own() -> None:
    results = api.ladder(Net(), SHORT, GPU, inputs=made)
    assert [each.setup["micro_batch_size"] for each in results.estimates] == [2, 1]  # and no checkpointing


# -- refusals


class Headless(Net):
    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return self.blocks(x)


class Reads(Net):
    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return super().forward(x * float(x.sum()), labels)


class Broken(Net):
    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return self.head(x)  # as wide as blocks, not as the head's output


@pytest.mark.parametrize(
    ("module", "training", "reason"),
    [
        (Headless(), {}, "forward returns no loss"),
        (Reads(), {}, "reads a tensor's value in Reads.forward, which"),
        (Broken(), {}, "forward returns no loss"),
        (Net(), {"gradient_checkpointing": True}, "Net has no gradient_checkpointing_enable"),
        (Net(), {"attn": "flash_attention_2"}, "run on a GPU only. Use sdpa"),
        (Net(), {"liger": True}, "liger True cannot be traced"),
        (Net(), {"lora": {"rank": 8}, "quantization": "nf4"}, "the kernels of bitsandbytes"),
        (Net(), {"vocab_size": 7}, "those of the module"),
        (Net().requires_grad_(False), {}, "the loss needs no gradient"),
        (GPT(), {}, r"does not run on tensors without data: TypeError: GPT.forward\(\) got an unexpected"),
    ],
)
def test_what_cannot_be_traced_is_refused_with_the_reason(module: Any, training: dict[str, Any], reason: str) -> None:
    with pytest.raises(UnsupportedError, match=reason):
        api.estimate(module, SHORT.replace(**training), GPU, inputs=made)


def test_inputs_that_are_not_known_are_asked_for() -> None:
    with pytest.raises(UnsupportedError, match="inputs=lambda"):
        api.estimate(Net(), SHORT, GPU)
    with pytest.raises(SpecError, match="trace=True"):
        api.estimate(deep("llama", 2), SHORT, GPU, inputs=made)


@pytest.mark.parametrize("wrong", [lambda batch_size: {}, lambda batch_size, seq_len: 7])
def test_inputs_that_are_no_batch_are_refused(wrong: Any) -> None:
    with pytest.raises(SpecError, match=r"^inputs: .* makes no batch: TypeError: .* returns \{name: tensor\}"):
        api.estimate(Net(), SHORT, GPU, inputs=wrong)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"model_type": "llava", "architectures": ["LlavaForConditionalGeneration"]}, "takes more than text"),
        ({"model_type": "resnet", "architectures": ["ResNetForImageClassification"]}, "has no image_size"),
        ({"model_type": "segformer", "architectures": ["SegformerForSemanticSegmentation"]}, "takes other inputs"),
        ({"model_type": "wav2vec2", "architectures": ["Wav2Vec2ForCTC"]}, "takes other inputs"),
        ({"model_type": "reformer", "architectures": ["ReformerModelWithLMHead"]}, "cannot build .*is_decoder=True"),
    ],
)
def test_an_architecture_that_cannot_be_traced_is_refused(config: dict[str, Any], reason: str) -> None:
    with pytest.raises(UnsupportedError, match=rf"^trace: .*{reason}"):
        api.estimate(config, SHORT, GPU, trace=True)


def test_a_loop_over_tokens_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recording, "MOST_OPERATIONS", 1000)
    shape = {"vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}
    config = {"model_type": "mamba", "architectures": ["MambaForCausalLM"], **shape}
    assert api.estimate(config, SHORT.replace(seq_len=4), "cpu", trace=True).model.parameters > 10**4
    with pytest.raises(UnsupportedError, match=r"1,000 operations, .* loops over tokens"):
        api.estimate(config, SHORT, "cpu", trace=True)


def test_a_lora_without_targets_says_so_as_without_a_trace() -> None:
    config, training = deep("cohere", 2), SHORT.replace(lora={"rank": 8})
    messages = []
    for traced in (False, True):
        with pytest.raises(SpecError) as error:
            api.estimate(config, training, GPU, trace=traced)
        messages.append(str(error.value))
    assert messages[0] == messages[1]


def test_nothing_is_printed(capfd: pytest.CaptureFixture[str]) -> None:
    api.estimate(deep("llama", 16), SHORT, GPU, trace=True)
    assert capfd.readouterr() == ("", "")


def test_a_head_without_loss_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="no loss"):
        api.estimate(deep("llama", 2), SHORT.replace(head="base"), GPU, trace=True)


def test_other_versions_than_the_installed_ones_are_refused() -> None:
    with pytest.raises(SpecError, match=r"transformers=4\.40.*is not what runs here"):
        api.estimate(deep("llama", 2), SHORT, GPU, trace=True, software="transformers=4.40")
    version = torch.__version__.partition("+")[0]
    result = api.estimate(deep("llama", 2), SHORT, GPU, trace=True, software=f"torch={version}")
    assert result.software["torch"] == version


def test_remote_code_is_never_run(monkeypatch: pytest.MonkeyPatch) -> None:
    code = {"AutoConfig": "x.Config", "AutoModelForCausalLM": "evil/repo--x.Model"}
    unknown = deep("llama", 2) | {"model_type": "new", "auto_map": code}
    with pytest.raises(UnsupportedError, match="remote code is never run"):
        api.estimate(unknown, SHORT, GPU, trace=True)
    with pytest.raises(SpecError, match="names no model of transformers"):
        api.estimate(deep("llama", 2) | {"architectures": ["pipeline"]}, SHORT, GPU, trace=True)
    # A config may name code beside a model that transformers has itself: that one is built.
    from transformers import dynamic_module_utils

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("remote code was asked for")

    monkeypatch.setattr(dynamic_module_utils, "get_class_from_dynamic_module", refuse)
    known = deep("llama", 2) | {"auto_map": code}
    assert api.estimate(known, SHORT, GPU, trace=True).gpu == api.estimate(deep("llama", 2), SHORT, GPU, trace=True).gpu


def test_no_weights_are_asked_for() -> None:
    text = {"auto_map": {"a": "b"}, "layers": (1, 2)}
    config = {"auto_map": {}, "use_pretrained_backbone": True, "text_config": text}
    assert extrapolate._harmless(config) == {"use_pretrained_backbone": False, "text_config": {"layers": [1, 2]}}


@pytest.mark.parametrize("missing", ["torch", "transformers"])
def test_without_the_extra_its_name_is_told(monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    real = importlib.import_module

    def import_module(name: str, *args: Any) -> Any:
        if name.partition(".")[0] == missing:
            raise ModuleNotFoundError(f"No module named {missing!r}")
        return real(name, *args)

    monkeypatch.setattr(importlib, "import_module", import_module)
    with pytest.raises(UnsupportedError, match=r"pip install 'memplan\[train\]'"):
        api.estimate(deep("llama", 2), SHORT, GPU, trace=True)


def test_importing_the_tracer_imports_no_torch() -> None:
    names = "torch", "transformers", "peft", "accelerate"
    code = f"import memplan.introspect.extrapolate, sys; print([n for n in {names} if n in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_a_trace_does_not_run_past_the_position_table() -> None:
    """Tensors without data raise no index error; the run would."""
    with pytest.raises(SpecError, match=r"seq_len: 1500 is longer than the model's table of 1024 positions"):
        api.estimate("openai-community/gpt2", {"seq_len": 1500}, "1xT4", "single", trace=True)


BERT: dict[str, Any] = {
    "model_type": "bert",
    "architectures": ["BertModel"],
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "max_position_embeddings": 40,
    "vocab_size": 100,
}


def test_a_trace_has_as_many_tokens_as_positions_unless_it_is_told(capfd: pytest.CaptureFixture[str]) -> None:
    asked = TrainingSpec(head="masked-lm")
    found = api.estimate(BERT, asked, GPU, trace=True)
    assert found.setup["seq_len"] == api.estimate(BERT, asked, GPU).setup["seq_len"] == 40
    assert ("seq_len (tokens)", 40) in [(each.name, each.value) for each in found.assumptions]
    with pytest.raises(UnsupportedError, match="does not run on tensors without data"):
        api.estimate(BERT, asked.replace(seq_len=41), GPU, trace=True)
    with pytest.raises(
        UnsupportedError, match=r"no loss to train\. Use --head masked-lm or sequence-classification\.$"
    ):
        api.estimate(BERT, asked.replace(head="base", seq_len=40), GPU, trace=True)
    assert "Traceback" not in capfd.readouterr().err
