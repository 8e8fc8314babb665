"""torch.compile around a streamed module: one graph, one operator in it, and Dynamo's guards on the model."""

from __future__ import annotations

import pytest
import torch
from torch import fx, nn
from torch._dynamo.exc import BackendCompilerFailed

import fxstream
from fxstream.tools.bench import relative_l2
from fxstream.tools.measure import measure_peak
from tests.dynamo import fresh_dynamo, graphs  # noqa: F401 (a fixture)
from tests.passes.programs import Branch, Network, TokenFeedForward, example

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def compiled(module, backend="aot_eager"):
    return torch.compile(module, backend=backend, fullgraph=True)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_one_graph_within_the_plan(backend):
    model, x = Network(("spatial", "temporal", "pixels", "feedforward", "skip"), 0).eval(), example(0)
    streamed = fxstream.optimize(model, 0.6)
    function = compiled(streamed, backend)
    for value, expected in zip(function(x), model(x), strict=True):
        assert torch.allclose(value, expected, atol=1e-5)
    assert graphs() == 1
    [plan] = streamed.plans
    assert plan.groups
    assert measure_peak(function, x).peak_bytes <= plan.after.peak_bytes


def test_what_is_around_it_is_in_the_same_graph():
    streamed = fxstream.optimize(TokenFeedForward(16), "min")
    x, seen = torch.randn(7, 32, 16), []

    def backend(graph_module: fx.GraphModule, example_inputs):
        seen.append(graph_module)
        return graph_module.forward

    function = torch.compile(lambda x: streamed(x + 1) * 2, backend=backend, fullgraph=True)
    assert torch.allclose(function(x), streamed(x + 1) * 2, atol=1e-6)
    assert len(seen) == 1 and sum("region" in str(node.target) for node in seen[0].graph.nodes) == 1


