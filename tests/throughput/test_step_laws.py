"""What must hold of the step time whatever the setup; what one might expect and is not so stands at the end."""

from typing import Any

from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tests.throughput.setups import resolved
from tests.throughput.test_step import STRATEGIES, twin_flow, zero

from memplan.constants import Constant
from memplan.errors import MemplanError
from memplan.specs.strategy import FsdpSpec, Strategy
from memplan.specs.training import LoraSpec
from memplan.throughput import Machine, StepTiming, step_time
from memplan.throughput.kernels import Product
from memplan.throughput.rates import DEFAULT_MACHINE, Rates

SPREAD = [*STRATEGIES, twin_flow(0.5), zero(2, overlap_comm=True), zero(3, overlap_comm=False)]
SPREAD.append(Strategy(kind="fsdp", fsdp=FsdpSpec(version=1, backward_prefetch="NO_PREFETCH")))
strategies = st.sampled_from(SPREAD)
gpus = st.sampled_from(["T4", "V100-16GB", "A100-80GB", "H100-80GB", "RTX3090", "L40S", "MI300X"])
lengths = st.sampled_from([16, 128, 512, 2048])
adapters = st.sampled_from([None, LoraSpec(rank=8)])
ends = ("low", "expected", "high")


def timed(
    gpu: str,
    number: int,
    strategy: Strategy,
    faster: dict[str, Any] | None = None,
    machine: Machine = DEFAULT_MACHINE,
    **training: Any,
) -> StepTiming:
    """A setup's time; one that the libraries refuse is passed over."""
    setup, cluster, strategy = resolved(
        gpu=gpu, gpus=number, strategy=strategy, mixed_precision="fp16", **{"seq_len": 512, **training}
    )
    if faster:
        cluster = cluster.replace(gpu=cluster.gpu.replace(**faster))
    try:
        return step_time(setup, cluster, strategy, machine)
    except MemplanError:
        assume(False)
        raise


def never_longer(less: StepTiming, more: StepTiming) -> None:
    for end in ends:
        assert getattr(less.seconds, end) <= getattr(more.seconds, end) * (1 + 1e-12), end


@settings(deadline=None, max_examples=25)
@given(gpu=gpus, strategy=strategies, length=lengths, lora=adapters, steps=st.sampled_from([1, 4]))
def test_checkpointing_never_makes_a_step_shorter(gpu, strategy, length, lora, steps) -> None:
    """Nor where the GPU waits for the host, or for transfers: they hide beside both."""
    common = {"seq_len": length, "lora": lora, "grad_accum_steps": steps}
    plain, checkpointed = (timed(gpu, 4, strategy, gradient_checkpointing=on, **common) for on in (False, True))
    never_longer(plain, checkpointed)


@settings(deadline=None, max_examples=25)
@given(
    gpu=gpus,
    strategy=strategies,
    length=lengths,
    what=st.sampled_from(["fp16_tflops", "fp32_tflops", "bandwidth_gb_per_s", "link_gb_per_s", "pcie_generation"]),
)
def test_better_hardware_never_takes_longer(gpu, strategy, length, what) -> None:
    _, cluster, _ = resolved(gpu=gpu)
    now = getattr(cluster.gpu, what)
    better = {3: 4, 4: 5, 5: 6}.get(now, 6) if what == "pcie_generation" else 2 * now
    plain, faster = (timed(gpu, 4, strategy, change, seq_len=length) for change in (None, {what: better}))
    never_longer(faster, plain)


@settings(deadline=None, max_examples=15)
@given(
    strategy=st.sampled_from([each for each in SPREAD if "none" not in (each.offload_optimizer, each.offload_param)]),
    what=st.sampled_from(["cores", "host_memory", "nvme_read", "nvme_write"]),
)
def test_a_better_node_never_takes_longer(strategy, what) -> None:
    value: Constant = getattr(DEFAULT_MACHINE, what)
    twice = Constant(value.name, 2 * value.value, 2 * value.low, 2 * value.high, value.unit, "twice")
    never_longer(timed("A100-80GB", 4, strategy, machine=Machine(**{what: twice})), timed("A100-80GB", 4, strategy))


@settings(deadline=None, max_examples=15)
@given(gpu=gpus, strategy=strategies, length=lengths, number=st.sampled_from([2, 4]))
def test_more_gpus_of_a_node_never_train_fewer_tokens_a_second(gpu, strategy, length, number) -> None:
    fewer, more = (timed(gpu, ranks, strategy, seq_len=length) for ranks in (number, 2 * number))
    assert more.tokens_per_second.expected >= fewer.tokens_per_second.expected * (1 - 1e-12)


@settings(deadline=None, max_examples=15)
@given(gpu=gpus, strategy=strategies, steps=st.sampled_from([2, 4]))
def test_larger_micro_batches_never_train_fewer_tokens_a_second(gpu, strategy, steps) -> None:
    """For the same sequences, once every product of the model has a tile for every multiprocessor."""
    common = {"seq_len": 4096}
    small = timed(gpu, 4, strategy, micro_batch_size=2, grad_accum_steps=steps, **common)
    large = timed(gpu, 4, strategy, micro_batch_size=4, grad_accum_steps=steps // 2, **common)
    assert small.tokens == large.tokens
    assert large.seconds.expected <= small.seconds.expected * (1 + 1e-12)


# -- what is not so ----------------------------------------------------------------------------------------------------


def test_a_second_gpu_can_cost_more_than_it_trains() -> None:
    """One GPU has nobody to share gradients with: a short sequence does not pay for a slow link."""
    one, two = (timed("RTX3090", n, Strategy(kind="ddp"), seq_len=16).tokens_per_second.expected for n in (1, 2))
    assert two < one


def test_a_larger_batch_can_leave_more_of_its_last_wave_empty() -> None:
    """A product of fewer tiles than multiprocessors is split along its length, one of a few more is not."""
    _, cluster, _ = resolved(gpu="A100-80GB")
    rates = Rates(cluster.gpu, cluster, DEFAULT_MACHINE, "expected")
    small, large = (rates.product(Product(rows, 128 * 27, 8192, "bfloat16")) for rows in (384, 768))
    assert large > 2.2 * small
