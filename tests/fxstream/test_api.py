"""``plan`` and ``optimize``: budgets, what they count, and errors."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import fxstream
from fxstream.tools import catalogue
from fxstream.tools.measure import measure_peak
from tests.passes.programs import Network, example

NAMES = ("spatial", "temporal", "pixels", "feedforward", "skip")


@pytest.fixture
def model():
    return Network(NAMES, 0).eval()


@pytest.fixture
def x():
    return example(0)


@pytest.fixture(scope="module")
def lowest():
    """The plan of the lowest reachable peak."""
    return fxstream.plan(Network(NAMES, 0).eval(), (example(0),))


def held(plan):
    return plan.weight_bytes + plan.input_bytes


class TestPlanning:
    def test_on_the_meta_device(self, model, x):
        plan = fxstream.plan(model.to("meta"), (x.to("meta"),))
        assert plan.groups
        assert plan.after.peak_bytes < plan.before.peak_bytes
        assert all(parameter.device.type == "meta" for parameter in model.parameters())

    def test_with_fake_tensors(self, lowest):
        """The same plan as with real ones."""
        with FakeTensorMode():
            model, x = Network(NAMES, 0).eval(), torch.empty(example(0).shape)
        plan = fxstream.plan(model, (x,))
        assert (plan.before, plan.after, plan.groups) == (lowest.before, lowest.after, lowest.groups)

    def test_inside_the_mode_of_the_fake_tensors(self, lowest):
        with FakeTensorMode():
            model, x = Network(NAMES, 0).eval(), torch.empty(example(0).shape)
            plan = fxstream.plan(model, (x,))
        assert (plan.before, plan.after, plan.groups) == (lowest.before, lowest.after, lowest.groups)

    def test_runs_nothing(self):
        """What the call would allocate, 20 MiB, isn't allocated."""
        model = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64)).requires_grad_(False)
        x = torch.zeros(64, 256, 64)
        measured = measure_peak(fxstream.plan, model, (x,))
        assert measured.result.before.peak_bytes >= 20 * 2**20
        assert measured.peak_bytes < 2**20

    def test_changes_nothing(self, model, x):
        state, attributes = copy.deepcopy(model.state_dict()), [dict(vars(sub)) for sub in model.modules()]
        random = torch.get_rng_state()
        given = x.clone()
        fxstream.plan(model, (x,))
        assert attributes == [dict(vars(sub)) for sub in model.modules()]
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
        assert torch.equal(torch.get_rng_state(), random)
        assert torch.equal(x, given)

    def test_what_a_plan_tells(self, model, x, lowest):
        assert lowest.weight_bytes == sum(parameter.nbytes for parameter in model.parameters())
        assert lowest.input_bytes == x.nbytes
        with torch.no_grad():
            captured = measure_peak(model, x)
        assert lowest.before.peak_bytes <= captured.peak_bytes + 2048
        assert lowest.after.peak_bytes < lowest.before.peak_bytes
        assert lowest.groups and lowest.barriers == ()
        assert set(lowest.seconds) == {"capture", "planning"}
        assert all(seconds > 0 for seconds in lowest.seconds.values())
        assert lowest.budget_bytes is None

    def test_by_keyword_and_of_a_method(self, model, x, lowest):
        assert fxstream.plan(model, kwargs={"x": x}).after == lowest.after
        assert fxstream.plan(model.forward, (x,)).after.peak_bytes == lowest.after.peak_bytes

    @pytest.mark.parametrize("budget", ["much", "0B", 0, 1.0, 0.0, -5, True, None])
    def test_budgets_that_can_not_be_read(self, budget):
        """Before anything is captured: neither is given a model that could be."""
        with pytest.raises(ValueError, match="memory_budget"):
            fxstream.plan(None, memory_budget=budget)
        with pytest.raises(ValueError, match="memory_budget"):
            fxstream.optimize(None, budget)

    def test_a_model_that_can_not_be_captured(self):
        class Branching(nn.Module):
            def forward(self, x):
                return x + 1 if x.sum() > 0 else x - 1

        with pytest.raises(fxstream.CaptureError):
            fxstream.plan(Branching(), (torch.ones(3),))


class TestBudgets:
    def test_a_share_is_of_the_activations(self, model, x):
        plan = fxstream.plan(model, (x,), memory_budget=0.5)
        assert plan.budget_bytes == int(0.5 * plan.before.peak_bytes)
        assert plan.after.peak_bytes <= plan.budget_bytes

    @pytest.mark.parametrize("budget, size", [(140_000, 140_000), ("160 KiB", 160 * 1024)])
    def test_bytes_count_all_that_a_call_holds(self, model, x, budget, size):
        streamed = fxstream.optimize(model, budget, (x,))
        (plan,) = streamed.plans
        assert plan.budget_bytes == size - held(plan)
        assert plan.groups
        with torch.no_grad():
            measured = measure_peak(streamed, x)
        assert plan.after.peak_bytes + held(plan) <= size
        assert measured.peak_bytes + held(plan) <= size + 2048
        for value, reference in zip(measured.result, model(x), strict=True):
            assert (value - reference).norm() <= 1e-6 * reference.norm()

    def test_a_budget_that_is_met_already(self, model, x, lowest):
        enough = lowest.before.peak_bytes + held(lowest)
        plan = fxstream.plan(model, (x,), memory_budget=enough)
        assert plan.groups == ()
        assert plan.before == plan.after
        assert fxstream.plan(model, (x,), memory_budget=enough - 1).groups

    def test_the_lowest_is_lower_than_a_large_share(self, model, x, lowest):
        plan = fxstream.plan(model, (x,), memory_budget=0.8)
        assert lowest.after.peak_bytes < plan.after.peak_bytes <= 0.8 * plan.before.peak_bytes


