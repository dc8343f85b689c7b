"""The tape: a log of allocations, and shape-level autograd that frees them where torch does.

Sources: torch/csrc/autograd/{engine,input_buffer,functions/accumulate_grad}.cpp, torch/utils/checkpoint.py,
aten/src/ATen/autocast_mode.cpp (torch 2.13).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from heapq import heappop, heappush
from math import prod
from sys import getrefcount
from typing import Any, Literal, NamedTuple

from memplan.constants import Constant
from memplan.tape.dispatch import CPU, DeviceRules
from memplan.tape.tensor import (
    Buffer,
    DType,
    Parameter,
    Persistent,
    Shape,
    Storage,
    Tensor,
    contiguous_strides,
    dense_like,
    float32,
    promote,
    uint8,
)

# What a storage is, as the breakdown names it. A plain result is temporary until autograd saves it.
TEMPORARY, ACTIVATION, LOGITS, GRADIENT, WORKSPACE, INPUT = range(6)

LayerKey = tuple[int, int]
"""(stack, index): a model may have several stacks of layers, as an encoder and a decoder."""

BackwardFn = Callable[["Tape", "Node", Any, Any], Sequence["Tensor | None"]]


EventKind = Literal[
    "gradient",
    "pre_forward",
    "post_forward",
    "pre_backward",
    "post_backward",
    "end_backward",
    "hold",
    "drop",
    "keep",
    "replace",
    "look",
    "step",
]


class Event(NamedTuple):
    """A moment at which an engine acts."""

    position: int
    """In the log."""
    kind: EventKind
    """end_backward: post_backward, of a module whose inputs need no gradient. hold and drop: for one node a weight is
    saved as it is then, which a recomputation does, and an operation that is given a view of it. keep: a node's ctx
    holds it until the graph dies. replace: a module has put another tensor in a weight's place. look: a forward reads
    a weight that is another module's. step: backward() is done, and the graph is still alive."""
    subject: int
    """id() of the weight or the module."""
    storage: int = -1
    """The gradient's; -1 is one that was added to the gradient there."""


class Handed(NamedTuple):
    """A tensor that passes over a border between layers."""

    storage: int
    state: tuple[Any, ...]
    """All that decides what the next layer does with it."""


BEFORE = -1
"""Stands in a :data:`LayerKey` for what a backward runs before it enters a stack's layers."""


class StopRecompute(Exception):
    """Raised when a checkpointed region has recomputed its last saved tensor (torch: early stop)."""


class Node:
    """One backward function: its edges, what it saved, and the gradients that have reached it so far."""

    __slots__ = ("ctx", "edges", "fn", "grads", "outputs", "saved", "seq")

    def __init__(self, fn: BackwardFn, seq: int, edges: list[Any], saved: Any, ctx: Any, outputs: int) -> None:
        self.fn = fn
        self.seq = seq
        self.edges = edges
        self.saved = saved
        self.ctx = ctx
        self.outputs = outputs
        self.grads: list[Tensor | None] | None = None


class AccumulateGrad:
    """The sink of a leaf's gradient: ``grad`` once it has one."""

    __slots__ = ("accumulated", "grad", "grads", "is_weight", "leaf", "pending", "reached", "shape", "strides")

    def __init__(self, leaf: Tensor) -> None:
        self.leaf = id(leaf)
        self.is_weight = leaf.__class__ is Parameter
        self.shape = leaf.shape
        self.strides = leaf.strides
        self.grads: list[Tensor | None] | None = None
        self.grad: Tensor | None = None
        self.accumulated = False
        """A gradient of an earlier micro-batch is there already."""
        self.pending = 0
        self.reached = False
        """A backward has brought a gradient."""


class _Frame:
    """A checkpointed call: its function, its inputs, and (during backward) what the recomputation saved."""

    __slots__ = ("args", "autocast", "count", "fn", "recomputed")

    def __init__(self, fn: Callable[..., Any], args: tuple[Any, ...], autocast: DType | None) -> None:
        self.fn = fn
        self.args = args
        self.autocast = autocast
        self.count = 0
        self.recomputed: list[Tensor | None] | None = None


_TENSOR = object()
"""Stands among a region's arguments for one that the node saved."""


