"""Split norms: the graph computes the same, in parts, and whole again where nothing came between them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fxstream
from fxstream.passes.graph.capture import capture
from fxstream.passes.graph.liveness import profile
from fxstream.passes.graph.normalize import normalize
from fxstream.passes.rewriting.split_norms import fuse_norms, split_norms
from fxstream.tools.bench import relative_l2
from fxstream.tools.measure import measure_peak

aten, norm = torch.ops.aten, torch.ops.fxstream


def video_branch():
    """A residual branch over frames and pixels, its norms' statistics of all of both."""
    torch.manual_seed(0)
    layers = (nn.GroupNorm(4, 16), nn.SiLU(), nn.Conv3d(16, 16, (3, 1, 1), padding=(1, 0, 0)))
    model = nn.Sequential(*layers, nn.GroupNorm(4, 16), nn.SiLU(), nn.Conv3d(16, 16, (3, 1, 1), padding=(1, 0, 0)))
    return model.eval().requires_grad_(False), torch.randn(1, 16, 8, 24, 24)


def captured():
    model, x = video_branch()
    return normalize(capture(model, (x,)).graph_module), x


def targets(graph_module):
    return [node.target for node in graph_module.graph.nodes]


def split_and_fused(model, x):
    """The operators of a model after its norm was split and fused again, with the same result at each."""
    graph_module = normalize(capture(model, (x,)).graph_module)
    split = split_norms(graph_module, 1)
    assert norm.group_scale.default in targets(split)
    assert relative_l2(split(x)[0], graph_module(x)[0]) <= 1e-6
    fuse_norms(split)
    assert relative_l2(split(x)[0], graph_module(x)[0]) <= 1e-6
    return targets(split)


def test_the_parts_compute_the_norm():
    graph_module, x = captured()
    split = split_norms(graph_module, 1)
    assert aten.group_norm.default not in targets(split)
    assert targets(split).count(norm.group_scale.default) == 2
    assert relative_l2(split(x)[0], graph_module(x)[0]) <= 1e-6
    assert measure_peak(split, x).peak_bytes == pytest.approx(profile(split).peak_bytes, rel=0.01)
    origins = {node.meta["origin"] for node in split.graph.nodes if node.target is norm.group_moments.default}
    assert origins == {node.name for node in graph_module.graph.nodes if node.target is aten.group_norm.default}


def test_small_norms_and_norms_of_tokens_stay():
    graph_module, x = captured()
    assert split_norms(graph_module, x.nbytes + 1) is graph_module
    tokens = normalize(capture(nn.GroupNorm(4, 16), (torch.randn(2, 16, 50),)).graph_module)
    assert split_norms(tokens, 1) is tokens


@pytest.mark.parametrize("affine", [True, False])
def test_an_instance_norm_has_a_group_a_channel(affine):
    model = nn.Sequential(nn.Conv2d(4, 16, 3, padding=1), nn.InstanceNorm2d(16, affine=affine), nn.SiLU())
    model.eval().requires_grad_(False)
    x = torch.randn(2, 4, 24, 24)
    assert aten.group_norm.default in split_and_fused(model, x)
    last = x.to(memory_format=torch.channels_last)
    moved = normalize(capture(model[1], (torch.randn(2, 16, 8, 8).to(memory_format=torch.channels_last),)).graph_module)
    assert split_norms(moved, 1) is moved
    streamed = fxstream.optimize(model, "min", (last,))
    with torch.no_grad():
        result, expected = streamed(last), model(last)
    assert result.stride() == expected.stride() and relative_l2(result, expected) <= 1e-6


