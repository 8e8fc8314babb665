"""The backend of torch.compile: options, weights, graph breaks, shapes, errors."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed

import fxstream
from fxstream.tools.bench import relative_l2
from fxstream.tools.measure import measure_peak
from tests.dynamo import fresh_dynamo, graphs  # noqa: F401 (a fixture)
from tests.fxstream.pipeline.pipelines import stable_diffusion
from tests.passes.programs import Network, TokenFeedForward, example

NAMES = ("spatial", "temporal", "pixels", "feedforward", "skip")


pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def compiled(model, memory_budget="min", inner="eager", **options):
    options = {"memory_budget": memory_budget, "inner": inner, **options}
    return torch.compile(model, backend="fxstream", options=options, fullgraph=True)


@pytest.fixture(scope="module")
def feed_forward():
    return TokenFeedForward(16)


def test_found_by_its_name_alone():
    code = """
import sys, torch
assert "fxstream" in torch._dynamo.list_backends()
assert "fxstream" not in sys.modules
model = torch.nn.Linear(2, 2).requires_grad_(False)
print(torch.compile(model, backend="fxstream", options={"memory_budget": "1GiB", "inner": "eager"})(torch.zeros(1, 2)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "tensor" in done.stdout


def test_it_computes_the_same_within_the_plan():
    model, x = Network(NAMES, 0).eval(), example(0)
    plan = fxstream.plan(model, (x,), memory_budget=0.6)
    assert plan.groups
    function = compiled(model, 0.6)
    for value, expected in zip(function(x), model(x), strict=True):
        assert torch.allclose(value, expected, atol=1e-5)
    assert graphs() == 1
    assert measure_peak(function, x).peak_bytes == plan.after.peak_bytes


def test_lifted_parameters_and_buffers_are_weights(feed_forward):
    """A budget of all that the call holds is counted as for the module itself."""
    feed_forward.register_buffer("shift", torch.randn(16))
    x = torch.randn(7, 32, 16)
    lowest = fxstream.plan(feed_forward, (x,))
    total = lowest.weight_bytes + lowest.input_bytes + lowest.after.peak_bytes
    assert torch.allclose(compiled(feed_forward, total)(x), feed_forward(x), atol=1e-6)
    torch._dynamo.reset()
    with pytest.raises(BackendCompilerFailed) as raised:
        compiled(feed_forward, total - 1000)(x)
    assert raised.value.inner_exception.plan.weight_bytes == lowest.weight_bytes


def test_a_weight_that_is_replaced_is_seen(feed_forward):
    model, x = TokenFeedForward(16), torch.randn(7, 32, 16)
    function = compiled(model)
    function(x)
    model.load_state_dict(feed_forward.state_dict(), strict=False)
    assert torch.allclose(function(x), model(x), atol=1e-6)
    model.narrow.weight = nn.Parameter(torch.randn(16, 64), requires_grad=False)
    assert torch.allclose(function(x), model(x), atol=1e-5)


def test_recompiles_for_a_new_shape_alone(feed_forward):
    function = compiled(feed_forward)
    for frames, expected in ((7, 1), (7, 1), (5, 2), (6, 3), (5, 3), (7, 3)):
        x = torch.randn(frames, 32, 16)
        assert torch.allclose(function(x), feed_forward(x), atol=1e-6)
        assert graphs() == expected
    with torch._dynamo.config.patch(error_on_recompile=True):
        function(torch.randn(6, 32, 16))


@pytest.mark.parametrize("around", [False, True])
def test_a_pipelines_second_generation_compiles_nothing(around):
    pipeline, call = stable_diffusion()
    pipeline.set_progress_bar_config(disable=True)
    unet = pipeline.unet.requires_grad_(False)

    def generate():
        generator = torch.Generator().manual_seed(0)
        return pipeline(**call, num_inference_steps=3, output_type="latent", generator=generator).images

    expected = generate()
    streamed = fxstream.optimize(unet, 0.5)
    pipeline.unet = torch.compile(streamed, backend="eager", fullgraph=True) if around else compiled(unet, 0.5)
    assert relative_l2(generate(), expected) <= 1e-5
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert relative_l2(generate(), expected) <= 1e-5
    assert graphs() == 1


@pytest.mark.parametrize("around", [False, True])
def test_what_is_written_to_data_is_seen(around):
    class Placed(TokenFeedForward):
        def forward(self, x):
            places = x.new_zeros(x.shape)
            places.data[:, :4].copy_(x[:, :4].exp())
            return super().forward(x + places)

    model, x = Placed(16), torch.randn(7, 32, 16)
    streamed = torch.compile(fxstream.optimize(model, "min"), backend="eager", fullgraph=True)
    function = streamed if around else compiled(model)
    assert torch.allclose(function(x), model(x), atol=1e-5)


@pytest.mark.parametrize("around", [False, True])
def test_a_number_that_changes(around):
    """Dynamo makes a number that it has seen change a symbol, in a tensor."""

    class Scaled(TokenFeedForward):
        def forward(self, x, scale):
            return super().forward(x * scale) + scale

    model, x = Scaled(16), torch.randn(7, 32, 16)
    streamed = torch.compile(fxstream.optimize(model, "min"), backend="eager", fullgraph=True)
    function = streamed if around else compiled(model)
    for scale in (1.5, 2.5, 3.5, 1.5, 3):
        assert torch.allclose(function(x, scale), model(x, scale), atol=1e-5)


def test_each_graph_of_a_broken_model_is_planned_alone():
    class Broken(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = TokenFeedForward(8), TokenFeedForward(64)

        def forward(self, x):
            x = self.first(x)
            torch._dynamo.graph_break()
            return self.second(torch.cat([x] * 8, -1))

    model, x = Broken(), torch.randn(7, 32, 8)
    function = torch.compile(model, backend="fxstream", options={"memory_budget": "min", "inner": "eager"})
    assert torch.allclose(function(x), model(x), atol=1e-6)
    assert graphs() == 2
    torch._dynamo.reset()
    budget = {"memory_budget": 100_000, "inner": "eager"}  # less than the weights of the second
    small = torch.compile(model, backend="fxstream", options=budget)
    with pytest.raises(
        BackendCompilerFailed, match=r"in the graph \d+/\d+ of torch.compile, from .*\.py:\d+"
    ) as raised:
        small(x)
    assert isinstance(raised.value.inner_exception, fxstream.MemoryBudgetError)


def test_under_autocast(feed_forward):
    x = torch.randn(7, 32, 16)
    function = compiled(feed_forward)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected, value = feed_forward(x), function(x)
    assert value.dtype == expected.dtype
    assert torch.allclose(value, expected, atol=1e-2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"memory_budget": "min", "memory": 1}, "no option 'memory'.*memory_budget, inner"),
        ({"memory_budget": "min", "inner": "indoctor"}, "inner 'indoctor' is no backend.*inductor"),
        ({"memory_budget": "min", "inner": "fxstream"}, "inner 'fxstream' is no backend"),
        ({"memory_budget": "6 gigs"}, "memory_budget '6 gigs' can't be read"),
        ({"inner": "eager"}, "'memory_budget'"),
        (None, "'memory_budget'"),
    ],
    ids=str,
)
def test_bad_options(feed_forward, options, message):
    function = torch.compile(feed_forward, backend="fxstream", options=options)
    with pytest.raises(BackendCompilerFailed, match=f"(?s){message}") as raised:
        function(torch.randn(7, 32, 16))
    assert isinstance(raised.value.inner_exception, ValueError)
    assert not torch._dynamo.config.suppress_errors


def test_gradients_are_refused(feed_forward):
    function = compiled(feed_forward)
    with torch.enable_grad(), pytest.raises(BackendCompilerFailed, match="inference only") as raised:
        function(torch.randn(7, 32, 16, requires_grad=True))
    assert isinstance(raised.value.inner_exception, fxstream.GradientError)
