"""A second, slow implementation of PyTorch's caching allocator, to compare memplan's with.

Written from c10/cuda/CUDACachingAllocator.cpp with its own data structure: a segment is a list of blocks in the order
of their addresses, and every search looks at all of them. It shares no code with memplan.
"""

from __future__ import annotations

from dataclasses import dataclass

MIB = 2**20


@dataclass
class Block:
    address: int
    size: int
    state: str  # "live", "free" or "unmapped"


class ReferenceAllocator:
    def __init__(
        self,
        *,
        expandable_segments: bool = False,
        roundup_power2_divisions: int = 0,
        max_split_size: int | None = None,
        max_non_split_rounding_size: int = 20 * MIB,
        large_segment_size: int = 20 * MIB,
        limit: int | None = None,
    ) -> None:
        self.expandable = expandable_segments
        self.divisions = roundup_power2_divisions
        self.max_split = max_split_size if max_split_size is not None else 2**63
        self.rounding = max_non_split_rounding_size
        self.large_segment = large_segment_size
        self.limit = limit
        self.segments: dict[tuple[int, bool], list[list[Block]]] = {}
        self.next_address = 2**20
        self.peak_allocated = self.peak_reserved = self.retries = 0

    def total(self, *states: str) -> int:
        return sum(
            block.size
            for pool in self.segments.values()
            for segment in pool
            for block in segment
            if block.state in states
        )

    @property
    def allocated(self) -> int:
        return self.total("live")

    @property
    def reserved(self) -> int:
        return self.total("live", "free")

    def round(self, nbytes: int) -> int:
        if nbytes < 512:
            return 512
        if self.divisions > 1 and nbytes > 512 * self.divisions:
            power = 1
            while power * 2 <= nbytes:
                power *= 2
            step = power // self.divisions
            rounded = power
            while rounded < nbytes:
                rounded += step
            return rounded
        return (nbytes + 511) // 512 * 512

    def malloc(self, nbytes: int, stream: int = 0) -> Block | None:
        """None where CUDA is out of memory."""
        size = self.round(nbytes)
        small = size <= MIB
        pool = self.segments.setdefault((stream, small), [])
        block = self.find(pool, size) or self.grow(pool, size, small)
        if block is None:
            return None
        segment = next(segment for segment in pool if block in segment)
        remaining = block.size - size
        if small or self.expandable:
            split = remaining >= 512
        else:
            split = size < self.max_split and remaining > MIB
        if split:
            position = next(i for i, other in enumerate(segment) if other is block)
            segment.insert(position + 1, Block(block.address + size, remaining, "free"))
            block.size = size
        block.state = "live"
        self.peak_allocated = max(self.peak_allocated, self.allocated)
        return block

    def free(self, block: Block) -> None:
        block.state = "free"
        for pool in self.segments.values():
            for segment in pool:
                self.merge(segment)

    @staticmethod
    def merge(segment: list[Block]) -> None:
        position = 0
        while position + 1 < len(segment):
            block, following = segment[position], segment[position + 1]
            if block.state == following.state != "live":
                block.size += following.size
                del segment[position + 1]
            else:
                position += 1

    def find(self, pool: list[list[Block]], size: int) -> Block | None:
        def reach(block: Block) -> int:
            segment = next(segment for segment in pool if any(other is block for other in segment))
            position = next(i for i, other in enumerate(segment) if other is block)
            following = segment[position + 1 : position + 2]
            return block.size + sum(other.size for other in following if other.state == "unmapped")

        free = [block for segment in pool for block in segment if block.state == "free" and block.size >= size]
        free.sort(key=lambda block: (block.size, block.address))
        if not free:
            return None
        chosen = 0
        if self.expandable:
            while chosen + 1 < len(free) and reach(free[chosen + 1]) < reach(free[chosen]):
                chosen += 1
        block = free[chosen]
        if size < self.max_split <= block.size:
            return None
        if size >= self.max_split and block.size >= size + self.rounding:
            return None
        return block

    def grow(self, pool: list[list[Block]], size: int, small: bool) -> Block | None:
        take = self.expand if self.expandable else self.cuda_malloc
        block = take(pool, size, small)
        if block is None and not self.expandable and self.max_split < 2**63 and self.release_oversize(pool, size):
            block = take(pool, size, small)
        if block is None:
            self.retries += 1
            self.empty_cache()
            block = take(pool, size, small)
        self.peak_reserved = max(self.peak_reserved, self.reserved)
        return block

    def cuda_malloc(self, pool: list[list[Block]], size: int, small: bool) -> Block | None:
        if small:
            nbytes = 2 * MIB
        elif size < 10 * MIB:
            nbytes = self.large_segment
        else:
            nbytes = (size + 2 * MIB - 1) // (2 * MIB) * 2 * MIB
        if self.limit is not None and self.reserved + nbytes > self.limit:
            return None
        block = Block(self.next_address, nbytes, "free")
        self.next_address += 2 * nbytes
        pool.append([block])
        return block

    def release_oversize(self, pool: list[list[Block]], size: int) -> bool:
        target = max(size, self.max_split)
        whole = sorted((segment[0].size, segment[0].address) for segment in pool if segment[0].state == "free")
        fitting = [item for item in whole if item[0] >= target]
        if fitting:
            pool[:] = [segment for segment in pool if segment[0].address != fitting[0][1]]
            return True
        released = 0
        for nbytes, address in reversed(whole):
            if released >= target or nbytes < self.max_split:
                break
            released += nbytes
            pool[:] = [segment for segment in pool if segment[0].address != address]
        return released >= target

    def expand(self, pool: list[list[Block]], size: int, small: bool) -> Block | None:
        page = 2 * MIB if small else self.large_segment
        if not pool:
            pool.append([Block(self.next_address, 2**22 * page, "unmapped")])
            self.next_address += 2**23 * page
        segment = pool[0]
        start = next(
            position
            for position, block in enumerate(segment)
            if "unmapped" in (block.state, segment[min(position + 1, len(segment) - 1)].state)
            and self.room(segment, position) >= size
        )
        address = segment[start].address
        while True:
            first = next(block for block in segment if block.address == address)
            if first.state == "free" and first.size >= size:
                return first
            missing = first if first.state == "unmapped" else segment[segment.index(first) + 1]
            wanted = min(missing.size, size if missing is first else size - first.size)
            nbytes = (wanted + page - 1) // page * page
            if self.limit is not None and self.reserved + nbytes > self.limit:
                return None
            if nbytes < missing.size:
                rest = Block(missing.address + nbytes, missing.size - nbytes, "unmapped")
                segment.insert(segment.index(missing) + 1, rest)
                missing.size = nbytes
            missing.state = "free"
            self.merge(segment)
            self.peak_reserved = max(self.peak_reserved, self.reserved)

    @staticmethod
    def room(segment: list[Block], position: int) -> int:
        total = 0
        for block in segment[position:]:
            if block.state == "live":
                break
            total += block.size
        return total

    def empty_cache(self) -> None:
        for (_, small), pool in self.segments.items():
            if not self.expandable:
                pool[:] = [segment for segment in pool if len(segment) > 1 or segment[0].state == "live"]
                continue
            page = 2 * MIB if small else self.large_segment
            for segment in pool:
                base = segment[0].address
                for block in [block for block in segment if block.state == "free"]:
                    begin = base + -((base - block.address) // page) * page
                    end = base + (block.address + block.size - base) // page * page
                    if begin >= end:
                        continue
                    position = segment.index(block)
                    parts = [
                        Block(block.address, begin - block.address, "free"),
                        Block(begin, end - begin, "unmapped"),
                        Block(end, block.address + block.size - end, "free"),
                    ]
                    segment[position : position + 1] = [part for part in parts if part.size]
                self.merge(segment)
