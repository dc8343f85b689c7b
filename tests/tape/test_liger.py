"""Liger's operations on a GPU, byte by byte: the formulas of its source, with their numbers filled in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memplan.catalog.gpus import find_gpu
from memplan.estimator import estimate
from memplan.specs.hardware import ClusterSpec
from memplan.specs.model import ModelSpec
from memplan.specs.software import SoftwareSpec
from memplan.specs.strategy import Strategy
from memplan.specs.training import TrainingSpec
from memplan.tape import liger
from memplan.tape.dispatch import DeviceRules, cuda
from memplan.tape.tape import Tape
from memplan.tape.tensor import DType, Parameter, Tensor, bfloat16, float16, float32, int32, int64

A100, T4 = cuda((8, 0), multiprocessors=108), cuda((7, 5), multiprocessors=40)
SCALAR = 512


def blocks(nbytes: int) -> int:
    return -(-nbytes // 512) * 512


class Run:
    """An operation on inputs that are there already, then its backward. Bytes on top of the inputs."""

    def __init__(self, rules: DeviceRules = A100) -> None:
        self.tape = Tape(rules)

    def leaf(self, *shape: int, dtype: DType = bfloat16) -> Tensor:
        x = self.tape.new(shape, dtype, "input")
        self.tape.require_grad(x)
        return x

    def forward(self, operation: Callable[[], Any]) -> Any:
        self.start = len(self.tape.log)
        out = operation()
        self.middle = len(self.tape.log)
        self.forward_peak, self.saved = self._bytes(self.start, self.middle)
        return out

    def backward(self, out: Tensor) -> int:
        """The peak of the backward, on top of what the forward left."""
        self.tape.backward(out)
        return self._bytes(self.middle, len(self.tape.log))[0]

    def made_in_backward(self, out: Tensor) -> list[str]:
        """The names of what the backward allocates."""
        self.tape.backward(out)
        return [self.tape.births[event][0] for event in self.tape.log[self.middle :] if event >= 0]

    def _bytes(self, start: int, end: int) -> tuple[int, int]:
        total = peak = 0
        for event in self.tape.log[start:end]:
            total += self.tape.sizes[event] if event >= 0 else -self.tape.sizes[~event]
            peak = max(peak, total)
        return peak, total


# -- the loss ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "vocab_size", "hidden_size", "chunk"),
    [
        (16384, 32000, 4096, 2048),  # 8 chunks, as the source's own comment says
        (8192, 128256, 4096, 256),  # Llama-3 8B: ceil(128256 / 4096) = 32
        (8192, 151936, 3584, 256),  # 43 -> ceil(8192 / 43) = 191 -> 256
        (1000, 50000, 512, 16),  # 98 -> 11 -> 16
        (7, 1000, 64, 1),
        (100, 64, 64, 100),  # one chunk of 128 would be more than there is
    ],
)
def test_chunk(rows: int, vocab_size: int, hidden_size: int, chunk: int) -> None:
    assert liger.chunk_rows(rows, vocab_size, hidden_size) == chunk


T, V, H = 512, 4000, 256
C = 32
"""Rows of a chunk: ceil(4000 / 256) = 16, and 512 / 16."""
LOSSES = 4 * T + T
"""A float32 loss and a boolean for each row."""


def loss_run(
    rules: DeviceRules,
    dtype: DType,
    *,
    autocast: DType | None = None,
    trained: bool = True,
    addmm_out_dtype: bool = True,
) -> tuple[Run, int]:
    run = Run(rules)
    x, labels = run.leaf(T, H, dtype=dtype), run.tape.new((T,), int64, "labels")
    weight: Parameter = run.tape.parameter("weight", (V, H), dtype, requires_grad=trained)

    def operation() -> Tensor:
        with run.tape.autocasting(autocast):
            return liger.fused_linear_cross_entropy(x, weight, labels, addmm_out_dtype)

    loss = run.forward(operation)
    return run, run.backward(loss)


def test_loss_in_bfloat16_keeps_both_gradients_and_one_chunk_of_logits() -> None:
    run, backward = loss_run(A100, bfloat16)
    gradients = 2 * T * H + 2 * V * H
    assert run.saved == gradients + SCALAR
    assert run.forward_peak == gradients + LOSSES + 2 * C * V
    assert backward == SCALAR  # both are scaled in place
    assert run.tape.flops == 3 * 2 * T * V * H


def test_loss_with_a_frozen_head_makes_no_gradient_of_it() -> None:
    run, _ = loss_run(A100, bfloat16, trained=False)
    assert run.saved == 2 * T * H + SCALAR
    assert run.forward_peak == 2 * T * H + LOSSES + 2 * C * V
    assert run.tape.flops == 2 * 2 * T * V * H


def test_loss_under_autocast_casts_the_weight_twice() -> None:
    """Once for the gradient of x, cached until autocast ends; and its transpose for each chunk, cached by nobody."""
    run, _ = loss_run(A100, float32, autocast=bfloat16)
    gradients = 4 * T * H + 4 * V * H
    assert run.forward_peak == gradients + LOSSES + 2 * V * H + 2 * V * H + 2 * C * H + 2 * C * V
    assert run.saved == gradients + SCALAR


def test_loss_under_autocast_without_addmm_of_mixed_dtypes() -> None:
    """torch before 2.8: a product of 16 bit and a float32 copy of it, beside the cached cast and the logits."""
    run, _ = loss_run(A100, float32, autocast=bfloat16, addmm_out_dtype=False)
    products = 2 * V * H + 4 * V * H
    assert run.forward_peak == 4 * T * H + 4 * V * H + LOSSES + 2 * V * H + 2 * C * V + products


def test_loss_in_float32_makes_the_weights_gradient_twice() -> None:
    run, _ = loss_run(A100, float32)
    assert run.forward_peak == 4 * T * H + 4 * V * H + LOSSES + 4 * C * V + 4 * V * H


def test_loss_before_ampere_makes_a_float32_copy_of_the_weights_gradient() -> None:
    run, _ = loss_run(T4, float16)
    assert run.forward_peak == 2 * T * H + 2 * V * H + LOSSES + 2 * C * V + 2 * V * H + 4 * V * H


def test_loss_without_gradients_still_has_room_for_that_of_x() -> None:
    run = Run()
    x, labels = run.leaf(T, H), run.tape.new((T,), int64, "labels")
    weight = run.tape.parameter("weight", (V, H), bfloat16)
    with run.tape.no_grad():
        x.node = None
        run.forward(lambda: liger.fused_linear_cross_entropy(x, weight, labels, True))
    assert run.forward_peak == 2 * T * H + LOSSES + 2 * C * V
    assert run.saved == SCALAR


def test_loss_of_a_tied_head_meets_the_embeddings_gradient() -> None:
    """The head's gradient waits from the forward on; the sum of both is one more table."""
    spec = llama(tie_word_embeddings=True)
    tied = peak(spec, seq_len=64)
    assert tied.components.gradients >= 2 * 4000 * 64


