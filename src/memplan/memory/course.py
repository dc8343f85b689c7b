"""A micro-batch as an engine sees it: stretches of a tape's log between the moments at which it acts.

Forward and backward are the same under every engine; what differs is what the engine holds at each moment. So the tape
runs once, and an engine is played over it: at each event it allocates and frees on a :class:`Ledger`, which knows
what is alive on the tape at that moment.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from operator import add
from typing import Literal

from memplan.errors import UnsupportedError
from memplan.memory.optimizers import OUTSIDE
from memplan.memory.timeline import COMPONENTS, Segment, Unrolled
from memplan.tape.tape import Event, Tape

_UNREACHED = (
    "model: a weight of its layers is used where the loss does not reach, so that its gradient is late, which is not "
    "modelled with an engine. Use strategy single or ddp."
)
Key = tuple[int, int]
"""A weight or a module of the whole model: the number of the made one that stands for it, and the layer, or OUTSIDE."""

Parts = dict[str, int]
"""Component -> bytes alive."""

DEFAULT_STREAM = 0
"""On which everything runs but what an engine puts on a stream of its own. The caching allocator has pools for each:
what is allocated while one stream is current never serves another.
"""


@dataclass(slots=True)
class Leg:
    """A stretch of the log that ends where an engine acts, or where its segment ends."""

    segment: Segment
    start: int
    end: int
    net: list[int]
    """Bytes by which it grows, by the tape's component."""
    total: int
    """The sum of ``net``."""
    peak: int
    """The most above its start."""
    event: Event | None = None
    """What an engine hooks into at its end."""


@dataclass(frozen=True, eq=False)
class Course:
    """The legs of the whole model, in the order in which they run, each with the weight or module of its event."""

    unrolled: Unrolled
    legs: list[tuple[Leg, Key | None]]

    @cached_property
    def stretches(self) -> list[tuple[Leg, str | None, str | None, Key | None]]:
        """The legs, each with the phase if that begins, and with what an engine hooks into at its end."""
        found: list[tuple[Leg, str | None, str | None, Key | None]] = []
        phase = ""
        for leg, key in self.legs:
            begins = None if leg.segment.phase == phase else leg.segment.phase
            phase = leg.segment.phase
            found.append((leg, begins, None if leg.event is None else leg.event.kind, key))
        return found

    @property
    def moments(self) -> tuple[tuple[object, ...], ...]:
        """All that an engine finds as it is played over it: phases, events, and the bytes of gradients."""
        sizes = self.unrolled.tape.sizes
        return tuple(
            [
                (leg.segment.phase,)
                if (event := leg.event) is None
                else (leg.segment.phase, event.kind, key, sizes[event.storage] if event.storage >= 0 else -1)
                for leg, key in self.legs
            ]
        )


def course(unrolled: Unrolled, numbers: Mapping[int, Key], *, measured: bool = True) -> Course:
    """Cut the whole model's log at the tape's events; a replay needs no legs that are ``measured``.

    ``numbers`` gives, by id(), the key of every made weight and module: OUTSIDE for one that is in no layer.
    """
    cut: dict[int, list[Leg]] = {}
    found: list[tuple[Leg, Key | None]] = []
    final = {id(segment): i for i, (segment, _) in enumerate(unrolled.runs) if segment.last}
    passed: Counter[tuple[int, str]] = Counter()
    for position, (segment, count) in enumerate(unrolled.runs):
        legs = cut.get(id(segment))
        if legs is None:
            legs = cut[id(segment)] = list(_legs(unrolled, segment, measured))
        for _ in range(count):
            layer = OUTSIDE
            if segment.layer is not None:
                stack = segment.layer[0]
                depth = len(unrolled.stacks[stack])
                layer = passed[stack, segment.phase] % depth
                passed[stack, segment.phase] += 1
                if segment.phase == "backward":
                    layer = depth - 1 - layer
            for leg in legs:
                key = None if leg.event is None or leg.event.kind == "step" else numbers[leg.event.subject]
                if key is not None and key[1] != OUTSIDE and layer == OUTSIDE:
                    raise UnsupportedError(_UNREACHED)
                found.append((leg, key if key is None or key[1] == OUTSIDE else (key[0], layer)))
        if final.get(id(segment)) == position:
            found.append((_dying(unrolled, segment), None))
    return Course(unrolled, found)


