"""CUDA's rules case by case: the attention backend, what each keeps and needs, and autocast's float32 list."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
from tests.oracles import compare, o1

from memplan import estimator
from memplan.catalog.gpus import find_gpu
from memplan.specs.hardware import ClusterSpec
from memplan.specs.model import ModelSpec
from memplan.specs.software import SoftwareSpec
from memplan.specs.strategy import Strategy
from memplan.specs.training import TrainingSpec
from memplan.tape import tensor as dtypes
from memplan.tape.attention import scaled_dot_product_attention
from memplan.tape.attention_kernels import backward_tile, efficient_workspace, flash_splits
from memplan.tape.dispatch import CPU, CUDA_AUTOCAST_FLOAT32, DeviceRules, choose_sdpa_backend, cuda, why_math
from memplan.tape.tape import Tape
from memplan.tape.tensor import Tensor

# -- the choice ----------------------------------------------------------------------------------------------------

V100, T4, A100, RTX3090, L40S, H100, B200, RTX5090 = (
    cuda(cc) for cc in ((7, 0), (7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0))
)
H100_OLD_CUDNN = cuda((9, 0), cudnn_attention=False)
H100_NEW_CUDNN = cuda((9, 0), cudnn_wide_attention=True)

CALL: dict[str, Any] = {
    "dtype": "bfloat16",
    "head_dim": 128,
    "query_heads": 8,
    "kv_heads": 8,
    "query_len": 512,
    "kv_len": 512,
    "mask": False,
    "mask_requires_grad": False,
    "dropout": 0.0,
    "requires_grad": True,
}
GQA = {"kv_heads": 2}
MASK = {"mask": True}
FP16 = {"dtype": "float16"}
FP32 = {"dtype": "float32"}
FORWARD_ONLY = {"requires_grad": False}

CASES: list[tuple[DeviceRules, dict[str, Any], str]] = [
    # bf16 has no kernel before 8.0
    (T4, {}, "math"),
    (V100, MASK, "math"),
    # float16 before 8.0: memory-efficient, which knows no grouped queries
    (T4, FP16, "efficient"),
    (T4, {**FP16, **MASK}, "efficient"),
    (T4, {**FP16, **GQA}, "math"),
    (V100, {**FP16, **GQA}, "math"),
    (T4, {**FP16, "head_dim": 20}, "math"),  # tensor cores want 8
    (cuda((6, 0)), {**FP16, "head_dim": 20}, "efficient"),
    # float32: never flash nor cuDNN
    (T4, {**FP32, "head_dim": 30}, "efficient"),
    (A100, FP32, "efficient"),
    (A100, {**FP32, "head_dim": 30}, "math"),  # aligned to 4 from 8.0 on
    (A100, {**FP32, "head_dim": 36}, "efficient"),
    (A100, {**FP32, **GQA}, "math"),
    (H100, {**FP32, **GQA}, "math"),
    # flash
    (A100, {}, "flash"),
    (A100, GQA, "flash"),
    (A100, FP16, "flash"),
    (A100, {"dropout": 0.1}, "flash"),
    (A100, {"head_dim": 100}, "flash"),  # padded to 8
    (A100, {"head_dim": 256}, "flash"),
    (A100, {"head_dim": 264}, "efficient"),
    (A100, {"head_dim": 192, "value_head_dim": 128}, "efficient"),  # multi-head latent attention
    (A100, MASK, "efficient"),
    (A100, {**MASK, **GQA}, "math"),
    (A100, {**MASK, "head_dim": 100}, "math"),
    # the backward of wide heads needs more shared memory than 8.6 .. 8.9 and 12.x have
    (RTX3090, {"head_dim": 192}, "flash"),
    (RTX3090, {"head_dim": 200}, "efficient"),
    (RTX3090, {"head_dim": 200, **GQA}, "math"),
    (RTX3090, {"head_dim": 200, **FORWARD_ONLY}, "flash"),
    (RTX3090, {"head_dim": 256}, "flash"),
    (RTX3090, {"head_dim": 256, "dropout": 0.1}, "efficient"),
    (L40S, {"head_dim": 224}, "efficient"),
    (RTX5090, {"head_dim": 224}, "efficient"),
    (A100, {"head_dim": 224}, "flash"),
    # cuDNN first on 9.x and 10.x
    (H100, {}, "cudnn"),
    (H100, GQA, "cudnn"),
    (H100, MASK, "cudnn"),
    (B200, FP16, "cudnn"),
    (cuda((10, 3)), {}, "cudnn"),
    (RTX5090, {}, "flash"),
    (H100_OLD_CUDNN, {}, "flash"),
    (H100_OLD_CUDNN, MASK, "efficient"),
    (H100, {"head_dim": 100}, "flash"),
    (H100, {"head_dim": 136}, "flash"),
    (H100, {"head_dim": 256}, "flash"),
    (H100, {"head_dim": 192, "value_head_dim": 128}, "cudnn"),
    (H100_NEW_CUDNN, {"head_dim": 256}, "cudnn"),
    (H100_NEW_CUDNN, {"head_dim": 160}, "flash"),
    (H100_NEW_CUDNN, {"head_dim": 160, **FORWARD_ONLY}, "cudnn"),
    (H100, {"dropout": 0.1}, "flash"),  # cuDNN drops in steps of 1/16
    (H100, {"dropout": 0.125}, "cudnn"),
    (H100, {"kv_len": 1}, "flash"),
    (H100, {"query_len": 1, "dropout": 0.125}, "flash"),
    (H100, {**MASK, "mask_requires_grad": True}, "efficient"),
    # CPU
    (CPU, FP32, "flash_cpu"),
    (CPU, {**FP32, "dropout": 0.1}, "math"),
    (CPU, {**FP32, **MASK, "mask_requires_grad": True}, "math"),
]


@pytest.mark.parametrize(("rules", "call", "backend"), CASES)
def test_backend(rules: DeviceRules, call: dict[str, Any], backend: str) -> None:
    call = {**CALL, **call}
    assert choose_sdpa_backend(rules, value_head_dim=call.pop("value_head_dim", call["head_dim"]), **call) == backend


@pytest.mark.parametrize(
    ("rules", "dtype", "kv_heads", "head_dim", "reason"),
    [
        (T4, "bfloat16", 8, 64, "takes bfloat16 on compute capability 7.5"),
        (T4, "float16", 2, 64, "does not take compute capability 7.5, and the memory-efficient kernel no grouped"),
        (A100, "float32", 2, 64, "does not take float32, and the memory-efficient kernel no grouped queries"),
        (A100, "float32", 8, 30, "heads of 30 in float32 on compute capability 8.0"),
    ],
)
def test_reason_for_math(rules: DeviceRules, dtype: str, kv_heads: int, head_dim: int, reason: str) -> None:
    assert reason in why_math(rules, dtype=dtype, head_dim=head_dim, query_heads=8, kv_heads=kv_heads)


# -- what the kernels take -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("multiprocessors", "blocks", "keys", "head_dim", "splits"),
    [
        (108, 173, 4096, 128, 1),  # 173 >= 0.8 * 216: the GPU is nearly full
        (108, 32, 256, 64, 1),  # one block of 256 keys
        # 128 blocks on 216 slots, 4 blocks of keys: 1 -> 0.593 of a wave, 2 -> 1.185 of two = 0.593,
        # 3 is no other share than 2, 4 -> 2.370 of three = 0.790: no fewer than 4 reach 0.85 * 0.790
        (108, 128, 1024, 64, 4),
        # 60 blocks, 8 of keys: 1 -> 0.278, 2 -> 0.556, 3 -> 0.833 >= 0.85 * max(0.833, 4 -> 1.111 / 2, 8 -> 2.222 / 3)
        (108, 60, 1024, 128, 3),
    ],
)
def test_flash_splits_keys_where_queries_do_not_fill_the_gpu(
    multiprocessors: int, blocks: int, keys: int, head_dim: int, splits: int
) -> None:
    assert flash_splits(multiprocessors, blocks, keys, head_dim) == splits


@pytest.mark.parametrize(
    ("rules", "half", "head_dim", "dropout", "tile"),
    [
        (A100, True, 64, 0.0, (64, 64, True)),
        (A100, True, 80, 0.0, (128, 128, True)),
        (A100, True, 256, 0.0, (128, 64, False)),
        (A100, False, 64, 0.0, (64, 64, False)),
        (A100, False, 128, 0.0, (128, 64, False)),
        (H100, True, 128, 0.0, (128, 128, True)),
        (RTX3090, True, 96, 0.0, (128, 64, True)),
        (RTX3090, True, 96, 0.1, (64, 64, False)),
        (RTX3090, True, 128, 0.0, (64, 64, False)),
        (RTX5090, True, 96, 0.0, (64, 64, False)),
        (V100, True, 128, 0.0, (128, 64, True)),
        (V100, False, 128, 0.0, (64, 64, False)),
        (T4, True, 128, 0.0, (64, 64, False)),
    ],
)
def test_backward_tile(rules: DeviceRules, half: bool, head_dim: int, dropout: float, tile: tuple[Any, ...]) -> None:
    assert backward_tile(rules, half, head_dim, dropout) == tile


@pytest.mark.parametrize(
    ("rules", "half", "shape", "elements"),
    [
        # 8 x (4 tiles of 64 queries, each 64 x 64 and 4 words of lock)
        (A100, True, (2, 4, 256, 256, 64), 8 * 4 * (64 * 64 + 4)),
        # one column of 128 for heads of 80; 200 queries are two tiles
        (A100, True, (1, 4, 200, 200, 80), 4 * 2 * (128 * 128 + 4)),
        # two columns of 64, and keys and values outside the registers: 8 splits of 64 keys of 128
        (T4, True, (1, 4, 512, 512, 128), 4 * (8 * 2 * (64 * 64 + 4) + 8 * 64 * (128 + 128))),
        # 64 heads: 200 // 64 = 3 splits
        (T4, True, (2, 32, 512, 512, 128), 64 * (8 * 2 * (64 * 64 + 4) + 3 * 64 * (128 + 128))),
        # 256 heads: none is left, one remains
        (T4, True, (8, 32, 512, 512, 128), 256 * (8 * 2 * (64 * 64 + 4) + 1 * 64 * (128 + 128))),
        # float32 accumulates keys and values in the result
        (A100, False, (1, 4, 512, 512, 128), 4 * 4 * 2 * (128 * 64 + 4)),
        # before 7.0 float32 accumulates queries there too
        (cuda((6, 0)), False, (1, 4, 512, 512, 128), 0),
    ],
)
def test_efficient_workspace(rules: DeviceRules, half: bool, shape: tuple[int, ...], elements: int) -> None:
    batch, heads, sq, sk, dim = shape
    assert efficient_workspace(rules, half, batch, heads, sq, sk, dim, dim, 0.0) == elements


# -- on the tape ---------------------------------------------------------------------------------------------------

B, H, S, D = 2, 4, 256, 64
Q = B * H * S * D
"""Elements of the query."""
RNG = 2 * 512
"""The generator's state: two scalars, a block each."""


