"""Loading a model: its footprint, where a device map puts it, and what the GPU holds on the way.

Sources: transformers/modeling_utils.py (get_memory_footprint, caching_allocator_warmup), core_model_loading.py
(convert_and_load_state_dict_in_model), integrations/bitsandbytes.py, 5.23; accelerate/big_modeling.py
(dispatch_model), 1.15; peft/utils/other.py (prepare_model_for_kbit_training), 0.21.2.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from memplan.adapters.quantization import Linear4bit, Linear8bitLt, is_packed
from memplan.architectures.nn import Embedding, Layers, Model, Module
from memplan.memory import device_map as placement
from memplan.memory.allocator import CachingAllocator
from memplan.memory.device_map import Device, Place
from memplan.tape.tensor import Buffer, Parameter

WARMUP_MARGIN = int(1.2 * 1024**3)
"""Bytes of the device that the allocator's warm-up leaves alone (caching_allocator_warmup)."""


class Held(NamedTuple):
    """One tensor of the whole model."""

    name: str
    tensor: Parameter | Buffer
    module: Module
    """Whose tensor it is."""

    @property
    def registered(self) -> bool:
        """Whether ``model.parameters()`` or ``model.buffers()`` lists it."""
        return not isinstance(self.tensor, Buffer) or self.tensor.registered


def tensors(root: Module) -> list[Held]:
    """Every tensor of the model in the order of ``named_parameters``, a tied weight once and under its first name.

    A model with a layer of each kind gives every layer's, as if all had been made.
    """
    found: list[Held] = []
    seen: set[int] = set()
    for path, module, repeated in _modules(root):
        for name, value in module.__dict__.items():
            if isinstance(value, (Parameter, Buffer)) and (repeated or id(value) not in seen):
                seen.add(id(value))
                found.append(Held(f"{path}.{name}" if path else name, value, module))
    return found


def _modules(module: Module, path: str = "", repeated: bool = False) -> Iterator[tuple[str, Module, bool]]:
    """Every module with its path, and whether it is a layer's that stands for several."""
    yield path, module, repeated
    for name, child, again in children(module):
        yield from _modules(child, f"{path}.{name}" if path else name, repeated or again)


def children(module: Module) -> Iterator[tuple[str, Module, bool]]:
    """Direct submodules with their names, every layer among them, and whether one has been given before."""
    if isinstance(module, Layers):
        made = dict(module.children())
        for i, index in enumerate(module.sequence()):
            yield str(i), made[str(index)], i != index
    else:
        for name, child in module.children():
            yield name, child, False


def footprint(held: Sequence[Held]) -> int:
    """What ``model.get_memory_footprint()`` returns: bytes of parameters and buffers, persistent or not."""
    return sum(each.tensor.nbytes for each in held if each.registered)


def blocks(held: Sequence[Held]) -> int:
    """Bytes of the blocks that the tensors take on a GPU, those that ``footprint`` does not count among them."""
    return sum((each.tensor.nbytes + 511) & -512 for each in held)


# -- device maps -------------------------------------------------------------------------------------------------------


def placed_model(root: Module) -> placement.Model:
    """The model as ``device_map`` sees it."""
    embeddings = {id(module.weight) for _, module in root.named_modules() if isinstance(module, Embedding)}
    tied = tied_names(root)
    listed = root.listed_as_tied if isinstance(root, Model) else {}
    for name, other in listed.items():
        embeddings.add(id(_parameter(root, name)))  # without a size of its own, as a head that is tied
        tied = [sorted([*group, name]) if other in group else group for group in tied]
    return placement.Model(_place(root, set(), embeddings), tied)


def _parameter(root: Module, name: str) -> Parameter:
    prefix, _, last = name.rpartition(".")
    return dict(dict(root.named_modules())[prefix].parameters())[last]


def tied_names(root: Module) -> list[list[str]]:
    """Groups of names that share one parameter."""
    names: dict[int, list[str]] = {}
    for prefix, module in root.named_modules():
        for name, parameter in module.parameters():
            names.setdefault(id(parameter), []).append(f"{prefix}.{name}" if prefix else name)
    return [sorted(group) for group in names.values() if len(group) > 1]


