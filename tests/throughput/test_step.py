from typing import Any

import pytest
from tests.throughput.setups import resolved, seconds, timed

from memplan.errors import SpecError, UnsupportedError
from memplan.micro_batch import run_of
from memplan.specs.strategy import DdpSpec, FsdpSpec, Strategy, ZeroSpec
from memplan.specs.training import LoraSpec
from memplan.throughput import Machine, expected_seconds, least_seconds, step_time
from memplan.throughput.rates import OVERLAP
from memplan.throughput.step import PARTS

BF16 = {"mixed_precision": "bf16"}
PARAMETERS = 1_100_048_384


def zero(stage: int, **keys) -> Strategy:
    places = {name: keys.pop(name) for name in ("offload_optimizer", "offload_param") if name in keys}
    return Strategy(kind=f"zero{stage}", zero=ZeroSpec(**keys), **places)


def twin_flow(ratio: float) -> Strategy:
    """The optimizer on the host, but for a share of its sub-groups."""
    zero = ZeroSpec(sub_group_size=20_000_000, offload_optimizer={"ratio": ratio})
    return Strategy(kind="zero3", offload_optimizer="cpu", zero=zero)


STRATEGIES = [
    Strategy(kind="ddp"),
    zero(0),
    zero(1),
    zero(2),
    zero(2, offload_optimizer="cpu"),
    zero(3),
    zero(3, offload_optimizer="cpu", offload_param="cpu"),
    zero(3, offload_optimizer="nvme", offload_param="nvme"),
    Strategy(kind="fsdp"),
    Strategy(kind="fsdp", offload_param="cpu"),
    Strategy(kind="fsdp", fsdp=FsdpSpec(version=1)),
]


@pytest.mark.parametrize("strategy", STRATEGIES, ids=lambda s: f"{s.kind}-{s.offload_optimizer}-{s.offload_param}")
@pytest.mark.parametrize("accumulated", [1, 4])
def test_parts_add_up_and_intervals_hold_the_expected(strategy: Strategy, accumulated: int) -> None:
    timing = timed(gpus=8, strategy=strategy, grad_accum_steps=accumulated, **BF16)
    assert sum(part.seconds.expected for part in timing.parts) == pytest.approx(timing.seconds.expected)
    assert 0 < timing.seconds.low < timing.seconds.expected < timing.seconds.high
    assert {part.name for part in timing.parts} <= set(PARTS)
    for part in timing.parts:
        assert part.made_of
        assert part.name == "overlap" or 0 <= part.seconds.low <= part.seconds.expected <= part.seconds.high
    assert timing.tokens == 8 * 1024 * accumulated
    speed = timing.tokens_per_second
    assert speed.low < speed.expected < speed.high
    assert speed.expected == pytest.approx(timing.tokens / timing.seconds.expected)


@pytest.mark.parametrize("strategy", STRATEGIES, ids=lambda s: f"{s.kind}-{s.offload_optimizer}-{s.offload_param}")
@pytest.mark.parametrize("run", [{}, {"grad_accum_steps": 4}, {"gradient_checkpointing": True, "seq_len": 64}], ids=str)
def test_a_search_is_told_the_expected_seconds_and_less_sooner(strategy: Strategy, run: dict[str, Any]) -> None:
    setup, cluster, _ = resolved(gpus=8, strategy=strategy, **BF16 | run)
    expected = expected_seconds(setup, cluster, strategy)
    assert expected == step_time(setup, cluster, strategy).seconds.expected
    share = least_seconds(setup, cluster, strategy) / expected
    assert (0 if "nvme" in strategy.offload_optimizer else 0.05) < share <= 1


def test_flops_are_six_per_parameter_and_token() -> None:
    setup, cluster, strategy = resolved(**BF16)
    timing = step_time(setup, cluster, strategy)
    attention = 22 * 4 * 1024 * 1024 * 2048 * 7 / 4
    embedding = 32000 * 2048
    assert timing.flops == pytest.approx(6 * (PARAMETERS - embedding) * 1024 + attention, rel=0.001)
    assert timing.result().flops == timing.flops
    assert timing.result().seconds == timing.seconds.expected


def test_a_gpu_is_needed() -> None:
    setup, cluster, strategy = resolved()
    with pytest.raises(SpecError, match=r"^gpu: null is no GPU whose speed is known"):
        step_time(setup, cluster.replace(gpu=None), strategy)
    setup, cluster, strategy = resolved(gpu="cpu", mixed_precision="no")
    with pytest.raises(UnsupportedError, match=r"^gpu: how fast a CPU trains"):
        step_time(setup, cluster, strategy)


def test_checkpointing_costs_the_recomputation() -> None:
    plain, checkpointed = timed(**BF16), timed(gradient_checkpointing=True, **BF16)
    assert seconds(plain, "recomputation") == 0
    extra = checkpointed.seconds.expected - plain.seconds.expected
    assert 0.15 * plain.seconds.expected < extra < 0.4 * plain.seconds.expected
    assert seconds(checkpointed, "recomputation") == pytest.approx(extra, rel=0.05)