class Step:
    """One call of attention and its backward, with transformers' transposition of the result; bytes without inputs."""

    def __init__(self, rules: DeviceRules, dtype: str, *, kv_heads: int = H, mask: bool = False, **call: Any) -> None:
        kind = dtypes.dtype_named(dtype)
        self.tape = Tape(rules)
        heads, length, dim = call.pop("heads", H), call.pop("length", S), call.pop("dim", D)
        self.inputs = [self._by_position(n, length, dim, kind) for n in (heads, kv_heads, kv_heads)]
        for x in self.inputs:
            self.tape.require_grad(x)
        bias = self.tape.new((B, 1, length, length), dtypes.bool_, "mask") if mask else None
        start = len(self.tape.log)
        out = scaled_dot_product_attention(*self.inputs, bias, enable_gqa=kv_heads != heads, **call)
        out = out.transpose(1, 2).contiguous()
        middle = len(self.tape.log)
        self.forward_peak, self.saved = self._bytes(start, middle)
        self.tape.backward(out)
        del out
        self.backward_peak = self.saved + self._bytes(middle, len(self.tape.log))[0]

    def _by_position(self, heads: int, length: int, dim: int, kind: dtypes.DType) -> Tensor:
        return self.tape.new((B, length, heads, dim), kind, "input").transpose(1, 2)

    def _bytes(self, start: int, end: int) -> tuple[int, int]:
        total = peak = 0
        for event in self.tape.log[start:end]:
            total += self.tape.sizes[event] if event >= 0 else -self.tape.sizes[~event]
            peak = max(peak, total)
        return peak, total


