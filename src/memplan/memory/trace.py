"""Two training steps, and evaluation, as the caching allocator sees them: every allocation and free, phase by phase."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

from memplan.memory.allocator import (
    CachingAllocator,
    SizeClass,
    TraceSummary,
    reserved_upper_bound,
)
from memplan.memory.broadcast import broadcast
from memplan.memory.depth import EveryLayer
from memplan.memory.evaluation import FORWARDS, Kept, pile_up
from memplan.memory.optimizers import Optimizer, clip_grad_norm
from memplan.specs.training import AllocatorSpec
from memplan.tape.tensor import Parameter
from memplan.units import MiB

STEPS = 2
"""Training steps of a trace: the first makes the optimizer states, the second is like all that follow."""


def configured(conf: AllocatorSpec, limit: int | None = None) -> CachingAllocator:
    """Return an empty allocator with the settings of ``PYTORCH_ALLOC_CONF``."""
    return CachingAllocator(
        expandable_segments=conf.expandable_segments,
        roundup_power2_divisions=conf.roundup_power2_divisions,
        max_split_size=conf.max_split_size_mb * MiB if conf.max_split_size_mb is not None else None,
        max_non_split_rounding_size=conf.max_non_split_rounding_mb * MiB,
        large_segment_size=conf.large_segment_size_mb * MiB,
        limit=limit,
    )


class _Replay:
    """A caching allocator that logs are played on, and its peaks in every phase."""

    def __init__(self, conf: AllocatorSpec) -> None:
        self.allocator = configured(conf)
        self.peaks: dict[str, int] = {}
        self._peak_reserved = 0

    @property
    def peak_reserved(self) -> int:
        """The most reserved in any phase."""
        return max(self._peak_reserved, self.allocator.peak_reserved)

    def run(
        self, phase: str, log: Sequence[int], sizes: Sequence[int], addresses: list[int] | None = None
    ) -> list[int]:
        """Play a log, or a further part of one, and return where its tensors lie."""
        if addresses is None:
            addresses = [0] * len(sizes)
        self._peak_reserved = self.peak_reserved
        self.allocator.reset_peak()
        self.allocator.run(log, sizes, addresses, regardless=True)
        self.peaks[phase] = max(self.peaks.get(phase, 0), self.allocator.peak_allocated)
        return addresses

    def allocate(self, phase: str, sizes: Sequence[int]) -> list[int]:
        """Allocate tensors that stay, and return where they lie."""
        return self.run(phase, range(len(sizes)), sizes)

    def free(self, addresses: Iterable[int]) -> None:
        """Free what lies there, in that order."""
        addresses = list(addresses)
        self.allocator.run([~i for i in range(len(addresses))], (), addresses)


class Replayed(NamedTuple):
    """What the allocator's counters reach, in bytes."""

    peak_allocated: dict[str, int]
    """Per phase: first_step, forward, loss, backward, step, eval."""
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
    return _upper_bound(prefix, counts, micro_batches * STEPS, [(s, n, m * STEPS) for s, n, m in others])


def engines_bound(
    streams: Sequence[Mapping[int, tuple[int, int]]],
    counts: Mapping[int, tuple[int, int]],
    micro_batches: int,
    evaluated: Mapping[int, tuple[int, int]],
) -> int:
    """The same under an engine that shards: each of its ``streams``, the default one first, says for each size how many
    of the engine's blocks are alive at most, and allocated over all steps.

    ``evaluated`` says of a batch of evaluation what ``counts`` says of a micro-batch.
    """
    live: dict[int, tuple[int, int]] = {size: (peak, number * micro_batches) for size, (peak, number) in counts.items()}
    for size, (peak, number) in evaluated.items():
        most, allocated = live.get(size, (0, 0))
        live[size] = max(most, peak), allocated + number * FORWARDS
    on_streams = ([(size, most, number) for size, (most, number) in blocks.items()] for blocks in streams)
    return sum(_upper_bound({}, live if not place else {}, 1, blocks) for place, blocks in enumerate(on_streams))


def _upper_bound(
    prefix: Mapping[int, int],
    counts: Mapping[int, tuple[int, int]],
    micro_batches: int,
    others: Iterable[tuple[int, int, int]],
) -> int:
    live: dict[int, tuple[int, int]] = {size: (peak, number * micro_batches) for size, (peak, number) in counts.items()}
    for size, alive, allocated in others:
        peak, number = live.get(size, (0, 0))
        live[size] = (peak + alive, number + allocated)
    classes = [SizeClass(size, peak, number) for size, (peak, number) in live.items() if size]
    return reserved_upper_bound(TraceSummary(prefix, classes))


class Batch(NamedTuple):
    """What a micro-batch, or a batch of evaluation, allocates and frees in all layers."""

    every: EveryLayer
    sizes: Sequence[int]
    """Bytes of each storage."""
    input_count: int
    """How many of the first storages are the batch itself."""


class EvaluationLoop(NamedTuple):
    """Evaluation after the last step."""

    batch: Batch
    """Its forward."""
    kept: Kept
    ranks: int
    """Processes from which predictions are gathered."""
    limit: int | None
    """Bytes that CUDA has to give. Training fills the cache with blocks of other sizes, which the allocator returns
    before evaluation dies of them.
    """


