"""The model of torch's caching allocator: what is allocated lies apart, within what is reserved, within the limit."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fxstream.passes.machine.caching import (
    LARGE_SEGMENT,
    MIB,
    SMALL_SEGMENT,
    CachingAllocator,
    ExpandableAllocator,
    OutOfMemory,
)

KINDS = [CachingAllocator, ExpandableAllocator]


def test_segments_are_of_a_few_sizes():
    allocator = CachingAllocator()
    for size, reserved in [(1, SMALL_SEGMENT), (MIB, 0), (2 * MIB, LARGE_SEGMENT), (31 * MIB, 32 * MIB)]:
        before = allocator.reserved
        allocator.allocate(size)
        assert allocator.reserved - before == reserved
    assert allocator.allocated == 512 + 35 * MIB


def test_what_is_freed_is_taken_again_and_joins_its_neighbours():
    allocator = CachingAllocator()
    blocks = [allocator.allocate(4 * MIB) for _ in range(5)]
    assert allocator.reserved == LARGE_SEGMENT
    for block in (blocks[1], blocks[3], blocks[2]):
        allocator.release(block)
    joined = allocator.allocate(12 * MIB)
    assert allocator.reserved == LARGE_SEGMENT
    assert joined.address == blocks[0].address + 4 * MIB
    allocator.release(joined)
    assert allocator.allocated == 8 * MIB
    assert allocator.most_allocated == 20 * MIB


def test_a_rest_that_is_too_small_stays_in_its_block():
    allocator = CachingAllocator()
    allocator.release(allocator.allocate(32 * MIB))
    block = allocator.allocate(31 * MIB)
    assert block.bytes == 32 * MIB  # a rest of a MiB is not cut off


def test_free_segments_are_given_back_where_there_is_no_room():
    allocator = CachingAllocator(limit=64 * MIB)
    allocator.release(allocator.allocate(40 * MIB))
    allocator.allocate(50 * MIB)
    assert allocator.reserved == 50 * MIB
    with pytest.raises(OutOfMemory):
        allocator.allocate(20 * MIB)


def test_an_expandable_segment_takes_pages_as_they_are_needed():
    allocator = ExpandableAllocator()
    first = allocator.allocate(30 * MIB)
    assert allocator.reserved == 2 * LARGE_SEGMENT
    allocator.release(first)
    allocator.allocate(50 * MIB)  # the segment's end grows
    assert allocator.reserved == 3 * LARGE_SEGMENT


def test_pages_are_given_back_though_their_segment_is_in_use():
    allocator = ExpandableAllocator(limit=100 * MIB)
    first, _ = allocator.allocate(40 * MIB), allocator.allocate(20 * MIB)
    allocator.release(first)
    allocator.allocate(60 * MIB)
    assert allocator.reserved <= 100 * MIB


sizes = st.integers(1, 3 * MIB) | st.integers(1, 64).map(lambda size: size * MIB)


@pytest.mark.parametrize("kind", KINDS)
@given(steps=st.lists(sizes | st.integers(0, 20).map(lambda index: -index), max_size=60), limit=st.integers(40, 200))
def test_blocks_lie_apart_within_the_limit(kind, steps, limit):
    allocator = kind(limit * MIB)
    held = []
    for step in steps:
        if step <= 0:
            if held:
                allocator.release(held.pop(-step % len(held)))
        else:
            try:
                block = allocator.allocate(step)
            except OutOfMemory:
                break
            assert block.bytes >= step
            held.append(block)
        assert allocator.allocated == sum(block.bytes for block in held) <= allocator.reserved <= allocator.limit
        for pool in (True, False):
            spans = sorted((b.address, b.address + b.bytes) for b in held if b.small is pool)
            assert all(end <= start for (_, end), (start, _) in pairwise(spans))
    else:
        for block in held:
            allocator.release(block)
        assert allocator.allocated == 0