def test_flash_keeps_result_and_logsumexp_and_accumulates_queries_in_float32() -> None:
    step = Step(A100, "bfloat16", is_causal=True)
    lse = 4 * B * H * S
    assert step.saved == 2 * Q + lse + RNG
    assert step.forward_peak == step.saved
    dq_accum, softmax_d = 4 * Q, 4 * B * H * S
    assert step.backward_peak == step.saved + 2 * Q + 3 * 2 * Q + dq_accum + softmax_d


def test_flash_expands_the_gradients_of_grouped_keys_and_values() -> None:
    step = Step(A100, "bfloat16", kv_heads=2)
    gradients = 2 * Q + 2 * (2 * Q // 2)
    assert step.backward_peak == step.saved + 2 * Q + gradients + 4 * Q + 4 * B * H * S + 2 * (2 * Q)


def test_flash_rounds_its_accumulators() -> None:
    step = Step(A100, "bfloat16", length=200, dim=72)
    q = B * H * 200 * 72
    dq_accum = 4 * B * 256 * H * 96
    assert step.backward_peak == step.saved + 2 * q + 3 * 2 * q + dq_accum + 4 * B * H * 256


def test_flash_needs_room_in_the_forward_where_it_splits_keys() -> None:
    step = Step(A100, "bfloat16", length=1024)
    assert flash_splits(108, B * H * 16, 1024, D) == 4
    assert step.forward_peak == step.saved + 4 * 4 * B * H * 1024 * (D + 1)
    assert Step(A100, "bfloat16", length=1024, dropout_p=0.1).forward_peak == step.saved


def test_efficient_keeps_a_bias_of_its_own_and_rounds_the_logsumexp() -> None:
    step = Step(A100, "bfloat16", mask=True, length=200)
    q = B * H * 200 * D
    bias = 2 * B * 200 * 208
    assert step.saved == 2 * q + 4 * B * H * 224 + bias + RNG
    workspace = 4 * B * H * 4 * (64 * 64 + 4)
    delta = 13 * 512  # 4 * B * H * 200 = 12.5 blocks
    assert step.backward_peak == step.saved + 2 * q + 3 * 2 * q + delta + workspace


def test_efficient_in_float32_sums_gradient_times_result_outside_the_kernel() -> None:
    step = Step(A100, "float32")
    delta, workspace = 4 * B * H * S, 4 * B * H * 4 * (64 * 64 + 4)
    product, summed = 4 * Q, delta  # live until delta is there, and are gone when the workspace is made
    assert product < workspace < product + summed
    assert step.backward_peak == step.saved + 4 * Q + 3 * 4 * Q + product + summed + delta


def test_efficient_accumulates_wide_heads_in_float32() -> None:
    step = Step(A100, "bfloat16", mask=True, dim=264)
    assert step.forward_peak == step.saved + 4 * B * H * S * 264
    assert Step(A100, "float32", dim=264).forward_peak == Step(A100, "float32", dim=264).saved


def test_cudnn_keeps_what_flash_keeps() -> None:
    assert Step(H100, "bfloat16").saved == Step(A100, "bfloat16").saved


@pytest.mark.parametrize(
    ("rules", "dtype", "kv_heads"), [(T4, "bfloat16", H), (A100, "float32", 2), (T4, "float16", 2)]
)
def test_math_grows_with_the_square_of_the_length(rules: DeviceRules, dtype: str, kv_heads: int) -> None:
    short, long = (Step(rules, dtype, kv_heads=kv_heads, length=n) for n in (512, 1024))
    square = B * H * 512**2

    def coefficient(name: str) -> float:
        """a + b S + c S^2 at S and 2 S: f(2 S) - 2 f(S) = 2 c S^2 - a, with a a few scalars."""
        return (getattr(long, name) - 2 * getattr(short, name)) / (2 * square)

    weights = 0 if dtype == "float32" else 2  # a 16-bit copy, the operation's second result
    assert coefficient("saved") == pytest.approx(4, abs=0.01)
    # the scores, the softmax and where it is infinite; or the softmax, and what is made of it
    assert coefficient("forward_peak") == pytest.approx(max(9, 4 + weights), abs=0.01)
    assert coefficient("backward_peak") == pytest.approx(12, abs=0.01)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_fused_attention_does_not(dtype: str) -> None:
    short, long = Step(A100, dtype, length=512), Step(A100, dtype, length=1024)
    assert long.backward_peak < 2.2 * short.backward_peak
    assert not long.tape.assumptions


# -- what the user is told -----------------------------------------------------------------------------------------

GROUPED = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 1000,
    "hidden_size": 128,
    "intermediate_size": 344,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
}


