"""Which of an engine's keys moves the peak, and by how much: the engine is played again with one key changed."""

from __future__ import annotations

from collections.abc import Iterator

from memplan.engines.plain import total
from memplan.engines.zero import resolved
from memplan.errors import MemplanError
from memplan.micro_batch import Setup
from memplan.results import Lever
from memplan.sharded import Sharded, play_ranks
from memplan.specs.hardware import ClusterSpec, GPUSpec
from memplan.specs.strategy import Strategy

TENTH = ("reduce_bucket_size", "sub_group_size")
"""Keys that are tried with a tenth of what they are: smaller ones cost time, none is not possible."""
NOTHING = (
    "stage3_prefetch_bucket_size",
    "stage3_max_live_parameters",
    "stage3_max_reuse_distance",
    "stage3_param_persistence_threshold",
)
SHARDING_STRATEGIES = ("FULL_SHARD", "SHARD_GRAD_OP")
SWITCHES = ("overlap_comm", "contiguous_gradients")


def levers(setup: Setup, gpu: GPUSpec | None, strategy: Strategy, cluster: ClusterSpec) -> tuple[Lever, ...]:
    """Every key that moves the peak of GPU or host, the one that saves the GPU most first.

    A setup with the key changed that memplan does not model, or the engine refuses, is left out.
    """
    before = play_ranks(setup, gpu, strategy, cluster.gpus, cluster.gpus_per_node)
    found = []
    for key, value, instead, changed in _changes(setup, strategy):
        try:
            after = play_ranks(setup, gpu, changed, cluster.gpus, cluster.gpus_per_node)
        except MemplanError:
            continue
        gains = after.peak - before.peak, _host(after) - _host(before)
        if any(gains):
            found.append(Lever(key=key, value=value, instead=instead, gpu=gains[0], host=gains[1]))
    return tuple(sorted(found, key=lambda lever: (lever.gpu, lever.host)))


def _host(played: Sharded) -> int:
    return max(map(total, played.host.values()))


def _changes(setup: Setup, strategy: Strategy) -> Iterator[tuple[str, int | bool | str, int | bool | str, Strategy]]:
    """Key, its value, another value, and the strategy with that one."""
    if strategy.kind in ("zero1", "zero2", "zero3"):
        keys = strategy.zero
        for key in (*TENTH, *NOTHING):
            value = resolved(keys, key, setup.model.hidden_size)
            instead = value // 10 if key in TENTH else 0
            yield key, value, instead, strategy.replace(zero=keys.replace(**{key: instead}))
        for key in SWITCHES:
            value = bool(getattr(keys, key))
            yield key, value, not value, strategy.replace(zero=keys.replace(**{key: not value}))
        if strategy.offload_optimizer == "none":
            yield "offload_optimizer", "none", "cpu", strategy.replace(offload_optimizer="cpu")
    if strategy.kind == "fsdp" and strategy.fsdp.version == 2:
        reshard = strategy.fsdp.reshard_after_forward
        changed = strategy.fsdp.replace(reshard_after_forward=not reshard)
        yield "reshard_after_forward", reshard, not reshard, strategy.replace(fsdp=changed)
        if strategy.fsdp.is_hybrid:
            changed = strategy.fsdp.replace(dp_replicate_size=1, dp_shard_size=None)
            yield "dp_replicate_size", strategy.fsdp.dp_replicate_size, 1, strategy.replace(fsdp=changed)
    elif strategy.kind == "fsdp":
        sharding = strategy.fsdp.sharding_strategy or SHARDING_STRATEGIES[0]
        for other in SHARDING_STRATEGIES:
            if other != sharding:
                changed = strategy.fsdp.replace(sharding_strategy=other)
                yield "sharding_strategy", sharding, other, strategy.replace(fsdp=changed)
    if strategy.kind in ("zero3", "fsdp") and strategy.offload_param == "none":
        yield "offload_param", "none", "cpu", strategy.replace(offload_param="cpu")
