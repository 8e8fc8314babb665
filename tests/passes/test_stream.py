"""The passes together: rewritten graphs compute what the model computes, within what was predicted."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from fxstream.passes.capture import Inputs, capture
from fxstream.passes.liveness import profile
from fxstream.passes.normalize import normalize
from fxstream.passes.stream import stream
from fxstream.tools.bench import relative_l2
from fxstream.tools.catalogue import small
from fxstream.tools.measure import measure_peak
from tests.passes.programs import BLOCKS, Network, example


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


MODELS = {
    "svd-unet": dict(frames=7, height=24, width=32),
    "animatediff-unet": dict(frames=8, height=24, width=40),
    "modelscope-unet": dict(frames=5, height=24, width=32),
    "i2vgenxl-unet": dict(frames=4, height=24, width=40),
}


def in_float64(model, args, kwargs):
    """The model's result in float64: what its own result and the streamed one are both rounded from."""

    def double(value):
        return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value

    exact = copy.deepcopy(model)
    torch.nn.Module.to(exact, torch.float64)
    return exact(*map(double, args), **{name: double(value) for name, value in kwargs.items()})[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_a_streamed_unet_is_equal_and_as_predicted(name, dtype):
    shape = (
        MODELS[name]
        if dtype is torch.float32
        else dict(frames=8 if name == "animatediff-unet" else 4, height=24, width=32)
    )
    model, args, kwargs = small(name, dtype=dtype, **shape)
    kwargs["return_dict"] = False
    inputs = Inputs.of(args, kwargs).tensors
    graph_module = normalize(capture(model, args, kwargs).graph_module)
    peak = profile(graph_module).peak_bytes
    with torch.no_grad():
        reference = model(*args, **kwargs)[0]
        exact = in_float64(model, args, kwargs)
        rounding = relative_l2(reference, exact)
        captured = measure_peak(graph_module, *inputs)
        assert captured.peak_bytes == pytest.approx(peak, rel=0.01)
        assert torch.equal(captured.result[0], reference)
        for share in (0.75, 0.5, 0.3, None):
            streamed = stream(graph_module, None if share is None else int(share * peak))
            assert share is None or streamed.after.peak_bytes <= share * peak
            measured = measure_peak(streamed.graph_module, *inputs)
            assert measured.peak_bytes == pytest.approx(streamed.after.peak_bytes, rel=0.01)
            result = measured.result[0]
            assert relative_l2(result, reference) <= 1e-6 or relative_l2(result, exact) <= 1.1 * rounding
