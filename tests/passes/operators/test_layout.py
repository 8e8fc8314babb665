"""Layouts against the addresses themselves."""

from __future__ import annotations

from math import prod

import torch
from hypothesis import assume, event, given, settings
from hypothesis import strategies as st

from fxstream.passes.operators.layout import lies_behind, lies_within, slice_layout
from fxstream.runtime.loop import Slice

ELEMENTS = 24


def addresses(tensor, piece):
    """The addresses of each step of the axis; the tensor's values are its addresses."""
    return [frozenset(piece.of(tensor, step, 1).flatten().tolist()) for step in range(piece.extent)]


@st.composite
def sliced(draw, extent):
    """A dense tensor of 24 elements, its dimensions in any order, perhaps in part, and an axis of it."""
    sizes, rest = [], ELEMENTS
    while rest > 1:
        size = draw(st.sampled_from([n for n in range(2, rest + 1) if rest % n == 0]))
        sizes.append(size)
        rest //= size
    if draw(st.booleans()):
        sizes.insert(draw(st.integers(0, len(sizes))), 1)
    tensor = torch.arange(prod(sizes)).view(sizes).permute(draw(st.permutations(range(len(sizes)))))
    if draw(st.integers(0, 3)) == 0:
        dim = draw(st.integers(0, tensor.dim() - 1))
        half = (tensor.shape[dim] + 1) // 2
        tensor = tensor.narrow(dim, draw(st.integers(0, tensor.shape[dim] - half)), half)
    pieces = [
        Slice(dim, extent, outer, size // (outer * extent))
        for dim, size in enumerate(tensor.shape)
        for outer in range(1, size + 1)
        if size % (outer * extent) == 0
    ]
    assume(pieces)
    return tensor, draw(st.sampled_from(pieces))


@settings(max_examples=600, derandomize=True)
@given(data=st.data(), extent=st.sampled_from([2, 3, 4]))
def test_layouts_are_equal_where_the_addresses_are(data, extent):
    (first, one), (second, other) = data.draw(sliced(extent)), data.draw(sliced(extent))
    same = addresses(first, one) == addresses(second, other)
    event(f"same addresses: {same}")
    assert (slice_layout(first, one) == slice_layout(second, other)) == same


def test_channels_last_images_and_tokens_lie_alike():
    images = torch.empty(3, 8, 4, 5, memory_format=torch.channels_last)
    tokens = torch.empty(3, 20, 8)
    assert slice_layout(images, Slice(0, 3)) == slice_layout(tokens, Slice(0, 3))
    assert slice_layout(images, Slice(1, 8)) == slice_layout(tokens, Slice(2, 8))
    assert slice_layout(images, Slice(2, 4)) == slice_layout(tokens, Slice(1, 4, inner=5))
    assert slice_layout(images, Slice(2, 4)) != slice_layout(images.contiguous(), Slice(2, 4))


def test_another_start_or_dtype_is_another_place():
    x, piece = torch.empty(4, 6), Slice(0, 4)
    assert slice_layout(x, piece) != slice_layout(torch.empty(5, 6)[1:], piece)
    assert slice_layout(x, piece) != slice_layout(x.int(), piece)


def test_an_expanded_tensor_has_no_layout_of_its_own():
    assert slice_layout(torch.empty(4, 1).expand(4, 6), Slice(0, 4)) is None
    assert slice_layout(torch.empty(1, 6).expand(4, 6), Slice(0, 4)) is None


@settings(max_examples=300, derandomize=True)
@given(data=st.data(), extent=st.sampled_from([2, 3, 4]))
def test_what_lies_within_touches_nothing_else(data, extent):
    (first, one), (second, other) = data.draw(sliced(extent)), data.draw(sliced(extent))
    layouts = slice_layout(first, one), slice_layout(second, other)
    assume(first.storage_offset() == second.storage_offset() == 0)
    if lies_within(*layouts):
        pairs = zip(addresses(first, one), addresses(second, other), strict=True)
        assert all(inner <= outer for inner, outer in pairs)


def test_half_the_channels_lie_within_all_of_them_by_rows_alone():
    half, whole = torch.empty(1, 4, 6, 5), torch.empty(1, 8, 6, 5)
    assert lies_within(slice_layout(half, Slice(2, 6)), slice_layout(whole, Slice(2, 6)))
    assert not lies_within(slice_layout(whole, Slice(2, 6)), slice_layout(half, Slice(2, 6)))
    frames = torch.empty(2, 4, 6, 5), torch.empty(2, 8, 6, 5)
    assert not lies_within(*(slice_layout(each, Slice(0, 2)) for each in frames))


@settings(max_examples=600, derandomize=True)
@given(data=st.data(), extent=st.sampled_from([2, 3, 4]))
def test_what_lies_behind_touches_nothing_of_later_slices(data, extent):
    (first, one), (second, other) = data.draw(sliced(extent)), data.draw(sliced(extent))
    layouts = slice_layout(first, one), slice_layout(second, other)
    assume(first.storage_offset() == second.storage_offset() == 0)
    event(f"behind: {lies_behind(*layouts)}")
    if lies_behind(*layouts):
        written, read = addresses(first, one), addresses(second, other)
        assert not any(written[step] & read[later] for later in range(extent) for step in range(later))


def test_half_the_channels_lie_behind_all_of_them_where_rows_follow_rows():
    half = torch.empty(1, 4, 6, 5, memory_format=torch.channels_last)
    whole = torch.empty(1, 8, 6, 5, memory_format=torch.channels_last)
    rows = slice_layout(half, Slice(2, 6)), slice_layout(whole, Slice(2, 6))
    assert lies_behind(*rows) and not lies_within(*rows)
    assert not lies_behind(*reversed(rows))
    columns = slice_layout(half, Slice(3, 5)), slice_layout(whole, Slice(3, 5))
    assert not lies_behind(*columns)
