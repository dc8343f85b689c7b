"""Generation as ``model.generate`` runs it: a prefill, then a step per token with a growing key-value cache.

Sources: transformers/generation/utils.py (_sample, _prefill), cache_utils.py (DynamicCache), 5.23. Sampling takes the
logits of the last position in float32; one sequence is generated for each prompt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from memplan.architectures.nn import Build, Layers, Model, Module
from memplan.errors import UnsupportedError
from memplan.memory.allocator import CachingAllocator
from memplan.memory.timeline import Moment
from memplan.memory.trace import Replayed
from memplan.tape.tape import ACTIVATION, INPUT, Tape
from memplan.tape.tensor import Tensor, float32, int64

MOST_REPLAYED = 40_000
"""Pairs of keys and values that a replay lets grow; of a longer generation it takes every n-th step."""
DEFAULT_NEW_TOKENS = 20
"""GenerationConfig.max_length's default, which generate() adds to the prompt's length."""


@dataclass(frozen=True, slots=True)
class Call:
    """One forward pass with a cache: what it allocates and frees, and for which layer."""

    log: list[int]
    """Storage ids, as on the tape; what was alive before the call is allocated first."""
    layer: dict[int, int]
    """Storage -> the layer it belongs to: -1 before the first, one more than the last after it."""
    cached: frozenset[int]
    """Storages of keys and values that the cache has before or after the call."""


@dataclass(frozen=True, slots=True)
class Generation:
    """The two calls that can need most, on one tape."""

    tape: Tape
    prefill: Call
    decode: Call | None
    """The last step; None where the prefill gives the only token."""
    kv_cache: int
    """Bytes of the keys and values that the cache holds at the end: of the prompt and of every new token but the last,
    which no call has seen. transformers/generation/utils.py: _sample."""
    growth: list[list[tuple[int, int]]]
    """For each step between prefill and ``decode``, bytes of every layer's keys and values after it."""
    tuples: bool = False
    """A step holds the keys and values that it was handed until it is over."""

    @property
    def calls(self) -> dict[str, Call]:
        """Phase -> the call that it consists of."""
        return {"forward": self.prefill} | ({"step": self.decode} if self.decode is not None else {})


def generate(b: Build, root: Model, batch: int, prompt: int, new_tokens: int) -> Generation:
    """Run the prefill of ``batch`` prompts and the step that makes the last of ``new_tokens``.

    ``b`` needs a cache, and ``root`` all its layers and the head causal-lm. Raises UnsupportedError for an encoder with
    a decoder, and for an architecture whose file does not pass its keys and values through the cache.
    """
    tape, cache = b.tape, b.cache
    assert cache is not None
    stacks = [module.sequence() for _, module in root.named_modules() if isinstance(module, Layers)]
    if len(stacks) != 1:
        raise UnsupportedError("task: generation with an encoder and a decoder is not modelled. Use --task load.")
    layers = len(stacks[0])
    cache.windows = windows(root)
    tape.training = tape.grad_enabled = False
    with tape.tagged(INPUT):
        input_ids = tape.new((batch, prompt), int64, "input_ids")
    scores: list[Tensor] = []
    prefill = _call(b, root, input_ids, layers, scores)
    vocabulary = scores.pop().shape
    if len(cache.layers) != layers:
        raise UnsupportedError("task: generation is not modelled for this architecture: it keeps no key-value cache.")
    kv_cache = cache.nbytes(prompt + new_tokens - 1)
    growth = [cache.blocks(length) for length in _lengths(prompt, new_tokens, layers)]
    decode = None
    if new_tokens > 1:
        with tape.tagged(ACTIVATION):
            cache.seed(prompt + new_tokens - 2)
        with tape.tagged(INPUT):
            input_ids = tape.new((batch, prompt + new_tokens - 1), int64, "input_ids")
            next_token = tape.new((batch, 1), int64, "next_token")
        scores.append(tape.new(vocabulary, float32, "next_token_logits"))  # of the step before
        decode = _call(b, root, next_token, layers, scores)
        scores.clear()
    return Generation(tape, prefill, decode, kv_cache, growth, cache.tuples)


