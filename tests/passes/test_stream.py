"""The passes together: rewritten graphs compute what the model computes, within what was predicted."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import nn

from fxstream.passes.graph.call import Inputs
from fxstream.passes.graph.capture import capture
from fxstream.passes.graph.liveness import bytes_of, profile
from fxstream.passes.graph.normalize import normalize
from fxstream.passes.planning.barriers import barriers
from fxstream.passes.stream import stream
from fxstream.runtime.loop import SlicedLoop
from fxstream.tools.bench import relative_l2
from fxstream.tools.bench_exact import seam, tiled
from fxstream.tools.catalogue import CATALOGUE, small
from fxstream.tools.measure import measure_peak
from tests.passes.programs import BLOCKS, Network, example

aten = torch.ops.aten


@settings(max_examples=25, derandomize=True, phases=[Phase.explicit, Phase.generate])
@given(
    names=st.lists(st.sampled_from(sorted(BLOCKS)), min_size=1, max_size=4),
    share=st.one_of(st.none(), st.floats(0.2, 0.9)),
    seed=st.integers(0, 1000),
)
def test_a_streamed_network_is_equal_and_as_predicted(names, share, seed):
    model, x = Network(names, seed), example(seed)
    graph_module = normalize(capture(model, (x,)).graph_module)
    peak = profile(graph_module).peak_bytes
    streamed = stream(graph_module, None if share is None else int(share * peak))
    assert streamed.after.peak_bytes <= peak
    with torch.no_grad():
        measured = measure_peak(streamed.graph_module, x)
    assert measured.peak_bytes == pytest.approx(streamed.after.peak_bytes, rel=0.01, abs=2048)
    for value, reference in zip(measured.result, model(x), strict=True):
        assert relative_l2(value, reference) <= 1e-6
        assert value.stride() == reference.stride()


def shallow(entry, levels):
    """A UNet of fewer levels, the last without attention as in the published one."""
    kind = {"svd-unet": "SpatioTemporal", "animatediff-unet": "Motion"}.get(entry.name, "3D")
    blocks = (*[f"CrossAttn{{}}Block{kind}"] * (levels - 1), f"{{}}Block{kind}")
    config = {name: value[:levels] if isinstance(value, tuple) else value for name, value in entry.small.items()}
    types = {
        "down_block_types": tuple(block.format("Down") for block in blocks),
        "up_block_types": tuple(block.format("Up") for block in reversed(blocks)),
    }
    return replace(entry, small={**config, **types, "layers_per_block": 1})


MODELS = {
    "svd-unet": dict(frames=7, height=24, width=32),
    "animatediff-unet": dict(frames=8, height=24, width=40),
    "modelscope-unet": dict(frames=5, height=24, width=32),
    "i2vgenxl-unet": dict(frames=4, height=24, width=40),
}


DECODERS = {
    "svd-vae": dict(frames=5, height=12, width=16, batch=1),
    "sd-vae": dict(frames=2, height=20, width=12, batch=1),
    "sd-vae-encode": dict(frames=2, height=12, width=20, batch=1),
}


FAMILIES = {
    "wan-transformer": dict(frames=9, height=8, width=12),
    "cogvideox-transformer": dict(frames=9, height=8, width=12),
    "ltx-transformer": dict(frames=17, height=8, width=12),
    "hunyuanvideo-transformer": dict(frames=9, height=8, width=12, batch=1),
    "wan-vae": dict(frames=5, height=8, width=12, batch=1),
    "cogvideox-vae": dict(frames=9, height=8, width=12, batch=1),
    "ltx-vae": dict(frames=17, height=4, width=6, batch=1),
    "hunyuanvideo-vae": dict(frames=9, height=8, width=12, batch=1),
}


def first(result):
    """The tensor that a call returns, of a distribution its mean."""
    return result[0] if isinstance(result[0], torch.Tensor) else result[0].mean


def in_float64(entry, model, args, kwargs):
    """The model's result in float64: what its own result and the streamed one are both rounded from."""

    def double(value):
        return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value

    exact = copy.deepcopy(getattr(model, "__self__", model))
    torch.nn.Module.to(exact, torch.float64)
    method = exact if exact.__class__ is model.__class__ else getattr(exact, entry.method)
    return first(method(*map(double, args), **{name: double(value) for name, value in kwargs.items()}))


