"""Plans through Inductor, in the three ways: equality, peaks, and what is compiled again."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch._inductor.utils import fresh_cache

import fxstream
from fxstream.passes.rewriting.lower import CompiledPart
from fxstream.runtime.loop import SlicedLoop
from fxstream.tools.bench import relative_l2
from fxstream.tools.measure import measure_peak
from tests.dynamo import fresh_dynamo  # noqa: F401 (a fixture)
from tests.passes.programs import Network, TokenFeedForward, example

BUDGET = 0.45

WAYS = {
    "backend": lambda model: torch.compile(
        model, backend="fxstream", options={"memory_budget": BUDGET}, fullgraph=True
    ),
    "around": lambda model: torch.compile(fxstream.optimize(model, BUDGET), fullgraph=True),
    "compile": lambda model: fxstream.optimize(model, BUDGET, compile="inductor"),
}


pytestmark = pytest.mark.usefixtures("fresh_dynamo")


@pytest.fixture(scope="module")
def cache():
    """One cache for all: what was compiled for one way need not be for the next."""
    with fresh_cache():
        yield


@pytest.fixture(scope="module")
def alone(cache):
    """A model, its input, its result, and the peak of torch.compile alone."""
    model, x = TokenFeedForward(16), torch.randn(7, 64, 16)
    with torch.no_grad():
        function = torch.compile(model, fullgraph=True)
        function(x)
        return model, x, model(x), measure_peak(function, x).peak_bytes


@pytest.mark.parametrize("way", WAYS)
def test_the_loops_survive_inductor(alone, way):
    """With a ragged last slice."""
    model, x, expected, peak_alone = alone
    plan = fxstream.plan(model, (x,), memory_budget=BUDGET)
    assert any(len(set(group.lengths)) == 2 for group in plan.groups)
    function = WAYS[way](model)
    assert relative_l2(function(x), expected) <= 1e-5
    with torch._dynamo.config.patch(error_on_recompile=True):
        measured = measure_peak(function, x)
    assert measured.peak_bytes <= 1.05 * plan.after.peak_bytes
    assert measured.peak_bytes < peak_alone


def test_a_network_with_skips_stays_within_its_plan(cache):
    model, x = Network(("spatial", "temporal", "feedforward", "skip"), 0).eval(), example(0)
    streamed = fxstream.optimize(model, 0.7, (x,), compile="inductor")
    for value, expected in zip(streamed(x), model(x), strict=True):
        assert relative_l2(value, expected) <= 1e-5
    [plan] = streamed.plans
    assert plan.groups
    assert measure_peak(streamed, x).peak_bytes <= 1.05 * plan.after.peak_bytes


def parts(streamed):
    return [part for part in streamed._compiled[next(iter(streamed._compiled))].run.__self__.modules()]


def test_each_body_is_compiled_once(alone):
    model, x, _, _ = alone
    first, second = (fxstream.optimize(model, BUDGET, (x,), compile="inductor") for _ in range(2))
    loops = [loop for loop in parts(first) if isinstance(loop, SlicedLoop)]
    assert loops and all(isinstance(body, CompiledPart) for loop in loops for body in loop.bodies.values())
    bodies = {id(part) for part in parts(first) if isinstance(part, CompiledPart)}
    assert bodies == {id(part) for part in parts(second) if isinstance(part, CompiledPart)}


def test_two_budgets_share_a_cache_on_disk(alone):
    """What is compiled is forgotten each time; the last is read from the cache, and is not the one of before."""
    model, x, expected, _ = alone
    for budget, misses in ((BUDGET, None), (0.3, True), (BUDGET, False)):
        torch._dynamo.reset()
        counters.clear()
        gc.collect()
        function = torch.compile(fxstream.optimize(model, budget), fullgraph=True)
        assert relative_l2(function(x), expected) <= 1e-5
        assert misses is None or misses == bool(counters["inductor"]["fxgraph_cache_miss"])
        plan = fxstream.plan(model, (x,), memory_budget=budget)
        assert measure_peak(function, x).peak_bytes <= 1.05 * plan.after.peak_bytes
        del function


def test_a_weight_that_is_replaced_is_seen(alone):
    model, x, _, _ = alone
    streamed = fxstream.optimize(model, BUDGET, compile="inductor")
    streamed(x)
    weight = model.narrow.weight
    try:
        model.narrow.weight = nn.Parameter(torch.randn_like(weight), requires_grad=False)
        assert relative_l2(streamed(x), model(x)) <= 1e-5
    finally:
        model.narrow.weight = weight


@pytest.mark.parametrize("name", ["indoctor", "fxstream", 3])
def test_an_unknown_backend_is_named(name):
    with pytest.raises(ValueError, match=f"compile {name!r} is no backend of torch.compile: use one of .*inductor"):
        fxstream.optimize(TokenFeedForward(8), "min", compile=name)
