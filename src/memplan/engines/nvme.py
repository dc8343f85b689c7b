"""DeepSpeed's offload to NVMe (ZeRO-Infinity): the swappers that stage 3 keeps weights and optimizer states with.

Sources: deepspeed/runtime/swap_tensor/{partitioned_param_swapper,optimizer_utils,partitioned_optimizer_swapper,
pipelined_optimizer_swapper}.py, 0.19.8, whose names are kept. Their buffers are the ledger's ``locked`` host memory:
aio_handle.new_cpu_locked_tensor is posix_memalign and mlock, to the page, and not torch's pinned memory. A file, once
written, stays for good and is written again in place.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from typing import TYPE_CHECKING

from memplan.errors import SpecError, UnsupportedError
from memplan.memory.course import Block, Key, Ledger
from memplan.specs.strategy import AioSpec, OffloadOptimizerSpec, OffloadParamSpec, ZeroSpec
from memplan.tape.tensor import float32

if TYPE_CHECKING:
    from memplan.engines.zero3 import Shard

MIN_AIO_BYTES = 1024**2
"""Less is not swapped (swap_tensor/utils.py)."""
AIO_ALIGNED_BYTES = 1024
"""Per thread: what a transfer is a multiple of (swap_tensor/utils.py)."""
BUFFERS = "swap_buffers"
"""The ledger's component of what lies on its way to and from NVMe."""
TENSORS = 4
"""Buffers that the update of a sub-group takes: its masters, both moments and the gradient."""


def is_swappable(aio: AioSpec, nbytes: int) -> bool:
    """Whether a tensor is large enough to be kept on NVMe."""
    return nbytes >= max(MIN_AIO_BYTES, aio.block_size)