@pytest.mark.parametrize("affine", [True, False])
def test_a_layer_norm_over_channels_and_pixels_has_one_group(affine):
    layer = nn.LayerNorm((16, 24, 24), elementwise_affine=affine)
    model = nn.Sequential(nn.Conv2d(4, 16, 3, padding=1), layer, nn.SiLU(), nn.Conv2d(16, 4, 3, padding=1))
    if affine:
        nn.init.normal_(layer.weight), nn.init.normal_(layer.bias)
    model.eval().requires_grad_(False)
    x = torch.randn(2, 4, 24, 24)
    assert split_and_fused(model, x).count(aten.layer_norm.default if affine else aten.group_norm.default) == 1
    streamed = fxstream.optimize(model, "min", (x[:1],))
    [plan] = streamed.plans
    assert plan.after.peak_bytes < 0.6 * plan.before.peak_bytes
    measured = measure_peak(streamed, x[:1])
    assert relative_l2(measured.result, model(x[:1])) <= 1e-6
    assert measured.peak_bytes == pytest.approx(plan.after.peak_bytes, rel=0.01)


def test_a_layer_norm_over_the_last_dimensions_alone_stays():
    graph_module = normalize(capture(nn.LayerNorm((24, 24)), (torch.randn(2, 16, 24, 24),)).graph_module)
    assert split_norms(graph_module, 1) is graph_module


def test_running_statistics_need_no_moments():
    model = nn.Sequential(nn.Conv2d(4, 16, 3, padding=1), nn.InstanceNorm2d(16, track_running_stats=True), nn.SiLU())
    graph_module = normalize(capture(model.eval(), (torch.randn(2, 4, 24, 24),)).graph_module)
    assert split_norms(graph_module, 1) is graph_module


def test_parts_that_are_together_are_fused():
    graph_module, x = captured()
    split = split_norms(graph_module, 1)
    fuse_norms(split)
    assert targets(split).count(aten.group_norm.default) == 2
    assert norm.group_moments.default not in targets(split)
    assert torch.equal(split(x)[0], graph_module(x)[0])


def test_a_fusion_that_would_raise_the_peak_is_left():
    """Permuted, the whole norm copies its input; its parts don't."""

    class Permuted(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.GroupNorm(4, 16)

        def forward(self, x):
            return self.norm((x * 2).transpose(1, 2)).sum()

    graph_module = normalize(capture(Permuted().eval(), (torch.randn(1, 64, 16, 24, 24),)).graph_module)
    split = split_norms(graph_module, 1)
    peak = profile(split).peak_bytes
    fuse_norms(split)
    assert profile(split).peak_bytes == peak < profile(graph_module).peak_bytes
    assert norm.group_scale.default in targets(split)


def test_statistics_of_all_frames_are_exact_in_slices():
    model, x = video_branch()
    streamed = fxstream.optimize(model, "min", (x,))
    [plan] = streamed.plans
    assert plan.after.peak_bytes < 0.8 * plan.before.peak_bytes
    assert any("24" in group.axis for group in plan.groups)
    with torch.no_grad():
        measured = measure_peak(streamed, x)
        assert relative_l2(measured.result, model(x)) <= 1e-6
    assert measured.peak_bytes == pytest.approx(plan.after.peak_bytes, rel=0.01)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")
def test_on_a_card_a_norm_of_channels_last_is_split_and_its_output_is_contiguous():
    with fxstream.fake_on("cuda", torch.float16):
        model, x = nn.Sequential(nn.GroupNorm(4, 16), nn.SiLU()), torch.randn(1, 16, 256, 256)
        x = x.contiguous(memory_format=torch.channels_last)
    graph_module = normalize(capture(model, (x,)).graph_module)
    split = split_norms(graph_module, 1)
    scale = next(node for node in split.graph.nodes if node.target is norm.group_scale.default)
    whole = next(node for node in graph_module.graph.nodes if node.target is aten.group_norm.default)
    assert scale.meta["val"].stride() == whole.meta["val"].stride() == (16 * 256 * 256, 256 * 256, 256, 1)
    with x.fake_mode:
        alone = norm.group_scale(x, torch.empty(2, 1, 4, device=x.device), None, None)
    assert alone.stride() == scale.meta["val"].stride()
