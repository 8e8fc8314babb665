"""Recompute: what is computed again is the same, frees what was held, and is told."""

from __future__ import annotations

import pytest
import torch

import fxstream
from fxstream.passes.graph.capture import capture
from fxstream.passes.graph.normalize import normalize
from fxstream.passes.planning.program import Program
from fxstream.passes.rewriting.recompute import recompute
from fxstream.passes.rewriting.split_norms import split_norms
from fxstream.tools.bench import relative_l2
from fxstream.tools.measure import measure_peak
from tests.passes.programs import Branch

norm = torch.ops.fxstream


@pytest.fixture
def case():
    torch.manual_seed(0)
    return Branch().eval().requires_grad_(False), torch.randn(1, 16, 6, 32, 32)


def test_a_norms_input_is_computed_for_its_statistics_and_again_for_its_values(case):
    model, x = case
    program = Program(split_norms(normalize(capture(model, (x,)).graph_module), 1))
    first = next(value.node for value in program.values if value.node.name == "conv3d")
    changed = recompute(program, program.liveness.of[first])
    assert changed is not None
    convs = [node for node in changed.graph.nodes if node.target is torch.ops.aten.conv3d.default]
    assert len(convs) == 3
    moments = [node for node in changed.graph.nodes if node.target is norm.group_moments.default]
    scales = [node for node in changed.graph.nodes if node.target is norm.group_scale.default]
    assert moments[1].args[0] is convs[0] and scales[-1].args[0] is convs[1]
    with torch.no_grad():
        assert torch.equal(changed(x)[0], program.graph_module(x)[0])


def test_what_is_returned_is_not_computed_again(case):
    model, x = case
    program = Program(split_norms(normalize(capture(model, (x,)).graph_module), 1))
    [result] = program.graph_module.graph.output_node().all_input_nodes
    assert recompute(program, program.liveness.of[result]) is None


def test_it_goes_below_the_floor_of_one_pass(case):
    model, x = case
    floor = fxstream.plan(model, (x,), memory_budget="min")
    assert floor.added_flops == 0
    streamed = fxstream.optimize(model, "min", (x,), allow_recompute=True)
    [plan] = streamed.plans
    assert plan.after.peak_bytes < 0.8 * floor.after.peak_bytes
    flops = 2 * 3 * 16 * 16 * 6 * 32 * 32  # of one of the two convolutions
    assert plan.added_flops == flops
    assert "computed again" in str(plan)
    with torch.no_grad():
        measured = measure_peak(streamed, x)
        assert relative_l2(measured.result, model(x)) <= 1e-6
    assert measured.peak_bytes == pytest.approx(plan.after.peak_bytes, rel=0.01)


def test_it_is_left_where_the_budget_is_met_without(case):
    model, x = case
    assert fxstream.plan(model, (x,), memory_budget=0.9, allow_recompute=True).added_flops == 0


def test_a_budget_below_the_floor_is_met_by_it_alone(case):
    model, x = case
    floor = fxstream.plan(model, (x,), memory_budget="min")
    share = 0.85 * floor.after.peak_bytes / floor.before.peak_bytes
    with pytest.raises(fxstream.MemoryBudgetError):
        fxstream.plan(model, (x,), memory_budget=share)
    plan = fxstream.plan(model, (x,), memory_budget=share, allow_recompute=True)
    assert plan.after.peak_bytes <= share * plan.before.peak_bytes