def test_cross_entropy_alone_overwrites_the_logits() -> None:
    run = Run()
    logits, labels = run.leaf(T, V, dtype=float32) * 1.0, run.tape.new((T,), int64, "labels")
    loss = run.forward(lambda: liger.cross_entropy(logits, labels))
    assert run.saved == SCALAR
    assert run.forward_peak == LOSSES + 8 * T
    assert run.made_in_backward(loss) == ["ones_like", "scale_backward"]


# -- the rest ------------------------------------------------------------------------------------------------------


def test_rms_norm_saves_its_input_and_a_number_per_row() -> None:
    run = Run()
    x, weight = run.leaf(2, T, H), run.tape.parameter("weight", (H,), bfloat16)
    out = run.forward(lambda: liger.rms_norm(x, weight, in_place=True))
    assert run.saved == 2 * 2 * T * H + 4 * 2 * T
    # the gradient of the result, a row of sums for each multiprocessor, their sum, and that in 16 bit
    assert run.backward(out) == 2 * 2 * T * H + 4 * 108 * H + 4 * H + 2 * H


def test_rms_norm_out_of_place_and_frozen() -> None:
    run = Run()
    x, weight = run.leaf(2, T, H), run.tape.parameter("weight", (H,), bfloat16, requires_grad=False)
    out = run.forward(lambda: liger.rms_norm(x, weight, in_place=False))
    assert run.backward(out) == 2 * (2 * 2 * T * H)


def test_rms_norm_has_the_dtype_of_its_input_and_copies_a_strided_one() -> None:
    run = Run()
    x, weight = run.leaf(2, T, H), run.tape.parameter("weight", (H,), float32)
    out = run.forward(lambda: liger.rms_norm(x.transpose(0, 1), weight, in_place=True))
    assert out.dtype is bfloat16
    assert run.saved == 2 * (2 * 2 * T * H) + 4 * 2 * T


def test_gated_activation_writes_gradients_over_what_it_saved() -> None:
    run = Run()
    gate, up = run.leaf(2, T, H) * 1.0, run.leaf(2, T, H) * 1.0
    out = run.forward(lambda: liger.gated(gate, up))
    assert run.saved == 2 * 2 * T * H
    assert run.made_in_backward(out) == ["ones_like", "scale_backward", "scale_backward"]


def test_gated_activation_copies_halves_of_a_projection() -> None:
    run = Run()
    both = run.leaf(2, T, 2 * H)
    run.forward(lambda: liger.gated(*both.chunk(2)))
    assert run.saved == 3 * (2 * 2 * T * H)


