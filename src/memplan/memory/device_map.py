"""Where ``device_map="auto"`` and its like put a model's modules.

The procedure is transformers' (integrations/accelerate.py, 5.23: get_balanced_memory, infer_auto_device_map), which
fills the devices in order, module by module: a module that does not fit is taken apart unless it is a block that must
stay whole; the first GPU and the CPU keep room for the largest layer; tied weights go together. Modules without
parameters and buffers are left out of the answer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, TypeAlias

from memplan.errors import UnsupportedError

Device: TypeAlias = int | str
"""A GPU's index, ``cpu`` or ``disk``."""
Kind: TypeAlias = Literal["auto", "balanced", "balanced_low_0", "sequential"]

SINGLE_GPU_SHARE = 0.9
"""Of the only GPU's free memory (get_balanced_memory)."""
CPU_SHARE = 0.9
"""Of the host's available memory (get_max_memory)."""
QUANTIZED_SHARE = 0.9
"""Of every device, for what quantizing takes (adjust_max_memory of the bitsandbytes quantizers)."""
BALANCE_SLACK = 1.25
"""How many of the largest blocks a balanced GPU may hold above its share (get_balanced_memory)."""


@dataclass(slots=True, eq=False)
class Place:
    """A module as placement sees it: sizes in bytes, in the order of the model."""

    parameters: dict[str, int] = field(default_factory=dict)
    """Its own, without the further names of tied ones."""
    buffers: dict[str, int] = field(default_factory=dict)
    children: dict[str, Place] = field(default_factory=dict)
    whole: bool = False
    """Listed in ``_no_split_modules``."""

    def walk(self, path: str = "") -> Iterator[tuple[str, Place]]:
        """This module and all below it, with dotted paths."""
        yield path, self
        for name, child in self.children.items():
            yield from child.walk(_join(path, name))


class Model(NamedTuple):
    """A module tree and the groups of names that share one weight."""

    root: Place
    tied: Sequence[Sequence[str]] = ()


_Item: TypeAlias = tuple[str, Place | None]
"""A path with its module, or with None for a single tensor."""


def device_map(
    model: Model, kind: Kind, free: Mapping[int, int], cpu: int | None, quantized: bool = False
) -> dict[str, Device]:
    """Return module name -> device; ``""`` is the whole model.

    Args:
        model: what to place.
        kind: as ``device_map`` of from_pretrained, without ``max_memory``.
        free: bytes that each GPU has free, by its index.
        cpu: bytes that the host has available; None is more than enough.
        quantized: whether bitsandbytes quantizes the model.

    Raises UnsupportedError where transformers itself fails, on tied weights that end up apart.
    """
    sizes = _sizes(model.root)
    budget: dict[Device, float] = dict(free.items())
    budget["cpu"] = float("inf") if cpu is None else cpu * CPU_SHARE
    if kind != "sequential":
        _balance(budget, list(free), model.root, sizes, low_zero=kind == "balanced_low_0")
    if quantized:
        budget = {device: size * QUANTIZED_SHARE for device, size in budget.items()}
    return _merged(_Filling(model, sizes, budget).run())


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _sizes(root: Place) -> dict[str, int]:
    """Bytes of every module and every tensor, by path."""
    sizes: dict[str, int] = {}

    def size(place: Place, path: str) -> int:
        own = {_join(path, name): nbytes for name, nbytes in (*place.parameters.items(), *place.buffers.items())}
        sizes.update(own)
        sizes[path] = sum(own.values()) + sum(size(child, _join(path, n)) for n, child in place.children.items())
        return sizes[path]

    size(root, "")
    return sizes


def _balance(
    budget: dict[Device, float], gpus: Sequence[int], root: Place, sizes: Mapping[str, int], low_zero: bool
) -> None:
    """Limit every GPU but the last to an even share, and for ``low_zero`` the first to what the others cannot take."""
    if not gpus:
        return
    if len(gpus) == 1:
        low_zero = False
        budget[gpus[0]] *= SINGLE_GPU_SHARE
    whole = [sizes[path] for path, place in root.walk() if place.whole]
    leaves = [sum(place.parameters.values()) + sum(place.buffers.values()) for path, place in root.walk() if path]
    share = sizes[""] // (len(gpus) - 1 if low_zero else len(gpus))
    share += int(BALANCE_SLACK * max(max(whole, default=0), max(leaves, default=0)))
    for gpu in gpus[:-1]:
        if not (low_zero and gpu == 0):
            budget[gpu] = min(share, budget[gpu])
    if low_zero:
        left = max(0, sizes[""] - sum(budget[gpu] for gpu in gpus[1:]))
        budget[gpus[0]] = min(left, budget[gpus[0]])