def _lengths(prompt: int, new_tokens: int, layers: int) -> range:
    """The cache's lengths after the steps between the prefill and the last one; every n-th of very many."""
    steps = max(0, new_tokens - 2)
    return range(prompt + 1, prompt + 1 + steps, 1 + steps * layers // MOST_REPLAYED)


def windows(root: Module) -> list[int | None]:
    """The sliding window of each layer, None where it sees everything."""
    config: Any = getattr(root, "c", None)
    if not hasattr(config, "windows"):
        return []
    # DynamicSlidingWindowLayer keeps [-window + 1 :], which for a window of 1 is everything.
    return [None if config.windows[kind] == 1 else config.windows[kind] for kind in config.layer_types]


def _call(b: Build, root: Model, input_ids: Tensor, layers: int, scores: list[Tensor]) -> Call:
    """One forward pass, and the sampling after it. ``scores`` are those of the step before, a local of the loop that
    lives until this step's are there.
    """
    tape, cache = b.tape, b.cache
    assert cache is not None
    freed = {~event for event in tape.log if event < 0}
    log = [event for event in tape.log if event >= 0 and event not in freed]
    layer = dict.fromkeys(log, -1)
    layer.update((x.storage.id, index) for index, pair in enumerate(cache.layers) for x in pair)
    cached = {x.storage.id for pair in cache.layers for x in pair}
    begun, first_mark = len(tape.log), len(tape.marks)
    _, logits = root(input_ids, None)
    scores[:] = [tape.new((logits.shape[0], logits.shape[-1]), float32, "next_token_logits")]
    del logits
    cache.step(input_ids.shape[1])
    cached |= {x.storage.id for pair in cache.layers for x in pair}
    marks = [mark for mark in tape.marks[first_mark:] if mark.name == "layer"]
    starts = [begun, *(mark.position for mark in marks)]
    indices = [-1, *(layers if mark.layer is None else mark.layer[1] for mark in marks)]
    for start, end, index in zip(starts, [*starts[1:], len(tape.log)], indices, strict=True):
        layer.update((event, index) for event in tape.log[start:end] if event >= 0)
    return Call(log + tape.log[begun:], layer, frozenset(cached))


def fullest(generation: Generation, call: Call, devices: Sequence[object]) -> dict[object, Moment]:
    """The fullest moment of a call on each device.

    ``devices`` are those of what comes before the layers, of each layer, and of what comes after. What a layer hands
    to the next counts where it was made.
    """
    moments = {device: Moment() for device in devices}
    best = {device: Moment() for device in devices}
    for event in call.log:
        storage = event if event >= 0 else ~event
        now = moments[devices[call.layer[storage] + 1]]
        size = generation.tape.sizes[storage] if event >= 0 else -generation.tape.sizes[storage]
        now.total += size
        now.parts[generation.tape.components[storage]] += size
        highest = best[devices[call.layer[storage] + 1]]
        if now.total > highest.total:
            highest.total, highest.parts = now.total, list(now.parts)
    return best


def alive_at_peak(generation: Generation, call: Call, devices: Sequence[object], device: object) -> set[int]:
    """The storages of :func:`fullest`'s moment on one device."""
    sizes = generation.tape.sizes
    mine = [event for event in call.log if devices[call.layer[event if event >= 0 else ~event] + 1] == device]
    heights = list(accumulate(sizes[event] if event >= 0 else -sizes[~event] for event in mine))
    until = heights.index(max(heights)) + 1 if heights else 0
    made = {event for event in mine[:until] if event >= 0}
    return made - {~event for event in mine[:until] if event < 0}


def replay(generation: Generation, allocator: CachingAllocator, devices: Sequence[object], device: object) -> Replayed:
    """Run prefill, growth and last step on one GPU's allocator, which holds the weights already."""
    mine = [index for index, where in enumerate(devices[1:-1]) if where == device]
    peaks: dict[str, int] = {}
    allocator.reset_peak()
    alive = _replay_call(generation, generation.prefill, allocator, devices, device, {})
    peaks["forward"] = allocator.peak_allocated
    if generation.decode is not None:
        allocator.reset_peak()
        caches = [[alive[storage] for storage in alive if generation.prefill.layer[storage] == layer] for layer in mine]
        growth = [[blocks[layer] for layer in mine] for blocks in generation.growth]
        _grow(allocator, caches, growth, at_once=generation.tuples)
        seeded = [storage for storage in generation.decode.log if storage >= 0]
        held: dict[int, int] = {}
        for pair, layer in zip(caches, mine, strict=True):
            storages = [storage for storage in seeded if generation.decode.layer[storage] == layer][: len(pair)]
            held.update(zip(storages, pair, strict=True))
        _replay_call(generation, generation.decode, allocator, devices, device, held)
        peaks["step"] = allocator.peak_allocated
    return Replayed(peaks, allocator.peak_reserved)


def _replay_call(
    generation: Generation,
    call: Call,
    allocator: CachingAllocator,
    devices: Sequence[object],
    device: object,
    held: Mapping[int, int],
) -> dict[int, int]:
    """Returns the addresses of what the call leaves alive; ``held`` are those of what is there already."""
    sizes = generation.tape.sizes

    def is_here(event: int) -> bool:
        storage = event if event >= 0 else ~event
        return devices[call.layer[storage] + 1] == device and sizes[storage] > 0

    events = [event for event in call.log if event not in held and is_here(event)]
    addresses = [held.get(storage, 0) for storage in range(len(sizes))]
    allocator.run(events, sizes, addresses)
    alive = dict.fromkeys([*held, *(event for event in events if event >= 0)])
    for event in events:
        if event < 0:
            del alive[~event]
    return {storage: addresses[storage] for storage in alive}


def _grow(
    allocator: CachingAllocator, caches: list[list[int]], steps: Sequence[Sequence[tuple[int, int]]], at_once: bool
) -> None:
    """Keys and values of each layer grow step by step: made anew, then the old ones are freed; or all at once then."""
    addresses = [address for cache in caches for address in cache]
    firsts = [0, *accumulate(map(len, caches))]
    now = list(range(len(addresses)))
    events: list[int] = []
    sizes = [0] * len(addresses)
    for step in steps:
        freed: list[int] = []
        for first, blocks in zip(firsts, step):
            for place, nbytes in enumerate(blocks, start=first):
                events.append(len(sizes))
                (freed if at_once else events).append(~now[place])
                now[place] = len(sizes)
                sizes.append(nbytes)
        events += freed
    addresses += [0] * (len(sizes) - len(addresses))
    allocator.run(events, sizes, addresses)
    for first, cache in zip(firsts, caches):
        cache[:] = [addresses[number] for number in now[first : first + len(cache)]]