def _legs(unrolled: Unrolled, segment: Segment, measured: bool) -> Iterator[Leg]:
    ends: list[tuple[int, Event | None]] = [(event.position, event) for event in unrolled.tape.events[segment.events]]
    start = segment.start
    for end, event in [*ends, (segment.end, None)]:
        leg = Leg(segment, start, end, [0] * len(COMPONENTS), 0, 0, event)
        for component, size in _changes(unrolled, leg) if measured else ():
            leg.net[component] += size
            leg.total += size
            leg.peak = max(leg.peak, leg.total)
        yield leg
        start = end


def _changes(unrolled: Unrolled, leg: Leg) -> Iterator[tuple[int, int]]:
    """Every allocation and free of a leg: its component, and the bytes. What an engine takes, it frees itself."""
    tape, taken, changes = unrolled.tape, unrolled.taken, unrolled.changes
    for event in tape.log[leg.start : leg.end]:
        if event >= 0:
            yield tape.components[event], changes[event]
        elif ~event not in taken:
            yield tape.components[~event], changes[event]


def _dying(unrolled: Unrolled, segment: Segment) -> Leg:
    """What dies with a segment's last repetition."""
    leg = Leg(segment, segment.end, segment.end, [0] * len(COMPONENTS), 0, 0)
    for storage in segment.last:
        leg.net[unrolled.tape.components[storage]] -= unrolled.tape.sizes[storage]
        leg.total -= unrolled.tape.sizes[storage]
    return leg


class Block:
    """Bytes that an engine holds in one place."""

    __slots__ = ("address", "component", "name", "nbytes", "place", "stream")

    def __init__(self, place: str, component: str, nbytes: int, name: str = "", stream: int = DEFAULT_STREAM) -> None:
        self.address = 0
        self.stream = stream
        """The GPU's, that was current when it was allocated."""
        self.place = place
        self.component = component
        self.nbytes = nbytes
        self.name = name
        """What it is, for an explanation."""


Move = Literal[
    "all_reduce", "all_gather", "reduce_scatter", "calls", "to_gpu", "to_host", "nvme_read", "nvme_write", "host_step"
]
"""What takes time beside the GPU's own work, in bytes: collectives by their larger side, copies over PCIe, reads and
writes of NVMe. Not in bytes: calls of collectives, and host_step, elements that the optimizer steps on the host."""

COLLECTIVES: frozenset[Move] = frozenset({"all_reduce", "all_gather", "reduce_scatter"})

WAITING = "inputs of the step's other micro-batches"
"""The name of the blocks of an engine's play that the size of the batch decides."""

_HOST = ("host", "pinned", "locked")
"""The places of host memory."""


