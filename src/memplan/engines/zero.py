"""DeepSpeed's ZeRO stages 1 and 2: optimizer states, and gradients, in partitions over the ranks.

Source: deepspeed/runtime/zero/stage_1_and_2.py (``DeepSpeedZeroOptimizer``), 0.19.8, whose names are kept. The engine
is played over a micro-batch (:mod:`memplan.memory.course`): it allocates and frees here in the order of there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import groupby

from memplan.engines import checkpoint
from memplan.engines.layout import Layout, StateDict, WholeWeights, temporaries_of_step
from memplan.errors import SpecError, UnsupportedError
from memplan.memory.course import DEFAULT_STREAM, Block, Key, Ledger
from memplan.memory.optimizers import CpuOptimizer, Groups, Optimizer, make_optimizer
from memplan.specs.strategy import Strategy, ZeroSpec
from memplan.tape.dispatch import CPU, DeviceRules
from memplan.tape.tape import Tape
from memplan.tape.tensor import DType, Parameter, bfloat16, float16, float32

NCCL_START_ALIGNMENT = 2
"""Elements: partitions are padded to multiples of twice the number of ranks (nccl_start_alignment_factor)."""
REDUCTION = 1
"""The stream on which buckets are reduced with ``overlap_comm`` (reduction_stream)."""
NORM_ITEMSIZE = 8
"""Bytes: norms are computed in float64 (get_norm_dtype)."""


BUCKETS = "buckets of gradients (reduce_bucket_size, overlap_comm)"
LARGE = "of a weight larger than the bucket (reduce_bucket_size)"
NORM = "gradients in float64, for their norm"
PARTITION = "this rank's partition"
REDUCED = "gradients that are reduced together (reduce_bucket_size)"
STEPPED = "a group's partition as the optimizer steps with it"
"""Blocks as an explanation names them; in parentheses the keys that size them."""


@dataclass(frozen=True, slots=True)
class Weight:
    """A trained weight of the whole model."""

    key: Key
    elements: int


@dataclass(frozen=True)
class Group:
    """An optimizer's parameter group, flattened and cut into one partition per rank."""

    weights: Sequence[Weight]
    ranks: int

    @cached_property
    def elements(self) -> int:
        """Of the flat buffer, padding included."""
        alignment = NCCL_START_ALIGNMENT * self.ranks
        return -(-sum(weight.elements for weight in self.weights) // alignment) * alignment

    @property
    def partition(self) -> int:
        """Elements of one rank's partition."""
        return self.elements // self.ranks

    @cached_property
    def starts(self) -> dict[Key, int]:
        """Where each weight begins in the flat buffer."""
        starts, at = {}, 0
        for weight in self.weights:
            starts[weight.key] = at
            at += weight.elements
        return starts

    def slices(self, weight: Weight) -> list[tuple[int, int]]:
        """The ranks that own a piece of the weight, each with the piece's elements (param_to_partition_ids)."""
        at = self.starts[weight.key]
        end = at + weight.elements
        found = []
        while at < end:
            rank = at // self.partition
            piece = min(end, (rank + 1) * self.partition) - at
            found.append((rank, piece))
            at += piece
        return found

    def in_partition(self, rank: int) -> list[tuple[Weight, int]]:
        """Weights with a piece in a rank's partition, and the elements of that piece (params_in_partition)."""
        begin, end = rank * self.partition, (rank + 1) * self.partition
        found = []
        for weight in self.weights:
            at = self.starts[weight.key]
            piece = min(end, at + weight.elements) - max(begin, at)
            if piece > 0:
                found.append((weight, piece))
        return found


@dataclass(frozen=True, slots=True)
class ZeroSetup:
    """What stages 1 and 2 place."""

    stage: int
    groups: Sequence[Group]
    frozen: Sequence[int]
    """Bytes of each weight that is not trained."""
    rank: int
    dtype: DType
    """Of the model's weights and gradients."""
    accumulation_dtype: DType
    """``grad_accum_dtype``."""
    communication_dtype: DType
    master_dtype: DType
    """Of masters, and of the gradients that the optimizer is given."""
    reduce_bucket_size: int
    overlap_comm: bool
    contiguous_gradients: bool
    reduce_scatter: bool
    offload: bool
    """Masters, gradients and optimizer states are on the host."""
    host: str
    """The ledger's place for what the GPU copies to and from: pinned, or host."""
    optimizers: Sequence[Optimizer]
    """For each group one, of its partition alone."""
    partitions: Sequence[Parameter]
    """For each group its partition: one flat weight in ``master_dtype``."""


def flattened(setup: ZeroSetup, ledger: Ledger, *, empties_cache: bool) -> Iterator[tuple[Group, Block]]:
    """Load, and flatten group by group, each with a clone of this rank's partition, which the caller frees."""
    size = setup.dtype.itemsize
    for nbytes in setup.frozen:
        ledger.allocate("weights", nbytes, name="frozen")
    loaded = [
        ledger.allocate("weights", w.elements * size, name="as loaded") for group in setup.groups for w in group.weights
    ]
    for group in setup.groups:
        if empties_cache:
            ledger.empty_cache()
        ledger.allocate("weights", group.elements * size, name="trained, in flat buffers")
        ledger.free(*(loaded.pop(0) for _ in group.weights))
        yield group, ledger.allocate("temporaries", group.partition * size, name="masters on their way")


class Zero12(WholeWeights):
    """Rank ``setup.rank`` of ``DeepSpeedZeroOptimizer``."""

    def __init__(self, setup: ZeroSetup, ledger: Ledger) -> None:
        self.setup = setup
        self.ledger = ledger
        self._weights = {weight.key: weight for group in setup.groups for weight in group.weights}
        self._group = {weight.key: group for group in setup.groups for weight in group.weights}
        self._owned = {w.key for group in setup.groups for w, _ in group.in_partition(setup.rank)}
        self._bucket: list[Weight] = []
        self._bucket_elements = 0
        self._buffers: list[Block] = []
        self._grads: dict[Key, Block] = {}
        """Gradients that keep memory of their own: ``param.grad``."""
        self._reduced: list[Block | None] = []
        """Of them, others' in the bucket before, which may still be on their way (previous_reduced_grads)."""
        self._grads_in_partition: Block | None = None
        self._all_grad_tensors: list[tuple[int, Block]] = []
        """This rank's gradients, each with the last group whose step needs it."""
        self._compact: dict[int, Block] = {}
        """With gradients accumulated in float32, each group's flat partition of them (GradPartitionBufferGroup)."""
        self._norms: list[Block] = []
        """Of gradients that are on the host now (norm_for_param_grads)."""
        self._stepped = False
        self._micro_step = -1
        """Backwards since the last step that have found buckets, from 0 (micro_step_id)."""
        self._accumulated: set[Key] = set()
        """Weights with a buffer for their gradient on the host (accumulated_grads_in_cpu)."""

    # -- __init__ ------------------------------------------------------------------------------------------------------

    def initialize(self) -> None:
        """Load, flatten every group, clone this rank's partition as master."""
        setup, ledger = self.setup, self.ledger
        size = setup.dtype.itemsize
        for group, clone in flattened(setup, ledger, empties_cache=True):
            if setup.offload:
                self._on_host("optimizer", group.partition * setup.master_dtype.itemsize)
                self._on_host("weights", group.partition * size)
            else:
                ledger.allocate("optimizer", group.partition * setup.master_dtype.itemsize, name="masters")
            ledger.free(clone)
        if setup.offload:
            largest = max(weight.elements for weight in self._weights.values()) * size
            self._on_host("gradients", largest)
            ledger.allocate("gradients", largest, name="temp_grad_buffer_for_gpu_offload (offload_optimizer)")
        # initialize_optimizer_states: gradients of zeros, which only offloading keeps.
        zeros = [group.partition * setup.master_dtype.itemsize for group in setup.groups]
        if setup.offload:
            for nbytes in zeros:
                self._on_host("gradients", nbytes)
        else:
            ledger.free(*[ledger.allocate("temporaries", nbytes) for nbytes in zeros])
        for i, optimizer in enumerate(setup.optimizers):
            if optimizer.made_at_construction:
                self._make_states(i)

    def _on_host(self, component: str, nbytes: int) -> Block:
        """Made in pageable memory and, if it is to be pinned, copied."""
        made = self.ledger.allocate(component, nbytes, "host")
        if self.setup.host == "host":
            return made
        pinned = self.ledger.allocate(component, nbytes, self.setup.host)
        self.ledger.free(made)
        return pinned

    # -- backward ------------------------------------------------------------------------------------------------------

    def process_gradients(self, key: Key, gradient: Block | None) -> None:
        """A gradient is ready: the hook after its accumulation. None is one that was added to the one there."""
        self._setup_buckets()
        weight = self._weights[key]
        if gradient is not None:
            self._grads[key] = gradient
        if self.setup.stage == 2 or (self.setup.overlap_comm and self._boundary):
            self._reduce_independent(weight)

    def finish_micro_batch(self) -> None:
        """reduce_gradients, which in stage 1 waits for the boundary."""
        if self.setup.stage == 1 and not self._boundary:
            return
        if self.setup.stage == 1 and not self.setup.overlap_comm:
            for weight in self._weights.values():
                self._reduce_independent(weight)
        self._epilogue()

    def _setup_buckets(self) -> None:
        if self._buffers:
            return
        self._micro_step += 1
        if self.setup.contiguous_gradients:
            nbytes = self.setup.reduce_bucket_size * self.setup.dtype.itemsize
            count = 2 if self.setup.overlap_comm else 1
            self._buffers = [self.ledger.allocate("communication", nbytes, name=BUCKETS) for _ in range(count)]

    def _reduce_independent(self, weight: Weight) -> None:
        """reduce_independent_p_g_buckets_and_remove_grads."""
        setup = self.setup
        if self._bucket_elements + weight.elements > setup.reduce_bucket_size:
            self._reduce_ipg_grads()
        if setup.contiguous_gradients:
            if weight.elements > setup.reduce_bucket_size:
                if setup.offload and weight.key in self._grads:  # cloned, so that nothing else holds its storage
                    clone = self.ledger.allocate("gradients", weight.elements * setup.dtype.itemsize, name=LARGE)
                    self.ledger.free(self._grads[weight.key])
                    self._grads[weight.key] = clone
            else:  # copied into the bucket
                self.ledger.free(self._grads.pop(weight.key, None))
        self._bucket_elements += weight.elements
        self._bucket.append(weight)

    def _reduce_ipg_grads(self) -> None:
        setup = self.setup
        with self.ledger.on(REDUCTION if setup.overlap_comm else DEFAULT_STREAM):
            self._average()
            for weight in self._bucket:
                if weight.key in self._owned:
                    if setup.contiguous_gradients:
                        self._copy_grads_in_partition(weight)
                elif setup.stage == 2:
                    self._reduced.append(self._grads.pop(weight.key, None))
        self._bucket, self._bucket_elements = [], 0
        if not setup.overlap_comm or setup.contiguous_gradients:
            self._clear_reduced()

    def _clear_reduced(self) -> None:
        """_clear_previous_reduced_grads."""
        self.ledger.free(*self._reduced)
        self._reduced = []

    def _average(self) -> None:
        """average_tensor: slices are reduced in runs of one owner, and copied together unless there is only one."""
        setup = self.setup
        size = setup.dtype.itemsize
        # With reduce_scatter too: allreduce_and_scatter, since use_multi_rank_bucket_allreduce is True by default.
        self.ledger.move("all_reduce", self._bucket_elements * setup.communication_dtype.itemsize)
        if not setup.contiguous_gradients:  # buffered_reduce_fallback: all of the bucket in one copy
            if self._bucket:
                self._clear_reduced()
            flat = None
            if len(self._bucket) > 1:
                flat = self.ledger.allocate("communication", self._bucket_elements * size, name=REDUCED)
            self._add_all_of_bucket()
            self.ledger.free(flat)
            return
        if not setup.reduce_scatter:
            self._add_all_of_bucket()
            return
        for weight in self._bucket:
            self._make_compact(weight)
        pieces = [piece for weight in self._bucket for piece in self._group[weight.key].slices(weight)]
        for batch in _batches(list(self._merged(pieces)), setup.reduce_bucket_size):
            elements = sum(n for _, n in batch)
            flat = self.ledger.allocate("communication", elements * size, name=REDUCED) if len(batch) > 1 else None
            reduced = self._in_communication_dtype(elements)
            if reduced is not None:
                self.ledger.free(flat)
                flat = reduced
            for rank, n in batch:
                if rank == setup.rank:
                    self._add_to_compact(n)
            self.ledger.free(flat)

    def _add_all_of_bucket(self) -> None:
        """The bucket reduced in one, and what is this rank's added up."""
        reduced = self._in_communication_dtype(self._bucket_elements)
        for weight in self._bucket:
            self._make_compact(weight)
            if weight.key in self._owned:
                self._add_to_compact(self._own_elements(weight))
        self.ledger.free(reduced)

    def _make_compact(self, weight: Weight) -> None:
        """_get_compact_grad_partition_slice: the buffer of a group, when a weight of this rank's finds none."""
        if not self.compact or weight.key not in self._owned:
            return
        place = self.setup.groups.index(self._group[weight.key])
        if place not in self._compact:
            nbytes = self.setup.groups[place].partition * self.setup.accumulation_dtype.itemsize
            self._compact[place] = self.ledger.allocate("gradients", nbytes, name=PARTITION)

    def _add_to_compact(self, elements: int) -> None:
        """_add_to_grad_partition_buffer."""
        if self.compact and self.setup.communication_dtype is not self.setup.accumulation_dtype:
            nbytes = elements * self.setup.accumulation_dtype.itemsize
            self.ledger.briefly("temporaries", nbytes, name="gradients, cast")

    def _own_elements(self, weight: Weight) -> int:
        return sum(n for rank, n in self._group[weight.key].slices(weight) if rank == self.setup.rank)

    def _in_communication_dtype(self, elements: int) -> Block | None:
        """The copy that is reduced, if its type is another one than the gradients'."""
        dtype = self.setup.communication_dtype
        if dtype is self.setup.dtype:
            return None
        return self.ledger.allocate("communication", elements * dtype.itemsize, name=REDUCED)

    def _merged(self, pieces: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int]]:
        """Neighbours of one rank as one; what goes to a buffer of this rank's own stays apart."""
        for rank, run in groupby(pieces, key=lambda piece: piece[0]):
            if self.compact and rank == self.setup.rank:
                yield from run
            else:
                yield rank, sum(n for _, n in run)

    @property
    def compact(self) -> bool:
        """Gradients are accumulated in float32, in a flat partition (_use_compact_grad_partition_buffer)."""
        return self.setup.accumulation_dtype is float32 and self.setup.dtype is not float32

    def _copy_grads_in_partition(self, weight: Weight) -> None:
        if self.setup.offload:
            self._offload_gradient(weight)
            return
        if self.compact:
            return
        if self._grads_in_partition is None:
            elements = sum(w.elements for group in self.setup.groups for w, _ in group.in_partition(self.setup.rank))
            nbytes = elements * self.setup.dtype.itemsize
            self._grads_in_partition = self.ledger.allocate("gradients", nbytes, name=PARTITION)
        self.ledger.free(self._grads.pop(weight.key, None))

    def _offload_gradient(self, weight: Weight) -> None:
        """copy_grads_in_partition: added up on the host by way of the GPU; at the boundary to the float32 gradients."""
        ledger, size, master = self.ledger, self.setup.dtype.itemsize, self.setup.master_dtype
        piece = self._own_elements(weight)
        adds_up = not self.compact and (self._micro_step > 0 or not self._boundary)
        if adds_up and weight.key not in self._accumulated:
            self._accumulated.add(weight.key)
            if master is float32:  # else in the optimizer's gradient itself
                self._on_host("gradients", weight.elements * size)
        if adds_up:  # async_accumulate_grad_in_cpu_via_gpu
            ledger.move("to_host", weight.elements * size)
            ledger.move("to_gpu", weight.elements * size if self._micro_step > 0 else 0)
        if not self._boundary:
            return
        ledger.move("to_host", piece * master.itemsize)
        ledger.briefly("temporaries", piece * NORM_ITEMSIZE, name=NORM)
        self._norms.append(ledger.allocate("temporaries", NORM_ITEMSIZE, name=NORM))
        if self.setup.accumulation_dtype is not master:
            ledger.briefly("temporaries", piece * master.itemsize)
        ledger.free(self._grads.pop(weight.key, None))

    def _epilogue(self) -> None:
        """independent_gradient_partition_epilogue."""
        self._reduce_ipg_grads()
        self._clear_reduced()
        groups = self.setup.groups
        new = [(len(groups) - 1, self._grads_in_partition)] if self._grads_in_partition is not None else []
        if not self.setup.contiguous_gradients and not self.compact:
            owned = [key for key in self._grads if key in self._owned]
            new = [(groups.index(self._group[key]), self._grads.pop(key)) for key in owned]
        if self._all_grad_tensors:  # added to those of the micro-batches before
            self.ledger.free(*(block for _, block in new))
        else:
            self._all_grad_tensors = new
        self._grads_in_partition = None
        self.ledger.free(*self._buffers, *self._grads.values())
        self._buffers = []
        self._grads.clear()

    # -- step ----------------------------------------------------------------------------------------------------------

    def step(self) -> None:
        """The norm, then group by group: the flat gradient in float32, the optimizer, the new weights."""
        setup, ledger = self.setup, self.ledger
        self._micro_step = -1
        first, self._stepped = not self._stepped, True
        if setup.offload:
            for i in range(len(setup.groups)):
                self._step_group(i, first)
            ledger.free(*self._compact.values(), *self._norms)
            self._compact, self._norms = {}, []
            return
        size = setup.accumulation_dtype.itemsize
        padding: list[Block] = []
        owned = [group.in_partition(setup.rank) for group in setup.groups]
        for group, pieces in zip(setup.groups, owned, strict=True):
            missing = group.partition - sum(n for _, n in pieces)
            if missing and not self.compact:
                padding.append(ledger.allocate("gradients", missing * size, name=PARTITION))
        for pieces in owned:
            for _, elements in pieces:
                ledger.briefly("temporaries", elements * NORM_ITEMSIZE, name=NORM)
        for i, (group, pieces) in enumerate(zip(setup.groups, owned, strict=True)):
            several = len(pieces) + (group.partition > sum(n for _, n in pieces)) > 1
            flat = (
                ledger.allocate("temporaries", group.partition * size, name=STEPPED)
                if several and not self.compact
                else None
            )
            gradient = flat
            if setup.accumulation_dtype is not setup.master_dtype:
                nbytes = group.partition * setup.master_dtype.itemsize
                gradient = ledger.allocate("gradients", nbytes, name=STEPPED)
                ledger.free(flat)
            ledger.free(*(block for last, block in self._all_grad_tensors if last == i))
            if i == len(setup.groups) - 1:
                ledger.free(*padding)
                self._all_grad_tensors = []
            self._step_group(i, first)
            ledger.free(gradient)
        ledger.free(*self._compact.values())
        self._compact = {}

    def _step_group(self, index: int, first: bool) -> None:
        optimizer, group, size = self.setup.optimizers[index], self.setup.groups[index], self.setup.dtype.itemsize
        if self.setup.offload:
            self.ledger.move("host_step", group.partition)
            self.ledger.move("to_gpu", group.partition * size)
        self.ledger.move("all_gather", group.elements * size)
        if first and not optimizer.made_at_construction:
            self._make_states(index)
        temporaries_of_step(self.ledger, optimizer, self._place)

    def save(self, state_dict: StateDict) -> None:
        """The model; then rank 0 writes the flat weights, and every rank its partitions of the optimizer."""
        setup, ledger = self.setup, self.ledger
        size = setup.dtype.itemsize
        self._save_model(state_dict, size)
        checkpoint.write(ledger, [*setup.frozen, *(group.elements * size for group in setup.groups)], "main")
        checkpoint.write(ledger, [] if setup.offload else optimizer_storages(setup.optimizers, setup.partitions))

    @property
    def _place(self) -> str:
        """Where the optimizer works: DeepSpeedCPUAdam's states are pageable."""
        return "host" if self.setup.offload else "gpu"

    def _make_states(self, index: int) -> None:
        for nbytes in self.setup.optimizers[index].state_bytes(self.setup.partitions[index]):
            self.ledger.allocate("optimizer", nbytes, self._place, "states")