@pytest.mark.parametrize("draw", [torch.randn_like, lambda x: nn.functional.dropout(x, 0.3, True)])
def test_a_model_that_dynamo_breaks_in_two_is_streamed_as_without_it(draw):
    class Broken(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = TokenFeedForward(8), TokenFeedForward(8)

        def forward(self, x):
            x = self.first(x)
            torch._dynamo.graph_break()
            return self.second(x + draw(x))

    model, x = Broken(), torch.randn(7, 32, 8)
    streamed = fxstream.optimize(model, "min")
    for module in (model, torch.compile(streamed, backend="eager")):
        torch.manual_seed(1)
        module.results = [module(x), module(x), torch.rand(2)]
        if module is model:
            wanted = module.results
    assert [relative_l2(*pair) < 1e-6 for pair in zip(module.results, wanted, strict=True)] == [True] * 3
    assert [plan.groups != () for plan in streamed.plans] == [True]


def test_what_a_model_that_dynamo_breaks_in_two_is_refused_for_is_named():
    class Seeding(nn.Module):
        def forward(self, x):
            torch.manual_seed(0)
            return x + torch.randn_like(x)

    with pytest.raises(fxstream.CaptureError, match="forward seeds torch's generator"):
        torch.compile(fxstream.optimize(Seeding(), "min"), backend="eager")(torch.randn(2, 3))


def test_results_that_are_no_tensors_alone():
    class Model(nn.Module):
        def forward(self, x, scale=2, *, named=True):
            y = (x * scale).sin().cos()
            return {"sample": y, "scale": scale} if named else (y, None)

    model, x = Model(), torch.randn(7, 32, 16)
    function = compiled(fxstream.optimize(model, 0.9))
    result = function(x, scale=3)
    assert torch.equal(result["sample"], model(x, 3)["sample"]) and result["scale"] == 3
    assert function(x, named=False)[1] is None


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_results_that_are_views(backend):
    """Of each other, of an input, and in an object that holds both a value and its halves."""

    class Halves:
        def __init__(self, whole):
            self.whole = whole
            self.first, self.second = whole.chunk(2, dim=1)

    class Model(nn.Module):
        def forward(self, x):
            y = (x * 2).sin()
            return Halves(y), y.transpose(0, 1)[1], x, x[0], y

    model, x = Model(), torch.randn(8, 32, 16)
    function = compiled(fxstream.optimize(model, "min"), backend)
    halves, *others = function(x)
    expected, *wanted = model(x)
    found = [halves.whole, halves.first, halves.second, *others]
    for value, other in zip(found, [expected.whole, expected.first, expected.second, *wanted], strict=True):
        assert torch.equal(value, other) and value.stride() == other.stride()
    halves.whole.zero_()
    assert not halves.second.any() and not others[0].any()
    assert others[1].data_ptr() == others[2].data_ptr() == x.data_ptr()


def test_a_method_of_a_model():
    class Decoder(TokenFeedForward):
        def decode(self, x):
            return self.forward(x) + 1

    model, x = Decoder(16), torch.randn(7, 32, 16)
    assert torch.allclose(compiled(fxstream.optimize(model.decode, "min"))(x), model.decode(x), atol=1e-6)


def test_recompiles_where_shapes_or_the_model_change():
    model = TokenFeedForward(16)
    function = compiled(fxstream.optimize(model, "min"))
    for frames, expected in ((7, 1), (7, 1), (5, 2), (6, 3), (5, 3), (7, 3)):
        x = torch.randn(frames, 32, 16)
        assert torch.allclose(function(x), model(x), atol=1e-6)
        assert graphs() == expected
    model.norm = nn.LayerNorm(16, eps=1.0)
    assert torch.allclose(function(x), model(x), atol=1e-6)
    with torch._dynamo.config.patch(error_on_recompile=True):
        model.narrow.weight.copy_(torch.randn(16, 64))
        assert torch.allclose(function(x), model(x), atol=1e-5)


def test_two_budgets_are_two_operators():
    model, x = TokenFeedForward(16), torch.randn(8, 32, 16)
    modules = [fxstream.optimize(model, budget) for budget in (0.5, 0.3)]
    for streamed in modules:
        plan = fxstream.plan(model, (x,), memory_budget=0.5 if streamed is modules[0] else 0.3)
        assert measure_peak(compiled(streamed), x).peak_bytes > 0  # planned and run
        assert measure_peak(compiled(streamed), x).peak_bytes <= plan.after.peak_bytes
    first, second = ([made.key for made in streamed._region.graphs] for streamed in modules)
    assert first and second and not set(first) & set(second)


def test_constants_tell_two_graphs_apart():
    class Shifted(nn.Module):
        def __init__(self, shift):
            super().__init__()
            self.shift = shift

        def forward(self, x):
            return (x + torch.tensor(self.shift)).sin().cos()

    x = torch.randn(7, 32, 2)
    functions = [compiled(fxstream.optimize(Shifted(shift), "min")) for shift in ([1.0, 2.0], [3.0, 4.0])]
    for function, shift in zip(functions, ([1.0, 2.0], [3.0, 4.0]), strict=True):
        assert torch.equal(function(x), Shifted(shift)(x))


def test_errors_come_through():
    x = torch.randn(7, 32, 16)
    with pytest.raises(BackendCompilerFailed, match="can't be met") as raised:
        compiled(fxstream.optimize(TokenFeedForward(16), 100))(x)
    assert isinstance(raised.value.inner_exception, fxstream.MemoryBudgetError)
    with torch.enable_grad(), pytest.raises(BackendCompilerFailed, match="inference only"):
        compiled(fxstream.optimize(TokenFeedForward(16), "min"))(x.requires_grad_())


def test_the_backend_of_a_streamed_module_has_the_say():
    streamed = fxstream.optimize(TokenFeedForward(16), 100)  # could not be met
    options = {"memory_budget": "min", "inner": "eager"}
    x = torch.randn(7, 32, 16)
    function = torch.compile(streamed, backend="fxstream", options=options, fullgraph=True)
    assert torch.allclose(function(x), streamed._original(x), atol=1e-6)


def test_values_are_computed_again_where_that_is_allowed():
    torch.manual_seed(0)
    model, x = Branch().eval().requires_grad_(False), torch.randn(1, 16, 6, 32, 32)
    streamed = fxstream.optimize(model, "min", allow_recompute=True)
    backend = torch.compile(
        model, backend="fxstream", options={"memory_budget": "min", "inner": "eager", "allow_recompute": True}
    )
    lowest = fxstream.plan(model, (x,), memory_budget="min").after.peak_bytes
    for function in (compiled(streamed, "eager"), backend):
        measured = measure_peak(function, x)
        assert relative_l2(measured.result, model(x)) <= 1e-6
        assert measured.peak_bytes < 0.8 * lowest
    assert streamed.plans[0].added_flops