@pytest.fixture(scope="module", params=[0.05, 100_000, "20KiB"], ids=str)
def budget(request):
    return request.param


@pytest.fixture(scope="module")
def error(budget):
    model = Network(NAMES, 0).eval()
    state, attributes = copy.deepcopy(model.state_dict()), [dict(vars(sub)) for sub in model.modules()]
    with pytest.raises(fxstream.MemoryBudgetError) as raised:
        fxstream.optimize(model, budget, (example(0),))
    # Nothing of the model's is changed.
    assert attributes == [dict(vars(sub)) for sub in model.modules()]
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    return raised.value


class TestBudgetsOutOfReach:
    def test_what_it_carries(self, error, budget, lowest):
        beside = 0 if isinstance(budget, float) else held(lowest)
        asked = {0.05: int(0.05 * lowest.before.peak_bytes), "20KiB": 20_480}
        assert error.budget_bytes == asked.get(budget, budget)
        assert error.lowest_bytes == error.plan.after.peak_bytes + beside
        assert error.budget_bytes < error.lowest_bytes
        assert lowest.after.peak_bytes / 1.04 <= error.plan.after.peak_bytes <= lowest.after.peak_bytes
        assert error.plan.before == lowest.before
        assert error.plan.budget_bytes == error.budget_bytes - beside
        assert error.holders == error.plan.after.holders
        assert isinstance(error, fxstream.FxstreamError)

    def test_what_it_says(self, error, budget, lowest):
        message = str(error)
        largest = error.holders[0]
        assert f"({error.lowest_bytes} bytes)" in message
        assert ("activations alone" if isinstance(budget, float) else "weights, inputs and activations") in message
        after = error.plan.after
        assert after.nodes[after.peak_index] in message
        assert f"the largest tensor is {largest.node}" in message
        assert 'memory_budget="min", a larger budget, or a smaller input' in message
        weights_alone_are_too_much = not isinstance(budget, float) and error.budget_bytes <= held(lowest)
        assert ("Weights and inputs alone hold" in message) == weights_alone_are_too_much

    def test_the_lowest_can_be_asked_for(self, model, x, error, budget):
        share = isinstance(budget, float)
        asked = (error.lowest_bytes + 0.5) / error.plan.before.peak_bytes if share else error.lowest_bytes
        plan = fxstream.plan(model, (x,), memory_budget=asked)
        assert plan.after.peak_bytes + (0 if share else held(plan)) <= error.lowest_bytes

    def test_much_less_than_the_lowest_can_not(self, model, x, lowest):
        less = int(0.95 * lowest.after.peak_bytes) + held(lowest)
        with pytest.raises(fxstream.MemoryBudgetError):
            fxstream.plan(model, (x,), memory_budget=less)

    def test_after_the_error(self, model, x):
        """The model runs, and another budget can be asked for."""
        reference = model(x)
        streamed = fxstream.optimize(model, 0.05)
        with torch.no_grad(), pytest.raises(fxstream.MemoryBudgetError):
            streamed(x)
        assert streamed.plans == ()
        assert all(map(torch.equal, model(x), reference))
        again = fxstream.optimize(model, 0.5, (x,))
        assert again.plans[0].groups
        assert (again(x)[0] - reference[0]).norm() <= 1e-6 * reference[0].norm()


class TestTheLowest:
    """No other budget reaches less, by more than one per cent, than "min" does and than an error says is reachable."""

    @pytest.fixture(scope="class")
    @classmethod
    def reached(cls):
        plan = fxstream.plan(Network(("spatial", "temporal"), 0), (example(0),), memory_budget=0.45)
        return plan.after.peak_bytes

    def test_of_min(self, reached):
        plan = fxstream.plan(Network(("spatial", "temporal"), 0), (example(0),))
        assert plan.after.peak_bytes <= 1.01 * reached

    def test_of_errors(self, reached):
        with pytest.raises(fxstream.MemoryBudgetError) as raised:
            fxstream.plan(Network(("spatial", "temporal"), 0), (example(0),), memory_budget=0.3)
        assert raised.value.lowest_bytes <= 1.01 * reached


def test_a_budget_above_the_lowest_is_met():
    """Also where the search for it ends above it."""
    model, args, kwargs = catalogue.small(catalogue.shallow("sd-vae"), frames=3, height=8, width=12, batch=1)
    plan = fxstream.plan(model, args, kwargs, memory_budget=0.5)
    assert plan.after.peak_bytes <= plan.before.peak_bytes / 2
