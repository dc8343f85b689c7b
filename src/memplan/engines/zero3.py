"""DeepSpeed's ZeRO stage 3: weights in partitions too, gathered for the modules that use them.

Sources: deepspeed/runtime/zero/{stage3,partition_parameters,partitioned_param_coordinator,parameter_offload}.py and
runtime/comm/coalesced_collectives.py, 0.19.8, whose names are kept. The engine is played over a micro-batch whose
modules are watched (:mod:`memplan.memory.course`).
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate

from memplan.engines import checkpoint, nvme, zeropp
from memplan.engines.layout import Layout, StateDict, temporaries_of_step
from memplan.engines.streams import Event, Streams
from memplan.engines.zero import (
    NORM_ITEMSIZE,
    master_dtype,
    named,
    optimizer_storages,
    resolved,
    stepping,
    uses_cpu_adam,
)
from memplan.errors import SpecError, UnsupportedError
from memplan.memory.course import DEFAULT_STREAM, Block, Key, Ledger
from memplan.memory.optimizers import OUTSIDE, Groups, Optimizer, make_optimizer
from memplan.specs.software import SoftwareSpec
from memplan.specs.strategy import Strategy, ZeroSpec
from memplan.tape.dispatch import DeviceRules
from memplan.tape.tape import Tape
from memplan.tape.tensor import DType, Parameter, Shape, float16, float32, int8

ALL_GATHER, REDUCE_AND_PARTITION = 1, 2
"""Streams, with ``overlap_comm``."""
MAX_PARAM_REDUCE_EVENTS = 2
"""Reductions that the CPU does not wait for (max_param_reduce_events)."""

LEAVES_SINCE = "0.18.0"
"""The version of DeepSpeed that fetches blocks of experts whole unless told otherwise (DEFAULT_LEAF_MODULE_CLASSES)."""
PEFT_MODEL: Key = (-1, OUTSIDE)
"""Stands for PeftModel, without a task_type: of its subclasses LoraModel is called too."""

BUCKET = "bucket of gradients (reduce_bucket_size)"
LIVE = "gathered weights (stage3_max_live_parameters, stage3_max_reuse_distance)"
STAYS = "weights that stay gathered (stage3_param_persistence_threshold)"
TOGETHER = "what several weights are gathered into together (stage3_prefetch_bucket_size)"
STAGED = "partitions on their way from the host (offload_param)"
NORM = "gradients in float64, for their norm"
TO_HOST = "a gradient on its way to the host (offload_optimizer)"
CAST = "gradients, cast"
KEPT = "gradients of sub-groups that are stepped on the GPU (ratio, sub_group_size)"
SUB_GROUP = "gradient that a sub-group steps with (sub_group_size)"
"""Blocks as an explanation names them; in parentheses the keys that size them."""


@dataclass(frozen=True, slots=True)
class Shard:
    """A weight, trained or frozen, of which every rank keeps a partition."""

    key: Key
    elements: int
    itemsize: int
    """Bytes of an element: adapters stay in float32, since zero.Init has done the cast before them."""
    ranks: int
    shape: Shape
    persistent: bool
    """Small enough to stay gathered between steps (ds_persist)."""

    partition: int = field(init=False)
    """Elements of one rank's partition, padding included."""
    aligned: int = field(init=False)
    """Elements of all partitions."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "partition", -(-self.elements // self.ranks))
        object.__setattr__(self, "aligned", self.partition * self.ranks)


@dataclass(frozen=True, slots=True)
class Zero3Setup:
    """What stage 3 places."""

    sub_groups: Sequence[Sequence[Shard]]
    """Trained weights, as they are stepped together."""
    groups: Sequence[Sequence[Shard]]
    """The optimizer's parameter groups."""
    frozen: Sequence[Shard]
    attributes_recomputed: bool
    """What a recomputation fetches of them is the module's whose backward runs."""
    modules: Mapping[Key, Sequence[Shard]]
    """Every module's own weights, in the model's order."""
    fetched: Mapping[Key, Sequence[Shard]]
    """What is gathered for a module: its own weights, for a leaf's those below it too."""
    leaves: Mapping[Key, Sequence[Key]]
    """Leaf modules, and those below them, which have no hooks."""
    wrapped: Key | None
    """The model, if it is adapted: PeftModel runs around it, a module without weights."""
    made_partitioned: frozenset[Key]
    """Weights that zero.Init partitions as their module is made; others come whole, when the engine is set up."""
    kept_whole: frozenset[Key]
    """Weights in int8: bitsandbytes computes with a reference of its own to the whole weight (MatmulLtState.CB)."""
    saves: frozenset[Key]
    """Weights of the model that is gathered to be saved."""
    ranks: int
    per_node: int
    secondary_group: int
    """Ranks that have second partitions of all weights together (zero_hpz_partition_size); 0 is none."""
    quantized_weights: bool
    """Weights are gathered in 8 bits."""
    quantized_gradients: bool
    """Gradients are reduced in 4 bits: all to all within nodes, then between them."""
    dtype: DType
    accumulation_dtype: DType
    communication_dtype: DType
    master_dtype: DType
    """Of masters, and of the gradients that the optimizer is given."""
    reduce_bucket_size: int
    prefetch_bucket_size: int
    max_live_parameters: int
    max_reuse_distance: int
    allgather_sequential: bool
    overlap_comm: bool
    contiguous_gradients: bool
    """Gradients are copied into the bucket's buffer as they come."""
    reduce_scatter: bool
    """Each partition is reduced to its rank, in place of an all-reduce of the bucket's buffer."""
    offload_optimizer: bool
    """Masters, gradients and optimizer states are on the host."""
    on_gpu: Sequence[bool]
    """For each sub-group: its masters, gradients and states are on the GPU all the same (subgroup_to_device)."""
    offload_param: bool
    """So are the partitions of the weights."""
    swap_optimizer: bool
    """Of sub-groups that are large enough they are on NVMe instead."""
    params_in_nvme: bool
    """Partitions that are large enough are on NVMe, but for those of ``in_cpu``."""
    in_cpu: Sequence[bool]
    """For each sub-group: its weights lie in the flat buffer of its group, if they are offloaded."""
    flat_elements: Sequence[int]
    """For each of the optimizer's groups: elements of that buffer."""
    keys: ZeroSpec
    """The engine's own, as they were given."""
    gradients_place: str
    weights_place: str
    """The ledger's places for what the GPU copies to and from: pinned, or host."""
    optimizers: Sequence[Optimizer]
    """For each sub-group one, of its partition alone."""
    partitions: Sequence[Parameter]
    """For each sub-group its partition: one flat weight in ``master_dtype``."""


@dataclass(slots=True)
class _Gather:
    """AllGatherCoalescedHandle."""

    shards: Sequence[Shard]
    held: list[Block | None]
    """What several weights are gathered into together, and what is quantized, until the last of them is fetched."""
    waited: bool = False
    left: int = 0
    quantized: bool = False


_NEVER = -(10**10)


@dataclass(slots=True)
class _Trace:
    """The modules of one forward and backward, in order: recorded once, then known ahead."""

    modules: list[Key] = field(default_factory=list)
    uses: dict[Key, list[int]] = field(default_factory=dict)
    """Weight -> the steps that use it."""
    passed: list[int] = field(default_factory=list)
    """Elements of all weights used before each step."""

    def complete(self, wanted: Callable[[Key], Sequence[Shard]]) -> None:
        for step, module in enumerate(self.modules):
            for shard in wanted(module):
                self.uses.setdefault(shard.key, []).append(step)
        elements = (sum(shard.elements for shard in wanted(module)) for module in self.modules)
        self.passed = [0, *accumulate(elements)]

    def next_use(self, shard: Shard, step: int) -> int | None:
        """The first step from ``step`` on that uses the weight."""
        uses = self.uses.get(shard.key, [])
        at = bisect_left(uses, step)
        return uses[at] if at < len(uses) else None