def check(entry, dtype, shape, shares, allow_recompute=False):
    """A model of the catalogue, streamed to each share of its peak: within it, as predicted, and equal.

    The last of them is returned.
    """
    model, args, kwargs = small(entry, dtype=dtype, **shape)
    kwargs["return_dict"] = False
    inputs = Inputs.of(args, kwargs).tensors
    captured = capture(model, args, kwargs)
    graph_module = normalize(captured.graph_module)
    peak = profile(graph_module).peak_bytes
    with torch.no_grad():
        reference = first(model(*args, **kwargs))
        exact = in_float64(entry, model, args, kwargs)
        rounding = relative_l2(reference, exact)
        whole = measure_peak(graph_module, *inputs)
        assert whole.peak_bytes == pytest.approx(peak, rel=0.01)
        assert torch.equal(first(captured.result(whole.result)), reference)
        for share in shares:
            streamed = stream(graph_module, None if share is None else int(share * peak), allow_recompute)
            assert share is None or streamed.after.peak_bytes <= share * peak
            measured = measure_peak(streamed.graph_module, *inputs)
            assert measured.peak_bytes == pytest.approx(streamed.after.peak_bytes, rel=0.01)
            result = first(captured.result(measured.result))
            assert relative_l2(result, reference) <= 1e-6 or relative_l2(result, exact) <= 1.1 * rounding
    return streamed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_a_streamed_unet_is_equal_and_as_predicted(name, dtype):
    entry = CATALOGUE[name]
    if dtype is torch.float32:
        streamed = check(shallow(entry, 3), dtype, MODELS[name], (0.75, 0.5, 0.3, None))
        # Loops read the two parts of a skip concatenation where they lie.
        whole = [node for node in streamed.graph_module.graph.nodes if node.target is aten.cat.default]
        assert all(bytes_of(node.meta["val"]) <= streamed.after.peak_bytes / 20 for node in whole)
    else:
        entry = shallow(entry, 2)
        frames = {"svd-unet": 7, "i2vgenxl-unet": 4}.get(name, 8)
        check(entry, dtype, dict(frames=frames, height=24, width=32), (None,))


@pytest.mark.parametrize("name", DECODERS)
def test_a_streamed_decoder_is_equal_and_as_predicted(name):
    check(CATALOGUE[name], torch.float32, DECODERS[name], (0.75, 0.5, None))


@pytest.mark.parametrize("name", FAMILIES)
def test_a_streamed_transformer_or_its_decoder_is_equal_and_as_predicted(name):
    streamed = check(CATALOGUE[name], torch.float32, FAMILIES[name], (None,))
    assert barriers(streamed.program) == ()


@pytest.mark.parametrize("name", ["svd-vae", "sd-vae"])
def test_a_decoder_that_computes_values_again_is_equal_and_as_predicted(name):
    check(CATALOGUE[name], torch.float32, DECODERS[name], (None,), allow_recompute=True)


def test_no_seam():
    """An image cut in 4 x 4 tiles, in float64 where rounding hides nothing: no pixel tells where they meet."""
    model, args, kwargs = small("sd-vae", frames=1, height=32, width=32, batch=1, dtype=torch.float64)
    graph_module = normalize(capture(model, args, kwargs).graph_module)
    with torch.no_grad():
        difference, edges = seam(graph_module, args, 4)
    border = [difference[0], difference[-1], difference[:, 0], difference[:, -1]]
    assert difference.shape == (256, 256) and len(edges) == 6
    assert max(line.max() for line in border) <= 1e-6
    assert difference[edges].max() <= 1e-6 and difference[:, edges].max() <= 1e-6
    assert difference.max() <= 1e-6


