"""Two training steps as the caching allocator sees them: every allocation and free, phase by phase."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from memplan.memory.allocator import CachingAllocator, SizeClass, TraceSummary, reserved_upper_bound
from memplan.memory.optimizers import Optimizer, clip_grad_norm
from memplan.tape.tape import Tape
from memplan.tape.tensor import Parameter

STEPS = 2
"""Training steps of a trace: the first makes the optimizer states, the second is like all that follow."""


@dataclass(slots=True)
class Trace:
    """Allocations and frees in the order of time, cut into sections that carry a phase's name."""

    sizes: list[int] = field(default_factory=list)
    sections: list[tuple[str, list[int]]] = field(default_factory=list)

    def begin(self, phase: str) -> None:
        """Further events belong to ``phase``."""
        self.sections.append((phase, []))

    def allocate(self, nbytes: int) -> int:
        """A new tensor; returns its number."""
        self.sizes.append(nbytes)
        self.sections[-1][1].append(len(self.sizes) - 1)
        return len(self.sizes) - 1

    def free(self, tensors: Iterable[int]) -> None:
        """Free the tensors, in that order."""
        self.sections[-1][1].extend(~i for i in tensors)

    def append(self, log: Sequence[int], sizes: Sequence[int], cuts: Sequence[tuple[str, int]]) -> list[int]:
        """Add a tape's log; ``cuts`` are (phase, position). Returns the tensors that it leaves alive."""
        offset = len(self.sizes)
        self.sizes.extend(sizes)
        shifted = [e + offset if e >= 0 else e - offset for e in log]
        ends = [position for _, position in cuts[1:]] + [len(log)]
        for (phase, start), end in zip(cuts, ends):
            self.begin(phase)
            self.sections[-1][1].extend(shifted[start:end])
        alive = {e for e in shifted if e >= 0}
        alive.difference_update(~e for e in shifted if e < 0)
        return sorted(alive)


@dataclass(frozen=True, slots=True)
class Replayed:
    """What the allocator's counters reach, in bytes."""

    peak_allocated: dict[str, int]
    """Per phase: first_step, forward, loss, backward, step."""
    peak_reserved: int


def reserved_bound(
    parameters: Iterable[tuple[Parameter, int]],
    held: Iterable[int],
    counts: Mapping[int, tuple[int, int]],
    micro_batches: int,
    others: Iterable[tuple[int, int, int]],
) -> int:
    """Bytes that the replay's peak reserved cannot exceed, without it; proven in :func:`reserved_upper_bound`.

    ``held`` lives from loading on; ``counts`` says for each size how many tensors a micro-batch has alive at most and
    allocates; ``others`` are (bytes, how many alive at most, how many that a step allocates): optimizer states,
    workspaces, temporaries.
    """
    prefix: Counter[int] = Counter(held)
    for p, count in parameters:
        prefix[p.nbytes] += count
    live: dict[int, tuple[int, int]] = {
        size: (peak, number * micro_batches * STEPS) for size, (peak, number) in counts.items()
    }
    for size, alive, allocated in others:
        peak, number = live.get(size, (0, 0))
        live[size] = (peak + alive, number + allocated * STEPS)
    classes = [SizeClass(size, peak, number) for size, (peak, number) in live.items() if size]
    return reserved_upper_bound(TraceSummary(prefix, classes))


def cuts(tape: Tape) -> list[tuple[str, int]]:
    """Where forward, loss and backward begin in the tape's log."""
    found = [("forward", 0)]
    found += [(mark.name, mark.position) for mark in tape.marks if mark.name in ("loss", "backward")]
    return found


def replay_steps(
    parameters: Sequence[Parameter],
    held: Sequence[int],
    micro_batches: Sequence[Tape],
    optimizer: Optimizer,
    workspaces: Sequence[int],
) -> Replayed:
    """Load the weights, run two steps and report the peaks.

    ``held`` are further sizes held throughout (buffers, DDP's buckets); ``micro_batches`` are the tapes of a step's
    micro-batches; ``workspaces`` are cuBLAS's, the first taken in forward, the others in backward.
    """
    trace = Trace()
    trace.begin("load")
    for p in parameters:
        trace.allocate(p.nbytes)
    for nbytes in held:
        trace.allocate(nbytes)
    trainable = [p for p in parameters if p.node is not None]
    if optimizer.made_at_construction:
        for p in trainable:
            for nbytes in optimizer.state_bytes(p):
                trace.allocate(nbytes)
    for step in range(STEPS):
        gradients: list[int] = []
        inputs: list[int] = []
        for number, tape in enumerate(micro_batches):
            if step == 0 and number == 0:
                trace.begin("first_step")
                for nbytes in workspaces:
                    trace.allocate(nbytes)
            places = cuts(tape)
            if step == 0:
                places = [("first_step", position) for _, position in places]
            for tensor in trace.append(tape.log, tape.sizes, places):
                # Inputs are allocated first; whatever else is left is a gradient.
                (inputs if number or len(inputs) < tape.input_count else gradients).append(tensor)
        phase = "step" if step else "first_step"
        trace.begin(phase)
        clipping = clip_grad_norm([(p, 1) for p in trainable], optimizer.rules)
        trace.free([trace.allocate(nbytes) for nbytes, count in clipping for _ in range(count)])
        stepped = optimizer.step(first=step == 0)
        trace.append(stepped.log, stepped.sizes, [(phase, 0)])
        trace.free(gradients)
        trace.free(inputs)
    allocator = CachingAllocator()
    peaks: dict[str, int] = {}
    reserved = 0
    addresses = [0] * len(trace.sizes)
    malloc, free, sizes = allocator.malloc, allocator.free, trace.sizes
    for phase, events in trace.sections:
        allocator.reset_peak()
        for event in events:
            if event >= 0:
                addresses[event] = malloc(sizes[event])
            else:
                free(addresses[~event])
        peaks[phase] = max(peaks.get(phase, 0), allocator.peak_allocated)
        reserved = max(reserved, allocator.peak_reserved)
    return Replayed(peaks, reserved)
