"""How a process works on an answer that is many: shared out to copies of it, and without collections."""

from __future__ import annotations

import gc
import json
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

__all__ = ["cores", "shared_out", "uncollected"]

T = TypeVar("T")


def cores() -> int:
    """Processors that this process may use; 1 where a copy of it is not safe to make."""
    # fork() copies the thread that calls it alone; macOS's own libraries do not survive it.
    if not sys.platform.startswith("linux") or threading.active_count() > 1:
        return 1
    return len(os.sched_getaffinity(0))


def shared_out(work: Callable[[T], str], items: Sequence[T], processes: int) -> list[str]:
    """``[work(item) for item in items]``, by this process and copies of it: who is free takes the next.

    What a copy does not bring home, because ``work`` raised there or for another reason, is done here again.
    """
    found: dict[int, str] = {}
    processes = min(processes, len(items))
    if processes > 1:
        claims = _claims(len(items))
        copies = [_copied(work, items, claims) for _ in range(processes - 1)]
        with os.fdopen(claims, "rb", buffering=0) as file:
            found.update((place, work(items[place])) for place in _claimed(file.fileno(), len(items)))
        for pid, pipe in copies:
            with os.fdopen(pipe, "rb") as file:
                answer = file.read()
            _, status = os.waitpid(pid, 0)
            if status == 0:
                found.update((int(place), text) for place, text in json.loads(answer).items())
    return [found[place] if place in found else work(item) for place, item in enumerate(items)]


_CLAIM = 2
"""Bytes by which a process claims places."""
_PIPE = 4096
"""Bytes that a pipe holds at the least before who writes waits for who reads: a page (man 7 pipe)."""


def _claims(places: int) -> int:
    """A pipe from which whoever is free reads the next places that nobody has, until it is empty."""
    reader, writer = os.pipe()
    share = _share(places)
    os.write(writer, b"".join(number.to_bytes(_CLAIM, "big") for number in range(-(-places // share))))
    os.close(writer)
    return reader


def _claimed(claims: int, places: int) -> Iterator[int]:
    share = _share(places)
    while claim := os.read(claims, _CLAIM):
        first = int.from_bytes(claim, "big") * share
        yield from range(first, min(first + share, places))


def _share(places: int) -> int:
    """How many places are claimed together."""
    return -(-places // (_PIPE // _CLAIM))


def _copied(work: Callable[[T], str], items: Sequence[T], claims: int) -> tuple[int, int]:
    """Start a copy; return its number, and the pipe that it answers through."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid:
        os.close(writer)
        return pid, reader
    status = 1
    try:
        os.close(reader)
        answer = json.dumps({place: work(items[place]) for place in _claimed(claims, len(items))})
        with os.fdopen(writer, "w", encoding="ascii") as file:
            file.write(answer)
        status = 0
    finally:
        os._exit(status)  # nothing of the process that was copied is cleaned up twice


@contextmanager
def uncollected() -> Iterator[None]:
    """Without collections of cycles, of which memplan makes few: each would walk all objects that there are, of torch
    and transformers alone a million, which takes 0.3 s.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