def scores_of(gpu: str, **training: Any) -> list[tuple[float, str]]:
    spec = ModelSpec(id="x", model_type="llama", architecture="LlamaForCausalLM", config=GROUPED, source="test")
    result = estimator.estimate(
        spec, TrainingSpec(seq_len=256, **training), ClusterSpec(gpu=find_gpu(gpu)), Strategy(), SoftwareSpec()
    )
    return [(a.value, a.source) for a in result.assumptions if a.name == "attention_scores_of_a_layer"]


def test_an_estimate_says_that_attention_falls_to_math() -> None:
    (found,) = scores_of("T4", micro_batch_size=2)
    assert found[0] == 4 * 2 * 8 * 256**2
    assert "compute capability 7.5" in found[1]
    assert "bfloat16" in scores_of("T4", dtype="bfloat16", mixed_precision="no")[0][1]
    assert "float32" in scores_of("A100-80GB", mixed_precision="no")[0][1]


@pytest.mark.parametrize(
    ("gpu", "training"),
    [
        ("A100-80GB", {}),
        ("H100-80GB", {}),
        ("T4", {"attn": "eager"}),
        ("T4", {"packed": False}),  # with a mask transformers repeats keys and values, so that no query is grouped
        ("cpu", {}),
    ],
)
def test_and_only_then(gpu: str, training: dict[str, Any]) -> None:
    assert scores_of(gpu, **training) == []