def test_no_kernel_hides_two_transfers() -> None:
    """Where copies and gathers take longer than kernels, less to compute would else take longer."""
    strategy = Strategy(kind="fsdp", offload_param="cpu")
    known = {"model": "meta-llama/Llama-2-7b", "gpu": "RTX3090", "gpus": 2, "strategy": strategy, **BF16}
    plain, checkpointed = (
        timed(lora=LoraSpec(rank=8), gradient_checkpointing=checkpointing, **known) for checkpointing in (False, True)
    )
    kernels = sum(seconds(plain, part) for part in ("forward", "backward"))
    assert kernels < min(seconds(plain, "communication"), seconds(plain, "copies"))
    assert -seconds(plain, "overlap") == pytest.approx(OVERLAP.value * kernels)
    assert plain.seconds.expected < checkpointed.seconds.expected


def test_micro_batches_add_up() -> None:
    one, four = timed(**BF16), timed(grad_accum_steps=4, **BF16)
    assert seconds(four, "forward") == pytest.approx(4 * seconds(one, "forward"))
    assert seconds(four, "optimizer") > seconds(one, "optimizer")  # gradients are added to
    assert seconds(four, "optimizer") < 2 * seconds(one, "optimizer")


def test_lora_needs_no_gradients_of_weights() -> None:
    full, lora = timed(dtype="bfloat16", **BF16), timed(dtype="bfloat16", lora=LoraSpec(rank=8), **BF16)
    assert seconds(lora, "backward") < 0.8 * seconds(full, "backward")
    assert seconds(lora, "optimizer") < 0.02 * seconds(full, "optimizer")


def test_ddp_reduces_once_and_beside_the_last_backward() -> None:
    one = timed(gpus=8, strategy=Strategy(kind="ddp"), **BF16)
    four = timed(gpus=8, strategy=Strategy(kind="ddp"), grad_accum_steps=4, **BF16)
    assert seconds(four, "communication") == pytest.approx(seconds(one, "communication"))
    assert seconds(one, "overlap") == pytest.approx(-OVERLAP.value * seconds(one, "communication"))
    slow = timed(gpus=2, gpu="RTX3090", strategy=Strategy(kind="ddp"), seq_len=128, **BF16)
    assert seconds(slow, "overlap") == pytest.approx(-OVERLAP.value * seconds(slow, "backward"))
    assert slow.bound_by == "communication"


def ring(timing) -> float:
    return seconds(timing, "communication")


def test_zero_moves_what_its_stage_moves() -> None:
    options = {
        "gpus": 8,
        "gpu": "RTX3090",
        "grad_accum_steps": 4,
        **BF16,
    }  # a slow link, so that latency does not matter
    one, two = timed(strategy=zero(1), **options), timed(strategy=zero(2), **options)
    # All-reduce is 2, all-gather 1: stage 1 reduces once, stage 2 with every micro-batch.
    assert ring(two) / ring(one) == pytest.approx((4 * 2 + 1) / (2 + 1), rel=0.02)
    three = timed(strategy=zero(3, stage3_max_reuse_distance=0, stage3_prefetch_bucket_size=0), **options)
    assert ring(three) / ring(one) == pytest.approx(4 * (2 + 1) / (2 + 1), rel=0.1)
    kept = timed(strategy=zero(3, stage3_max_reuse_distance=10**10), **options)
    assert ring(kept) / ring(one) == pytest.approx(4 * (1 + 1) / (2 + 1), rel=0.1)  # used again soon: gathered once


def test_overlap_comm_hides_the_reduction() -> None:
    serial, beside = (timed(gpus=8, strategy=zero(2, overlap_comm=on), **BF16) for on in (False, True))
    assert seconds(serial, "overlap") == 0
    assert beside.seconds.expected < serial.seconds.expected


def test_offloading_the_optimizer_takes_pcie_and_cores() -> None:
    on_gpu, offloaded = (
        timed(gpus=4, strategy=zero(2), **BF16),
        timed(gpus=4, strategy=zero(2, offload_optimizer="cpu"), **BF16),
    )
    assert seconds(offloaded, "optimizer") > 5 * seconds(on_gpu, "optimizer")
    copied = PARAMETERS / 4 * (4 + 2)  # a partition of gradients in float32 down, of weights in 16 bit up
    assert seconds(offloaded, "copies") == pytest.approx(copied / 25.2e9, rel=0.02)
    threads = timed(Machine(threads=1), gpus=4, strategy=zero(2, offload_optimizer="cpu"), **BF16)
    assert seconds(threads, "optimizer") == pytest.approx(11.5e-9 * PARAMETERS / 4, rel=0.01)


def test_offloaded_parameters_come_with_every_gather() -> None:
    keys = {"stage3_max_reuse_distance": 0, "stage3_param_persistence_threshold": 0, "stage3_prefetch_bucket_size": 0}
    strategy = zero(3, offload_optimizer="cpu", offload_param="cpu", **keys)
    timing = timed(gpus=4, strategy=strategy, **BF16)
    weights, gradients = 2 * 2 * PARAMETERS / 4, (2 + 2 + 4) * PARAMETERS / 4
    assert seconds(timing, "copies") == pytest.approx((weights + gradients) / 25.2e9, rel=0.1)