def _place(module: Module, seen: set[int], embeddings: set[int], repeated: bool = False) -> Place:
    """``seen`` are parameters placed before; a head that shares its weight with one of ``embeddings`` has none."""
    place = Place(whole=module.no_split)
    others = seen if isinstance(module, Embedding) else seen | embeddings
    for name, value in module.__dict__.items():
        if isinstance(value, Parameter) and (repeated or id(value) not in others):
            seen.add(id(value))
            place.parameters[name] = value.nbytes
        elif isinstance(value, Buffer) and value.registered:
            place.buffers[name] = value.nbytes
    for name, child, again in children(module):
        if _has_tensors(child):
            place.children[name] = _place(child, seen, embeddings, repeated or again)
    return place


def _has_tensors(module: Module) -> bool:
    if any(isinstance(value, (Parameter, Buffer)) for value in module.__dict__.values()):
        return True
    return any(_has_tensors(child) for _, child in module.children())


def by_device(held: Sequence[Held], device_map: Mapping[str, Device]) -> dict[Device, list[Held]]:
    """The tensors on each device. Buffers of offloaded modules stay on the first GPU (``offload_buffers=False``)."""
    gpus = [device for device in device_map.values() if isinstance(device, int)]
    found: dict[Device, list[Held]] = {}
    for each in held:
        device = device_of(each.name, device_map)
        if isinstance(device, str) and isinstance(each.tensor, Buffer) and gpus:
            device = gpus[0]
        found.setdefault(device, []).append(each)
    return found


def device_of(name: str, device_map: Mapping[str, Device]) -> Device:
    """The entry for the tensor or for the nearest module around it; the CPU where there is none."""
    parts = name.split(".")
    paths = (".".join(parts[:end]) for end in range(len(parts), -1, -1))
    return next((device_map[path] for path in paths if path in device_map), "cpu")


# -- on the way --------------------------------------------------------------------------------------------------------


class Loaded(NamedTuple):
    """What the allocator of one GPU has seen once the model is there, in bytes."""

    allocated: int
    peak_allocated: int
    peak_reserved: int


def load(
    held: Sequence[Held],
    *,
    direct: bool,
    capacity: int | None = None,
    prepare: bool = False,
    allocator: CachingAllocator | None = None,
) -> Loaded:
    """Replay the loading of these tensors, as they are before any preparation, on one GPU.

    ``direct``: from_pretrained puts each tensor on the GPU, as it does with a device map and under quantization;
    otherwise the model is moved there when it is complete. A quantized weight is there in the dtype it is loaded in,
    together with what quantizing it takes; one is quantized at a time. ``prepare``: prepare_model_for_kbit_training
    follows, which raises 16-bit tensors to float32 one by one.
    """
    allocator = allocator or CachingAllocator()
    if direct:
        _warm_up(allocator, held, capacity)
    order = sorted(held, key=lambda each: _natural(each.name)) if direct else held
    addresses: dict[str, int] = {}
    for each in order:
        scratch = [allocator.malloc(nbytes) for nbytes in _quantizing(each)]
        addresses[each.name] = allocator.malloc(each.tensor.nbytes)
        for address in scratch:
            allocator.free(address)
    if prepare:
        allocator.empty_cache()
        for each in held:
            if _is_16_bit(each):
                old = addresses[each.name]
                addresses[each.name] = allocator.malloc(2 * each.tensor.nbytes)
                allocator.free(old)
    return Loaded(allocator.allocated, allocator.peak_allocated, allocator.peak_reserved)


def _warm_up(allocator: CachingAllocator, held: Sequence[Held], capacity: int | None) -> None:
    """caching_allocator_warmup: one block as large as the model, taken and given back."""
    nbytes = footprint(held)
    if capacity is not None:
        nbytes = min(nbytes, capacity - WARMUP_MARGIN)
    if nbytes > 0:
        allocator.free(allocator.malloc(nbytes))


def _quantizing(each: Held) -> tuple[int, ...]:
    """Bytes beside the packed weight while it is made."""
    if isinstance(each.module, (Linear4bit, Linear8bitLt)) and each.tensor is each.module.weight:
        return each.module.quantizing
    return ()


def _is_16_bit(each: Held) -> bool:
    dtype = each.tensor.dtype
    return (
        isinstance(each.tensor, Parameter) and dtype.is_floating and dtype.itemsize == 2 and not is_packed(each.tensor)
    )


def _natural(name: str) -> list[tuple[bool, str, int]]:
    """The order in which a checkpoint is read: numbers by value, before words (dot_natural_key)."""
    matches = (_PART.fullmatch(part) for part in name.split("."))
    return [(bool(m[1]), m[1], int(m[2] or -1)) for m in matches if m is not None]


_PART = re.compile(r"(.*?)(\d*)")