# -- autocast ------------------------------------------------------------------------------------------------------

CUDA_LIST_ON_CPU = DeviceRules(
    "cpu", CUDA_AUTOCAST_FLOAT32, autocast_promote=CPU.autocast_promote, accumulate_in_place=False
)
"""The rules that a trace with ``cuda_autocast`` has: CPU's kernels, with what CUDA raises to float32."""


def imposed_rows() -> Iterator[o1.Row]:
    for archive in o1.load_archives().values():
        for row in archive.rows:
            if row.result is not None and row.setup.options.get("cuda_autocast"):
                options = {name: value for name, value in row.setup.options.items() if name != "cuda_autocast"}
                yield dataclasses.replace(row, setup=dataclasses.replace(row.setup, options=options))


@pytest.mark.parametrize("row", list(imposed_rows()), ids=lambda row: f"{row.setup.family}-{row.setup.options['attn']}")
def test_traces_under_cudas_autocast_list(row: o1.Row, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimator, "device_rules", lambda gpu, software: CUDA_LIST_ON_CPU)
    compared = compare.compare(row)
    traced, estimated = compared.phases["backward"]
    assert compared.error == pytest.approx(0, abs=1e-3)
    assert estimated / traced == pytest.approx(1, abs=1e-3)


def test_the_list_matters() -> None:
    """CPU's own list fails the same rows, so the test above can fail."""
    errors = [abs(compare.compare(row).error) for row in imposed_rows() if row.setup.family == "gpt2"]
    assert errors
    assert min(errors) > 1e-3