def aligned(aio: AioSpec, nbytes: int) -> int:
    """Bytes of the file, or of the buffer, of a tensor (_io_aligned_numel)."""
    unit = AIO_ALIGNED_BYTES * aio.intra_op_parallelism
    return -(-nbytes // unit) * unit


class _Status(Enum):
    """PartitionedParamStatus."""

    NOT_AVAILABLE = 0
    INFLIGHT = 1
    AVAILABLE = 2


class ParamSwapper:
    """AsyncPartitionedParameterSwapper: partitions on NVMe, which take a buffer each while they are wanted."""

    def __init__(self, keys: ZeroSpec, itemsize: int, ledger: Ledger) -> None:
        self._keys = keys.offload_param
        self._prefetch_bucket_size = keys.stage3_prefetch_bucket_size
        self._aio = keys.aio
        self._itemsize = itemsize
        self._ledger = ledger
        self._available_buffers = self._keys.buffer_count
        self._status: dict[Key, _Status] = {}

    def configure_aio(self) -> None:
        """The pool of buffers; its size is first asked for in a tensor that nothing is written to."""
        nbytes = aligned(self._aio, self._keys.buffer_size * self._itemsize) * self._keys.buffer_count
        example = self._ledger.allocate(BUFFERS, nbytes, "host")
        self._ledger.allocate(BUFFERS, nbytes, "locked")
        self._ledger.free(example)

    def is_swappable(self, shard: Shard) -> bool:
        """Whether zero.Init writes a partition to NVMe. Raises SpecError if it does not fit into a buffer."""
        if not is_swappable(self._aio, shard.partition * self._itemsize):
            return False
        if shard.itemsize != self._itemsize:
            raise UnsupportedError(
                "offload_param: 'nvme' with adapters in float32 that are large enough for NVMe is not modelled. "
                "Use cpu, or a smaller --lora-rank."
            )
        if shard.partition > self._keys.buffer_size:
            problem = f"is less than the largest partition of a weight, {shard.partition} elements"
            remedy = f"Use {shard.partition} or more, in a DeepSpeed JSON."
            raise SpecError.at("zero.offload_param.buffer_size", self._keys.buffer_size, problem, remedy)
        return True

    def write(self, shard: Shard, files: int = 1) -> None:
        """A partition's file; from now on it is read where it is wanted.

        A tied weight has as many ``files`` as modules: zero.Init writes each one's own before they are tied.
        """
        for _ in range(files):
            self._ledger.allocate("weights", aligned(self._aio, shard.partition * shard.itemsize), "nvme")
        self._status[shard.key] = _Status.NOT_AVAILABLE

    def swap_out(self, shards: Sequence[Shard]) -> None:
        """Updated partitions are written over: those that have a file."""
        sizes = (aligned(self._aio, s.partition * self._itemsize) for s in shards if s.key in self._status)
        self._ledger.move("nvme_write", sum(sizes))

    def keep_in_cpu(self, shard: Shard) -> None:
        """_move_to_flat_buffer: read once, for good; the file stays."""
        self._status.pop(shard.key, None)

    def reserve_partitioned_swap_space(self, sub_group: Sequence[Shard]) -> None:
        """A buffer for a sub-group's updated partitions on their way out.

        Its size is that of the weights whole, on however many ranks: stage3.py hands over ``param.ds_numel``, and not
        its partition's.
        """
        nbytes = sum(aligned(self._aio, shard.elements * self._itemsize) for shard in sub_group)
        self._ledger.allocate(BUFFERS, nbytes, "locked")

    def is_away(self, shard: Shard) -> bool:
        """Whether a partition is on NVMe alone, and not even on its way."""
        return self._status.get(shard.key) is _Status.NOT_AVAILABLE

    def ensure_availability(self, shards: Sequence[Shard]) -> None:
        """Partitions that are to be gathered are waited for."""
        self._swap_in([shard for shard in shards if self.is_away(shard)])
        if any(self._status.get(shard.key) is _Status.INFLIGHT for shard in shards):  # all reads are waited for
            for key, status in self._status.items():
                if status is _Status.INFLIGHT:
                    self._status[key] = _Status.AVAILABLE

    def prefetch(self, queue: Sequence[Shard], inflight_elements: int) -> None:
        """__prefetch_nvme_param_partitions: what comes next in the trace, as far as there are buffers."""
        wanted: list[Shard] = []
        considered = 0
        for shard in queue:
            if considered > 2 * inflight_elements or len(wanted) >= self._available_buffers:
                break
            if self.is_away(shard):
                wanted.append(shard)
            considered += shard.elements
        self._swap_in(wanted)

    def _swap_in(self, shards: Sequence[Shard]) -> None:
        if len({shard.key for shard in shards}) < len(shards):
            problem = "lets DeepSpeed read a weight from NVMe twice at once, which it asserts against"
            remedy = "Use 0, or offload parameters to cpu."
            raise SpecError.at("zero.stage3_prefetch_bucket_size", self._prefetch_bucket_size, problem, remedy)
        if len(shards) > self._available_buffers:
            problem = "is too few: more weights of NVMe are gathered at once, and each keeps a buffer"
            remedy = (
                "Use more, or a smaller stage3_max_reuse_distance, which keeps weights gathered, in a file for "
                "--engine-config."
            )
            raise SpecError.at("zero.offload_param.buffer_count", self._keys.buffer_count, problem, remedy)
        self._available_buffers -= len(shards)
        self._ledger.move("nvme_read", sum(aligned(self._aio, s.partition * self._itemsize) for s in shards))
        for shard in shards:
            self._status[shard.key] = _Status.INFLIGHT

    def remove_partition_and_release_buffer(self, shard: Shard) -> None:
        """A gathered weight goes."""
        status = self._status.get(shard.key)
        if status is not None and status is not _Status.NOT_AVAILABLE:
            self._available_buffers += 1
            self._status[shard.key] = _Status.NOT_AVAILABLE


class OptimizerSwapper:
    """PartitionedOptimizerSwapper, or PipelinedOptimizerSwapper: one sub-group's states in host memory at a time."""

    def __init__(self, keys: ZeroSpec, ledger: Ledger) -> None:
        self._keys = keys.offload_optimizer
        self._aio = keys.aio
        self._ledger = ledger
        self._moments: dict[int, list[Block]] = {}
        """Of sub-groups: those that Adam has made and that no buffer has replaced yet."""
        self._swapped_gradients: set[Key] = set()
        self._unswapped_gradients: dict[int, list[Block]] = {}

    @property
    def _pipeline(self) -> bool:
        return self._keys.pipeline_read or self._keys.pipeline_write

    def configure(self, largest: int) -> None:
        """The pool of buffers, each for the ``largest`` sub-group's bytes."""
        for _ in range(self._keys.buffer_count):
            self._ledger.allocate(BUFFERS, aligned(self._aio, largest), "locked")

    def is_swappable(self, nbytes: int) -> bool:
        """Whether a sub-group's states are kept on NVMe; others stay in host memory."""
        return is_swappable(self._aio, nbytes)

    def initialize_parameters(self, nbytes: int) -> None:
        """The file of a sub-group's masters."""
        self._write(nbytes)

    def _write(self, nbytes: int, component: str = "optimizer") -> None:
        self._ledger.allocate(component, aligned(self._aio, nbytes), "nvme")

    def swap_out_gradient(self, sub_group: int, key: Key, gradient: Block, nbytes: int) -> None:
        """A gradient of float32, on the GPU: one that is small stays there until the step.

        So does one that is no multiple of the alignment: its rest is not swapped, and is a view of all of it
        (_adjust_for_misaligned_lengths).
        """
        rest = nbytes % (AIO_ALIGNED_BYTES * self._aio.intra_op_parallelism)
        swaps = is_swappable(self._aio, nbytes)
        if swaps and is_swappable(self._aio, nbytes - rest):
            self._ledger.move("nvme_write", nbytes - rest)
        if swaps and is_swappable(self._aio, nbytes - rest) and key not in self._swapped_gradients:
            self._swapped_gradients.add(key)
            self._write(nbytes - rest, "gradients")
        if rest or not swaps:
            self._unswapped_gradients.setdefault(sub_group, []).append(gradient)
        else:
            self._ledger.free(gradient)

    def swap_in_optimizer_state(self, sub_group: int) -> None:
        """The states are in the buffers."""
        self._ledger.free(*self._moments.pop(sub_group, ()))

    def make_states(self, sub_group: int, sizes: Sequence[int]) -> None:
        """Adam makes its moments in pageable memory; its step count stays there."""
        self._moments[sub_group] = []
        for nbytes in sizes:
            made = self._ledger.allocate("optimizer", nbytes, "host")
            if is_swappable(self._aio, nbytes):
                self._moments[sub_group].append(made)
                self._write(nbytes)

    def swap_out_optimizer_state(self, sub_group: int) -> None:
        """The states are on NVMe. The pipelined swapper keeps Adam's own until the next step's are read."""
        if not self._pipeline:
            self._ledger.free(*self._moments.pop(sub_group, ()))
        self._ledger.free(*self._unswapped_gradients.pop(sub_group, ()))


def check_buffer_count(keys: OffloadOptimizerSpec, swappable: int) -> None:
    """Raise SpecError if the swapper runs out of buffers for so many ``swappable`` sub-groups.

    Beside the one that is updated, the next is being read, and the one before is being written.
    """
    at_once = min(swappable, 1 + keys.pipeline_read + keys.pipeline_write)
    needed = TENSORS * at_once
    if keys.buffer_count < needed:
        problem = f"is too few: pipelining has {at_once} sub-groups in memory at once"
        raise SpecError.at(
            "zero.offload_optimizer.buffer_count",
            keys.buffer_count,
            problem,
            f"Use {needed} or more, in a DeepSpeed JSON.",
        )


def check_fast_init(optimizer: OffloadOptimizerSpec, param: OffloadParamSpec, aio: AioSpec, largest: int) -> None:
    """Raise SpecError if masters cannot be made in the weights' buffers: ``largest`` is a sub-group's elements."""
    unit = AIO_ALIGNED_BYTES * aio.intra_op_parallelism // float32.itemsize
    needed = -(-largest // unit) * unit
    if optimizer.fast_init and param.buffer_size < needed:
        problem = "is less than the largest sub-group, which fast_init reads into one buffer"
        remedy = f"Use {needed} or more, or leave fast_init out."
        raise SpecError.at("zero.offload_param.buffer_size", param.buffer_size, problem, remedy)
