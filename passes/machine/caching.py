"""Caching: a model of the allocator that torch has for CUDA, which keeps what is freed for what comes next.

It takes memory from the card in segments and cuts blocks from them, the smallest free block that is large enough first.
A block that is freed joins its free neighbours. Where the card has no more, segments that are free as a whole are given
back. With ``expandable`` segments each pool has a single one that grows and is given back page by page. After
`c10/cuda/CUDACachingAllocator.cpp`, its settings as they are by default, of one stream.
"""

from __future__ import annotations

from bisect import bisect_left, insort

MIB = 1 << 20

ROUNDED = 512
"""Bytes that all blocks are a multiple of."""

SMALL = MIB
"""Blocks of so many bytes and less are in a pool of their own."""

SMALL_SEGMENT, LARGE_SEGMENT = 2 * MIB, 20 * MIB
"""Bytes of a segment, or of a page of an expandable one, for small blocks and for larger ones."""

OWN_SEGMENT = 10 * MIB
"""A block of so many bytes has a segment of its own, of a multiple of ``SMALL_SEGMENT``."""


class OutOfMemory(Exception):
    """There is no room for an allocation of so many bytes."""


class Block:
    """Bytes of a segment, between its neighbours there."""

    __slots__ = ("address", "after", "before", "bytes", "free", "small")

    def __init__(self, address: int, size: int, small: bool) -> None:
        self.address, self.bytes, self.small, self.free = address, size, small, True
        self.before: Block | None = None
        self.after: Block | None = None

    def __lt__(self, other: Block) -> bool:
        return (self.bytes, self.address) < (other.bytes, other.address)


class CachingAllocator:
    """Allocations and releases, and what they make of a card with ``limit`` bytes.

    ``allocated`` and ``reserved`` are bytes of blocks in use and of segments, ``most_allocated`` and ``most_reserved``
    the most that there were.
    """

    def __init__(self, limit: float = float("inf")) -> None:
        self.limit = limit
        self.allocated = self.reserved = self.most_allocated = self.most_reserved = 0
        self._free: dict[bool, list[Block]] = {True: [], False: []}
        self._end = 0

    def allocate(self, size: int) -> Block:
        """A block of at least ``size`` bytes. Raises ``OutOfMemory``."""
        wanted = max(ROUNDED, -(-size // ROUNDED) * ROUNDED)
        small = wanted <= SMALL
        block = self._found(wanted, small) or self._new(wanted, small)
        rest = block.bytes - wanted
        if self._splits(rest, small):
            other = Block(block.address + wanted, rest, small)
            block.bytes = wanted
            other.before, other.after = block, block.after
            if block.after is not None:
                block.after.before = other
            block.after = other
            insort(self._free[small], other)
        block.free = False
        self._use(block)
        self.allocated += block.bytes
        self.most_allocated = max(self.most_allocated, self.allocated)
        self.most_reserved = max(self.most_reserved, self.reserved)
        return block

    def release(self, block: Block) -> None:
        """Give a block back, for others to take."""
        self.allocated -= block.bytes
        self._unuse(block)
        block.free = True
        pool = self._free[block.small]
        before, after = block.before, block.after
        if before is not None and before.free:
            del pool[bisect_left(pool, before)]
            block.address, block.bytes, block.before = before.address, before.bytes + block.bytes, before.before
            if before.before is not None:
                before.before.after = block
        if after is not None and after.free:
            del pool[bisect_left(pool, after)]
            block.bytes, block.after = block.bytes + after.bytes, after.after
            if after.after is not None:
                after.after.before = block
        insort(pool, block)

    def _found(self, wanted: int, small: bool) -> Block | None:
        """The smallest free block that is large enough, taken from its pool."""
        pool = self._free[small]
        at = bisect_left(pool, Block(-1, wanted, small))
        return pool.pop(at) if at < len(pool) else None

    def _new(self, wanted: int, small: bool) -> Block:
        """A block in a new segment."""
        size = LARGE_SEGMENT if wanted < OWN_SEGMENT else -(-wanted // SMALL_SEGMENT) * SMALL_SEGMENT
        size = SMALL_SEGMENT if small else size
        if self.reserved + size > self.limit:
            self._give_back()
        if self.reserved + size > self.limit:
            raise OutOfMemory(size)
        self.reserved += size
        self._end += 2 * size  # no segment lies beside another
        return Block(self._end - size, size, small)

    def _give_back(self) -> None:
        """Return what is free as a whole to the card."""
        for small, pool in self._free.items():
            whole = [block for block in pool if block.before is None and block.after is None]
            self.reserved -= sum(block.bytes for block in whole)
            self._free[small] = [block for block in pool if block.before is not None or block.after is not None]

    def _splits(self, rest: int, small: bool) -> bool:
        return rest >= ROUNDED if small else rest > SMALL

    def _use(self, block: Block) -> None:
        """Take note that a block is in use."""

    def _unuse(self, block: Block) -> None:
        """Take note that a block is in use no more."""


class ExpandableAllocator(CachingAllocator):
    """The allocator with expandable segments: one a pool, whose pages are in the card's memory as they are needed."""

    def __init__(self, limit: float = float("inf")) -> None:
        super().__init__(limit)
        self._last: dict[bool, Block | None] = {True: None, False: None}
        self._pages: dict[bool, dict[int, int]] = {True: {}, False: {}}  # of pages in memory, the blocks on them

    def _found(self, wanted: int, small: bool) -> Block | None:
        pool = self._free[small]
        for at in range(bisect_left(pool, Block(-1, wanted, small)), len(pool)):
            if pool[at].after is not None:  # the end of the segment is as large as it has to be
                return pool.pop(at)
        return None

    def _new(self, wanted: int, small: bool) -> Block:
        """The end of the segment, as large as it has to be."""
        last = self._last[small]
        if last is not None and last.free:
            pool = self._free[small]
            del pool[bisect_left(pool, last)]
            last.bytes = max(last.bytes, wanted)
            return last
        block = Block(0 if last is None else last.address + last.bytes, wanted, small)
        if last is not None:
            block.before, last.after = last, block
        self._last[small] = block
        return block

    def allocate(self, size: int) -> Block:
        block = super().allocate(size)
        if block.after is not None and block.after.after is None:
            self._last[block.small] = block.after
        return block

    def release(self, block: Block) -> None:
        super().release(block)
        if block.after is None:
            self._last[block.small] = block

    def _splits(self, rest: int, small: bool) -> bool:
        return rest >= ROUNDED

    def _on(self, block: Block) -> range:
        """The pages that a block lies on."""
        page = SMALL_SEGMENT if block.small else LARGE_SEGMENT
        return range(block.address // page, -(-(block.address + block.bytes) // page))

    def _use(self, block: Block) -> None:
        pages, page = self._pages[block.small], SMALL_SEGMENT if block.small else LARGE_SEGMENT
        for number in self._on(block):
            if number not in pages:
                if self.reserved + page > self.limit:
                    self._give_back()
                if self.reserved + page > self.limit:
                    raise OutOfMemory(block.bytes)
                pages[number] = 0
                self.reserved += page
            pages[number] += 1

    def _unuse(self, block: Block) -> None:
        for number in self._on(block):
            self._pages[block.small][number] -= 1

    def _give_back(self) -> None:
        for small, pages in self._pages.items():
            for number in [number for number, blocks in pages.items() if not blocks]:
                del pages[number]
                self.reserved -= SMALL_SEGMENT if small else LARGE_SEGMENT