class _Filling:
    """One run of infer_auto_device_map."""

    def __init__(self, model: Model, sizes: Mapping[str, int], budget: Mapping[Device, float]) -> None:
        self.sizes = sizes
        self.budget = budget
        self.tied = model.tied
        self.devices: list[Device] = [*budget, "disk"]
        gpus = [device for device in self.devices if isinstance(device, int)]
        self.keep_room = {gpus[0], "cpu"} if gpus else {"cpu"}
        self.current = 0
        self.used: dict[Device, float] = dict.fromkeys(self.devices, 0.0)
        self.result: dict[str, Device] = {}
        root = model.root
        self.todo: list[_Item] = [(name, None) for name in root.parameters]
        self.todo += list(root.children.items())
        self.todo += [(name, None) for name in root.buffers]
        self.largest, self.largest_names = self._largest_layer(self.todo)

    def run(self) -> dict[str, Device]:
        """Place everything."""
        while self.todo:
            path, place = self.todo.pop(0)
            self.largest_names = [n for n in self.largest_names if n != path and not n.startswith(path + ".")]
            if not self.largest_names:
                self._measure_largest()
            if not self._placed(path) and not self._taken_apart(path, place):
                self._next_device()
                self.todo.insert(0, (path, place))
        return self.result

    def _room(self) -> float:
        """Bytes that may still go to the current device."""
        device = self.devices[self.current]
        if device == "disk":
            return float("inf")
        return self.budget[device] - (self.largest if device in self.keep_room else 0) - self.used[device]

    def _placed(self, path: str) -> bool:
        """Put the module on the current device, with the modules that hold its tied weights, if they fit."""
        partners = self._partners(path)
        size = self.sizes[path] + sum(self.sizes[name] for name in partners)
        if size > self._room():
            return False
        device = self.devices[self.current]
        self.used[device] += size
        for name in (path, *partners):
            self.result[name] = device
        self.todo = [item for item in self.todo if item[0] not in partners]
        return True

    def _partners(self, path: str) -> list[str]:
        """The waiting modules that share a weight with this one."""
        partners: list[str] = []
        for group in self.tied:
            inside = [f"{path}." in f"{name}." for name in group]
            if any(inside) and not all(inside):
                for name in (name for name, within in zip(group, inside) if not within):
                    partner = next((p for p, _ in self.todo if name.startswith(f"{p}.")), None)
                    if partner is None:
                        raise UnsupportedError(
                            f"device_map: {path} shares a weight with {name}, which has been placed without it; "
                            "transformers fails there too. Use device_map sequential, or GPUs with more memory."
                        )
                    if partner not in partners:
                        partners.append(partner)
        return partners

    def _taken_apart(self, path: str, place: Place | None) -> bool:
        """Replace a module that does not fit by its parts: first a partner's, then its own."""
        partners = self._partners(path)
        if partners and self.sizes[path] <= self._room():
            for partner in partners:
                index = next(i for i, item in enumerate(self.todo) if item[0] == partner)
                parts = self._parts(*self.todo[index])
                if parts:
                    self.todo[index : index + 1] = parts
                    self.todo.insert(0, (path, place))
                    self._measure_largest()
                    return True
        parts = self._parts(path, place)
        if parts:
            self.todo = parts + self.todo
            self._measure_largest()
        return bool(parts)

    def _parts(self, path: str, place: Place | None) -> list[_Item]:
        """A module's parameters and children; none where it must stay whole. Its own buffers are not among them."""
        if place is None or place.whole or not place.children:
            return []
        parameters: list[_Item] = [(_join(path, name), None) for name in place.parameters]
        return parameters + [(_join(path, name), child) for name, child in place.children.items()]

    def _next_device(self) -> None:
        device = self.devices[self.current]
        if device in self.keep_room:
            self.used[device] += self.largest
        self.current += 1

    def _measure_largest(self) -> None:
        self.largest, self.largest_names = self._largest_layer([item for item in self.todo if item[1] is not None])

    def _largest_layer(self, items: Sequence[_Item]) -> tuple[int, list[str]]:
        """The most bytes of a module that is not taken apart, with the names of those that have them."""
        largest, names = 0, []
        stack = list(reversed(items))
        while stack:
            path, place = stack.pop()
            if place is not None and place.children and not place.whole:
                stack += reversed([(_join(path, name), child) for name, child in place.children.items()])
            elif self.sizes[path] > largest:
                largest, names = self.sizes[path], [path]
            elif self.sizes[path] == largest:
                names.append(path)
        return largest, names


def _merged(placed: dict[str, Device]) -> dict[str, Device]:
    """accelerate's clean_device_map: several modules below one name that share a device become that name."""
    below: dict[str, list[Device]] = {}
    for path, device in placed.items():
        for name in _parents(path):
            below.setdefault(name, []).append(device)
    merged = {name for name, devices in below.items() if len(devices) > 1 and len(set(devices)) == 1}
    return {next((name for name in _parents(path) if name in merged), path): device for path, device in placed.items()}


def _parents(path: str) -> list[str]:
    """The names of the modules that a path lies in, the whole model first."""
    parts = path.split(".")
    return [".".join(parts[:end]) for end in range(len(parts))]