class Ledger:
    """What is alive on GPU, host and NVMe while an engine is played, and the fullest moment of each phase.

    Places are ``gpu``, ``host`` (pageable), ``pinned`` (host, page-locked by torch), ``locked`` (host, page-locked by
    DeepSpeed), ``main`` (pageable, but the main process's alone) and ``nvme``. On the GPU blocks are multiples of 512
    bytes; pinned ones are powers of two (CachingHostAllocator.h); locked ones are pages (posix_memalign and mlock,
    deepspeed's pin_memory/page_alloc.cpp). The host is told of a node on which ``ranks`` ranks do the same, the main
    process among them.
    """

    measures = True
    """Whether it asks for the legs' growth and peak."""

    def __init__(self, pinned_in_powers_of_two: bool = True, ranks: int = 1) -> None:
        self.pinned_in_powers_of_two = pinned_in_powers_of_two
        self.ranks = ranks
        self.stream = DEFAULT_STREAM
        """The GPU's current one."""
        self.phase = "load"
        self._engine: dict[str, Parts] = {place: {} for place in ("gpu", *_HOST, "main", "nvme")}
        self._totals: dict[str, int] = dict.fromkeys(self._engine, 0)
        self._tape = [0] * len(COMPONENTS)
        self._tape_total = 0
        self._highest: dict[tuple[str, str], int] = {}
        self._fullest: dict[tuple[str, str], Parts] = {}
        self._rising = False
        """The host is at the phase's fullest moment, or above it, which has not been kept yet."""
        self.moves: list[Counter[Move]] = []
        """Of the running step, by micro-batch; what the step itself moves is with the last one's."""
        self.moves_of_step: list[Counter[Move]] = []
        """The same of the last step, once it is over."""

    # -- what engines do ---------------------------------------------------------------------------------------------

    def allocate(self, component: str, nbytes: int, place: str = "gpu", name: str = "") -> Block:
        """A block of ``nbytes``, rounded up as the place's allocator does; on the GPU it is the current stream's."""
        if place == "gpu":
            nbytes = (nbytes + 511) & -512
        elif place == "pinned" and nbytes and self.pinned_in_powers_of_two:
            nbytes = 1 << (nbytes - 1).bit_length()
        elif place == "locked":
            nbytes = (nbytes + 4095) & -4096
        parts = self._engine[place]
        parts[component] = parts.get(component, 0) + nbytes
        self._totals[place] += nbytes
        self._look(place)
        return Block(place, component, nbytes, name, self.stream)

    def free(self, *blocks: Block | None) -> None:
        """Give blocks back; None is none."""
        for block in blocks:
            if block is not None:
                if self._rising:
                    self._keep_host()
                self._engine[block.place][block.component] -= block.nbytes
                self._totals[block.place] -= block.nbytes
                block.nbytes = 0

    def on(self, stream: int) -> _On:
        """Within, ``stream`` is current, as in ``torch.cuda.stream``."""
        return _On(self, stream)

    def defer(self, *blocks: Block | None) -> None:
        """Give blocks back that ``record_stream`` has marked: the allocator has them once they are to be reused."""
        self.free(*blocks)

    def reuse(self, blocks: Iterable[Block]) -> None:
        """The CPU knows that the GPU is done with these, which it has deferred."""

    def move(self, kind: Move, amount: int) -> None:
        """The engine moves so many bytes, or steps so many elements on the host."""
        if self.moves and amount:
            moved = self.moves[-1]
            moved[kind] += amount
            if kind in COLLECTIVES:
                moved["calls"] += 1

    def briefly(self, component: str, nbytes: int, place: str = "gpu", name: str = "") -> None:
        """A block that lives for one call."""
        self.free(self.allocate(component, nbytes, place, name))

    def take(self, unrolled: Unrolled, leg: Leg) -> Block | None:
        """The gradient at a leg's end passes from the tape to the engine; None is one that was added to another."""
        if leg.event is None or leg.event.storage < 0:
            return None
        nbytes = unrolled.tape.sizes[leg.event.storage]
        self._tape[unrolled.tape.components[leg.event.storage]] -= nbytes
        self._tape_total -= nbytes
        parts = self._engine["gpu"]
        parts["gradients"] = parts.get("gradients", 0) + nbytes
        self._totals["gpu"] += nbytes
        return Block("gpu", "gradients", nbytes, "as autograd makes them")

    def empty_cache(self) -> None:
        """``torch.cuda.empty_cache()``: here nothing is cached."""

    def confine(self, limit: int) -> None:
        """CUDA has no more than ``limit`` bytes to give: here nothing is cached that it could take back."""

    # -- what the tape does ------------------------------------------------------------------------------------------

    def run(self, unrolled: Unrolled, leg: Leg) -> None:
        """The next stretch of the micro-batch, beside what the engine holds."""
        key = self.phase, "gpu"
        before = self._tape_total
        height = before + leg.peak + self._totals["gpu"]
        if leg.peak and height > self._highest.get(key, 0):
            self._highest[key] = height
            tape, total = list(self._tape), 0
            for component, size in _changes(unrolled, leg):
                tape[component] += size
                total += size
                if total == leg.peak:
                    break
            self._fullest[key] = self._sum(tape)
        self._tape = list(map(add, self._tape, leg.net))
        self._tape_total = before + leg.total

    def rewind(self) -> None:
        """Another micro-batch: what the last one left on the tape is gone."""
        self._tape = [0] * len(COMPONENTS)
        self._tape_total = 0

    # -- what came of it -----------------------------------------------------------------------------------------------

    def fullest(self, phase: str, place: str = "gpu") -> Parts:
        """The fullest moment of a phase, by component; ``host`` is all of it, ``pinned`` what of it is page-locked."""
        self._keep_host()
        return self._fullest.get((phase, place), {})

    def begin(self, phase: str) -> None:
        """Further moments belong to ``phase``, the present one too."""
        self._keep_host()
        self.phase = phase
        for place in self._engine:
            self._look(place)

    def _look(self, place: str) -> None:
        totals = self._totals
        if place == "gpu" or place == "nvme":
            key = self.phase, place
            height = totals[place] + (self._tape_total if place == "gpu" else 0)
            if height > self._highest.get(key, -1):
                self._highest[key] = height
                self._fullest[key] = self._sum(self._tape) if place == "gpu" else dict(self._engine[place])
            return
        # One memory: the fullest moment of all places together.
        height = (totals["host"] + totals["pinned"] + totals["locked"]) * self.ranks + totals["main"]
        key = self.phase, "host"
        if height > self._highest.get(key, -1):
            self._highest[key] = height
            self._rising = True

    def _keep_host(self) -> None:
        """Keep what is on the host, if that is the fullest moment of the phase; nothing has been freed since."""
        if self._rising:
            self._rising = False
            self._fullest[self.phase, "host"] = self._node((*_HOST, "main"))
            self._fullest[self.phase, "pinned"] = self._node(("pinned", "locked"))

    def _node(self, places: Iterable[str]) -> Parts:
        """What the ranks of a node have in some places of its host, by component."""
        parts: Parts = {}
        for place in places:
            ranks = 1 if place == "main" else self.ranks
            for name, size in self._engine[place].items():
                parts[name] = parts.get(name, 0) + size * ranks
        return parts

    def _sum(self, tape: list[int]) -> Parts:
        parts = dict(self._engine["gpu"])
        for name, size in zip(COMPONENTS, tape, strict=True):
            if size:
                parts[name] = parts.get(name, 0) + size
        return parts


