"""DeepSpeed's offload to NVMe for O2: what it needs of a machine, what it locks in host memory, what it writes.

The op that reads and writes is DeepSpeed's own, compiled once into ``TORCH_EXTENSIONS_DIR`` against libaio: the
system's, or one unpacked from Debian's packages into the folder that ``MEMPLAN_LIBAIO`` names. Its swap buffers are not
torch's (posix_memalign and mlock), so the profiler does not see them; :class:`Swapping` does.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.util
import os
import resource
import shutil
import sys
import time
import unittest.mock
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tests.oracles.o2 import Block, TwoSides

SITE = "deepspeed new_cpu_locked_tensor"
"""Where the ledger says that a swap buffer comes from."""
LOCKED = 256 * 2**20
"""Bytes that a row may lock, and more."""


ABANDONED = 1800
"""Seconds after which a lock is that of a compilation that was interrupted."""


def unavailable() -> str | None:
    """Why the real thing cannot run here, or None."""
    if importlib.util.find_spec("deepspeed") is None:
        return "deepspeed is not installed"
    if shutil.which("g++") is None:
        return "there is no g++ to compile DeepSpeed's aio with"
    if _library() is None or not _headers():
        return "libaio is not installed (Debian's libaio-dev)"
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if os.geteuid() != 0 and resource.RLIM_INFINITY != soft < LOCKED:
        return f"only {soft} bytes may be locked in memory (ulimit -l)"
    return None


def _unpacked() -> Path | None:
    folder = os.environ.get("MEMPLAN_LIBAIO")
    return Path(folder) if folder and Path(folder).is_dir() else None


@functools.cache
def _library() -> ctypes.CDLL | None:
    folder = _unpacked()
    candidates = [str(path) for path in sorted(folder.rglob("libaio.so.1*"))] if folder is not None else []
    for name in [*candidates, "libaio.so.1", "libaio.so.1t64"]:
        with contextlib.suppress(OSError):
            return ctypes.CDLL(name, mode=ctypes.RTLD_GLOBAL)
    return None


def _headers() -> bool:
    folder = _unpacked()
    return Path("/usr/include/libaio.h").exists() or (folder is not None and any(folder.rglob("libaio.h")))


def prepare() -> None:
    """Let the compiler and the loader find libaio."""
    _library()
    for lock in Path(os.environ.get("TORCH_EXTENSIONS_DIR", "/nonexistent")).glob("*/lock"):
        if time.time() - lock.stat().st_mtime > ABANDONED:  # torch would wait for it for ever
            lock.unlink()
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # ninja
    folder = _unpacked()
    for name, file in (("CPATH", "libaio.h"), ("LIBRARY_PATH", "libaio.so")):
        found = [str(path.parent) for path in folder.rglob(file)] if folder is not None else []
        if found:
            os.environ[name] = os.pathsep.join(found)


class Swapping:
    """While it is entered, swap buffers are noted and are the host's; :meth:`written` looks into the folder."""

    def __init__(self, folder: Path, sides: TwoSides | None) -> None:
        self.folder = folder
        self.blocks: list[Block] = []
        self._sides = sides
        self._alive: dict[int, Block] = {}
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Swapping:
        from deepspeed.ops.op_builder import AsyncIOBuilder

        prepare()
        op = AsyncIOBuilder().load(verbose=False)
        noting = functools.partial(_Handle, self, op.aio_handle)
        module = unittest.mock.Mock(aio_handle=noting)
        self._stack.enter_context(unittest.mock.patch.object(AsyncIOBuilder, "load", return_value=module))
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def locked(self, tensor: Any) -> None:
        """A buffer was made."""
        from tests.oracles.o2 import Block

        if self._sides is not None:
            self._sides.put(tensor, "host")
        address = tensor.untyped_storage().data_ptr()
        self._alive[address] = Block(tensor.nbytes, SITE, time.time_ns(), address, side="host")
        self.blocks.append(self._alive[address])

    def freed(self, tensor: Any) -> None:
        """A buffer was given back."""
        block = self._alive.pop(tensor.untyped_storage().data_ptr(), None)
        if block is not None:
            block.died = time.time_ns()

    def written(self) -> dict[str, int]:
        """Bytes of the files by what they hold."""
        found: Counter[str] = Counter()
        for path in self.folder.rglob("*.swp"):
            component = "gradients" if "_gradient_" in path.name else "optimizer"
            if path.name.endswith("_param.tensor.swp"):
                component = "weights"
            found[component] += path.stat().st_size
        return dict(sorted(found.items()))


class _Handle:
    """An aio_handle whose buffers are noted."""

    def __init__(self, swapping: Swapping, make: Any, **settings: Any) -> None:
        self._swapping = swapping
        self._handle = make(**settings)

    def new_cpu_locked_tensor(self, elements: int, example: Any) -> Any:
        tensor = self._handle.new_cpu_locked_tensor(elements, example)
        self._swapping.locked(tensor)
        return tensor

    def free_cpu_locked_tensor(self, tensor: Any) -> Any:
        self._swapping.freed(tensor)
        return self._handle.free_cpu_locked_tensor(tensor)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._handle, name)
