"""Layouts on a card that isn't here: those of its own kernels, whatever this torch was built with."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from fxstream.fake import fake_on
from fxstream.passes.graph.capture import capture
from fxstream.passes.graph.normalize import normalize

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")


class Called(torch.nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *args):
        return self.function(*args)


def stride_of(function, *shapes, dtype=torch.float16, last=()):
    """The stride of what a function makes of tensors on the card, those at positions ``last`` with channels last."""
    with fake_on("cuda"):
        args = [torch.empty(shape, dtype=dtype) for shape in shapes]
        for position in last:
            form = {4: torch.channels_last, 5: torch.channels_last_3d}[args[position].dim()]
            args[position] = args[position].contiguous(memory_format=form)
    graph_module = normalize(capture(Called(function), tuple(args)).graph_module)
    [result] = graph_module.graph.output_node().args[0]
    return result.meta["val"].stride()


@pytest.mark.parametrize(
    "function, shapes, plain, last",
    [
        (functional.conv2d, ((2, 4, 6, 8), (6, 4, 3, 3)), (144, 24, 6, 1), (144, 1, 36, 6)),
        (functional.conv3d, ((2, 4, 3, 6, 8), (6, 4, 1, 3, 3)), (432, 72, 24, 6, 1), (432, 1, 144, 36, 6)),
    ],
)
def test_convolutions_have_channels_last_where_an_operand_has(function, shapes, plain, last):
    assert stride_of(function, *shapes) == plain
    assert stride_of(function, *shapes, last=[0]) == last
    assert stride_of(function, *shapes, last=[1]) == last
    assert stride_of(function, *shapes, last=[0, 1], dtype=torch.float64) == plain


def test_a_group_norm_puts_channels_first():
    for last in ([], [0]):
        assert stride_of(lambda x: functional.group_norm(x, 2), (2, 4, 6, 8), last=last) == (192, 48, 8, 1)


def attended(shape, transposed, mask=None, **options):
    def attention(query, *masks):
        heads = query.transpose(1, 2) if transposed else query
        return functional.scaled_dot_product_attention(heads, heads, heads, *masks)

    return stride_of(attention, shape, *([mask] if mask else []), **options)


def test_attention_is_laid_out_by_the_kernel_that_is_taken():
    batch, length, heads, size = 2, 16, 4, 64
    tokens = (
        length * heads * size,
        size,
        heads * size,
        1,
    )  # (batch, heads, length, size) of (batch, length, heads, size)
    plain = (heads * length * size, length * size, size, 1)
    of_tokens, of_heads = (batch, length, heads, size), (batch, heads, length, size)
    assert attended(of_tokens, True) == tokens  # flash: as the query
    assert attended(of_heads, False) == plain
    assert attended(of_heads, False, dtype=torch.float32) == tokens  # memory-efficient: heads within tokens
    assert attended(of_heads, False, mask=(length, length)) == tokens
    assert attended(of_tokens, True, dtype=torch.float64) == plain  # products
    assert attended((batch, heads, length, 512), False) == (length * heads * 512, 512, heads * 512, 1)
    assert attended((heads, length, size), False) == (length * size, size, 1)  # three dimensions: products
