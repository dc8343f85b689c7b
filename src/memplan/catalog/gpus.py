"""GPUs by name: what torch sees of their memory, and how fast they are. The rows are in ``data/gpus.json``."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

from memplan.constants import Constant
from memplan.errors import ResolutionError, did_you_mean, suggest_names
from memplan.specs.hardware import ClusterSpec, GPUSpec
from memplan.units import GiB, MiB

__all__ = ["all_gpus", "find_gpu", "match_device", "parse_cluster"]

_DATA = Path(__file__).with_name("data") / "gpus.json"
_PUNCTUATION = re.compile(r"[^a-z0-9]+")
_VENDOR_WORDS = re.compile(r"(?:nvidia|amd|geforce|tesla|quadro|instinct)+")
_RESERVE_BOUND = GiB
"""A driver keeps 256 to 880 MiB of a board to itself (board totals in nvidia-smi against torch's): less than this."""


def find_gpu(name: str) -> GPUSpec:
    """Return the catalog's GPU of that name; ``cpu`` is the device that follows CPU dispatch rules.

    Case, punctuation and the words NVIDIA, AMD, GeForce, Tesla, Quadro and Instinct are ignored, and RTX
    may be left out; names as NVML reports them are known. The plain name of a GPU that exists on several
    boards is the SXM one's: ``A100-80GB``, ``H100-80GB``. Raises ResolutionError for an unknown name, with
    the nearest ones, and for a name that several GPUs share, with all of them.

    >>> find_gpu("NVIDIA A100-SXM4-80GB").name, find_gpu("geforce rtx 3090").name, find_gpu("t4").name
    ('A100-80GB', 'RTX3090', 'T4')
    """
    if not isinstance(name, str) or not _key(name):
        raise ResolutionError.at("gpu", name, "is not a GPU's name", "Name one, as in A100-80GB.")
    key, keys = _key(name), _rows_by_key()
    found = keys.get(key, ())
    if len(found) == 1:
        return _spec(found[0])
    shared = _names(found or (row for known, rows in keys.items() if known.startswith(key) for row in rows))
    if len(shared) > 1:
        raise ResolutionError.at("gpu", name, "names several GPUs", f"Use one of {', '.join(shared)}.")
    # Sought among the spellings, not the names alone: "geforce 3091" resembles 3090, not RTX3090.
    near = shared or _names(row for known in suggest_names(key, keys) for row in keys[known])
    hint = f"Did you mean {' or '.join(near)}?" if near else did_you_mean(name, _names(range(len(_rows()))))
    remedy = f"{hint} For another GPU give a GPUSpec, or the nearest one with gpu_memory."
    raise ResolutionError.at("gpu", name, "is not in the catalog", remedy)


def all_gpus() -> tuple[GPUSpec, ...]:
    """Return every GPU of the catalog, in its order (by vendor and generation); the ``cpu`` device is not one."""
    return tuple(_spec(index) for index, row in enumerate(_rows()) if row["vendor"] != "cpu")


def match_device(name: str, memory: int) -> GPUSpec | None:
    """Return the catalog's GPU for a device of this machine, or None if it is not in the catalog.

    ``name`` is what the driver reports, and must match a whole row: ``RTX 4090 Laptop GPU`` is not an
    RTX 4090. ``memory`` (bytes: the board's total, or what of it a program sees) tells boards of one name
    apart, as with the two RTX 3080, and refuses a board whose size the catalog does not have.
    """
    specs = [_spec(index) for index in _rows_by_key().get(_key(name), ())]
    sized = [s for s in specs if s.memory.low - _RESERVE_BOUND <= memory <= s.memory.high + _RESERVE_BOUND]
    return min(sized, key=lambda spec: abs(spec.memory_bytes - memory), default=None)


def parse_cluster(text: str) -> ClusterSpec:
    """Read ``NAME``, ``GPUSxNAME`` or ``NODESxGPUSxNAME``, the GPUs being those of one node. Raises SpecError.

    >>> cluster = parse_cluster("2x8xH100-80GB")
    >>> cluster.nodes, cluster.gpus, cluster.gpu.name
    (2, 16, 'H100-80GB')
    """
    return ClusterSpec.parse(text, find_gpu)


def _key(name: str) -> str:
    return _VENDOR_WORDS.sub("", _PUNCTUATION.sub("", name.lower()), count=1)


def _names(rows: Iterable[int]) -> list[str]:
    return [_rows()[row]["name"] for row in sorted(set(rows))]


@cache
def _rows() -> list[dict[str, Any]]:
    return json.loads(_DATA.read_bytes())["gpus"]  # type: ignore[no-any-return]


@cache
def _rows_by_key() -> dict[str, tuple[int, ...]]:
    keys: dict[str, tuple[int, ...]] = {}
    for index, row in enumerate(_rows()):
        for key in _spellings(row):
            keys[key] = (*keys.get(key, ()), index)
    return keys


def _spellings(row: dict[str, Any]) -> set[str]:
    keys = {_key(name) for name in (row["name"], *row["aliases"])}
    if "marketed_gb" in row:
        keys.add(f"{_key(row['name'])}{row['marketed_gb']}gb")
    return keys | {key.removeprefix("rtx") for key in keys}


@cache
def _spec(index: int) -> GPUSpec:
    row = dict(_rows()[index])
    low, expected, high = (mib * MiB for mib in row.pop("memory_mib"))
    memory = Constant(f"{row['name']} memory", expected, low, high, "B", row.pop("memory_source"))
    for lookup_only in ("aliases", "marketed_gb"):
        row.pop(lookup_only, None)
    return GPUSpec(memory=memory, **row)