def optimizer_storages(optimizers: Sequence[Optimizer], partitions: Sequence[Parameter]) -> list[int]:
    """Bytes of every master and state of a rank, each in a storage of its own."""
    states = [n for each, p in zip(optimizers, partitions, strict=True) for n in each.state_bytes(p)]
    return [*states, *(p.nbytes for p in partitions)]


def _batches(pieces: Sequence[tuple[int, int]], limit: int) -> list[list[tuple[int, int]]]:
    """allreduce_and_scatter: a batch ends when it is above the limit."""
    batches: list[list[tuple[int, int]]] = [[]]
    elements = 0
    for piece in pieces:
        batches[-1].append(piece)
        elements += piece[1]
        if elements > limit:
            batches.append([])
            elements = 0
    return [batch for batch in batches if batch]


def parameter_groups(model: Layout, ranks: int, round_robin_gradients: bool = False) -> list[Group]:
    """The groups with their partitions."""
    groups = [[Weight(key, model.parameters[key].numel) for key in group] for group in model.groups]
    if round_robin_gradients:  # _round_robin_reorder
        groups = [[weight for i in range(ranks) for weight in group[i::ranks]] for group in groups]
    return [Group(weights, ranks) for weights in groups]


def uses_bf16_optimizer(strategy: Strategy, dtype: DType) -> bool:
    """Whether stage 1 is done by BF16_Optimizer (_do_optimizer_sanity_check)."""
    accumulates_in_float32 = strategy.zero.grad_accum_dtype == "fp32"
    in_place = strategy.kind == "zero1" and strategy.offload_optimizer == "none"
    return in_place and dtype is bfloat16 and accumulates_in_float32