class _On:
    """A context within which a stream is current."""

    __slots__ = ("_before", "_ledger", "_stream")

    def __init__(self, ledger: Ledger, stream: int) -> None:
        self._ledger = ledger
        self._stream = stream
        self._before = ledger.stream

    def __enter__(self) -> None:
        self._ledger.stream = self._stream

    def __exit__(self, *_: object) -> None:
        self._ledger.stream = self._before


class ExplainingLedger(Ledger):
    """A ledger that keeps what is alive on the GPU at one phase's fullest moment, block by block.

    It takes courses over tapes of all layers.
    """

    def __init__(self, explained: str) -> None:
        super().__init__()
        self._explained = explained
        self._blocks: dict[int, Block] = {}
        self._tensors: set[int] = set()
        self._running: Tape | None = None
        self.blocks: Counter[tuple[str, str, int]] = Counter()
        """The engine's at that moment: (component, name, bytes) -> how many."""
        self.tape: Tape | None = None
        self.tensors: frozenset[int] = frozenset()
        """The tape's storages at that moment."""

    def allocate(self, component: str, nbytes: int, place: str = "gpu", name: str = "") -> Block:
        before = self._height()
        block = super().allocate(component, nbytes, place, name)
        if place == "gpu":
            self._blocks[id(block)] = block
            self._keep(before, self._tensors)
        return block

    def free(self, *blocks: Block | None) -> None:
        for block in blocks:
            if block is not None:
                self._blocks.pop(id(block), None)
        super().free(*blocks)

    def take(self, unrolled: Unrolled, leg: Leg) -> Block | None:
        block = super().take(unrolled, leg)
        if block is not None and leg.event is not None:
            self._blocks[id(block)] = block
            self._tensors.discard(leg.event.storage)
        return block

    def rewind(self) -> None:
        self._tensors.clear()
        super().rewind()

    def begin(self, phase: str) -> None:
        before = self._height() if phase == self._explained else 0
        super().begin(phase)
        self._keep(before, self._tensors)

    def run(self, unrolled: Unrolled, leg: Leg) -> None:
        self._running = unrolled.tape
        before = self._height()
        super().run(unrolled, leg)
        fullest = set(self._tensors)
        if self._height() > before:
            total = 0
            for event in unrolled.tape.log[leg.start : leg.end]:
                if event >= 0:
                    fullest.add(event)
                    total += unrolled.tape.sizes[event]
                elif ~event not in unrolled.taken:
                    fullest.discard(~event)
                    total -= unrolled.tape.sizes[~event]
                if total == leg.peak:
                    break
        self._keep(before, fullest)
        for event in unrolled.tape.log[leg.start : leg.end]:
            if event >= 0:
                self._tensors.add(event)
            elif ~event not in unrolled.taken:
                self._tensors.discard(~event)

    def _height(self) -> int:
        return self._highest.get((self._explained, "gpu"), 0)

    def _keep(self, before: int, tensors: set[int]) -> None:
        if self.phase == self._explained and self._height() > before:
            self.blocks = Counter((each.component, each.name, each.nbytes) for each in self._blocks.values())
            self.tape, self.tensors = self._running, frozenset(tensors)
