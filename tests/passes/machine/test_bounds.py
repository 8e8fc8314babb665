"""Bounds of CUDA's workspaces: what torch's sources allocate, on tensors as they lie."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fxstream.fake import fake_on
from fxstream.passes.graph.capture import capture
from fxstream.passes.graph.normalize import normalize
from fxstream.passes.machine.bounds import bound_bytes, is_bounded
from fxstream.passes.machine.choices import attention_kernel
from fxstream.tools import catalogue

aten, norm = torch.ops.aten, torch.ops.fxstream


def made(*shape, dtype=torch.float16, last=False):
    with fake_on("cuda"):
        tensor = torch.empty(shape, dtype=dtype)
        form = {4: torch.channels_last, 5: torch.channels_last_3d}
        return tensor.contiguous(memory_format=form[len(shape)]) if last else tensor


def bound(target, *args, **kwargs):
    with args[0].fake_mode:
        return bound_bytes(target, target(*args, **kwargs), args, kwargs)


def test_a_convolution_is_copied_to_channels_last_and_back():
    x, weight = made(2, 8, 16, 16), made(4, 8, 3, 3)
    out = aten.conv2d.default(x, weight, None, [1, 1], [1, 1])
    assert bound(aten.conv2d.default, x, weight, None, [1, 1], [1, 1]) == x.nbytes + weight.nbytes + out.nbytes
    turned = made(2, 16, 16, 8).permute(0, 3, 1, 2)
    kept = made(4, 8, 3, 3, last=True)
    assert bound(aten.conv2d.default, turned, kept, None, [1, 1], [1, 1]) == 0
    assert bound(aten.conv2d.default, x, kept, None, [1, 1], [1, 1]) == x.nbytes
    odd = made(2, 16, 8, 16).transpose(1, 2)  # lies neither way
    assert bound(aten.conv2d.default, odd, weight, None, [1, 1], [1, 1]) == 2 * odd.nbytes + weight.nbytes + out.nbytes


def test_some_versions_of_cudnn_leave_videos_to_columns(monkeypatch):
    """A column for each element under a kernel of 3x3x3: 27 times a sample's input."""
    x, weight = made(2, 8, 4, 16, 16), made(8, 8, 3, 3, 3)
    around = None, [1, 1, 1], [1, 1, 1]
    call = aten.conv3d.default, x, weight, *around
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91002)
    assert bound(*call) == 27 * x.nbytes // 2
    assert bound(aten.conv3d.default, x.float(), weight.float(), *around) == 4 * x.nbytes + 2 * weight.nbytes
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91501)
    assert bound(*call) == 2 * x.nbytes + weight.nbytes


def test_a_norm_copies_what_is_not_contiguous():
    x = made(2, 8, 16, 16)
    few = bound(aten.group_norm.default, x, 4)
    assert 0 < few <= 1024
    assert bound(aten.group_norm.default, made(2, 8, 16, 16, last=True), 4) == x.nbytes + few
    rows = made(64, 32)
    assert bound(aten.layer_norm.default, rows, [32]) == 64 * 8
    assert bound(aten.layer_norm.default, made(32, 64).t(), [32]) == rows.nbytes + 64 * 8


def test_a_split_norm_makes_nothing_of_the_inputs_size():
    x = made(1, 64, 8, 256, 256)
    moments = norm.group_moments.default(x, 32)
    statistics = norm.group_statistics.default(moments, 512, 1e-5)
    weight = made(64)
    assert bound(norm.group_moments.default, x, 32) <= 6 * 2**20 < x.nbytes / 10
    assert bound(norm.group_statistics.default, moments, 512, 1e-5) <= 4 * moments.nbytes
    assert bound(norm.group_scale.default, x, statistics, weight, weight) <= 2**12


def test_products_copy_what_no_blas_reads():
    x, weight = made(4, 16, 32), made(8, 32)
    assert bound(aten.linear.default, x, weight) == 0
    assert bound(aten.linear.default, made(16, 4, 32).transpose(0, 1), weight) == x.nbytes
    a, b = made(4, 16, 32), made(4, 32, 8)
    assert bound(aten.bmm.default, a, b) == bound(aten.bmm.default, made(4, 32, 16).transpose(1, 2), b) == 0
    assert bound(aten.bmm.default, made(4, 16, 64)[..., ::2], b) == a.nbytes
    one = made(1, 32, 8)
    assert bound(aten.matmul.default, a, one) == 4 * one.nbytes  # repeated over the batch


def attention(heads, length, size, dtype=torch.float16, mask=None):
    query = made(2, heads, length, size, dtype=dtype)
    masks = [] if mask is None else [mask]
    found = attention_kernel(query, query, query, *masks)
    return found, bound(aten.scaled_dot_product_attention.default, query, query, query, *masks)


def test_attention():
    kernel, flash = attention(8, 4096, 64)
    assert kernel == "flash"
    assert flash == 4 * 2 * 8 * 4096  # a number for each query
    kernel, wide = attention(1, 9216, 512)
    assert kernel == "efficient"
    assert wide == 4 * 2 * 9216 * 512  # accumulators
    assert attention(8, 4096, 64, torch.float32) == ("efficient", 0)
    kernel, masked = attention(8, 256, 64, mask=made(256, 256, dtype=torch.bool))
    assert kernel == "efficient"
    assert masked == 2 * 256 * 256
    kernel, scores = attention(8, 256, 36)  # in no step of eight, but flash pads
    assert kernel == "flash"
    kernel, scores = attention(8, 256, 64, torch.float64)
    assert kernel == "math"
    assert scores >= 3 * 4 * 2 * 8 * 256 * 256


def test_indices_and_masks():
    x = made(2, 8, 16, 16)
    assert bound(aten.max_pool2d.default, x, 2) == 8 * x.numel() // 4
    assert bound(aten.sort.default, x) >= x.nbytes


def test_pointwise_operators_allocate_nothing_and_unknown_ones_as_much_as_they_touch():
    x = made(2, 8, 16, 16)
    for target in (aten.gelu.default, aten.sigmoid.default, aten.clone.default):
        assert bound(target, x) == 0
        assert is_bounded(target, target(x), (x,), {})
    target = aten.cholesky.default
    square = made(16, 16, dtype=torch.float32)
    assert not is_bounded(target, square, (square,), {})
    assert bound(target, square) == 2 * square.nbytes
    wide = square[:1].expand(1000, 16)  # a view, which takes the memory that it is of
    assert bound_bytes(target, wide, (square,), {}) == square.nbytes


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card, which is measured")
@pytest.mark.parametrize("name", ["svd-unet", "svd-vae", "ltx-vae", "cogvideox-vae", "wan-transformer"])
def test_every_operator_of_published_models_is_bounded(name):
    """On small ones of them: more than what it reads and makes is known of each."""
    entry = catalogue.shallow(name)
    small = replace(entry, config={**entry.config, **entry.small})
    model, args, kwargs = catalogue.build(small, frames=9, height=64, width=64, device="cuda")
    graph_module = normalize(capture(model, args, kwargs).graph_module)
    unknown = set()
    for node in graph_module.graph.nodes:
        if node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload):
            given, named = torch.fx.map_arg((node.args, node.kwargs), lambda each: each.meta["val"])
            makes = any(each.alias_info is None for each in node.target._schema.returns)
            if makes and not is_bounded(node.target, node.meta["val"], given, named):
                unknown.add(str(node.target))
    assert unknown == set()
