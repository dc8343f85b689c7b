"""This machine's own constants, measured by ``memplan calibrate`` and kept in a file of the user's.

One file per GPU model, ``memplan/profiles/<GPU>.json`` below XDG_CONFIG_HOME or ~/.config; MEMPLAN_PROFILE names
another, or none if it is empty. An estimate for this machine's GPU looks whether one file is there, and reads it if so.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

from memplan.constants import Constant
from memplan.errors import SpecError
from memplan.specs.hardware import GPUSpec

__all__ = ["CONSTANTS", "RATES", "VARIABLE", "calibrated", "profile_path"]

VARIABLE = "MEMPLAN_PROFILE"
RATES = ("matmul_bfloat16", "matmul_float16", "matmul_float32", "copy", "pcie")
"""Constants that decide a step's time."""
CONSTANTS = ("cuda_context", "cublas_workspace", "nccl", *RATES, "pcie_pageable")
_FIELDS = ("name", "value", "low", "high", "unit", "source")


def profile_path(gpu: str, environ: Mapping[str, str] = os.environ) -> Path | None:
    """Return where the profile of a GPU is kept; None if none is to be used."""
    named = environ.get(VARIABLE)
    if named is not None:
        return Path(named).expanduser() if named.strip() else None
    base = environ.get("XDG_CONFIG_HOME", "")
    # The XDG Base Directory Specification has a relative path ignored.
    folder = Path(base) if Path(base).is_absolute() else Path(environ.get("HOME") or "~").expanduser() / ".config"
    return folder / "memplan" / "profiles" / f"{gpu}.json"


def calibrated(gpu: GPUSpec, environ: Mapping[str, str] = os.environ) -> GPUSpec:
    """Return the GPU with this machine's constants, if there is a profile of it.

    Raises SpecError for a profile that cannot be read, and for one that MEMPLAN_PROFILE names and is not there.
    """
    path = profile_path(gpu.name, environ)
    if path is None:
        return gpu
    try:
        seen = path.stat()
    except OSError as error:
        if VARIABLE not in environ:
            return gpu
        reason = (error.strerror or str(error)).lower()
        raise SpecError.at(VARIABLE, str(path), f"cannot be read ({reason})", "Name a profile, or unset it.") from None
    measured_on, constants = _read(path, seen.st_mtime_ns, seen.st_size)
    return gpu.replace(measured=constants) if measured_on == gpu.name else gpu


@lru_cache(maxsize=4)
def _read(path: Path, _changed: int, _size: int) -> tuple[str, tuple[Constant, ...]]:
    """The GPU of a profile, and its constants."""
    try:
        profile = json.loads(path.read_bytes())
        found = tuple(Constant(**{name: row[name] for name in _FIELDS}) for row in profile["constants"])
        if profile["schema_version"] != 1:
            raise ValueError(f"schema_version is {profile['schema_version']}, not 1")
        unknown = [each.name for each in found if each.name not in CONSTANTS or not each.low > 0]
        if unknown:
            raise ValueError(f"constants {', '.join(unknown)} cannot be")
        return str(profile["gpu"]), found
    except OSError as error:
        problem = f"cannot be read ({(error.strerror or str(error)).lower()})"
    except KeyError as error:
        problem = f"is no profile: it has no {error}"
    except (ValueError, TypeError) as error:
        problem = f"is no profile: {error}"
    raise SpecError(f"{path}: {problem}. Run memplan calibrate again, or delete it.")
