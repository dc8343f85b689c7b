from __future__ import annotations

from typing import Any

import pytest

import memplan
from memplan import api
from memplan.engines import nvme
from memplan.engines.zero3 import Shard
from memplan.errors import SpecError, UnsupportedError
from memplan.memory.course import Ledger
from memplan.results import Estimate
from memplan.specs.strategy import AioSpec, OffloadOptimizerSpec, ZeroSpec

MiB = 2**20
MODEL: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 8192,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
}
LAYER = 4 * 1024**2 + 3 * 1024 * 4096
"""Weights of a layer but for its norms, which are 2 x 1024."""


def shard(number: int, elements: int, itemsize: int = 2, ranks: int = 1, persistent: bool = False) -> Shard:
    return Shard((number, -1), elements, itemsize, ranks, (elements,), persistent)


def param_swapper(itemsize: int = 2, **keys: Any) -> tuple[nvme.ParamSwapper, Ledger]:
    ledger = Ledger()
    return nvme.ParamSwapper(ZeroSpec(offload_param=keys), itemsize, ledger), ledger


def held(ledger: Ledger, place: str) -> dict[str, int]:
    ledger.begin(f"now {place}")
    return ledger.fullest(f"now {place}", place)


def test_tensors_from_1_mib_on_are_swapped_in_multiples_of_1_kib() -> None:
    default, wide = AioSpec(), AioSpec(block_size=4 * MiB, intra_op_parallelism=3)
    assert nvme.is_swappable(default, MiB)
    assert not nvme.is_swappable(default, MiB - 1)
    assert not nvme.is_swappable(AioSpec(block_size=4096), MiB - 1)
    assert not nvme.is_swappable(wide, 4 * MiB - 1)
    assert [nvme.aligned(default, n) for n in (1, 1024, 1025)] == [1024, 1024, 2048]
    assert nvme.aligned(wide, 1025) == 3 * 1024


