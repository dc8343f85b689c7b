"""A model that is loaded, and perhaps generates, without being trained: on one GPU or spread by a device map."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from memplan.architectures.cache import DynamicCache
from memplan.architectures.nn import Layers, Model, Module
from memplan.engines.plain import Parts, total
from memplan.errors import SpecError, UnsupportedError
from memplan.memory import loading
from memplan.memory.allocator import OutOfMemoryError
from memplan.memory.device_map import Device, device_map
from memplan.memory.generation import DEFAULT_NEW_TOKENS, Call, Generation, alive_at_peak, fullest, generate, replay
from memplan.memory.loading import Held
from memplan.memory.timeline import COMPONENTS, Moment
from memplan.memory.trace import Replayed, configured
from memplan.specs.training import AllocatorSpec, TrainingSpec
from memplan.tape.dispatch import DeviceRules
from memplan.tape.tape import Tape

MakeGenerating = Callable[[Tape, DynamicCache], Module]
"""The model with all its layers, on a tape, its keys and values going through the cache."""


@dataclass(frozen=True, slots=True)
class Machine:
    """What a device map fills."""

    rules: DeviceRules
    gpus: int
    capacity: int | None
    """Bytes that torch sees on each GPU."""
    free: int | None
    """Of them, those that the process's context leaves."""
    limit: int | None
    """Of them, those that it leaves for certain: up to there the allocator keeps what it has cached."""
    host: int | None
    """Bytes of RAM."""
    workspaces: Sequence[int]
    """cuBLAS's, of a process without an autograd thread."""


@dataclass(frozen=True, slots=True)
class Inference:
    """The answer for the fullest GPU, and what lies elsewhere; in bytes."""

    placed: dict[str, Parts]
    """The fullest moment of each phase: load, forward (the prefill), step (the last token), idle."""
    replayed: Replayed | None
    """The allocator of the fullest GPU, weights, prefill and every further token; None on a CPU."""
    held: list[Held]
    """Every tensor of the model."""
    on_gpu: list[Held]
    """Those of them that the fullest GPU holds."""
    generation: Generation | None
    """The calls, for task generate."""
    alive: dict[str, set[int]]
    """Storages on that GPU at the fullest moment of phases forward and step."""
    device_map: dict[str, Device] | None
    on_host: int
    on_disk: int
    kv_cache: int | None
    refused: bool
    """transformers refuses to offload modules of a quantized model."""


def infer(root: Module, generating: MakeGenerating, training: TrainingSpec, machine: Machine) -> Inference:
    """Load ``root``, and for task generate run it. Raises SpecError and UnsupportedError."""
    held = loading.tensors(root)
    quantized = training.quantization is not None
    placement = _device_map(root, training, machine)
    groups = loading.by_device(held, placement or {"": 0})
    generation, devices = _generation(generating, training, machine, placement)
    best: tuple[int, int, dict[str, Parts], Replayed] | None = None
    for gpu in [device for device in groups if isinstance(device, int)] or [0]:
        on_gpu = groups.get(gpu, [])
        direct = quantized or placement is not None
        placed = _phases(loading.blocks(on_gpu), generation, devices, gpu, machine)
        conf = training.alloc_conf or AllocatorSpec()
        replayed = _replay(on_gpu, direct, generation, devices, gpu, machine, conf)
        height = max(total(parts) for parts in placed.values())
        if best is None or height > best[0]:
            best = (height, gpu, placed, replayed)
    assert best is not None
    _, fullest_gpu, placed, replayed = best
    on_host, on_disk = (sum(each.tensor.nbytes for each in groups.get(place, [])) for place in ("cpu", "disk"))
    return Inference(
        placed=placed,
        replayed=replayed if machine.rules.kind != "cpu" else None,
        held=held,
        on_gpu=groups.get(fullest_gpu, []),
        generation=generation,
        alive=_alive(generation, devices, fullest_gpu),
        device_map=placement,
        on_host=on_host,
        on_disk=on_disk,
        kv_cache=generation.kv_cache if generation is not None else None,
        refused=quantized and bool(on_host or on_disk),
    )