def zero_setup(
    strategy: Strategy,
    groups: Sequence[Group],
    frozen: Sequence[int],
    rank: int,
    dtype: DType,
    hidden_size: int | None,
    optim: str,
    rules: DeviceRules,
) -> ZeroSetup:
    """The engine's settings as DeepSpeed and the Trainer resolve them. Raises UnsupportedError for unmodelled ones."""
    keys = strategy.zero
    stage = strategy.zero_stage
    assert stage is not None
    accumulation = named(keys.grad_accum_dtype, dtype)
    reasons = {
        "offload_optimizer": strategy.offload_optimizer == "nvme" and "nvme",
        "grad_accum_dtype": stage == 1
        and accumulation is not dtype
        and not uses_bf16_optimizer(strategy, dtype)
        and keys.grad_accum_dtype,
    }
    for key, value in reasons.items():
        if value:
            raise UnsupportedError(f"{key}: {value!r} is not modelled yet under {strategy.kind}. Leave it out.")
    tape = Tape(rules)
    master = master_dtype(strategy, dtype)
    partitions = [tape.parameter("flat partition", (group.partition,), master) for group in groups]
    return ZeroSetup(
        stage=stage,
        groups=groups,
        frozen=frozen,
        rank=rank,
        dtype=dtype,
        accumulation_dtype=accumulation,
        communication_dtype=named(keys.communication_data_type, dtype),
        master_dtype=master,
        reduce_bucket_size=resolved(keys, "reduce_bucket_size", hidden_size),
        overlap_comm=bool(keys.overlap_comm),
        contiguous_gradients=keys.contiguous_gradients or strategy.offload_optimizer != "none",
        reduce_scatter=keys.reduce_scatter,
        offload=strategy.offload_optimizer != "none",
        host="pinned" if keys.offload_optimizer.pin_memory else "host",
        optimizers=stepping(strategy, dtype, optim, len(groups), rules, partitions),
        partitions=partitions,
    )