def test_rotary_positions_are_written_in_place() -> None:
    run = Run()
    q, k = run.leaf(2, T, 8, 32) * 1.0, run.leaf(2, T, 2, 32) * 1.0
    cos, sin = (run.tape.new((1, T, 32), float32, name) for name in ("cos", "sin"))
    rotated = run.forward(lambda: liger.rotary_pos_emb(q.transpose(1, 2), k.transpose(1, 2), cos, sin))
    assert run.forward_peak == 0
    assert [x.dtype for x in rotated] == [bfloat16, bfloat16]
    # gradients that lie in memory position by position, too, are rotated where they are; the key's are zeros
    made = run.made_in_backward(rotated[0].transpose(1, 2).reshape(2, T, 256))
    assert made == ["ones_like", "zeros", "clone", "scale_backward", "scale_backward"]


def test_rotary_positions_copy_what_lies_head_by_head() -> None:
    run = Run()
    q, k = run.leaf(2, 8, T, 32), run.leaf(2, 2, T, 32)
    cos, sin = (run.tape.new((1, T, 32), float32, name) for name in ("cos", "sin"))
    run.forward(lambda: liger.rotary_pos_emb(q, k, cos, sin))
    assert run.saved == 2 * 2 * T * 32 * (8 + 2)


def test_experts_save_the_projections_of_every_tokens_experts() -> None:
    run = Run()
    experts, top_k, width = 8, 2, 96
    x, weights = run.leaf(T, H), run.leaf(T, top_k)
    gate_up = run.tape.parameter("gate_up", (experts, 2 * width, H), bfloat16)
    down = run.tape.parameter("down", (experts, H, width), bfloat16)
    index = run.tape.new((T, top_k), int32, "index")
    out = run.forward(lambda: liger.fused_experts(x, gate_up, down, index, weights))
    rows = T * top_k
    routing = 3 * 4 * rows + SCALAR + 2 * SCALAR  # permutations; where experts start; at most 16 + 8 tiles
    assert run.saved == 2 * T * H + 2 * rows * 2 * width + routing
    assert run.forward_peak == run.saved + 2 * rows * width + 2 * rows * H
    gradients = 2 * T * H + 2 * experts * 3 * width * H + 2 * rows
    assert run.backward(out) == 2 * T * H + gradients + 2 * rows * (2 * width + width + H)


# -- whole models --------------------------------------------------------------------------------------------------


def llama(**values: Any) -> ModelSpec:
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 4000,
        "hidden_size": 64,
        "intermediate_size": 176,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        **values,
    }
    return ModelSpec(id="x", model_type="llama", architecture="LlamaForCausalLM", config=config, source="test")


def peak(spec: ModelSpec, gpu: str = "A100-80GB", **training: Any) -> Any:
    training = {"liger": True, "dtype": "bfloat16", "mixed_precision": "no", **training}
    cluster = ClusterSpec(gpu=find_gpu(gpu))
    return estimate(spec, TrainingSpec(**training), cluster, Strategy(), SoftwareSpec(), replay=False).gpu


@given(
    st.integers(1, 4),
    st.integers(256, 2048),
    st.sampled_from(["A100-80GB", "H100-80GB", "RTX3090"]),
    st.sampled_from([("bfloat16", "no"), ("float32", "bf16"), ("float32", "no")]),
    st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_long_sequences_never_need_more_with_liger(
    batch: int, length: int, gpu: str, precision: tuple[str, str], checkpointed: bool
) -> None:
    training = {
        "micro_batch_size": batch,
        "seq_len": length,
        "dtype": precision[0],
        "mixed_precision": precision[1],
        "gradient_checkpointing": checkpointed,
    }
    with_liger, without = (peak(llama(), gpu, liger=flag, **training) for flag in (True, False))
    assert with_liger.peak_allocated <= without.peak_allocated


def test_short_ones_may() -> None:
    """In float32 the loss makes the head's gradient twice in the forward, whatever the length: 2 x 4 V h."""
    wide = llama(vocab_size=64000, hidden_size=256, num_hidden_layers=1)
    training = {"dtype": "float32", "mixed_precision": "no", "seq_len": 16, "optim": "sgd"}
    phases = [
        {phase.name: phase.allocated for phase in peak(wide, liger=flag, **training).phases} for flag in (True, False)
    ]
    assert phases[0]["loss"] > phases[1]["loss"] + 4 * 64000 * 256


@pytest.mark.parametrize("evaluation", [1, 8])
def test_evaluation_makes_logits_all_the_same(evaluation: int) -> None:
    """Liger leaves them out while training alone: lce_forward's skip_logits is self.training."""
    found, plain = (
        peak(llama(vocab_size=64000), seq_len=128, eval_batch_size=evaluation, liger=flag) for flag in (True, False)
    )
    with_liger, without = (
        next(phase.allocated for phase in each.phases if phase.name == "eval") for each in (found, plain)
    )
    assert with_liger >= without > evaluation * 128 * 64000 * 4