class _Packed:
    """Stands in a node for the tensors that a checkpointed region did not keep."""

    __slots__ = ("frame", "length", "start")

    def __init__(self, frame: _Frame, start: int, length: int) -> None:
        self.frame = frame
        self.start = start
        self.length = length


class Recomputed(list["Tensor | None"]):
    """What a checkpointed region made again for one node. It dies with the node's apply(); what a node saved itself
    lives on until the engine has reduced and cast the gradients (validate_outputs).
    """


class Mark:
    """A position in the log, with the FLOPs and the events counted so far."""

    __slots__ = ("events", "flops", "layer", "name", "position")

    def __init__(self, name: str, layer: LayerKey | None, position: int, flops: int, events: int = 0) -> None:
        self.events = events
        self.name = name
        self.layer = layer
        self.position = position
        self.flops = flops

    def __repr__(self) -> str:
        return f"Mark({self.name}, {self.layer}, @{self.position})"


class Tape:
    """Runs a forward and a backward pass symbolically and logs every allocation.

    ``log`` holds storage ids: ``i`` when storage i is allocated, ``~i`` when it is freed. ``sizes`` are bytes,
    rounded up to 512; ``components`` say what storage i is, ``births`` which operation made it, in which shape and
    dtype.
    """

    def __init__(self, rules: DeviceRules = CPU) -> None:
        self.rules = rules
        self.grad_enabled = True
        self.accumulate_in_place = rules.accumulate_in_place
        self.training = True
        self.log: list[int] = []
        self.sizes: list[int] = []
        self.components: list[int] = []
        self.births: list[tuple[str, Shape, DType]] = []
        self.marks: list[Mark] = []
        self.component = TEMPORARY
        self.flops = 0
        self.products: list[tuple[int, int]] = []
        """FLOPs as they were counted, each with the number of storages before them: the product's result comes next."""
        self.skipped: list[tuple[int, int]] = []
        """Of these, what a causal kernel does not compute: the blocks above the diagonal."""
        self.recomputed: list[tuple[int, int]] = []
        """Storages that a checkpointed region made in backward: the first, and the one after the last."""
        self.autocast: DType | None = None
        self._cast_cache: dict[int, Tensor] = {}
        self._seq = 0
        self._frame: _Frame | None = None
        self.reentrant = False
        """Checkpointed regions are autograd functions that run a backward of their own (use_reentrant=True)."""
        self._inner = False
        """That backward runs, or the forward before it: what it makes dies with the region's node."""
        self._recording: list[Tensor | None] | None = None
        self._record_limit = 0
        self._boundaries: list[tuple[int, LayerKey | None]] = []
        self._context: list[Tensor] = []
        self._held_in_context: list[int] = []
        """id() of the weights that a recomputed graph's ctx holds."""
        self.kept: dict[int, LayerKey | None] = {}
        """Storages that lie in a node's ctx until the graph dies, or are held as long -> the first layer with them."""
        self.flowing: set[int] = set()
        self.held: set[int] = set()
        """Those of ``flowing`` that the model holds until all layers have run."""
        self.passed: set[int] = set()
        """Those of ``flowing`` that are gradients which a layer made: each stands for those of other layers too."""
        self.passed_gradients: set[int] = set()
        """Those of ``passed`` that are a weight's gradient once backward is over; on their way they are temporary."""
        self.handed_on: dict[LayerKey, list[Handed]] = {}
        """By layer, what it hands on to the next one in forward."""
        self.handed_back: dict[LayerKey, list[Handed]] = {}
        """By layer, or BEFORE them, the gradients that are on their way as backward leaves it."""
        self._leaves: list[Tensor] = []
        """Leaves that are not weights: the graph holds them and their gradients until it is freed after backward."""
        self._held_leaves: list[Tensor] = []
        """Inputs of regions that ran again, and with them their gradients, which a hook holds as long."""
        self.input_count = 0
        """How many of the first storages are the batch."""
        self.assumptions: dict[str, Constant] = {}
        """What the step takes for granted, by name; an estimate reports them."""
        self.engine_takes_gradients = False
        """An engine that shards takes each weight's gradient as it comes, and says itself how long it is kept."""
        self.events: list[Event] = []
        """What an engine hooks into, in order: gradients that are ready, and modules that are watched."""
        self.steps_in_backward = False
        """accelerate's backward() under DeepSpeed also steps, before the loss and its graph die."""
        self.zero3_linear = False
        """DeepSpeed's own function stands in F.linear's place."""
        self.watches = False
        """Modules are watched."""
        self.flat_parameters = False
        """FSDP1 hooks into its weights, not into a module's inputs: it acts where these need no gradient too."""
        self.holders: set[int] = set()
        """id() of watched modules that hold leaves which they are given until the whole backward is over."""
        self._watched: list[tuple[int, int, int, bool]] = []
        """Watched modules with a backward: the number before their first node, that of their last one, their id(), and
        whether an input needs a gradient: the hook after a backward sits there."""

    # -- storage -----------------------------------------------------------------------------------------------

    def new(self, shape: Shape, dtype: DType, name: str, strides: Shape | None = None) -> Tensor:
        """Allocate a tensor; contiguous unless ``strides`` says otherwise."""
        sizes = self.sizes
        log = self.log
        index = len(sizes)
        sizes.append((prod(shape, start=dtype.itemsize) + 511) & -512)
        self.components.append(self.component)
        self.births.append((name, shape, dtype))
        log.append(index)
        return Tensor(shape, strides or contiguous_strides(shape), dtype, Storage(self, index, log))

    def new_like(self, x: Tensor, name: str) -> Tensor:
        """Allocate the result of an elementwise operation on x: same dtype, x's order of dimensions."""
        return self.new(x.shape, x.dtype, name, dense_like(x.shape, x.strides))

    def parameter(self, name: str, shape: Shape, dtype: DType, requires_grad: bool = True) -> Parameter:
        """A weight. Its bytes are not logged: they are there before the step and after it."""
        storage = Persistent(self)
        p = Parameter(shape, contiguous_strides(shape), dtype, storage)
        storage.owner = id(p)
        p.name = name
        p.elements = p.numel
        p.loaded = None
        p.unused = False
        if requires_grad:
            p.node = AccumulateGrad(p)
        return p

    def buffer(self, shape: Shape, dtype: DType, registered: bool = True) -> Buffer:
        """A tensor without gradient that is there before the step and after it, as an attribute of its module."""
        x = Buffer(shape, contiguous_strides(shape), dtype, Persistent(self))
        x.registered = registered
        return x

    def require_grad(self, x: Tensor) -> None:
        """x.requires_grad_(): x becomes a leaf with a gradient of its own."""
        if x.node is None and self.grad_enabled:
            x.node = AccumulateGrad(x)
            if self._recording is None:  # a recomputed graph does not outlive its recomputation
                self._leaves.append(x)

    def scratch(self, nbytes: int, name: str) -> None:
        """Memory that a kernel takes and gives back within one call."""
        self.new((nbytes,), uint8, name)

    def tag(self, x: Tensor, component: int) -> None:
        """Say what x's storage is."""
        if x.storage.id >= 0:
            self.components[x.storage.id] = component

    # -- graph -------------------------------------------------------------------------------------------------

    def node(
        self,
        fn: BackwardFn,
        inputs: Sequence[Tensor | None],
        saved: tuple[Tensor | None, ...] = (),
        ctx: Any = None,
        outputs: int = 1,
    ) -> Node | None:
        """A backward node for ``inputs``, or None where no gradient flows. Call it before allocating the result:
        torch saves inputs before it runs the kernel, which is where a recomputation stops early.
        """
        if not self.grad_enabled:
            return None
        edges: list[Any] = []
        live = False
        for x in inputs:
            if x is None or (source := x.node) is None:
                edges.append(None)
                continue
            live = True
            if source.__class__ is AccumulateGrad and self._recording is None:
                source.pending += 1
            edges.append((source, x.slot))
        if not live:
            return None
        self._seq += 1
        result = Node(fn, self._seq, edges, None, ctx, outputs)
        if saved:
            self._save(result, saved)
        return result

    def save(self, node: Node | None, *tensors: Tensor | None) -> None:
        """Add results of the operation itself to what ``node`` saved. They share storage with what is saved, not
        identity (as SavedVariable does), so that no cycle keeps them alive.
        """
        if node is not None:
            self._save(node, tuple(x if x is None or x.__class__ is Parameter else _detached(x) for x in tensors))

    def _save(self, node: Node, tensors: tuple[Tensor | None, ...]) -> None:
        if self._recording is not None:
            for x in tensors:
                # pack_hook: x.detach() if x.requires_grad else x. A frozen weight is itself, with what it is then.
                if x is not None and (x.__class__ is not Parameter or x.node is not None):
                    if self.watches and _weight_of(x):
                        self.events.append(Event(len(self.log), "hold", _weight_of(x)))
                    x = _detached(x)
                self._recording.append(x)
                self._mark_saved(x)
                if len(self._recording) == self._record_limit:
                    raise StopRecompute
        elif self._frame is not None:
            frame = self._frame
            if node.saved is None:
                node.saved = _Packed(frame, frame.count, 0)
            node.saved.length += len(tensors)
            frame.count += len(tensors)
        else:
            components = self.components
            for x in tensors:
                if x is None:
                    continue
                index = x.storage.id
                if index >= 0:
                    if components[index] == TEMPORARY:
                        components[index] = ACTIVATION
                elif self.watches and x.__class__ is not Parameter and _weight_of(x):
                    self.events.append(Event(len(self.log), "hold", _weight_of(x)))
            node.saved = tensors if node.saved is None else node.saved + tensors

    def keep(self, x: Tensor) -> None:
        """An autograd.Function's ``ctx.x = x``. Unlike a saved tensor, x outlives its node's backward, because the
        loss holds the graph, and no checkpoint lets go of it.
        """
        self._context.append(_detached(x))
        self._mark_saved(x)
        if self._recording is None and not self._inner:
            self._keep_by_layer([x])

    def _keep_by_layer(self, tensors: Sequence[Tensor]) -> None:
        layer = self._boundaries[-1][1] if self._boundaries else None
        for x in tensors:
            self.kept.setdefault(x.storage.id, layer)

    def keep_weight(self, p: Parameter) -> None:
        """The same of a weight, which matters where it is gathered into memory that it does not keep."""
        if not self.watches:
            return
        dies = self._inner or self._recording is not None
        self.events.append(Event(len(self.log), "hold" if dies else "keep", id(p)))
        if dies:
            self._held_in_context.append(id(p))

    def look(self, p: Parameter) -> None:
        """A module's forward reads a weight that is not its own, be it for its dtype alone."""
        if self.watches:
            self.events.append(Event(len(self.log), "look", id(p)))

    def replace(self, p: Parameter) -> None:
        """``module.weight.data = other``: what the weight was gathered into is let go."""
        if self.watches:
            self.events.append(Event(len(self.log), "replace", id(p)))

    def _mark_saved(self, x: Tensor | None) -> None:
        if x is not None:
            index = x.storage.id
            if index >= 0 and self.components[index] == TEMPORARY:
                self.components[index] = ACTIVATION

    def count(self, flops: int) -> None:
        """A product of so many floating-point operations, two for each multiply-add, whose result comes next."""
        self.products.append((len(self.sizes), flops))
        self.flops += flops

    @contextmanager
    def no_grad(self) -> Iterator[None]:
        before, self.grad_enabled = self.grad_enabled, False
        try:
            yield
        finally:
            self.grad_enabled = before

    @contextmanager
    def tagged(self, component: int) -> Iterator[None]:
        """Everything allocated inside belongs to ``component``."""
        before, self.component = self.component, component
        try:
            yield
        finally:
            self.component = before

    def close(self) -> None:
        """End the log: what dies with the caller's variables from here on is not part of the step."""
        self.log = list(self.log)

    def resized(self, sizes: list[int], flops: Sequence[int]) -> Tape:
        """The same run on a batch of another size: with the ``sizes`` of its storages, and the FLOPs that its marks and
        its end have. All else is this tape's, and so is not to be changed; it does not tell shapes.
        """
        tape = copy(self)
        tape.sizes = sizes
        tape.births = []
        tape.marks = [Mark(m.name, m.layer, m.position, count, m.events) for m, count in zip(self.marks, flops)]
        tape.flops = flops[-1]
        return tape

    def mark(self, name: str, layer: LayerKey | None = None) -> None:
        """Remember the present position in the log."""
        self.marks.append(Mark(name, layer, len(self.log), self.flops, len(self.events)))

    def watch(self, module: object, forward: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        """Run a module's forward and note where it begins and ends, and where its backward will."""
        self.events.append(Event(len(self.log), "pre_forward", id(module)))
        before = self._seq
        if self._inner and id(module) in self.holders:
            leaves = [x for x in args if isinstance(x, Tensor) and x.node.__class__ is AccumulateGrad]
            self._held_leaves += leaves
            self._keep_by_layer(leaves)
        out = forward(*args)
        self.events.append(Event(len(self.log), "post_forward", id(module)))
        if self.grad_enabled and self._recording is None and (self._seq > before or _needs_grad(out)):
            hooked = any(isinstance(x, Tensor) and x.node is not None for x in args)
            self._watched.append((before, self._seq, id(module), hooked))
        return out

    def watch_leaf(self, module: object, x: Tensor) -> Tensor:
        """x as a watched module gives it out, made a leaf by then: what hooks in before a backward sits behind it."""
        if not self.watches or not x.requires_grad:
            return x
        before = self._seq
        node = self.node(_give_back, (x,))
        if self._recording is None:
            self._watched.append((before, self._seq, id(module), False))
        return Tensor(x.shape, x.strides, x.dtype, x.storage, node)

    def layer_boundary(self, layer: LayerKey | None) -> None:
        """Forward enters ``layer`` (None: what follows the last one) here; backward leaves it at an older node."""
        self._boundaries.append((self._seq, layer))
        self.mark("layer", layer)

    def flow(self, x: Tensor, made_before: int, held: bool = False) -> None:
        """x passes from one layer to the next, and dies there: its storage is not repeated with its layer.

        What a layer hands on without having made it (T5's position bias, made by the first) outlives them all.
        """
        _, layer = self._boundaries[-1]
        if layer is not None:
            state = x.node is None, x.dtype, x.shape, x.strides
            self.handed_on.setdefault(layer, []).append(Handed(x.storage.id, state))
        if x.storage.id >= made_before:
            self.flowing.add(x.storage.id)
            if held:
                self.held.add(x.storage.id)
            self._mark_saved(x)
        else:
            self.flowing.discard(x.storage.id)

    # -- autocast ----------------------------------------------------------------------------------------------

    @contextmanager
    def autocasting(self, dtype: DType | None) -> Iterator[None]:
        """torch.autocast: weights cast once and cached until the outermost context ends."""
        before, cache = self.autocast, self._cast_cache
        self.autocast, self._cast_cache = dtype, {}
        try:
            yield
        finally:
            self._cast_cache.clear()
            self.autocast, self._cast_cache = before, cache

    def cached_cast(self, p: Tensor, dtype: DType, cast: Callable[[Tensor, DType], Tensor]) -> Tensor:
        """The low-precision copy of a weight. Only fp32 leaves that require a gradient are cached; a region's inputs
        are some too, where it runs again in a backward of its own.
        """
        if p.node.__class__ is not AccumulateGrad or p.dtype is not float32:
            return cast(p, dtype)
        found = self._cast_cache.get(id(p))
        if found is None:
            # The cast belongs to the outer graph even inside a checkpointed region's recomputation.
            found = self._cast_cache[id(p)] = cast(p, dtype)
        return found

    # -- checkpointing -----------------------------------------------------------------------------------------

    def checkpoint(self, fn: Callable[..., Any], *args: Any) -> Any:
        """torch.utils.checkpoint: keep the inputs, recompute the rest in backward."""
        if not self.grad_enabled:
            return fn(*args)
        if self.reentrant:
            return self._checkpoint_function(fn, args)
        frame = _Frame(fn, args, self.autocast)
        for x in args:
            if isinstance(x, Tensor):
                self._mark_saved(x)
        outer, self._frame = self._frame, frame
        try:
            return fn(*args)
        finally:
            self._frame = outer

    def _checkpoint_function(self, fn: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        """CheckpointFunction.forward: without gradients, so no node of the region knows of its place in the graph."""
        tensors = [x for x in args if isinstance(x, Tensor)]
        others = tuple(_TENSOR if isinstance(x, Tensor) else x for x in args)
        node = self.node(_checkpoint_backward, tensors, tuple(tensors))
        with self.no_grad():
            out = fn(*args)
        if node is None:
            return out
        # A block's other arguments are in the function itself, as keywords: its ctx has them until the graph dies.
        keywords = [x for x in tensors if x.node is None]
        keywords += [x for each in others if isinstance(each, tuple) for x in each if isinstance(x, Tensor)]
        self._context += map(_detached, keywords)
        outputs = out if isinstance(out, tuple) else (out,)
        node.outputs = len(outputs)
        node.ctx = fn, others, self.autocast, [None if x is None else (x.shape, x.dtype) for x in outputs]
        made = tuple(
            None if x is None else Tensor(x.shape, x.strides, x.dtype, x.storage, node, slot)
            for slot, x in enumerate(outputs)
        )
        return made if isinstance(out, tuple) else made[0]

    def _run_again(self, region: Any, inputs: Sequence[Tensor], grads: list[Tensor | None]) -> None:
        """CheckpointFunction.backward: the forward again, with gradients, and then its backward, to ``inputs``."""
        fn, others, autocast, outputs = region
        for i, output in enumerate(outputs):  # materialize_grads
            if output is not None and grads[i] is None:
                shape, dtype = output
                grads[i] = self.new(shape, dtype, "zeros")
        taken = iter(inputs)
        args = [next(taken) if each is _TENSOR else each for each in others]
        outer = self._inner, self.component, self._context, self._held_in_context, self._leaves
        self._inner, self.component, self.grad_enabled = True, TEMPORARY, True
        self._context, self._held_in_context, self._leaves = [], [], []
        start, watched = len(self.sizes), len(self._watched)
        with self.autocasting(autocast):
            out = fn(*args)
        self.recomputed.append((start, len(self.sizes)))
        roots: list[tuple[Node, int, Tensor]] = []
        for x, grad in zip(out if isinstance(out, tuple) else (out,), grads, strict=True):
            if x is not None and x.node.__class__ is Node and grad is not None:
                roots.append((x.node, x.slot, grad))
        self._drive(roots)
        held = [x.node.grad for x in self._held_leaves if isinstance(x.node, AccumulateGrad)]
        self._keep_by_layer([grad for grad in held if grad is not None])
        while len(self._watched) > watched:  # at the region's beginning, with no node of their own
            entered = self._watched.pop()
            self.events.append(Event(len(self.log), "pre_backward", entered[2]))
            self._leave(entered)
        self.events += [Event(len(self.log), "drop", subject) for subject in self._held_in_context]
        self._inner, self.component, self._context, self._held_in_context, self._leaves = outer

    def _unpack(self, packed: _Packed) -> Recomputed:
        frame = packed.frame
        if frame.recomputed is None:
            frame.recomputed = []
            outer = (self._recording, self._record_limit, self.grad_enabled, self.component, self._context)
            self._context, self._held_in_context = [], []  # the recomputed graph dies with the recomputation
            self._recording, self._record_limit, self.grad_enabled = frame.recomputed, frame.count, True
            self.component = TEMPORARY
            start = len(self.sizes)
            try:
                with self.autocasting(frame.autocast):
                    frame.fn(*frame.args)
            except StopRecompute:
                pass
            finally:
                self.recomputed.append((start, len(self.sizes)))
                self._recording, self._record_limit, self.grad_enabled, self.component, self._context = outer
                self.events += [Event(len(self.log), "drop", subject) for subject in self._held_in_context]
        recomputed = frame.recomputed
        end = packed.start + packed.length
        tensors = Recomputed(recomputed[packed.start : end])
        for i in range(packed.start, end):
            recomputed[i] = None
        return tensors

    # -- backward ----------------------------------------------------------------------------------------------

    def backward(self, loss: Tensor) -> None:
        """Run the graph of the loss, and let it die."""
        root: Any = loss.node
        roots = [(root, 0, self.new(loss.shape, loss.dtype, "ones_like"))]
        del loss, root
        self._drive(roots)
        boundaries = self._boundaries
        while boundaries:
            self.mark("layer_backward_end", boundaries.pop()[1])
        if self.steps_in_backward:
            self.events.append(Event(len(self.log), "step", 0))
        self._leaves.clear()
        self._held_leaves.clear()
        self._context.clear()
        self.grad_enabled = True

    def _drive(self, roots: list[tuple[Node, int, Tensor]]) -> None:
        """Run a graph from ``roots``, node, output and gradient, which it takes: in torch's order, the newest ready
        node first, parameter sinks at once.
        """
        self.grad_enabled = False
        heap: list[tuple[int, Node]] = []
        for root, output, grad in roots:
            if root.grads is None:
                root.grads = [None] * root.outputs
                heappush(heap, (-root.seq, root))
            root.grads[output] = grad
        roots.clear()
        boundaries = self._boundaries
        waiting: list[AccumulateGrad] = []
        modules = self._watched  # taken from the end: the last that ended first
        running: list[tuple[int, int, int, bool]] = []
        root = grad = None  # type: ignore[assignment]
        while heap:
            node = heappop(heap)[1]
            while running and node.seq <= running[-1][0]:
                self._leave(running.pop())
            if boundaries and node.seq <= boundaries[-1][0]:
                left = boundaries[-1][1]
                flowing = self._gradients_flow([node, *(entry[1] for entry in heap), *waiting], left)
                while boundaries and node.seq <= boundaries[-1][0]:
                    self.mark("layer_backward_end", boundaries.pop()[1])
                if left is None and boundaries and boundaries[-1][1] is not None:
                    left = boundaries[-1][1][0], BEFORE
                if left is not None:
                    self.handed_back[left] = flowing
            while modules and node.seq <= modules[-1][1]:
                entered = modules.pop()
                if node.seq > entered[0] or entered[0] == entered[1]:  # one that does nothing has no node
                    self.events.append(Event(len(self.log), "pre_backward", entered[2]))
                    running.append(entered)
                    if node.seq <= entered[0]:
                        self._leave(running.pop())
            grads: Any = node.grads
            node.grads = None
            saved = node.saved
            node.saved = None
            if saved.__class__ is _Packed:
                saved = self._unpack(saved)
            if node.outputs == 1:
                grads = grads[0]
            held: list[int] = []
            if self.watches and saved:  # what it saved, an operation may let go early
                # A weight that was saved as itself comes with what it is then.
                held = [_weight_of(x) for x in saved if x is not None and x.__class__ is not Parameter]
            results = list(node.fn(self, node, grads, saved))
            if held:
                self.events += [Event(len(self.log), "drop", subject) for subject in held if subject]
            del grads, saved
            edges = node.edges
            node.edges = []
            for i, edge in enumerate(edges):
                if edge is None or results[i] is None:
                    continue
                target, slot = edge
                buffer = target.grads
                if buffer is None:
                    size = 1 if target.__class__ is AccumulateGrad else target.outputs
                    target.grads = buffer = [None] * size
                    if target.__class__ is Node:
                        heappush(heap, (-target.seq, target))
                if buffer[slot] is None:
                    buffer[slot] = results[i]
                    results[i] = None
                else:
                    self._accumulate(buffer, slot, results, i)
                if target.__class__ is AccumulateGrad:
                    target.pending -= 1
                    if target.pending <= 0:
                        self._sink(target)
                    else:
                        waiting.append(target)
            target = buffer = None  # a gradient that was added to another one dies here
            del results, edges, node
        while running:
            self._leave(running.pop())
        for sink in waiting:  # a weight used where the loss does not reach
            if sink.grads is not None:
                self._sink(sink)

    def _leave(self, watched: tuple[int, int, int, bool]) -> None:
        """The backward of a watched module is done."""
        if watched[3]:
            self.events.append(Event(len(self.log), "post_backward", watched[2]))
        elif self.flat_parameters:
            self.events.append(Event(len(self.log), "end_backward", watched[2]))

    def _gradients_flow(self, targets: Sequence[Node | AccumulateGrad], left: LayerKey | None) -> list[Handed]:
        """At the border of the layer that is left: the gradients on their way pass from one layer to the next."""
        found = []
        for target in targets:
            grads: Any = target.grads or ()
            for slot in range(len(grads)):
                grad = grads[slot]
                if grad is not None:
                    owners = getrefcount(grad), getrefcount(grad.storage)
                    state = grad.is_view, owners, grad.dtype, grad.shape, grad.strides, target.__class__
                    found.append(Handed(grad.storage.id, state))
                    if left is not None and grad.storage.id not in self.flowing:
                        self.passed.add(grad.storage.id)
                    self.flowing.add(grad.storage.id)
                    if self.components[grad.storage.id] == ACTIVATION:
                        # Written over what was saved, but it stands for the gradients of layers where that is not so.
                        self.tag(grad, TEMPORARY)
        return found

    def _accumulate(self, buffer: list[Any], slot: int, results: list[Any], i: int) -> None:
        """InputBuffer::accumulate: into the old gradient if nobody else holds it, else into a new tensor."""
        old = buffer[slot]
        if self.accumulate_in_place and not old.is_view and _owners(buffer, slot, 1) == _SOLE_OWNER:
            results[i] = None
            return
        buffer[slot] = self.new(
            old.shape, promote(old.dtype, results[i].dtype), "accumulate", dense_like(old.shape, old.strides)
        )
        results[i] = None

    def _sink(self, sink: AccumulateGrad) -> None:
        """AccumulateGrad: keep the gradient itself where nobody else holds it and its layout fits, else a copy."""
        buffer: Any = sink.grads
        sink.grads = None
        sink.pending = 0
        sink.reached = True
        if sink.accumulated:
            buffer[0] = None  # added in place to the gradient that is there, and let go before the hook
            self._hand_over(sink, -1)
            return
        grad = buffer[0]
        # A view is kept too, and with it all of the storage it looks at.
        if _owners(buffer, 0, 1)[0] != _SOLE_OWNER[0] or not _obeys_layout(grad, sink):
            grad = self.new(sink.shape, grad.dtype, "clone_grad")
        if not sink.is_weight:
            sink.grad = grad
            return
        if grad.storage.id in self.passed:
            self.passed_gradients.add(grad.storage.id)
        else:
            self.components[grad.storage.id] = GRADIENT
        if not self._hand_over(sink, grad.storage.id):
            sink.grad = grad

    def _hand_over(self, sink: AccumulateGrad, storage: int) -> bool:
        """A post-accumulate-grad hook: whether an engine has taken the gradient."""
        if self.engine_takes_gradients:
            self.events.append(Event(len(self.log), "gradient", sink.leaf, storage))
        return self.engine_takes_gradients


def _obeys_layout(grad: Tensor, sink: AccumulateGrad) -> bool:
    """obeys_layout_contract in autograd/utils/grad_layout_contract.h: strides matter where there is more than one."""
    if grad.strides == sink.strides:
        return True
    same = zip(grad.shape, grad.strides, sink.strides, strict=True)
    return all(stride == wanted if size != 1 else stride != 0 for size, stride, wanted in same)


def _checkpoint_backward(tape: Tape, node: Node, grads: Any, saved: Any) -> Sequence[Tensor | None]:
    inputs = [_detached(x) for x in saved]
    for x, own in zip(saved, inputs, strict=True):
        if x.node is not None:
            own.node = AccumulateGrad(own)
    tape._run_again(node.ctx, inputs, [grads] if node.outputs == 1 else list(grads))
    return [x.node.grad if isinstance(x.node, AccumulateGrad) else None for x in inputs]


def _give_back(tape: Tape, node: Node, grad: Any, saved: Any) -> Sequence[Tensor | None]:
    return (grad,)


def _weight_of(x: Tensor) -> int:
    """id() of the weight that x is, or is a view of; 0 is none."""
    storage = x.storage
    return storage.owner if storage.__class__ is Persistent else 0


def _needs_grad(out: Any) -> bool:
    """Whether a module has handed on what it was given, to which a gradient flows: dropout of 0 does."""
    return isinstance(out, Tensor) and out.node is not None


def _detached(x: Tensor) -> Tensor:
    """The same storage without a place in the graph."""
    return Tensor(x.shape, x.strides, x.dtype, x.storage)


def _owners(buffer: list[Any], slot: int, extra: int = 0) -> tuple[int, int]:
    old = buffer[slot]
    return getrefcount(old) - extra, getrefcount(old.storage)


def _probe() -> tuple[int, int]:
    """What ``_owners`` reports for a gradient that only the buffer holds; interpreters count differently."""
    tape = Tape()
    return _owners([tape.new((1,), float32, "probe")], 0)


_SOLE_OWNER = _probe()