def stepping(
    strategy: Strategy, dtype: DType, optim: str, groups: int, rules: DeviceRules, partitions: Sequence[Parameter]
) -> list[Optimizer]:
    """The optimizer of each partition: on the host DeepSpeed's own, where accelerate or DeepSpeed puts it in the place
    of the one that was asked for.

    ``groups`` are the optimizer's. Raises SpecError for what accelerate or DeepSpeed fail on.
    """
    if optim == "muon":
        # torch/optim/_muon.py, step: "Param gradient must be a 2D matrix"
        problem = f"needs matrices, and {strategy.kind} steps on flat partitions, on which torch.optim.Muon fails"
        raise SpecError.at("optim", optim, problem, "Use adamw_torch_fused, or ddp.")
    keys = strategy.zero
    on_host = strategy.offload_optimizer != "none"
    if on_host and not keys.ds_optimizer and keys.zero_force_ds_cpu_optimizer:
        moments = _mapped_by_accelerate(optim)
    elif on_host and keys.ds_optimizer and optim in _MADE_BY_DEEPSPEED:
        moments = _MADE_BY_DEEPSPEED[optim]
    else:
        if on_host and optim not in TORCH_OPTIMIZERS:
            raise UnsupportedError.at("optim", optim, "is not modelled on the CPU", "Use adamw_torch.")
        if optim == "adagrad" and groups > 1 and not uses_bf16_optimizer(strategy, dtype):
            # initialize_optimizer_states puts one of a single group in its place, and the step asks for the second.
            problem = f"fails in DeepSpeed under {strategy.kind} on weights with and without weight decay"
            remedy = "Use another, or let DeepSpeed make it: optimizer.type Adagrad in its file."
            raise SpecError.at("optim", optim, problem, remedy)
        where = CPU if on_host else rules
        return [make_optimizer(optim, where, partial(Groups, [partition])) for partition in partitions]
    itemsize = (bfloat16 if keys.bf16_optimizer_states else float32).itemsize
    return [CpuOptimizer(rules, partial(Groups, [partition]), moments, itemsize) for partition in partitions]