def test_nvme_reads_states_and_writes_them() -> None:
    strategy = zero(3, offload_optimizer="nvme")
    timing = timed(gpus=4, strategy=strategy, **BF16)
    # Of four ranks: gradients are written first; masters, moments and gradients read, and all but the latter written.
    assert seconds(timing, "nvme") == pytest.approx(16 * PARAMETERS / 6e9 + (12 + 4) * PARAMETERS / 4e9, rel=0.03)
    assert timing.bound_by == "nvme"


def test_a_small_batch_waits_for_the_host() -> None:
    small, large = timed(seq_len=16, **BF16), timed(seq_len=2048, micro_batch_size=4, **BF16)
    assert small.bound_by == "host"
    assert seconds(small, "host") > 0
    assert seconds(large, "host") == 0
    assert large.bound_by in ("compute", "bandwidth")


@pytest.mark.parametrize(
    ("slower", "faster"), [("RTX3090", "A100-80GB"), ("A100-80GB", "H100-80GB"), ("T4", "RTX4090")]
)
def test_a_faster_gpu_is_faster(slower: str, faster: str) -> None:
    options = {"gpus": 2, "strategy": zero(3), "mixed_precision": "fp16", "seq_len": 2048}
    assert timed(gpu=faster, **options).seconds.expected < timed(gpu=slower, **options).seconds.expected


def test_more_ranks_never_train_fewer_tokens_a_second() -> None:
    found = [timed(gpus=n, strategy=zero(3), **BF16).tokens_per_second.expected for n in (2, 4, 8)]
    assert found == sorted(found)
    two_nodes = timed(gpus=16, nodes=2, strategy=zero(3), **BF16).tokens_per_second.expected
    assert found[-1] < two_nodes < 2.1 * found[-1]  # of 16 ranks each steps half as much


def test_an_optimizer_of_less_state_moves_less() -> None:
    by_name = {name: seconds(timed(optim=name, **BF16), "optimizer") for name in (
        "sgd", "adamw_bnb_8bit", "adamw_torch_fused", "adamw_torch_foreach",
    )}  # fmt: skip
    assert list(by_name.values()) == sorted(by_name.values())
    assert seconds(timed(optim="paged_adamw_8bit", **BF16), "optimizer") == by_name["adamw_bnb_8bit"]
    bandwidth = 2039e9 * 0.83
    assert by_name["adamw_torch_fused"] == pytest.approx((28 + 12) * PARAMETERS / bandwidth, rel=0.01)


def test_buckets_are_calls() -> None:
    setup, cluster, _ = resolved(gpus=8, **BF16)
    strategy = Strategy(kind="ddp", ddp=DdpSpec(bucket_cap_mb=25))
    words = next(part.made_of for part in step_time(setup, cluster, strategy).parts if part.name == "communication")
    gradients = sum(p.nbytes * count for p, count in run_of(setup, cluster.gpu)[0].trainable)
    assert f"all-reduce of {gradients / 1e9:.3g} GB" in words
    assert " calls" in words


@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.7])
def test_a_ratio_leaves_less_to_the_host(ratio: float) -> None:
    """Twin-Flow: sub-groups that stay on the GPU are stepped there, beside the host's."""
    some, every = (timed(gpus=4, strategy=twin_flow(share), **BF16) for share in (ratio, 1.0))
    assert some.seconds.expected < every.seconds.expected
    assert seconds(some, "copies") < seconds(every, "copies")
    if ratio:  # in steps of a sub-group
        assert seconds(some, "optimizer") == pytest.approx(ratio * seconds(every, "optimizer"), rel=0.1)
    else:
        assert seconds(some, "optimizer") < 0.2 * seconds(every, "optimizer")
        assert some.bound_by != "cpu"


def test_an_image_is_its_patches_and_the_class_token() -> None:
    vit = {"model": "google/vit-base-patch16-224", "mixed_precision": "fp16"}
    timing = timed(micro_batch_size=8, grad_accum_steps=2, gpus=4, strategy=Strategy(kind="ddp"), seq_len=512, **vit)
    assert timing.tokens == 4 * 2 * 8 * (14 * 14 + 1)
    shorter = timed(micro_batch_size=8, grad_accum_steps=2, gpus=4, strategy=Strategy(kind="ddp"), seq_len=2, **vit)
    assert shorter.tokens == timing.tokens


def test_the_interval_is_an_assumption() -> None:
    timing = timed(**BF16)
    assert timing.interval.value == pytest.approx(timing.seconds.expected, rel=0.005)
    ends = timing.seconds.low, timing.seconds.high
    assert (timing.interval.low, timing.interval.high) == pytest.approx(ends, rel=0.005)
    assert timing.interval.unit == "s"