class Coordinator:
    """PartitionedParameterCoordinator: fetches, prefetches and releases weights."""

    def __init__(self, setup: Zero3Setup, ledger: Ledger, swapper: nvme.ParamSwapper | None = None) -> None:
        self.setup = setup
        self.ledger = ledger
        self.swapper = swapper
        self.stream = ALL_GATHER if setup.overlap_comm else DEFAULT_STREAM
        """__allgather_stream."""
        self.available: dict[Key, Block | None] = {}
        self._inflight: dict[Key, _Gather] = {}
        self._active: dict[Key, set[Key]] = {}
        self._n_available = 0
        self._recorded: _Trace | None = None
        self._trace: _Trace | None = None
        self._queue: deque[tuple[Shard, int]] = deque()
        self._fetched_for: dict[Key, int] = {}
        self._step = 0
        self._to_release: dict[tuple[Key, int], Sequence[Shard]] = {}
        self._running: dict[Key, None] = {}
        """Modules whose backward has begun (__active_backward_submodules)."""
        self._attributed = {shard.key for shard in setup.frozen if setup.attributes_recomputed}
        self._recomputed: dict[Key, list[Shard]] = {}
        """By such a module, frozen weights that a recomputation within it has fetched (ds_recompute_parameters)."""
        self._forwards: list[Key] = []
        """Modules whose forward runs (FWD_MODULE_STACK)."""
        self._external: dict[Key, list[Shard]] = {}
        """For a module, the weights of others that its forward was seen to look at."""
        self.ds_id = {shard.key: i for i, own in enumerate(setup.modules.values()) for shard in own}
        self._holds: dict[Key, deque[Block | None]] = {}
        self._held: Counter[Block] = Counter()
        """How many nodes a gathered weight is saved for by a recomputation, or kept in the ctx of."""
        self._kept: list[tuple[Key, Block]] = []
        """Gathered weights that the graph of the loss holds."""
        self.secondary = zeropp.Secondaries(setup.secondary_group, self._second_partition)

    @property
    def hooks(self) -> dict[str, Callable[[Key], None]]:
        """What is done as a module begins or ends, and with its weights."""
        return {
            "pre_forward": partial(self.fetch_sub_module, forward=True),
            "pre_backward": partial(self.fetch_sub_module, forward=False),
            "post_forward": partial(self.release_sub_module, forward=True),
            "post_backward": partial(self.release_sub_module, forward=False),
            "hold": self.hold,
            "drop": self.drop,
            "keep": self.keep,
            "replace": self.replace,
        }

    def _second_partition(self, nbytes: int) -> Block:
        """Where the first ones are."""
        if not self.setup.offload_param:
            return self.ledger.allocate("weights", nbytes, name=zeropp.SECONDARY)
        return on_host(self.ledger, "weights", nbytes, self.setup.weights_place)

    def reset_step(self) -> None:
        """A forward begins."""
        for key, gather in list(self._inflight.items()):
            self._wait(gather)
            self._drop(gather)
            self._release(next(shard for shard in gather.shards if shard.key == key))
        self._inflight.clear()
        if self._trace is None:
            if self._recorded is None:
                self._recorded = _Trace()
            else:
                self._recorded.complete(self._wanted)
                self._trace = self._recorded
        if self._trace is not None:
            self._queue = deque(
                (shard, step) for step, module in enumerate(self._trace.modules) for shard in self._wanted(module)
            )
        self._fetched_for.clear()
        self._step = 0
        self._n_available = 0

    def fetch_sub_module(self, module: Key, forward: bool) -> None:
        """What a module needs, and some of what comes after it."""
        if self._trace is None and self._recorded is not None:
            self._recorded.modules.append(module)
        if forward:
            self._forwards.append(module)
        else:
            self._running[module] = None
        wanted = self._wanted(module)
        if wanted:
            self._all_gather([shard for shard in wanted if self._is_away(shard)])
        for shard in wanted:
            users = self._active.get(shard.key)
            if users is None:
                self._active[shard.key] = {module}
            else:
                users.add(module)
            if forward and self._running and shard.key in self._attributed:
                owner = next(reversed(self._running))
                self._recomputed.setdefault(owner, []).append(shard)
                self._active[shard.key].add(owner)
            gather = self._inflight.pop(shard.key, None)
            if gather is not None:
                with self.ledger.on(self.stream):
                    self._wait(gather)
                self._drop(gather)
        if self._trace is not None and (self._queue or self.swapper is not None):
            self._prefetch(wanted)
        self._step += 1

    def release_sub_module(self, module: Key, forward: bool) -> None:
        """A module has done its forward, or its backward."""
        wanted = self._wanted(module)
        released = wanted if self._trace is None else self._params_to_release(module)
        if forward:
            self._forwards.pop()
        else:
            self._running.pop(module, None)
            if module in self._recomputed:
                recomputed = self._recomputed.pop(module)
                wanted = [*wanted, *recomputed]
                released = [*released, *(shard for shard in recomputed if not shard.persistent)]
        for shard in wanted:
            users = self._active.get(shard.key)
            if users:
                users.discard(module)
        for shard in released:
            self._release(shard)

    def release_backward_leftovers(self) -> None:
        """Modules whose inputs need no gradient have no hook after their backward."""
        while self._running:
            module, _ = self._running.popitem()
            for shard in (*self._wanted(module), *self._recomputed.pop(module, ())):
                self._active.get(shard.key, set()).discard(module)
                if not shard.persistent:
                    self._release(shard)

    def release_and_reset_all(self, shards: Iterable[Shard]) -> None:
        """All weights go before the step."""
        for gather in self._inflight.values():
            self._wait(gather)
            self._drop(gather)
        self._inflight.clear()
        self._active.clear()
        for shard in shards:
            self._release(shard)

    def gather_persistent(self, shards: Iterable[Shard]) -> None:
        """_post_step: the small ones are gathered again at once."""
        away = [shard for shard in shards if shard.persistent and self._is_away(shard)]
        alone = len(away) == 1 or self.setup.allgather_sequential
        if self.swapper is not None:
            self.swapper.ensure_availability(away)
        self._moves(away)
        if alone:
            for shard in away:
                self.available[shard.key], *staged = self._gathered_alone(shard)
                self.ledger.free(*staged)
            return
        # _allgather_params_coalesced: all of them before the first is gathered
        staged = self._staged(away, first=True)
        for shard in away:
            self.available[shard.key] = self._gather(shard)
        self.ledger.free(*staged)

    def look(self, shard: Shard) -> None:
        """ZeROOrderedDict.__getitem__: a weight that is away is gathered alone, and the module that runs has it from
        then on (register_external_parameter).
        """
        if not self._is_away(shard):
            return
        self._external.setdefault(self._forwards[-1], []).append(shard)
        if self.swapper is not None:
            self.swapper.ensure_availability([shard])
        self._moves([shard])
        self.available[shard.key], *staged = self._gathered_alone(shard)
        self.ledger.free(*staged)

    def _gathered_alone(self, shard: Shard) -> list[Block]:
        """_allgather_params_sequential: into memory of its own, on one rank too."""
        nbytes = shard.partition * shard.itemsize
        name = STAYS if shard.persistent else LIVE
        blocks = [self.ledger.allocate("communication", nbytes * shard.ranks, name=name)]
        if self.setup.offload_param:
            blocks.append(self.ledger.allocate("communication", nbytes, name=STAGED))
        return blocks

    def _wanted(self, module: Key) -> Sequence[Shard]:
        """iter_params: a module's own weights, and others that its forward looks at, in the order of their ds_id."""
        own, external = self.setup.fetched[module], self._external.get(module)
        return own if external is None else sorted([*own, *external], key=lambda shard: self.ds_id[shard.key])

    def _moves(self, shards: Sequence[Shard]) -> None:
        """What gathering takes: partitions come from the host, if they are there, and from all ranks."""
        partitions = sum([shard.partition * shard.itemsize for shard in shards])
        if self.setup.offload_param:
            self.ledger.move("to_gpu", partitions)
        if self.setup.ranks > 1:
            self.ledger.move("all_gather", partitions * self.setup.ranks)

    def _is_away(self, shard: Shard) -> bool:
        return shard.key not in self.available and shard.key not in self._inflight

    def _gather(self, shard: Shard, padded: bool = True) -> Block | None:
        """A weight, whole, and with what the partitions are padded with."""
        name = STAYS if shard.persistent else LIVE
        elements = shard.partition * shard.ranks if padded else shard.elements
        return self._allocate(elements * shard.itemsize, name)

    def _allocate(self, nbytes: int, name: str) -> Block | None:
        """On one rank a gathered weight is the partition itself, if that is on the GPU."""
        if self.setup.ranks == 1 and not self.setup.offload_param:
            return None
        return self.ledger.allocate("communication", nbytes, name=name)

    def _own_part(self, shard: Shard) -> int:
        """Elements of what this rank gives to a gathering."""
        return shard.aligned // self.secondary.group if shard.key in self.secondary else shard.partition

    def _staged(self, shards: Sequence[Shard], *, first: bool = False) -> list[Block]:
        """Partitions come from the host before they are gathered: the ``first`` ones, or the second where they are."""
        if not self.setup.offload_param or self.setup.ranks == 1:
            return []
        sizes = ((shard.partition if first else self._own_part(shard)) * shard.itemsize for shard in shards)
        return [self.ledger.allocate("communication", nbytes, name=STAGED) for nbytes in sizes]

    def _all_gather(self, shards: Sequence[Shard]) -> None:
        if not shards:
            return
        self._n_available += sum([shard.elements for shard in shards])
        self._moves(shards)
        if self.swapper is not None:
            self.swapper.ensure_availability(shards)
        with self.ledger.on(self.stream):
            if not self.secondary.group:
                self._all_gather_coalesced(shards)
                return
            for together in (
                [shard for shard in shards if shard.key in self.secondary],
                [shard for shard in shards if shard.key not in self.secondary],
            ):
                if together:
                    self._all_gather_coalesced(together)

    def _all_gather_coalesced(self, shards: Sequence[Shard]) -> None:
        alone = len(shards) == 1 or self.setup.allgather_sequential
        gather = _Gather(shards, [], left=len(shards))
        if self.setup.quantized_weights and self.setup.ranks > 1:
            gather.quantized = True
            gather.held = self._quantized_one_by_one(shards) if alone else self._quantized_together(shards)
        elif alone or self.setup.ranks == 1:
            for shard in shards:
                self.available[shard.key] = self._gather(shard)
                self.ledger.free(*self._staged([shard]))
            gather.waited = True
        else:
            gather.held = [self._allocate(sum([shard.aligned * shard.itemsize for shard in shards]), TOGETHER)]
            self.ledger.free(*self._staged(shards))
        for shard in shards:
            self._inflight[shard.key] = gather
            if self.swapper is not None and shard.persistent:
                self.swapper.remove_partition_and_release_buffer(shard)

    def _quantized_one_by_one(self, shards: Sequence[Shard]) -> list[Block | None]:
        """_all_gather_sequential: what is gathered, with all ranks' scales."""
        held: list[Block | None] = []
        before: list[Block] = []
        """Of the weight before, by the loop's variables."""
        for shard in shards:
            own = self._own_part(shard)
            held.append(self._passes(shard.aligned))
            half = None if self._is_half(shard) else self._passes(own * float16.itemsize)
            sizes = zeropp.quantized(own)
            made = [self._passes(nbytes) for nbytes in sizes]
            self.ledger.free(half, *before)
            held.append(self._passes(sizes[1] * (shard.aligned // own)))
            before = made
        self.ledger.free(*before)
        return held

    def _quantized_together(self, shards: Sequence[Shard]) -> list[Block | None]:
        """_all_gather_coalesced: the partitions are put together, and quantized as one."""
        own = sum(map(self._own_part, shards))
        aligned = sum(shard.aligned for shard in shards)
        gathered = self._passes(aligned)
        staged = self._staged(shards)
        together = self._passes(own * max(shard.itemsize for shard in shards))
        self.ledger.free(*staged)
        if not all(map(self._is_half, shards)):
            half = self._passes(own * float16.itemsize)
            self.ledger.free(together)
            together = half
        sizes = zeropp.quantized(own)
        made = [self._passes(nbytes) for nbytes in sizes]
        self.ledger.free(together)
        scales = self._passes(sizes[1] * (aligned // own))
        self.ledger.free(*made)
        return [gathered, scales]

    def _passes(self, nbytes: int) -> Block:
        return self.ledger.allocate("communication", nbytes, name=zeropp.QUANTIZED)

    def _is_half(self, shard: Shard) -> bool:
        """In float16, which the quantizer takes and returns."""
        return self.setup.dtype is float16 and shard.itemsize == float16.itemsize

    def _wait(self, gather: _Gather) -> None:
        if gather.waited:
            return
        gather.waited = True
        together = len(gather.shards) > 1 and not self.setup.allgather_sequential
        if gather.quantized and together:
            gather.held.append(self._passes(sum(shard.aligned for shard in gather.shards) * float16.itemsize))
        for shard in gather.shards:
            cast = gather.quantized and not self._is_half(shard)
            half = self._passes(shard.elements * float16.itemsize) if cast else None
            self.available[shard.key] = self._gather(shard, padded=False)
            self.ledger.free(half)

    def _drop(self, gather: _Gather) -> None:
        gather.left -= 1
        if not gather.left:
            self.ledger.free(*gather.held)

    def _release(self, shard: Shard) -> None:
        if shard.key in self.available and not self._active.get(shard.key):
            if self.secondary.group:
                self.secondary.partition(shard.key, shard.aligned, shard.itemsize)
            block = self.available.pop(shard.key)
            if block is not None and not self._held.get(block):
                self.ledger.free(block)
            if self.swapper is not None:
                self.swapper.remove_partition_and_release_buffer(shard)
            self._n_available -= shard.elements

    def hold(self, key: Key) -> None:
        """A recomputation saves a weight as it is gathered now: torch.utils.checkpoint keeps ``x.detach()``."""
        block = self.available.get(key)
        self._holds.setdefault(key, deque()).append(block)
        if block is not None:
            self._held[block] += 1

    def drop(self, key: Key) -> None:
        """The node that it was saved for has run."""
        self._let_go(key, self._holds[key].popleft())

    def _let_go(self, key: Key, block: Block | None) -> None:
        if block is not None:
            self._held[block] -= 1
            if not self._held[block] and self.available.get(key) is not block:
                self.ledger.free(block)

    def keep(self, key: Key) -> None:
        """bitsandbytes puts a packed weight as it is gathered now into a node's ctx, where it stays."""
        block = self.available.get(key)
        if block is not None:
            self._kept.append((key, block))
            self._held[block] += 1

    def replace(self, key: Key) -> None:
        """A module has set ``weight.data`` to a tensor of its own."""
        block = self.available.get(key)
        if block is not None:
            self.available[key] = None
            if not self._held[block]:
                self.ledger.free(block)

    def end_graph(self) -> None:
        """The loss dies, and with it the nodes."""
        for key, block in self._kept:
            self._let_go(key, block)
        self._kept.clear()

    def _prefetch(self, wanted: Sequence[Shard]) -> None:
        fetched_for, queue = self._fetched_for, self._queue
        if wanted:
            waiting = {s.key for s in wanted if fetched_for.get(s.key, _NEVER) < self._step}
            seen: set[Key] = set()
            while queue and len(seen) < len(waiting):
                shard, step = queue.popleft()
                fetched_for[shard.key] = step
                seen.add(shard.key)
        if not self.setup.prefetch_bucket_size:
            return
        limit = min(self.setup.max_live_parameters - self._n_available, self.setup.prefetch_bucket_size)
        ahead: dict[Key, Shard] = {}
        elements = 0
        while queue and elements < limit:
            if self.swapper is not None and self.swapper.is_away(queue[0][0]):
                break
            shard, step = queue.popleft()
            if fetched_for.get(shard.key, _NEVER) < step:
                fetched_for[shard.key] = step
            if self._is_away(shard) and shard.key not in ahead:
                ahead[shard.key] = shard
                elements += shard.elements
        if ahead:
            self._all_gather(list(ahead.values()))
        if self.swapper is not None:
            inflight = (next(s for s in gather.shards if s.key == key) for key, gather in self._inflight.items())
            self.swapper.prefetch([shard for shard, _ in self._queue], sum(shard.elements for shard in inflight))

    def _params_to_release(self, module: Key) -> Sequence[Shard]:
        """__params_to_release, whose first answer for a module and a step is the last: it has an lru_cache."""
        at = module, self._step
        if at not in self._to_release:
            self._to_release[at] = [shard for shard in self._wanted(module) if self._may_go(shard)]
        return self._to_release[at]

    def _may_go(self, shard: Shard) -> bool:
        """Not what stays, what a prefetch passed over, or what is used again soon."""
        trace = self._trace
        assert trace is not None
        if shard.persistent or self._fetched_for.get(shard.key, _NEVER) > self._step:
            return False
        again = trace.next_use(shard, self._step)
        if again is None or self._step >= len(trace.modules):
            return True
        # Modules are looked at as long as those before them have fewer elements than the distance.
        return trace.passed[again] - trace.passed[self._step] >= self.setup.max_reuse_distance


class Zero3:
    """One rank of ``DeepSpeedZeroOptimizer_Stage3``."""

    keeps_loaded = False

    def __init__(self, setup: Zero3Setup, ledger: Ledger) -> None:
        self.setup = setup
        self.ledger = ledger
        self._params = nvme.ParamSwapper(setup.keys, setup.dtype.itemsize, ledger) if setup.params_in_nvme else None
        self._optimizer = nvme.OptimizerSwapper(setup.keys, ledger) if setup.swap_optimizer else None
        self._streams = Streams(ledger)
        self._stream = REDUCE_AND_PARTITION if setup.overlap_comm else DEFAULT_STREAM
        """reduce_and_partition_stream."""
        self._reductions: deque[Event] = deque()
        """param_reduce_events."""
        self.coordinator = Coordinator(setup, ledger, self._params)
        self._hooks = self.coordinator.hooks | {"look": self._look}
        self._trained = {shard.key: shard for group in setup.sub_groups for shard in group}
        self._sub_group = {shard.key: i for i, group in enumerate(setup.sub_groups) for shard in group}
        self._all = [*self._trained.values(), *setup.frozen]
        self._below_leaves = frozenset(key for below in setup.leaves.values() for key in below)
        self._leaf = {shard.key: leaf for leaf in setup.leaves for shard in setup.fetched[leaf]}
        self._in_leaves: dict[Key, list[Key]] = {leaf: [] for leaf in setup.leaves}
        """Each leaf's trained weights, in the order of the optimizer's groups."""
        for key in self._trained:
            if key in self._leaf:
                self._in_leaves[self._leaf[key]].append(key)
        self._waiting: dict[Key, Block | None] = {}
        """Gradients that wait for the backward of the leaf that their weight is in."""
        self._shards = {shard.key: shard for shard in self._all}
        self._bucket: list[Shard] = []
        self._bucket_elements = 0
        self._grads: dict[Key, Block] = {}
        self._norms: list[Block] = []
        """Of gradients that are on the host now (norm_for_param_grads)."""
        self._boundary = True
        self._accumulates = False
        """Gradients are added to those of a micro-batch before."""
        self._stepped = False

    def initialize(self) -> None:
        """zero.Init has partitioned the weights; masters, the bucket and the gradients' partitions are made."""
        setup, ledger = self.setup, self.ledger
        self._place_partitions()
        largest = max((partition.nbytes for partition in setup.partitions), default=0)
        if self._optimizer is not None:
            self._optimizer.configure(largest)
        for i in range(len(setup.partitions)):
            self._create_fp32_partition(i)
        # initialize_optimizer_states: a gradient of zeros, and the gradients that offloading keeps.
        zeros = ledger.allocate("temporaries", largest, self._device)
        for i, partition in enumerate(setup.partitions):
            if setup.offload_optimizer and not self._swaps(i):
                made = on_host(ledger, "gradients", partition.nbytes, setup.gradients_place)
                if setup.on_gpu[i]:
                    ledger.allocate("gradients", partition.nbytes, name=KEPT)
                    ledger.free(made)
        ledger.free(zeros)
        for i, optimizer in enumerate(setup.optimizers):
            if optimizer.made_at_construction:
                self._make_states(i)
        if setup.contiguous_gradients:
            ledger.allocate("communication", setup.reduce_bucket_size * setup.communication_dtype.itemsize, name=BUCKET)
        nbytes = sum(shard.partition for shard in self._trained.values()) * setup.accumulation_dtype.itemsize
        if setup.offload_optimizer:
            on_host(ledger, "gradients", nbytes, setup.gradients_place)
        else:
            ledger.allocate("gradients", nbytes, name="partitions of the gradients")
        for shard in self._trained.values():  # create_reduce_and_remove_grad_hooks gathers each once
            ledger.free(*self._gathered([shard]))

    def _place_partitions(self) -> None:
        """Weights are cut into partitions; those that are trained then move into flat buffers."""
        setup, ledger = self.setup, self.ledger
        in_nvme = self._place_on_nvme()
        partitions = self._made_partitions(in_nvme)
        if not setup.offload_param:
            nbytes = sum(shard.partition * shard.itemsize for shard in self._trained.values())
            flat = ledger.allocate("weights", nbytes, "host")  # defragment: by way of the host
            ledger.free(*(partitions[key] for key in self._trained))
            ledger.empty_cache()
            ledger.allocate("weights", nbytes, name="partitions of the weights")
            ledger.free(flat)
            return
        for group, elements in zip(setup.groups, setup.flat_elements, strict=True):
            on_host(ledger, "weights", elements * group[0].itemsize, "pinned")  # whatever pin_memory says
        for sub_group, in_cpu in zip(setup.sub_groups, setup.in_cpu, strict=True):
            for shard in sub_group if in_cpu else ():  # _move_to_flat_buffer
                if self._params is not None:
                    self._params.keep_in_cpu(shard)
                ledger.free(partitions.get(shard.key))
        if self._params is not None and not all(setup.in_cpu):
            largest = max(setup.sub_groups, key=lambda group: sum(shard.partition for shard in group))
            self._params.reserve_partitioned_swap_space(largest)

    def _place_on_nvme(self) -> set[Key]:
        """zero.Init writes the partitions that are large enough."""
        if self._params is None:
            return set()
        self._params.configure_aio()
        written = [shard for shard in self._all if self._params.is_swappable(shard)]
        owners = Counter(shard.key for own in self.setup.modules.values() for shard in own)
        for shard in written:
            self._params.write(shard, owners[shard.key])
        return {shard.key for shard in written}

    def _create_fp32_partition(self, index: int) -> None:
        """A sub-group's masters."""
        setup, ledger, nbytes = self.setup, self.ledger, self.setup.partitions[index].nbytes
        read_from_nvme = setup.params_in_nvme and not setup.in_cpu[index]
        if self._optimizer is not None and self._swaps(index):
            if read_from_nvme and not setup.keys.offload_optimizer.fast_init:
                ledger.briefly("temporaries", nbytes, "host")
            self._optimizer.initialize_parameters(nbytes)
        elif not setup.on_gpu[index]:
            ledger.allocate("optimizer", nbytes, "host")
        else:
            cast = None  # .to(float32).clone()
            comes_from_host = setup.offload_param and setup.offload_optimizer
            if not read_from_nvme and (setup.dtype is not setup.master_dtype or comes_from_host):
                cast = ledger.allocate("temporaries", nbytes, name="masters on their way")
            ledger.allocate("optimizer", nbytes, name="masters")
            ledger.free(cast)

    def _swaps(self, index: int) -> bool:
        """_swappable_optimizer_subgroup."""
        return self._optimizer is not None and self._optimizer.is_swappable(self.setup.partitions[index].nbytes)

    def _made_partitions(self, in_nvme: Set[Key]) -> dict[Key, Block]:
        """zero.Init, module by module, and what from_pretrained gathers then; the other weights come whole.

        Those ``in_nvme`` have a partition nowhere else.
        """
        setup, ledger = self.setup, self.ledger
        partitions: dict[Key, Block] = {}
        twice: list[Block] = []
        """Weights that will be tied, which are made nevertheless."""
        for own in filter(None, setup.modules.values()):
            made = self._partition([shard for shard in own if shard.key in setup.made_partitioned], in_nvme)
            twice += [made.pop(key) for key in list(made) if key in partitions]
            partitions |= made
        for own in filter(None, setup.modules.values()):  # _load_state_dict_into_zero3_model
            ledger.free(*self._gathered([shard for shard in own if shard.key in setup.made_partitioned]))
        ledger.free(*twice)
        others = [shard for shard in self._all if shard.key not in setup.made_partitioned]
        return partitions | self._partition(others, in_nvme)

    def _partition(self, shards: Sequence[Shard], in_nvme: Set[Key]) -> dict[Key, Block]:
        """All of them are there whole, and are cut one by one."""
        setup = self.setup
        partitions: dict[Key, Block] = {}
        sizes = (shard.elements * shard.itemsize for shard in shards)
        whole = [self.ledger.allocate("weights", nbytes, name="weights of a module, whole") for nbytes in sizes]
        for shard, block in zip(shards, whole, strict=True):
            self.coordinator.secondary.partition(shard.key, shard.aligned, shard.itemsize)
            nbytes = shard.partition * shard.itemsize
            if not setup.offload_param:
                partitions[shard.key] = self.ledger.allocate("weights", nbytes, name="partitions of the weights")
            elif shard.key not in in_nvme:  # small weights too: zero.Init does not know what will stay gathered
                partitions[shard.key] = on_host(self.ledger, "weights", nbytes, setup.weights_place)
            if shard.key not in setup.kept_whole:
                self.ledger.free(block)
        return partitions

    def _gathered(self, shards: Sequence[Shard]) -> list[Block]:
        """GatheredParameters."""
        blocks = []
        staged: list[Block] = []
        for shard in shards:
            nbytes = shard.partition * shard.ranks * shard.itemsize
            blocks.append(self.ledger.allocate("communication", nbytes, name="weights gathered module by module"))
            if self.setup.offload_param:
                nbytes = shard.partition * shard.itemsize
                staged.append(self.ledger.allocate("communication", nbytes, name=STAGED))
        self.ledger.free(*staged)
        return blocks

    @property
    def _device(self) -> str:
        """Where gradients wait for the optimizer (self.device)."""
        return "host" if self.setup.offload_optimizer else "gpu"

    def _optimizer_place(self, index: int) -> str:
        """Where a sub-group is stepped: DeepSpeedCPUAdam's states are pageable."""
        return "gpu" if self.setup.on_gpu[index] else "host"

    # -- hooks -----------------------------------------------------------------------------------------------------

    def begin_micro_batch(self, boundary: bool) -> None:
        self._boundary = boundary
        self.coordinator.reset_step()

    def begin_evaluation(self) -> None:
        self.coordinator.reset_step()

    def module_event(self, kind: str, module: Key) -> None:
        """A hook of a module, and of PeftModel around the model."""
        hook = self._hooks[kind]
        if module != self.setup.wrapped:
            if module not in self._below_leaves:
                if kind == "post_backward" and module in self._in_leaves:
                    self._reduce_leaf_module_grads(module)
                hook(module)
            return
        for each in (PEFT_MODEL, module) if kind.startswith("pre") else (module, PEFT_MODEL):
            hook(each)

    def _look(self, key: Key) -> None:
        self.coordinator.look(self._shards[key])

    def process_gradients(self, key: Key, gradient: Block | None) -> None:
        """A gradient has come; what is in a leaf waits until the leaf's backward is done."""
        if key in self._leaf:
            self._waiting[key] = gradient
        else:
            self._reduce_ready(key, gradient)

    def _reduce_leaf_module_grads(self, leaf: Key) -> None:
        for key in self._in_leaves[leaf]:
            if key in self._waiting:
                self._reduce_ready(key, self._waiting.pop(key))

    def _reduce_ready(self, key: Key, gradient: Block | None) -> None:
        """reduce_independent_p_g_buckets_and_remove_grads."""
        shard = self._trained[key]
        if gradient is not None:
            self._grads[key] = gradient
        if self._bucket and self._bucket_elements + shard.elements > self.setup.reduce_bucket_size:
            self._reduce_and_partition()
        self._streams.wait(self._stream, DEFAULT_STREAM)
        if self.setup.contiguous_gradients and self._bucket_elements + shard.elements <= self.setup.reduce_bucket_size:
            self._streams.free(self._grads.pop(key, None), used_on=self._stream)  # copied into the bucket
        self._bucket.append(shard)
        self._bucket_elements += shard.elements

    def finish_micro_batch(self) -> None:
        self._reduce_and_partition()
        self._accumulates = True
        self.coordinator.release_backward_leftovers()
        self._reductions.clear()
        self._streams.synchronize_all()  # the Trainer asks whether the loss is a number (logging_nan_inf_filter)

    def end_graph(self) -> None:
        self.coordinator.end_graph()

    def _reduce_and_partition(self) -> None:
        """__reduce_and_partition_ipg_grads."""
        if not self._bucket:
            return
        if len(self._reductions) > MAX_PARAM_REDUCE_EVENTS:
            self._streams.synchronize(self._reductions.popleft())
        with self.ledger.on(self._stream):
            self._reduce_bucket()
        self._bucket, self._bucket_elements = [], 0
        self._reductions.append(self._streams.record(self._stream))

    def _reduce_bucket(self) -> None:
        setup = self.setup
        fills_buffer = setup.contiguous_gradients and self._bucket_elements <= setup.reduce_bucket_size
        all_reduces = fills_buffer and not setup.reduce_scatter
        reduced = self._avg_scatter_contiguous_grads() if all_reduces else self._avg_scatter_grads()
        swapped: list[tuple[Shard, Block]] = []
        itemsize = setup.communication_dtype.itemsize
        if all_reduces:
            self.ledger.move("all_reduce", self._bucket_elements * itemsize)
        else:
            self.ledger.move("reduce_scatter", sum(s.partition * s.ranks for s in self._bucket) * itemsize)
        self._bucket.sort(key=lambda shard: self.coordinator.ds_id[shard.key])
        for shard in self._bucket:
            if self.setup.offload_optimizer:
                swapped += self._offload_gradient(shard)
            elif self._adds_quantized(shard):
                self.ledger.briefly("temporaries", shard.partition * setup.accumulation_dtype.itemsize, name=CAST)
            self._streams.free(self._grads.pop(shard.key, None), used_on=self._stream)
        for shard, gradient in swapped:  # together, after the bucket's last
            assert self._optimizer is not None
            nbytes = shard.partition * float32.itemsize
            self._optimizer.swap_out_gradient(self._sub_group[shard.key], shard.key, gradient, nbytes)
        self.ledger.free(*reduced)

    def _avg_scatter_grads(self) -> list[Block]:
        """By reduce_scatter_coalesced: in one piece, padded for every rank."""
        setup, ledger = self.setup, self.ledger
        size, copies, flat = setup.communication_dtype.itemsize, list[Block](), list[Block]()
        if setup.communication_dtype is not setup.dtype:  # the bucket's buffer has the type already
            own = [shard for shard in self._bucket if shard.key in self._grads]
            copies = [ledger.allocate("communication", shard.elements * size, name=CAST) for shard in own]
        if setup.quantized_gradients:
            flat = self._all_to_all_quant_reduce()
        elif len(self._bucket) > 1 or self._bucket[0].elements % setup.ranks:
            nbytes = sum(shard.partition * setup.ranks for shard in self._bucket) * size
            flat.append(ledger.allocate("communication", nbytes, name="reduce-scatter's input"))
        if setup.accumulation_dtype is setup.communication_dtype:
            if flat:
                ledger.free(*copies)
            return flat or copies
        sizes = [shard.partition * setup.accumulation_dtype.itemsize for shard in self._bucket]
        partitions = [ledger.allocate("temporaries", nbytes, name=CAST) for nbytes in sizes]
        ledger.free(*copies, *flat)
        return partitions

    def _all_to_all_quant_reduce(self) -> list[Block]:
        """What is left of a bucket's gradients: partitions in float16, and of those that cannot be quantized what they
        are reduced from.
        """
        setup, ledger = self.setup, self.ledger
        left: list[Block] = []
        passing: list[list[Block]] = [[] for _ in range(7)]
        """Of the gradient before, by the loop's variables."""
        for shard in sorted(self._bucket, key=lambda shard: self.coordinator.ds_id[shard.key]):
            if not zeropp.reduces_quantized(shard.shape, shard.elements, setup.ranks):
                if shard.elements % setup.ranks:
                    nbytes = shard.aligned * setup.communication_dtype.itemsize
                    left.append(ledger.allocate("communication", nbytes, name="reduce-scatter's input"))
                continue
            sizes = zeropp.quant_reduce_sizes(shard.shape, shard.elements, setup.ranks, setup.per_node)
            for i, together in enumerate(sizes):
                made = [ledger.allocate("communication", nbytes, name=zeropp.REDUCED) for nbytes in together]
                ledger.free(*passing[i])
                passing[i] = made
            total: Block | None = None
            for _ in range(setup.ranks // setup.per_node + 1):  # the nodes' chunks are added up, and divided
                nbytes = shard.partition * float16.itemsize
                new = ledger.allocate("communication", nbytes, name=zeropp.REDUCED)
                ledger.free(total)
                total = new
            left += [] if total is None else [total]
        ledger.free(*(block for made in passing for block in made))
        return left

    def _adds_quantized(self, shard: Shard) -> bool:
        """Whether a gradient that came in float16 is cast to be added to that of the micro-batch before."""
        setup = self.setup
        came_in_float16 = zeropp.reduces_quantized(shard.shape, shard.elements, setup.ranks)
        is_cast = setup.communication_dtype is setup.accumulation_dtype is not float16
        return self._accumulates and setup.quantized_gradients and came_in_float16 and is_cast

    def _avg_scatter_contiguous_grads(self) -> list[Block]:
        """The buffer is reduced in place, and scaled into another (gradient_predivide_factor, though it is 1); the last
        rank pads what its partition lacks.
        """
        setup, made = self.setup, list[Block]()
        itemsize = setup.accumulation_dtype.itemsize
        if setup.ranks > 1:
            nbytes = self._bucket_elements * setup.communication_dtype.itemsize
            made.append(self.ledger.allocate("temporaries", nbytes, name=BUCKET))
        if setup.accumulation_dtype is not setup.communication_dtype:
            cast = self.ledger.allocate("temporaries", self._bucket_elements * itemsize, name=CAST)
            self.ledger.free(*made)
            made = [cast]
        padded = [shard.partition * itemsize for shard in self._bucket if shard.elements % setup.ranks]
        return made + [self.ledger.allocate("temporaries", nbytes, name="padded partitions") for nbytes in padded]

    def _offload_gradient(self, shard: Shard) -> list[tuple[Shard, Block]]:
        """partition_grads: the sum is on the GPU for its norm, and in float32 on its way to the host.

        Return what of it is left to be swapped out.
        """
        setup, ledger = self.setup, self.ledger
        nbytes = shard.partition * setup.accumulation_dtype.itemsize
        ledger.move("to_host", nbytes)
        ledger.move("to_gpu", nbytes)  # back for its norm, or to be added to
        stays = setup.on_gpu[self._sub_group[shard.key]]  # ratio
        ledger.move("to_host", shard.partition * setup.master_dtype.itemsize if self._boundary and not stays else 0)
        swaps = self._boundary and self._swaps(self._sub_group[shard.key])
        dtypes = [setup.accumulation_dtype]
        if self._boundary and setup.accumulation_dtype is not setup.master_dtype:
            dtypes.append(setup.master_dtype)
        made: list[Block] = []
        for dtype in dtypes:
            component = "gradients" if swaps and dtype is setup.master_dtype else "temporaries"
            made.append(ledger.allocate(component, shard.partition * dtype.itemsize, name=TO_HOST))
            if len(made) == 1 and self._adds_quantized(shard):
                ledger.briefly("temporaries", shard.partition * dtype.itemsize, name=CAST)
            if self._boundary and len(made) == 1:
                ledger.briefly("temporaries", min(shard.partition, NORM_PART) * NORM_ITEMSIZE, name=NORM)
                self._norms.append(ledger.allocate("temporaries", NORM_ITEMSIZE, name=NORM))
        swapped = [(shard, made.pop())] if swaps else []
        ledger.free(*made)
        return swapped

    # -- step ------------------------------------------------------------------------------------------------------

    def step(self) -> None:
        """Weights go, the norm, then sub-group by sub-group; the small weights come back."""
        setup, ledger = self.setup, self.ledger
        self.coordinator.release_and_reset_all(self._all)
        self._check_overflow()
        if setup.offload_optimizer:
            for i in range(len(setup.optimizers)):
                self._step_on_host(i)
            self._stepped = True
            ledger.free(*self._norms)  # reset_cpu_buffers
            self._norms.clear()
            self._post_step()
            return
        for shard in self._trained.values():
            ledger.briefly("temporaries", shard.partition * NORM_ITEMSIZE, name=NORM)
        for i, (group, partition) in enumerate(zip(setup.sub_groups, setup.partitions, strict=True)):
            nbytes = partition.numel * setup.accumulation_dtype.itemsize
            flat = ledger.allocate("temporaries", nbytes, name=SUB_GROUP) if len(group) > 1 else None
            gradient = flat
            if setup.accumulation_dtype is not setup.master_dtype:
                gradient = ledger.allocate("gradients", partition.nbytes, name=SUB_GROUP)
                ledger.free(flat)
            if not self._stepped and not setup.optimizers[i].made_at_construction:
                self._make_states(i)
            temporaries_of_step(ledger, setup.optimizers[i])
            ledger.free(gradient)
            self._moves_updated(i)
        self._stepped = True
        self._post_step()

    def _post_step(self) -> None:
        self._accumulates = False
        self.coordinator.gather_persistent(self._all)
        self.coordinator.secondary.invalidate(self._trained, self.ledger)

    def _check_overflow(self) -> None:
        """isinf of gradients in float16, which adapters' are not: their absolute values, and a byte for each."""
        first = next(iter(self._trained.values()), None)
        if first is None or self.setup.dtype is not float16 or first.itemsize != float16.itemsize:
            return
        elements = sum(shard.partition for shard in self._trained.values())
        nbytes = elements * self.setup.accumulation_dtype.itemsize
        absolute = self.ledger.allocate("temporaries", nbytes, self._device)
        self.ledger.briefly("temporaries", elements, self._device)
        self.ledger.free(absolute)

    def _step_on_host(self, index: int) -> None:
        """A sub-group's step: its states come from NVMe and go back."""
        optimizer, partition = self._optimizer, self.setup.partitions[index]
        self.ledger.move("host_step", 0 if self.setup.on_gpu[index] else partition.numel)
        self._moves_updated(index)
        if optimizer is None or not self._swaps(index):
            if not self._stepped and not self.setup.optimizers[index].made_at_construction:
                self._make_states(index)
            temporaries_of_step(self.ledger, self.setup.optimizers[index], self._optimizer_place(index))
            return
        states = nvme.TENSORS * partition.nbytes  # the gradient is only read
        self.ledger.move("nvme_read", states)
        self.ledger.move("nvme_write", states - partition.nbytes)
        optimizer.swap_in_optimizer_state(index)
        if not self._stepped:
            optimizer.make_states(index, self.setup.optimizers[index].state_bytes(self.setup.partitions[index]))
        optimizer.swap_out_optimizer_state(index)

    def _moves_updated(self, index: int) -> None:
        """Masters go to where the weights are: in 16 bits to the GPU, but as they are to the host (Copy.cu converts on
        the CPU), and from there to NVMe.
        """
        setup, partition, there = self.setup, self.setup.partitions[index], self.setup.offload_param
        if setup.on_gpu[index]:
            self.ledger.move("to_host", partition.nbytes if there else 0)
        else:
            self.ledger.move("to_gpu", 0 if there else partition.numel * setup.dtype.itemsize)
        if self._params is not None and not setup.in_cpu[index]:
            self._params.swap_out(setup.sub_groups[index])

    # -- save ------------------------------------------------------------------------------------------------------

    def save(self, state_dict: StateDict) -> None:
        """The model, if it is to be gathered; then every rank writes its partitions of the optimizer."""
        setup, ledger = self.setup, self.ledger
        model = self._consolidated() if setup.saves else []
        if len(setup.saves) == len(self._all):
            self.ledger.briefly("temporaries", state_dict.split * setup.dtype.itemsize, "main")
        self.coordinator.release_and_reset_all(self._all)  # checkpoint_event_prologue
        there = [i for i in range(len(setup.partitions)) if setup.on_gpu[i]]
        storages = optimizer_storages([setup.optimizers[i] for i in there], [setup.partitions[i] for i in there])
        checkpoint.write(ledger, storages)
        self.coordinator.gather_persistent(self._all)
        # get_layer_state_dict calls itself, a cycle that holds the model until the garbage collector comes by.
        ledger.free(*model)

    def _consolidated(self) -> list[Block]:
        """_zero3_consolidated_16bit_state_dict: gathered module by module, kept on rank 0's host."""
        ledger = self.ledger
        self.coordinator.release_and_reset_all(self._all)
        model: dict[Key, Block] = {}
        for own in filter(None, self.setup.modules.values()):
            gathered = self._gathered(own)
            for shard in own:
                if shard.key in self.setup.saves and shard.key not in model:
                    model[shard.key] = ledger.allocate("weights", shard.elements * shard.itemsize, "main")
                self.coordinator.secondary.partition(shard.key, shard.aligned, shard.itemsize)
            ledger.free(*gathered)
        self.coordinator.gather_persistent(self._all)
        return list(model.values())

    def _make_states(self, index: int) -> None:
        for nbytes in self.setup.optimizers[index].state_bytes(self.setup.partitions[index]):
            self.ledger.allocate("optimizer", nbytes, self._optimizer_place(index), "states")


def on_host(ledger: Ledger, component: str, nbytes: int, place: str) -> Block:
    """Made in pageable memory and, if it is to be pinned, copied."""
    made = ledger.allocate(component, nbytes, "host")
    if place == "host":
        return made
    pinned = ledger.allocate(component, nbytes, place)
    ledger.free(made)
    return pinned


NORM_PART = 250_000_000
"""Elements whose norm is taken at once (_constant_buffered_norm2)."""


def attributes_recomputed(software: SoftwareSpec) -> bool:
    """Whether fetch_sub_module calls update_recompute_parameters: since DeepSpeed 0.19.4 (#8148)."""
    return software.at_least("deepspeed", "0.19.4")


def zero3_setup(
    strategy: Strategy,
    model: Layout,
    ranks: int,
    per_node: int,
    dtype: DType,
    hidden_size: int | None,
    optim: str,
    rules: DeviceRules,
    software: SoftwareSpec,
    *,
    adapted: bool,
    quantized: bool,
) -> Zero3Setup:
    """The engine's settings as DeepSpeed and the Trainer resolve them; PEFT has ``adapted`` the model, or not.

    A model that is ``quantized`` as it is loaded comes without zero.Init (PreTrainedModel.get_init_context).

    Raises UnsupportedError for unmodelled ones.
    """
    keys = strategy.zero
    cuts_frozen = any(p.node is None for p in model.parameters.values()) and (quantized or not keys.zero3_init_flag)
    has_ratio = strategy.offload_optimizer != "none" and keys.offload_optimizer.ratio < 1
    reasons = {
        "optim": strategy.offload_optimizer == "nvme" and not optim.startswith("adamw_torch") and optim,
        "use_gds": "nvme" in (strategy.offload_optimizer, strategy.offload_param) and keys.aio.use_gds and "true",
        "ratio": has_ratio and "nvme" in (strategy.offload_optimizer, strategy.offload_param) and "less than 1",
        "zero_quantized_nontrainable_weights": keys.zero_quantized_nontrainable_weights and cuts_frozen and "true",
    }
    for key, value in reasons.items():
        if value:
            raise UnsupportedError(f"{key}: {value!r} is not modelled yet under {strategy.kind}. Leave it out.")
    if keys.zero_quantized_gradients and not keys.reduce_scatter:
        remedy = "Set reduce_scatter too."
        raise SpecError.at(
            "zero.zero_quantized_gradients", True, "is refused by DeepSpeed without reduce_scatter", remedy
        )
    persistent = _persistent(model, resolved(keys, "stage3_param_persistence_threshold", hidden_size), keys)
    shards = {
        key: Shard(key, p.numel, p.dtype.itemsize, ranks, p.shape, key in persistent)
        for key, p in model.parameters.items()
    }
    trained = {key for group in model.groups for key in group}
    groups = [[shards[key] for key in group] for group in model.groups]
    divided = [_sub_groups(group, keys.sub_group_size) for group in groups]
    sub_groups = [part for parts in divided for part in parts]
    swap_optimizer, params_in_nvme = strategy.offload_optimizer == "nvme", strategy.offload_param == "nvme"
    flat_elements = _flat_elements(groups, keys.offload_param.max_in_cpu if params_in_nvme else None)
    in_cpu = [fits for parts, n in zip(divided, flat_elements, strict=True) for fits in _in_flat_buffer(parts, n)]
    tape, master = Tape(rules), master_dtype(strategy, dtype)
    partitions = [
        tape.parameter("flat partition", (sum(shard.partition for shard in part),), master) for part in sub_groups
    ]
    if swap_optimizer:
        swappable = [part.numel for part in partitions if nvme.is_swappable(keys.aio, part.nbytes)]
        nvme.check_buffer_count(keys.offload_optimizer, len(swappable))
        if not all(in_cpu):
            largest = max(part.numel for part in partitions)
            nvme.check_fast_init(keys.offload_optimizer, keys.offload_param, keys.aio, largest)
    on_gpu, optimizers = _placed(
        strategy, optim, rules, partitions, stepping(strategy, dtype, optim, len(groups), rules, partitions)
    )
    leaves = model.leaves if software.at_least("deepspeed", LEAVES_SINCE) else {}
    modules = {module: [shards[key] for key in own] for module, own in model.modules.items()}
    modules |= {PEFT_MODEL: []} if adapted else {}
    return Zero3Setup(
        sub_groups=sub_groups,
        frozen=[shard for key, shard in shards.items() if key not in trained],
        attributes_recomputed=attributes_recomputed(software),
        modules=modules,
        fetched=modules
        | {leaf: [shard for each in (leaf, *below) for shard in modules[each]] for leaf, below in leaves.items()},
        leaves=leaves,
        wrapped=next(iter(model.modules)) if adapted else None,
        made_partitioned=frozenset(
            key for key in shards if keys.zero3_init_flag and not quantized and not (adapted and key in trained)
        ),
        kept_whole=frozenset(key for key, p in model.parameters.items() if p.dtype is int8),
        # Of an adapted model the Trainer saves what is trained, whatever the key says.
        saves=frozenset(trained if adapted else shards if keys.stage3_gather_16bit_weights_on_model_save else ()),
        ranks=ranks,
        per_node=per_node,
        secondary_group=_secondary_group(strategy, ranks),
        quantized_weights=keys.zero_quantized_weights,
        quantized_gradients=keys.zero_quantized_gradients and ranks > per_node,
        dtype=dtype,
        accumulation_dtype=named(keys.grad_accum_dtype, dtype),
        communication_dtype=named(keys.communication_data_type, dtype),
        master_dtype=master,
        reduce_bucket_size=resolved(keys, "reduce_bucket_size", hidden_size),
        prefetch_bucket_size=resolved(keys, "stage3_prefetch_bucket_size", hidden_size),
        max_live_parameters=keys.stage3_max_live_parameters,
        max_reuse_distance=keys.stage3_max_reuse_distance,
        allgather_sequential=keys.stage3_allgather_sequential,
        overlap_comm=keys.overlap_comm is not False,
        contiguous_gradients=keys.contiguous_gradients,
        reduce_scatter=keys.reduce_scatter,
        offload_optimizer=strategy.offload_optimizer != "none",
        on_gpu=on_gpu,
        offload_param=strategy.offload_param != "none",
        swap_optimizer=swap_optimizer,
        params_in_nvme=params_in_nvme,
        in_cpu=in_cpu,
        flat_elements=flat_elements,
        keys=keys,
        gradients_place="pinned" if keys.offload_optimizer.pin_memory else "host",
        weights_place="pinned" if keys.offload_param.pin_memory else "host",
        groups=groups,
        optimizers=optimizers,
        partitions=partitions,
    )


def _secondary_group(strategy: Strategy, ranks: int) -> int:
    """_create_zero_param_parallel_group. Raises SpecError for what it asserts against, and what fails."""
    name, size = "zero.zero_hpz_partition_size", strategy.zero.zero_hpz_partition_size
    if size <= 1:
        return 0
    if strategy.offload_param == "nvme":  # torch.empty(..., device="nvme")
        raise SpecError.at(name, size, "fails in DeepSpeed with offload_param nvme", "Use cpu, or leave it out.")
    if ranks % min(size, ranks):
        remedy = "Use a divisor, such as the GPUs of a node."
        raise SpecError.at(name, size, f"does not divide {ranks} GPUs, which DeepSpeed asserts", remedy)
    return min(size, ranks)


def _placed(
    strategy: Strategy, optim: str, rules: DeviceRules, partitions: Sequence[Parameter], optimizers: list[Optimizer]
) -> tuple[list[bool], list[Optimizer]]:
    """Which sub-groups are on the GPU, and each one's optimizer: an offloaded one's ``ratio`` leaves the first to
    torch's AdamW (backup_optimizer). Raises SpecError for what DeepSpeed asserts against.
    """
    ratio = strategy.zero.offload_optimizer.ratio
    if strategy.offload_optimizer == "none":
        return [True] * len(partitions), optimizers
    if ratio == 1:
        return [False] * len(partitions), optimizers
    if not uses_cpu_adam(strategy.zero, optim):
        problem, remedy = "is refused by DeepSpeed without DeepSpeedCPUAdam", "Use adamw_torch_fused, or leave it out."
        raise SpecError.at("zero.offload_optimizer.ratio", ratio, problem, remedy)
    on_gpu = [i < int((1 - ratio) * len(partitions)) for i in range(len(partitions))]
    for i, partition in enumerate(partitions):
        if on_gpu[i]:
            optimizers[i] = make_optimizer("adamw_torch", rules, partial(Groups, [partition]))
    return on_gpu, optimizers


def _persistent(model: Layout, threshold: int, keys: ZeroSpec) -> set[Key]:
    """mark_persistent_parameters: the small ones, in the model's order, as many as may stay over all."""
    found, elements = set[Key](), 0
    for key, p in model.parameters.items():
        if p.numel <= threshold and p.numel + elements <= keys.stage3_model_persistence_threshold:
            found.add(key)
            elements += p.numel
    return found


def _flat_elements(groups: Sequence[Sequence[Shard]], max_in_cpu: int | None) -> list[int]:
    """_create_param_groups_fp16_flat_cpu_memory: with ``max_in_cpu`` a group's buffer is what of it is left."""
    found, passed = list[int](), 0
    for group in groups:
        elements = sum(shard.partition for shard in group)
        left = elements if max_in_cpu is None else max(0, max_in_cpu - passed)
        found.append(min(elements, left))
        passed += elements
    return found


def _in_flat_buffer(sub_groups: Sequence[Sequence[Shard]], elements: int) -> list[bool]:
    """Which sub-groups of a group fit into its buffer; those that do not take room all the same."""
    sizes = [sum(shard.partition for shard in group) for group in sub_groups]
    return [end <= elements for end in accumulate(sizes)]


def _sub_groups(shards: Sequence[Shard], size: int) -> list[list[Shard]]:
    """_create_fp16_sub_groups: a sub-group ends once it has reached its size, in elements of partitions."""
    groups: list[list[Shard]] = [[]]
    elements = 0
    for shard in shards:
        if groups[-1] and elements >= size:
            groups.append([])
            elements = 0
        groups[-1].append(shard)
        elements += shard.partition
    return groups
