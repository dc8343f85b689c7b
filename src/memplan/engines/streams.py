"""Streams of the GPU beside the default one, and when the CPU knows that they are done with what it has freed.

A block that ``record_stream`` has marked is free once every stream it is marked for has come as far as where it was
freed. The allocator learns that from an event, which at the worst is done only when the CPU waits for it: the CPU runs
ahead of the GPU, as far as the library lets it. What a library does not bound is not deferred here, since memory bounds
it: before a request fails, the allocator waits for all of the GPU's work (``synchronize_and_free_events`` in
c10/cuda/CUDACachingAllocator.cpp). It may keep more reserved than is said, but no run dies of it.
"""

from __future__ import annotations

from collections import defaultdict

from memplan.memory.course import Block, Ledger

Event = list[Block]
"""What can be reused once the CPU has waited for it."""


class Streams:
    """The streams of one GPU, known by their numbers."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._behind: defaultdict[int, list[Block]] = defaultdict(list)
        """For a stream, what can be reused once it has come as far as now."""
        self._events: list[Event] = []

    def free(self, *blocks: Block | None, used_on: int) -> None:
        """``record_stream(used_on)``, which says nothing of what that stream has allocated itself, and its last
        reference dies.
        """
        held = [block for block in blocks if block is not None and block.nbytes and block.stream != used_on]
        self._ledger.free(*(block for block in blocks if block is not None and block.stream == used_on))
        self._ledger.defer(*held)
        self._behind[used_on] += held

    def wait(self, stream: int, other: int) -> None:
        """``stream.wait_stream(other)``: what ``other`` is done with by now, ``stream`` is too once it goes on."""
        if behind := self._behind[other]:
            self._behind[stream] += behind
            self._behind[other] = []

    def record(self, stream: int) -> Event:
        """An event on ``stream``."""
        event, self._behind[stream] = self._behind[stream], []
        if event:
            self._events.append(event)
        return event

    def synchronize(self, event: Event) -> None:
        """The CPU waits for an event."""
        self._ledger.reuse(event)
        event.clear()

    def synchronize_all(self) -> None:
        """The CPU waits for all of the GPU's work."""
        self._ledger.reuse(block for event in (*self._events, *self._behind.values()) for block in event)
        for event in self._events:
            event.clear()
        self._events.clear()
        self._behind.clear()
