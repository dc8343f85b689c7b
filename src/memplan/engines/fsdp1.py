"""FSDP1 (``FullyShardedDataParallel``) as accelerate sets it up: each unit's weights in one flat parameter.

Sources: torch/distributed/fsdp/{_flat_param,_runtime_utils,_exec_order_utils,_init_utils}.py, torch 2.13, whose names
are kept; prepare_model in accelerate/accelerator.py, 1.15. The views of a flat parameter are what the modules compute
with, so its gradient is the concatenation of theirs (SplitWithSizesBackward0). Storages are freed and allocated again
under the tensors (``resize_``). Streams are those of ``_init_streams``; how far the CPU runs ahead of the GPU is what
``limit_all_gathers`` lets it (_limiter_utils.py).

A backward's node runs on the stream that its forward ran on (``Node::stream`` in torch/csrc/autograd/node.h). Views are
made as the unit is gathered, so it is the unshard stream's pool that has the flat gradient, and that ``record_stream``s
the weights' gradients (torch/csrc/autograd/input_buffer.cpp).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from memplan.engines.layout import StateDict, temporaries_of_step
from memplan.engines.streams import Event, Streams
from memplan.engines.wrapping import Row, Unit
from memplan.memory.broadcast import broadcast, copies
from memplan.memory.course import DEFAULT_STREAM, Block, Key, Ledger
from memplan.memory.optimizers import Optimizer
from memplan.tape.tensor import Parameter

ALIGNMENT = 16
"""Bytes: with ``use_orig_params`` every weight begins at a multiple (_get_aligned_numel in _flat_param.py)."""


UNSHARD, PRE_UNSHARD, POST_BACKWARD, ALL_REDUCE = 1, 2, 3, 4
"""Streams. NCCL has one more for each group of ranks, on which nothing is allocated."""
IN_FLIGHT = 2
"""Frees of gathered parameters that the CPU does not wait for (_max_num_inflight_all_gathers)."""

CAST = "shards in the dtype in which they are gathered (mixed precision)"
GATHERED = "gathered flat parameters (auto_wrap_policy, sharding_strategy)"
PADDED = "a flat gradient, padded so that it can be cut"
FREED = "allocated in order to be freed"
SAVED = "gathered to be saved (state_dict_type)"
WHOLE = "weights on their way, whole"
BROADCAST = "copies of weights that rank 0 broadcasts (sync_module_states)"
STAGED = "shards on their way from the host (offload_params)"
"""Blocks as an explanation names them; in parentheses the keys that size them."""


@dataclass(frozen=True)
class FlatParam:
    """A unit's weights in one tensor (FlatParamHandle)."""

    unit: Unit
    ranks: int
    is_sharded: bool
    """Whether it is cut over them: NO_SHARD is not, and with one rank none is."""
    use_orig_params: bool

    @cached_property
    def loaded(self) -> int:
        """Bytes of an element as the weights are handed over."""
        return max(row.loaded for row in self.unit.weights)

    @cached_property
    def itemsize(self) -> int:
        """Bytes of an element of the shard."""
        return max(row.itemsize for row in self.unit.weights)

    @cached_property
    def gathered(self) -> int:
        """Bytes of an element as it is gathered and its gradient is reduced."""
        return max(row.gathered for row in self.unit.weights)

    @cached_property
    def trained(self) -> bool:
        return any(row.trained for row in self.unit.weights)

    @cached_property
    def is_cast(self) -> bool:
        """_uses_param_mixed_precision."""
        return self.itemsize != self.gathered

    @cached_property
    def offsets(self) -> list[tuple[Row, int]]:
        """Each weight with where it begins."""
        aligned = ALIGNMENT // self.gathered if self.use_orig_params else 1
        found, at = [], 0
        for row in self.unit.weights:
            at = -(-at // aligned) * aligned
            found.append((row, at))
            at += row.elements
        return found

    @cached_property
    def elements(self) -> int:
        """Of the unsharded tensor; with ``use_orig_params`` padded so that it divides."""
        row, at = self.offsets[-1]
        end = at + row.elements
        return -(-end // self.ranks) * self.ranks if self.use_orig_params else end

    @cached_property
    def shard(self) -> int:
        """Elements of one rank's, padding included."""
        return -(-self.elements // self.ranks) if self.is_sharded else self.elements

    @cached_property
    def padded(self) -> int:
        """Elements of all shards together."""
        return self.shard * self.ranks if self.is_sharded else self.elements

    def pieces(self) -> Iterator[tuple[Row, int]]:
        """Trained weights with the elements of them that the first rank has."""
        for row, at in self.offsets:
            if row.trained and at < self.shard:
                yield row, min(at + row.elements, self.shard) - at


@dataclass(frozen=True, slots=True)
class Fsdp1Setup:
    """What FSDP1 places."""

    flats: Sequence[FlatParam]
    """In the order of the modules, the root's first."""
    root: Key
    is_hybrid: bool
    """Nodes reduce gradients among each other, in the shards' dtype, on a stream of its own."""
    offload: bool
    """CPUOffload: shards, their gradients and the optimizer on the host."""
    backward_prefetch: Literal["BACKWARD_PRE", "BACKWARD_POST", "NO_PREFETCH"]
    forward_prefetch: bool
    sync_module_states: bool
    optimizer: Optimizer
    stepped: Sequence[Parameter]
    """The pieces of weights, or the flat parameters, that the optimizer sees on the first rank."""
    whole: Mapping[Key, Parameter]
    """The trained weights that they are pieces of."""
    state_dict_type: str


class _Handle:
    """What a flat parameter holds at the moment."""

    def __init__(self, flat: FlatParam, is_root: bool) -> None:
        self.flat = flat
        self.is_root = is_root
        self.state: Literal["idle", "forward", "backward_pre", "backward_post"] = "idle"
        self.is_resharded = True
        self.prefetched = False
        self.needs_pre_forward = False
        self.needs_pre_backward = False
        self.viewed_by: _Handle | None = None
        """Who prefetched it in the forward: its views are as old as that unit's, and their backward runs after it."""
        self.delayed: list[_Handle] = []
        """Those it has prefetched, whose backward has come as far as to their views."""
        self.unsharded: Block | None = None
        """_full_param_padded, or under NO_SHARD _mp_shard."""
        self.stale: list[Block] = []
        """What the shard was in before it was upcast or pinned: views of it live until the first reshard."""
        self.staged: list[Block] = []
        """Shards from the host, of which weights have views until the next reshard."""
        self.grad: Block | None = None
        """The unsharded gradient, which no_sync leaves."""
        self.shows_grads = False
        """After a forward: weights have views of _cpu_grad as their gradients, until zero_grad."""
        self.zeros: Block | None = None
        self.sharded_grad: Block | None = None


class Fsdp1:
    """One rank."""

    keeps_loaded = False

    def __init__(self, setup: Fsdp1Setup, ledger: Ledger) -> None:
        self.setup = setup
        self.ledger = ledger
        self._handles = [_Handle(flat, flat.unit.first == setup.root) for flat in setup.flats]
        self._streams = Streams(ledger)
        self._frees: deque[Event] = deque()
        """_FreeEventQueue."""
        self._by_module = {handle.flat.unit.first: handle for handle in self._handles}
        self._grads: dict[Key, Block] = {}
        self._pre_forward_order: list[_Handle] = []
        """Of the first iteration, once and for all."""
        self._post_forward_order: list[_Handle] = []
        self._frozen_done: list[_Handle] = []
        """Frozen, and used for the last time: the hook on its input runs after that of the unit that made it."""
        self._boundary = True
        self._is_grad_enabled = True
        self._is_lazy = True
        self._has_states = False
        self._gradients_are_none = False

    def initialize(self) -> None:
        """Bottom up, unit by unit, the weights come to the GPU, are flattened and cut."""
        for handle in reversed(self._handles):
            flat, size = handle.flat, handle.flat.loaded
            sizes = [row.elements * size for row in flat.unit.weights]
            whole = [self.ledger.allocate("temporaries", nbytes, name=WHOLE) for nbytes in sizes]
            if self.setup.sync_module_states:
                broadcast(
                    copies((size, nbytes) for nbytes in sizes),
                    lambda nbytes: self.ledger.allocate("communication", nbytes, name=BROADCAST),
                    self.ledger.free,
                )
            unsharded = self.ledger.allocate("temporaries", flat.elements * size, name=WHOLE)
            if not flat.use_orig_params:
                self.ledger.free(*whole)
                whole.clear()
            cut = self.ledger.allocate("weights", flat.shard * size, name="shards") if flat.is_sharded else None
            self.ledger.free(*whole)
            place = "host" if self.setup.offload else "gpu"
            shard = (
                cut if cut and place == "gpu" else self.ledger.allocate("weights", flat.shard * size, place, "shards")
            )
            self.ledger.free(unsharded, None if shard is cut else cut)
            handle.stale = [shard]
        for handle in self._handles:
            self._upcast(handle)
        if self.setup.optimizer.made_at_construction:
            self._make_states()

    def _upcast(self, handle: _Handle) -> None:
        """prepare_model: 16-bit weights that are trained under mixed precision get a float32 shard."""
        flat, offload = handle.flat, self.setup.offload
        if flat.itemsize != flat.loaded:
            loaded = handle.stale
            place = "host" if offload else "gpu"
            handle.stale = [self.ledger.allocate("weights", flat.shard * flat.itemsize, place, "shards")]
            if flat.use_orig_params:
                handle.stale = [*loaded, *handle.stale]
            else:
                self.ledger.free(*loaded)
        if not offload:
            handle.stale.pop()  # what is kept

    # -- hooks -----------------------------------------------------------------------------------------------------

    def begin_micro_batch(self, boundary: bool) -> None:
        self._boundary = boundary
        self._is_grad_enabled = True

    def begin_evaluation(self) -> None:
        self._is_grad_enabled = False
        self._streams.synchronize_all()  # gathering predictions asks each rank for its shape

    def module_event(self, kind: str, module: Key) -> None:
        """A hook of a module; only those of units matter."""
        handle = self._by_module.get(module)
        if kind == "pre_backward" and handle is not None:
            self._pre_backward(handle)
        while self._frozen_done:
            self._post_backward_reshard(self._frozen_done.pop())
        if kind == "pre_forward" and module == self.setup.root:
            self._root_pre_forward()
        if handle is None or (handle.state == "backward_pre" and kind.endswith("forward")):
            return  # a recomputation within a unit finds it gathered
        if kind == "pre_forward":
            self._pre_forward(handle)
        elif kind == "post_forward":
            self._post_forward(handle)
        elif kind in ("post_backward", "end_backward"):
            self._backward_of_views(handle)
            if kind == "post_backward" and not handle.flat.trained:
                handle.state = "backward_post"
                self._frozen_done.append(handle)

    def process_gradients(self, key: Key, gradient: Block | None) -> None:
        if gradient is not None:
            self._grads[key] = gradient

    def finish_micro_batch(self) -> None:
        """_post_backward_final_callback."""
        for handle in self._handles:
            if not handle.is_resharded:
                self._reshard(handle, free=self._should_free_in_backward(handle))
            handle.state = "idle"
            handle.prefetched = handle.needs_pre_backward = False
            if self._boundary and self.setup.offload:  # prepare_gradient_for_optim takes _cpu_grad
                self.ledger.free(handle.sharded_grad)
                handle.sharded_grad = None
        self._frozen_done.clear()
        self._post_forward_order.clear()
        self._streams.synchronize_all()  # the Trainer asks whether the loss is a number (logging_nan_inf_filter)

    # -- forward -----------------------------------------------------------------------------------------------------

    def _root_pre_forward(self) -> None:
        if self._is_lazy:
            self._is_lazy = False
            for handle in self._handles:
                self._init_flat_param_attributes(handle)
        if self._gradients_are_none:
            self._free_gradients()
        if self.setup.forward_prefetch:
            for handle in self._handles:
                handle.needs_pre_forward, handle.prefetched = True, False

    def _init_flat_param_attributes(self, handle: _Handle) -> None:
        """What is allocated in order to be freed, and what is pinned."""
        flat, ledger = handle.flat, self.ledger
        if self.setup.offload:
            ledger.allocate("weights", flat.shard * flat.itemsize, "pinned")
            zeros = ledger.allocate("gradients", flat.shard * flat.itemsize, "host")
            ledger.allocate("gradients", flat.shard * flat.itemsize, "pinned")
            ledger.free(zeros)
        if flat.is_cast:
            ledger.briefly("temporaries", flat.shard * flat.gathered, name=FREED)
        if flat.is_sharded:
            ledger.briefly("temporaries", flat.padded * flat.gathered, name=FREED)
            if flat.is_cast:
                ledger.briefly("temporaries", flat.padded * flat.itemsize, name=FREED)

    def _pre_forward(self, handle: _Handle) -> None:
        handle.state = "forward"
        if handle not in self._pre_forward_order:
            self._pre_forward_order.append(handle)
        if not handle.prefetched:
            self._unshard(handle)
        self._streams.wait(DEFAULT_STREAM, UNSHARD)
        handle.needs_pre_forward = False
        after = self._pre_forward_order.index(handle) + 1
        if self.setup.forward_prefetch and after < len(self._pre_forward_order):
            target = self._pre_forward_order[after]
            if target.needs_pre_forward and not target.prefetched:
                self._unshard(target)
                target.prefetched = True
                target.viewed_by = handle

    def _post_forward(self, handle: _Handle) -> None:
        self._post_forward_order.append(handle)
        # Where they stay gathered a forward with gradients leaves the views as they are (_skipped_use_sharded_views).
        views = handle.flat.unit.reshard_after_forward or not self._is_grad_enabled
        self._reshard(handle, free=handle.flat.unit.reshard_after_forward and not handle.is_root, views=views)
        handle.shows_grads = self.setup.offload and views
        handle.needs_pre_backward = True
        handle.state = "idle"

    # -- gathering -------------------------------------------------------------------------------------------------

    def _unshard(self, handle: _Handle) -> None:
        flat, offload = handle.flat, self.setup.offload
        self._writeback_orig_params(handle)
        handle.is_resharded = False
        is_gathered = handle.unsharded is not None and not (flat.is_sharded and offload)
        with self.ledger.on(PRE_UNSHARD):
            shard = None if is_gathered else self._pre_unshard(flat)
        if len(self._frees) >= IN_FLIGHT:
            self._streams.synchronize(self._frees.popleft())
        if is_gathered:
            return
        if not flat.is_sharded:
            handle.unsharded = shard
            return
        self.ledger.move("all_gather", flat.padded * flat.gathered)
        if handle.unsharded is None:
            nbytes = flat.padded * flat.gathered
            with self.ledger.on(UNSHARD):
                handle.unsharded = self.ledger.allocate("communication", nbytes, name=GATHERED)
        # NCCL runs it after the reduce-scatters before it, which are of the same ranks; what the post-backward stream
        # does with their outputs takes less than the blocks' backward that comes before this one is used.
        self._streams.wait(UNSHARD, POST_BACKWARD)
        if shard is not None and flat.use_orig_params and not flat.is_cast:
            handle.staged.append(shard)  # flat_param_to refreshes the weights' views
        else:
            self._streams.free(shard, used_on=UNSHARD)

    def _pre_unshard(self, flat: FlatParam) -> Block | None:
        """The shard that is gathered, where it is not the one that is kept: _mp_shard, or a copy on the GPU."""
        self.ledger.move("to_gpu", flat.shard * flat.itemsize if self.setup.offload else 0)
        if flat.is_cast:
            shard = self.ledger.allocate("communication", flat.shard * flat.gathered, name=CAST)
            if self.setup.offload:
                self.ledger.briefly("temporaries", flat.shard * flat.itemsize, name=STAGED)
            return shard
        if not self.setup.offload:
            return None
        return self.ledger.allocate("communication", flat.shard * flat.itemsize, name=STAGED)

    def _reshard(self, handle: _Handle, *, free: bool, views: bool = True, stream: int = DEFAULT_STREAM) -> None:
        """``views``: weights become views of the shard that is kept. ``stream`` is current."""
        handle.is_resharded = True
        handle.prefetched = False
        if views or not handle.flat.is_sharded:
            self.ledger.free(*handle.stale)
            handle.stale.clear()
            self._streams.free(*handle.staged, used_on=UNSHARD)
            handle.staged.clear()
        if free or not handle.flat.is_sharded:
            self._streams.free(handle.unsharded, used_on=stream)
            handle.unsharded = None
        if free and handle.flat.is_sharded:
            self._frees.append(self._streams.record(stream))

    # -- backward ----------------------------------------------------------------------------------------------------

    def _pre_backward(self, handle: _Handle) -> None:
        handle.state = "backward_pre"
        if handle.needs_pre_backward:
            if not handle.prefetched:
                self._unshard(handle)
            self._streams.wait(DEFAULT_STREAM, UNSHARD)
        handle.needs_pre_backward = False
        if self.setup.backward_prefetch == "BACKWARD_PRE":
            self._prefetch_before(handle)
        self.ledger.free(handle.zeros)  # prepare_gradient_for_backward
        handle.zeros = None

    def _writeback_orig_params(self, handle: _Handle) -> None:
        """Takes the views of _cpu_grad for gradients: before the backward, or before another forward of evaluation."""
        flat = handle.flat
        takes = handle.shows_grads and flat.is_sharded and flat.use_orig_params and flat.trained
        if takes and handle.grad is None and handle.zeros is None:
            handle.zeros = self.ledger.allocate("temporaries", flat.shard * flat.itemsize, "host")

    def _prefetch_before(self, handle: _Handle) -> None:
        """get_handle_to_backward_prefetch."""
        before = self._post_forward_order.index(handle) - 1
        if before >= 0:
            target = self._post_forward_order[before]
            if target.needs_pre_backward and not target.prefetched:
                self._unshard(target)
                target.prefetched = True

    def _should_free_in_backward(self, handle: _Handle) -> bool:
        return self._boundary or handle.flat.unit.reshard_after_forward

    def _post_backward_reshard(self, handle: _Handle, stream: int = DEFAULT_STREAM) -> None:
        self._reshard(handle, free=self._should_free_in_backward(handle), stream=stream)
        if self.setup.backward_prefetch == "BACKWARD_POST":
            self._prefetch_before(handle)

    def _backward_of_views(self, handle: _Handle) -> None:
        """Autograd runs the youngest node first, and views were made where the unit was gathered in the forward."""
        for delayed in handle.delayed:
            self._post_backward(delayed)
        handle.delayed.clear()
        if not handle.flat.trained:
            handle.viewed_by = None
        elif handle.viewed_by is None:
            self._post_backward(handle)
        else:
            handle.viewed_by.delayed.append(handle)
            handle.viewed_by = None

    def _post_backward(self, handle: _Handle) -> None:
        handle.state = "backward_post"
        flat, ledger = handle.flat, self.ledger
        size = flat.gathered
        grads = [self._grads.pop(row.key) for row in flat.unit.weights if row.key in self._grads]
        if not grads:
            return
        frozen = (row.elements * size for row in flat.unit.weights if not row.trained)
        self._streams.wait(UNSHARD, DEFAULT_STREAM)
        with ledger.on(UNSHARD):  # SplitWithSizesBackward0
            zeros = [ledger.allocate("gradients", nbytes, name="zeros of frozen weights") for nbytes in frozen]
            grad = ledger.allocate("gradients", flat.elements * size, name="of a flat parameter")
        self._streams.free(*grads, used_on=UNSHARD)
        ledger.free(*zeros)
        is_first = handle.grad is None
        if is_first:
            handle.grad = grad
        else:  # AccumulateGrad
            ledger.free(grad)
        self._post_backward_reshard(handle, UNSHARD)
        if self._boundary:
            with ledger.on(POST_BACKWARD):
                self._reduce_grad(handle)
        elif is_first and flat.use_orig_params:
            with ledger.on(UNSHARD):
                self._use_unsharded_grad_views(flat)

    def _use_unsharded_grad_views(self, flat: FlatParam) -> None:
        """Each piece of a shard gets an empty gradient in order to point it elsewhere, unless it has one: _cpu_grad."""
        if self.setup.offload and (flat.unit.reshard_after_forward or not flat.is_sharded):
            return
        for _, elements in flat.pieces():
            self.ledger.briefly("temporaries", elements * flat.itemsize, "host" if self.setup.offload else "gpu")

    def _reduce_grad(self, handle: _Handle) -> None:
        """_reduce_grad and _reduce_grad_no_shard, with the cast to the shard's dtype."""
        flat, ledger = handle.flat, self.ledger
        size = flat.gathered
        padding = flat.padded != flat.elements
        ledger.move("reduce_scatter" if flat.is_sharded else "all_reduce", flat.padded * size)
        ledger.move("to_host", flat.shard * flat.itemsize if self.setup.offload else 0)
        padded = ledger.allocate("communication", flat.padded * size, name=PADDED) if padding else None
        unsharded, handle.grad = handle.grad, None
        reduced = ledger.allocate("gradients", flat.shard * size, name="shards") if flat.is_sharded else None
        if flat.is_cast:
            last = ALL_REDUCE if self.setup.is_hybrid and flat.is_sharded else POST_BACKWARD
            with ledger.on(last):
                handle.sharded_grad = ledger.allocate("gradients", flat.shard * flat.itemsize, name="shards")
            self._streams.free(reduced, used_on=last)
            self._streams.free(unsharded, used_on=POST_BACKWARD)
        elif reduced is not None:
            handle.sharded_grad = reduced
            self._streams.free(unsharded, used_on=POST_BACKWARD)
        else:
            handle.sharded_grad = unsharded
        ledger.free(padded)

    # -- step ----------------------------------------------------------------------------------------------------------

    def step(self) -> None:
        if not self._has_states:
            self._make_states()
        place = "host" if self.setup.offload else "gpu"
        self.ledger.move("host_step", sum(p.numel for p in self.setup.stepped) if self.setup.offload else 0)
        temporaries_of_step(self.ledger, self.setup.optimizer, place)
        self._gradients_are_none = True
        for handle in self._handles:
            handle.shows_grads = False
        if not self.setup.flats[0].use_orig_params:
            self._free_gradients()  # otherwise zero_grad clears the weights' gradients, which are views of what stays

    def _make_states(self) -> None:
        self._has_states = True
        for p in self.setup.stepped:
            for nbytes in self.setup.optimizer.states(p):
                self.ledger.allocate("optimizer", nbytes, "host" if self.setup.offload else "gpu", "states")

    def _free_gradients(self) -> None:
        """_reset_flat_param_grad_info_if_needed."""
        self._gradients_are_none = False
        for handle in self._handles:
            self.ledger.free(handle.sharded_grad)
            handle.sharded_grad = None

    def end_graph(self) -> None:
        """Unsharded weights have given their memory back by then, whoever holds them (resize_)."""

    # -- save ----------------------------------------------------------------------------------------------------------

    def save(self, state_dict: StateDict) -> None:
        """The model, then the optimizer's states: whole on rank 0's host, or every rank's shards on its own.

        From _state_dict_utils.py and _optim_utils.py; not measured, since FSDP1 cannot gather states of one rank alone.
        """
        ledger = self.ledger
        if self.setup.state_dict_type == "SHARDED_STATE_DICT":
            for component, of in (("weights", lambda p: [p.nbytes]), ("optimizer", self.setup.optimizer.state_bytes)):
                nbytes = sum(sum(of(p)) for p in self.setup.stepped)
                ledger.briefly(component, 0 if self.setup.offload else nbytes, "host")
            return
        flats = [handle.flat for handle in self._handles]
        root = self._gathered(flats[0], flats[0].itemsize)  # while those of all other units are
        model: list[Block] = []
        for flat in flats:
            gathered = self._gathered(flat, flat.itemsize) if flat is not flats[0] else None
            model += [ledger.allocate("weights", row.elements * flat.itemsize, "main") for row in flat.unit.weights]
            ledger.free(gathered)
        ledger.free(root)
        ledger.briefly("temporaries", state_dict.split * flats[0].itemsize, "main")
        ledger.free(*model)
        states: list[Block] = []
        for flat in flats:
            sizes = [
                nbytes
                for row in flat.unit.weights
                if row.key in self.setup.whole
                for nbytes in self.setup.optimizer.state_bytes(self.setup.whole[row.key])
            ]
            gathered = ledger.allocate("communication", sum(sizes), name=SAVED) if flat.is_sharded else None
            states += [ledger.allocate("optimizer", nbytes, "main") for nbytes in sizes]
            ledger.free(gathered)
        ledger.free(*states)

    def _gathered(self, flat: FlatParam, itemsize: int) -> Block | None:
        return self.ledger.allocate("communication", flat.padded * itemsize, name=SAVED) if flat.is_sharded else None