def uses_cpu_adam(keys: ZeroSpec, optim: str) -> bool:
    """Whether an offloaded optimizer is DeepSpeedCPUAdam."""
    return optim == "adamw_torch_fused" if keys.ds_optimizer else keys.zero_force_ds_cpu_optimizer


def master_dtype(strategy: Strategy, dtype: DType) -> DType:
    """Masters and gradients may be in bfloat16 (_configure_master_weights).

    Raises SpecError for what that asserts against: states in float32 beside them are DeepSpeedCPUAdam's alone, and
    accelerate makes that with such states only.
    """
    keys, offload = strategy.zero, strategy.offload_optimizer
    if not keys.bf16_master_weights_and_grads:
        return float32
    if strategy.kind == "zero0":  # _do_sanity_check of DeepSpeedConfig
        remedy = "Use --strategy zero1, zero2 or zero3."
        raise SpecError.at("bf16_master_weights_and_grads", True, "is refused by DeepSpeed at stage 0", remedy)
    if dtype is not bfloat16 or offload == "nvme" or uses_bf16_optimizer(strategy, dtype):
        raise UnsupportedError.at(
            "bf16_master_weights_and_grads", True, "is not modelled here", "Use it with bf16 and without NVMe."
        )
    forced = keys.ds_optimizer or keys.zero_force_ds_cpu_optimizer
    if not keys.bf16_optimizer_states and (offload == "none" or not forced):
        problem = "needs DeepSpeedCPUAdam, whose states stay in float32"
        raise SpecError.at(
            "bf16_master_weights_and_grads", True, problem, "Use --offload-optimizer cpu, or bf16_optimizer_states."
        )
    if keys.bf16_optimizer_states and offload != "none" and not keys.ds_optimizer:
        problem = "is refused by DeepSpeed with the DeepSpeedCPUAdam that accelerate makes"
        raise SpecError.at("bf16_optimizer_states", True, problem, "Let DeepSpeed make it: optimizer.type AdamW.")
    return bfloat16