def _replay(
    held: Sequence[Held],
    direct: bool,
    generation: Generation | None,
    devices: Sequence[Device],
    gpu: int,
    machine: Machine,
    conf: AllocatorSpec,
) -> Replayed:
    """The GPU's allocator through loading and generation; without the limit if it cannot keep to it."""

    def run(limit: int | None) -> Replayed:
        allocator = configured(conf, limit)
        loaded = loading.load(held, direct=direct, capacity=machine.capacity, allocator=allocator)
        if generation is None:
            return Replayed({"load": loaded.peak_allocated}, loaded.peak_reserved)
        for nbytes in machine.workspaces:
            allocator.malloc(nbytes)
        ran = replay(generation, allocator, devices, gpu)
        return Replayed({"load": loaded.peak_allocated} | ran.peak_allocated, ran.peak_reserved)

    try:
        return run(machine.limit)
    except OutOfMemoryError:
        return run(None)


def _device_map(root: Module, training: TrainingSpec, machine: Machine) -> dict[str, Device] | None:
    if training.device_map is None:
        return None
    if machine.free is None:
        remedy = "Name it with --gpu, or give --gpu-memory."
        raise SpecError.at("device_map", training.device_map, "needs the GPU's memory", remedy)
    free = dict.fromkeys(range(machine.gpus), machine.free)
    quantized = training.quantization is not None
    return device_map(loading.placed_model(root), training.device_map, free, machine.host, quantized)


def _generation(
    make: MakeGenerating, training: TrainingSpec, machine: Machine, placement: Mapping[str, Device] | None
) -> tuple[Generation | None, list[Device]]:
    """The run, and the devices of what comes before the layers, of each layer, and of what comes after."""
    if training.task != "generate":
        return None, []
    cache = DynamicCache()
    root = make(Tape(machine.rules), cache)
    assert isinstance(root, Model)
    cache.tuples = not root.b.software.at_least("transformers", "4.42")
    new_tokens = training.max_new_tokens or DEFAULT_NEW_TOKENS
    generation = generate(root.b, root, training.micro_batch_size, training.seq_len, new_tokens)
    devices = _layer_devices(root, placement or {"": 0})
    if any(isinstance(device, str) for device in devices):
        raise UnsupportedError(
            "device_map: generation with modules on the CPU or the disk is not modelled. Use more or larger GPUs, or "
            "--task load to see where the modules go."
        )
    return generation, devices


def _layer_devices(root: Module, placement: Mapping[str, Device]) -> list[Device]:
    path, layers = next((path, module) for path, module in root.named_modules() if isinstance(module, Layers))
    blocks = [loading.device_of(f"{path}.{i}", placement) for i in range(len(layers.sequence()))]
    names = [each.name for each in loading.tensors(root)]
    outside = [name for name in names if not name.startswith(f"{path}.")]
    return [loading.device_of(outside[0], placement), *blocks, loading.device_of(outside[-1], placement)]


def _alive(generation: Generation | None, devices: Sequence[Device], gpu: int) -> dict[str, set[int]]:
    if generation is None:
        return {}
    return {name: alive_at_peak(generation, call, devices, gpu) for name, call in generation.calls.items()}


def _phases(
    nbytes: int, generation: Generation | None, devices: Sequence[Device], gpu: int, machine: Machine
) -> dict[str, Parts]:
    weights = {"weights": nbytes}
    placed: dict[str, Parts] = {"load": dict(weights)}
    if generation is None:
        return placed
    resting = weights | {"workspace": sum((nbytes + 511) & -512 for nbytes in machine.workspaces)}

    def during(call: Call) -> Parts:
        parts = dict(resting)
        moment = fullest(generation, call, devices).get(gpu, Moment())
        for name, nbytes in zip(COMPONENTS, moment.parts, strict=True):
            parts[name] = parts.get(name, 0) + nbytes
        return parts

    placed.update((name, during(call)) for name, call in generation.calls.items())
    placed["idle"] = dict(resting)
    return placed