def test_tiles_are_loops_within_loops():
    """Cut along rows in 4, and inside along columns in 4; the last convolutions are among them."""
    model, args, kwargs = small("sd-vae", frames=1, height=16, width=16, batch=1)
    rows = tiled(normalize(capture(model, args, kwargs).graph_module), 4)
    loops = [loop for loop in rows.modules() if isinstance(loop, SlicedLoop)]
    *_, last = (module for module in rows.children() if isinstance(module, SlicedLoop))
    assert all(len(loop.lengths) == 4 for loop in loops)
    assert last.outputs[0].slice.dim == 2
    for body in last.graphs().values():
        assert any(loop.outputs[0].slice.dim == 3 for loop in body.children() if isinstance(loop, SlicedLoop))


class Narrowing(nn.Module):
    """A residual block from 32 channels to 16 and one of 16: of the wide one's input half is left to write over."""

    def __init__(self):
        super().__init__()
        layers = {}
        for block, wide in enumerate((32, 16)):
            layers[f"norm_{block}"] = nn.GroupNorm(4, wide)
            layers[f"conv_{block}"] = nn.Conv2d(wide, 16, 3, padding=1)
            layers[f"second_norm_{block}"] = nn.GroupNorm(4, 16)
            layers[f"second_conv_{block}"] = nn.Conv2d(16, 16, 3, padding=1)
        self.layers = nn.ModuleDict(layers)
        self.widen, self.shortcut = nn.Conv2d(4, 32, 1), nn.Conv2d(32, 16, 1)

    def forward(self, x):
        x = self.widen(x)
        for block in (0, 1):
            h = x
            for part in ("", "second_"):
                h = self.layers[f"{part}norm_{block}"](h)
                h = self.layers[f"{part}conv_{block}"](nn.functional.silu(h))
            x = h + (x if block else self.shortcut(x))
        return x.sum(1)


def test_what_a_larger_input_holds_after_a_loop_is_counted():
    """The narrow values after the shortcut lie in the wide one's storage, and loops next to them leave room for it."""
    torch.manual_seed(0)
    model, x = Narrowing().eval().requires_grad_(False), torch.randn(1, 4, 256, 256)
    streamed = stream(normalize(capture(model, (x,)).graph_module), None)
    measured = measure_peak(streamed.graph_module, x)
    assert measured.peak_bytes == pytest.approx(streamed.after.peak_bytes, rel=0.01)
    assert relative_l2(measured.result[0], model(x)) <= 1e-6
    assert streamed.after.peak_bytes <= 3.2 * 16 * x[0, 0].nbytes


class JointAttention(nn.Module):
    """Attention over tokens of a video and of a prompt together, masked, each of which goes its own way after it."""

    def __init__(self):
        super().__init__()
        self.qkv, self.video, self.text = nn.Linear(32, 96), nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, video, text, mask):
        heads = self.qkv(torch.cat([video, text], 1)).unflatten(2, (3, 2, 16)).permute(2, 0, 3, 1, 4)
        mask = nn.functional.pad(mask, (video.shape[1], 0), value=True)[:, None, None]
        x = nn.functional.scaled_dot_product_attention(*heads, attn_mask=mask & mask.mT)
        x = x.transpose(1, 2).flatten(2)
        return video + self.video(x[:, : video.shape[1]]), text + self.text(x[:, video.shape[1] :])


def test_what_joint_attention_parts_into_is_cut_apart():
    """A few tokens at the end of many are no part of the loop over these: their slices lie elsewhere."""
    torch.manual_seed(0)
    model = JointAttention().eval().requires_grad_(False)
    inputs = torch.randn(1, 576, 32), torch.randn(1, 14, 32), torch.arange(14)[None] < 9
    graph_module = normalize(capture(model, inputs).graph_module)
    streamed = stream(graph_module, None)
    assert streamed.after.peak_bytes <= 0.5 * profile(graph_module).peak_bytes
    with torch.no_grad():
        measured = measure_peak(streamed.graph_module, *inputs)
        assert measured.peak_bytes == pytest.approx(streamed.after.peak_bytes, rel=0.01)
        for value, reference in zip(measured.result, model(*inputs), strict=True):
            assert relative_l2(value, reference) <= 1e-6