TORCH_OPTIMIZERS = frozenset(
    {*("adamw_torch", "adamw_torch_fused", "adamw_torch_foreach", "adamw_torch_loop"), "sgd", "adagrad", "rmsprop"}
    | {"adafactor"}
)
"""Optimizers that run on a CPU too."""
_MADE_BY_DEEPSPEED = {"adamw_torch_fused": 2, "adagrad": 1}
"""Moments of what ``_configure_basic_optimizer`` makes where the optimizer is offloaded; else it is torch's."""


def _mapped_by_accelerate(optim: str) -> int:
    """map_pytorch_optim_to_deepspeed (accelerate 1.15): DeepSpeedCPUAdam, with two moments, whatever it is given.

    But for torch's Adagrad and for Lion in 32 bit, whose constructors do not take the adamw_mode that it gives them.
    It hands the groups on with what they hold, and Adafactor's have two for ``eps``, with which DeepSpeedCPUAdam cannot
    step.
    """
    if optim in ("adagrad", "adafactor", "lion_32bit", "paged_lion_32bit"):
        problem = "fails in accelerate with an offloaded optimizer"
        raise SpecError.at("optim", optim, problem, "Use another.")
    return 2


DTYPES = {"fp32": float32, "bf16": bfloat16, "fp16": float16}