def evaluation_bound(kept: Kept, ranks: int, counts: Mapping[int, tuple[int, int]]) -> int:
    """Bytes that evaluation cannot add to what training has reserved at most, by the same proof: a segment that is
    opened for it holds nothing else. ``counts`` says of a batch what :func:`reserved_bound` wants of a micro-batch.
    """
    alive: list[tuple[int, int, int]] = []
    for nbytes, _ in kept.predictions:
        alive += [(nbytes * ranks * batches, 1, 1) for batches in range(2, kept.steps + 1)]
        alive += [(nbytes, 2, kept.steps), (nbytes * ranks, 2, kept.steps)]
    return _upper_bound({}, counts, kept.steps, alive)


def sent_bound(
    parameters: Sequence[Parameter], held: Sequence[int], optimizer: Optimizer, sent: Sequence[int], conf: AllocatorSpec
) -> int:
    """Bytes of the segments that are opened for the copies in which DDP sends the model; the arguments are those of
    :func:`replay_steps`. Whoever comes later opens no more for them.
    """
    replay = _Replay(conf)
    _load(replay, parameters, held, optimizer)
    before = replay.peak_reserved
    _send(replay, sent)
    return replay.peak_reserved - before


def _load(replay: _Replay, parameters: Sequence[Parameter], held: Sequence[int], optimizer: Optimizer) -> None:
    replay.allocate("load", [*(p.nbytes for p in parameters), *held])
    if optimizer.made_at_construction:
        replay.allocate("load", [nbytes for p in _stepped(parameters) for nbytes in optimizer.state_bytes(p)])


def _send(replay: _Replay, sent: Sequence[int]) -> None:
    broadcast(sent, lambda nbytes: replay.allocate("load", [nbytes]), replay.free)


def _stepped(parameters: Iterable[Parameter]) -> list[Parameter]:
    return [p for p in parameters if p.node is not None and not p.unused]


def _evaluate(replay: _Replay, loop: EvaluationLoop) -> None:
    """The batches whose predictions stay on the GPU."""
    if loop.limit is not None:
        replay.allocator.confine(loop.limit)
    every, sizes = loop.batch.every, loop.batch.sizes

    def forward() -> None:
        addresses = replay.run("eval", every.log, sizes)
        replay.free(addresses[tensor] for tensor in every.left_alive)

    pile_up(loop.kept, loop.ranks, forward, partial(replay.allocate, "eval"), replay.free, gathers=loop.ranks > 1)


def replay_steps(
    parameters: Sequence[Parameter],
    held: Sequence[int],
    batches: Sequence[Batch],
    micro_batches: int,
    optimizer: Optimizer,
    workspaces: Sequence[int],
    conf: AllocatorSpec | None = None,
    waiting: Sequence[int] = (),
    evaluation: EvaluationLoop | None = None,
    *,
    sent: Sequence[int] = (),
    buckets: Sequence[int] = (),
    keeps_gradients: bool = False,
    gradients_in_buckets: bool = False,
) -> Replayed:
    """Load the weights, run two steps and the evaluation, and report the peaks.

    ``held`` are further sizes held throughout (buffers), as are DDP's ``buckets`` of gradients, before which it has
    ``sent`` the model; ``batches`` are the first micro-batch, and
    the last, which finds gradients if any does; ``micro_batches`` is how many of them a step has;
    ``workspaces`` are cuBLAS's, the first taken in forward, the others in backward; ``waiting`` are inputs of further
    micro-batches, which a step has from its start. With ``keeps_gradients`` they stay after
    a step, filled with zeros. With ``gradients_in_buckets`` backward ends with the gradients in
    the buckets, and their own memory free.
    """
    replay = _Replay(conf or AllocatorSpec())
    _load(replay, parameters, held, optimizer)
    _send(replay, sent)
    replay.allocate("load", buckets)
    replay.allocate("first_step", workspaces)
    trainable = [(p, 1) for p in _stepped(parameters)]
    clipping = [(nbytes, count) for nbytes, count in clip_grad_norm(trainable, optimizer.rules)]
    gradients: list[int] = []
    for step in range(STEPS):
        inputs = replay.allocate("forward" if step else "first_step", waiting)
        for number in range(micro_batches):
            finds = number > 0 or (keeps_gradients and step > 0)
            batch = batches[-1 if finds else 0]
            addresses: list[int] | None = None
            log, phases = batch.every.log, batch.every.phases
            for (phase, start), end in zip(phases, [*(position for _, position in phases[1:]), len(log)]):
                addresses = replay.run(phase if step else "first_step", log[start:end], batch.sizes, addresses)
            assert addresses is not None
            alive = [addresses[tensor] for tensor in batch.every.left_alive]
            # Inputs are allocated first; whatever else is left is a gradient, made where there is none.
            kept = len(alive) if finds else batch.input_count
            inputs += alive[:kept]
            gradients += alive[kept:]
        if gradients_in_buckets:
            replay.free(gradients)
            gradients = []
        phase = "step" if step else "first_step"
        replay.free(replay.allocate(phase, [nbytes for nbytes, count in clipping for _ in range(count)]))
        stepped = optimizer.step(first=step == 0)
        replay.run(phase, stepped.log, stepped.sizes)
        if not keeps_gradients:
            replay.free(gradients)
            gradients = []
        if step == STEPS - 1 and evaluation is not None:
            _evaluate(replay, evaluation)
        replay.free(inputs)
    return Replayed(replay.peaks, replay.peak_reserved)