def test_the_pool_of_weights_is_locked_to_the_page_and_not_to_a_power_of_two() -> None:
    swapper, ledger = param_swapper(buffer_count=3, buffer_size=3_000_001)
    swapper.configure_aio()
    nbytes = -(-3_000_001 * 2 // 1024) * 1024 * 3
    assert held(ledger, "host") == held(ledger, "pinned") == {"swap_buffers": -(-nbytes // 4096) * 4096}


def test_a_gathered_weight_keeps_a_buffer() -> None:
    swapper, _ = param_swapper(buffer_count=2, buffer_size=MiB)
    first, second, third = shards = [shard(i, MiB) for i in range(3)]
    for each in shards:
        swapper.write(each)
    swapper.ensure_availability([first])
    swapper.prefetch([second, third], inflight_elements=MiB)
    assert [swapper.is_away(each) for each in shards] == [False, False, True]
    with pytest.raises(SpecError, match=r"^zero\.offload_param\.buffer_count: 2 is too few: .* Use more, or a smaller"):
        swapper.ensure_availability([third])
    swapper.remove_partition_and_release_buffer(first)
    swapper.ensure_availability([third])
    assert [swapper.is_away(each) for each in shards] == [True, False, False]


def test_prefetching_looks_as_far_ahead_as_is_in_flight() -> None:
    swapper, _ = param_swapper(buffer_count=5, buffer_size=MiB)
    shards = [shard(i, MiB) for i in range(4)]
    for each in shards:
        swapper.write(each)
    swapper.prefetch(shards, inflight_elements=MiB)
    assert [swapper.is_away(each) for each in shards] == [False, False, False, True]
    with pytest.raises(SpecError, match=r"^zero\.stage3_prefetch_bucket_size: .* twice at once"):
        swapper.prefetch([shards[3], shards[3]], inflight_elements=MiB)


def test_a_partition_must_fit_into_a_buffer() -> None:
    swapper, _ = param_swapper(buffer_size=MiB)
    assert swapper.is_swappable(shard(0, MiB // 2))
    assert not swapper.is_swappable(shard(0, MiB // 2 - 1))
    with pytest.raises(SpecError, match=r"^zero\.offload_param\.buffer_size: 1048576 is less .* Use 1048577 or more"):
        swapper.is_swappable(shard(0, MiB + 1))
    with pytest.raises(UnsupportedError, match="adapters in float32"):
        swapper.is_swappable(shard(0, MiB, itemsize=4))


@pytest.mark.parametrize(
    ("keys", "swappable", "needed"),
    [
        ({}, 9, 4),
        ({"pipeline_read": True}, 1, 4),
        ({"pipeline_read": True}, 2, 8),
        ({"pipeline_write": True}, 9, 8),
        ({"pipeline_read": True, "pipeline_write": True}, 2, 8),
        ({"pipeline_read": True, "pipeline_write": True}, 3, 12),
    ],
)
def test_pipelining_needs_buffers(keys: dict[str, Any], swappable: int, needed: int) -> None:
    nvme.check_buffer_count(OffloadOptimizerSpec(buffer_count=needed, **keys), swappable)
    if needed > 4:
        with pytest.raises(SpecError, match=rf"^zero\.offload_optimizer\.buffer_count: .* Use {needed} or more"):
            nvme.check_buffer_count(OffloadOptimizerSpec(buffer_count=needed - 1, **keys), swappable)


# -- estimates


def estimate(optimizer: str = "nvme", param: str = "none", gpus: int = 2, **keys: Any) -> Estimate:
    cluster = memplan.ClusterSpec(gpu="A100-80GB", gpus=gpus, nvme="1TB", host_memory="64GiB")
    strategy = memplan.Strategy(kind="zero3", offload_optimizer=optimizer, offload_param=param, zero=keys)
    return memplan.estimate(MODEL, memplan.TrainingSpec(seq_len=16), cluster, strategy, replay=False)


AWAY: dict[str, Any] = {
    "offload_param": {"max_in_cpu": 0, "buffer_size": 5_000_000},
    "stage3_max_reuse_distance": 0,
    "stage3_prefetch_bucket_size": 0,
}


def test_the_files_of_a_node() -> None:
    result = estimate(param="nvme", **AWAY)
    large = 2 * LAYER + 2 * 8192 * 1024
    norms = 5 * 1024  # not swapped: too small, as a sub-group too, since they are without weight decay
    assert result.nvme.components == {"weights": 2 * large, "optimizer": 12 * large, "gradients": 4 * large}
    assert result.model.parameters == large + norms
    assert (result.nvme.capacity, result.verdict) == (10**12, "fits")


def test_weights_that_stay_in_host_memory_have_files_all_the_same() -> None:
    away, kept = estimate(param="nvme", **AWAY), estimate(param="nvme", offload_param={"buffer_size": 5_000_000})
    assert kept.nvme == away.nvme
    assert kept.host.components["weights"] > 2 * 2 * LAYER > MiB > away.host.components["weights"]


def test_a_flat_buffer_is_there_even_if_no_sub_group_fits_into_it() -> None:
    """max_in_cpu a little less than the model: its one sub-group is on NVMe, and the buffer is not used."""
    keys = {**AWAY, "offload_param": {**AWAY["offload_param"], "max_in_cpu": 10_000_000}}
    assert estimate(param="nvme", **keys).host.components["weights"] > 2 * 2 * 10_000_000
    assert estimate(param="nvme", **AWAY).host.components["weights"] < MiB


def test_buffers_of_the_optimizer_follow_the_largest_sub_group() -> None:
    large = 2 * LAYER + 2 * 8192 * 1024
    assert estimate().host.components["swap_buffers"] == 2 * 4 * 4 * large // 2
    assert estimate(sub_group_size=4_000_000).host.components["swap_buffers"] < 2 * 4 * 4 * large // 8


def test_updated_weights_leave_through_a_buffer_for_whole_weights() -> None:
    """A finding: it does not shrink with the number of ranks."""
    two, eight = (estimate(param="nvme", gpus=gpus, **AWAY).host.components["swap_buffers"] // gpus for gpus in (2, 8))
    large = 2 * LAYER + 2 * 8192 * 1024
    pool = 5 * 5_000_192 * 2
    assert two - 16 * large // 2 - pool == pytest.approx(2 * large, abs=8192)
    assert eight - 16 * large // 8 - pool == pytest.approx(2 * large, abs=8192)


def test_gradients_that_are_not_swapped_wait_on_the_gpu() -> None:
    """A finding: those whose partition is small, or no multiple of 1 KiB, stay there in float32 until the step."""
    even, odd = (
        memplan.estimate(
            {**MODEL, "vocab_size": vocab},
            memplan.TrainingSpec(seq_len=16),
            memplan.ClusterSpec(gpu="A100-80GB", gpus=3, nvme="1TB"),
            memplan.Strategy(kind="zero3", offload_optimizer="nvme"),
            replay=False,
        )
        for vocab in (8256, 8257)
    )
    phases = [{phase.name: phase.allocated for phase in each.gpu.phases} for each in (even, odd)]
    waiting = [each["step"] - each["idle"] for each in phases]
    assert waiting[1] - waiting[0] > 2 * 4 * 8256 * 1024 // 3 * 0.99


def test_weights_on_their_way_to_nvme_are_on_the_gpu_module_by_module() -> None:
    result = estimate(param="nvme", **AWAY)
    load = next(phase.allocated for phase in result.gpu.phases if phase.name == "load")
    largest = 2 * 8192 * 1024
    assert largest <= load < 2 * largest + 1_000_000_000  # the embedding, its partition, and the bucket


def test_a_small_disk_decides_the_verdict() -> None:
    cluster = memplan.ClusterSpec(gpu="A100-80GB", gpus=2, nvme="100MiB")
    strategy = memplan.Strategy(kind="zero3", offload_optimizer="nvme")
    assert memplan.estimate(MODEL, memplan.TrainingSpec(seq_len=16), cluster, strategy).verdict == "does-not-fit"


@pytest.mark.parametrize(
    ("keys", "reason"),
    [({"aio": {"use_gds": True}}, "use_gds: "), ({"offload_optimizer": {"ratio": 0.5}}, "ratio: ")],
)
def test_what_is_not_modelled(keys: dict[str, Any], reason: str) -> None:
    with pytest.raises(UnsupportedError, match=f"^{reason}"):
        estimate(**keys)


def test_nvme_needs_a_folder() -> None:
    strategy = memplan.Strategy(kind="zero3", offload_optimizer="nvme")
    with pytest.raises(SpecError, match=r"^nvme_path: null is no folder, .* Use --nvme-path DIR"):
        memplan.estimate(MODEL, None, "2xA100-80GB", strategy)


def test_the_ladder_ends_on_nvme_where_there_is_one() -> None:
    def places(**hardware: Any) -> list[tuple[object, object]]:
        cluster = memplan.ClusterSpec(gpu="A100-80GB", gpus=2, **hardware)
        found = api.ladder(MODEL, memplan.TrainingSpec(seq_len=16), cluster, replay=False)
        return [(each.setup["offload_optimizer"], each.setup["offload_param"]) for each in found.estimates]

    without = places()
    assert places(nvme="1TB") == [*without, ("nvme", "cpu"), ("nvme", "nvme")]
    assert not any("nvme" in each for each in without)


def test_the_buffers_of_the_last_rung_hold_the_largest_weight() -> None:
    config = {**MODEL, "vocab_size": 250_000, "num_hidden_layers": 1}
    cluster = memplan.ClusterSpec(gpu="A100-80GB", gpus=2, nvme="1TB")
    last = api.ladder(config, memplan.TrainingSpec(seq_len=16), cluster, replay=False).estimates[-1]
    assert last.setup["engine_config"]["offload_param"]["buffer_size"] == 250_000 * 1024 // 2