def named(name: str | None, default: DType) -> DType:
    """The type of a key, which is the model's where none is given."""
    return default if name is None else DTYPES[name]


AUTO: dict[str, Callable[[int], int]] = {
    "reduce_bucket_size": lambda h: h * h,
    "stage3_prefetch_bucket_size": lambda h: int(0.9 * h * h),
    "stage3_param_persistence_threshold": lambda h: 10 * h,
}
"""What HfTrainerDeepSpeedConfig makes of ``auto``, from the hidden size."""


def resolved(zero: ZeroSpec, key: str, hidden_size: int | None) -> int:
    """The number of a key that may be ``auto``. Raises SpecError where the config has no hidden size."""
    value: int | str = getattr(zero, key)
    if isinstance(value, int):
        return value
    if hidden_size is None:
        raise SpecError.at(key, value, "needs a hidden_size, which the config does not have", "Give a number.")
    return AUTO[key](hidden_size)


def fullest_ranks(groups: Sequence[Group]) -> list[int]:
    """The ranks one of which holds most: the first, the last (padding), the one with most of straddling weights."""
    changes: Counter[int] = Counter()  # rank -> elements of whole weights that it touches, more than the rank before it
    for group in groups:
        for weight in group.weights:
            begin = group.starts[weight.key]
            changes[begin // group.partition] += weight.elements
            changes[(begin + weight.elements - 1) // group.partition + 1] -= weight.elements
    level = most = fullest = 0
    for rank in sorted(changes):
        level += changes[rank]
        if level > most:
            most, fullest = level, rank
    return sorted({0, groups[0].ranks - 1, fullest})
