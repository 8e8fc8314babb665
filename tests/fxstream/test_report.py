"""Plans: what they tell of a streamed call, held against the call."""

from __future__ import annotations

import re

import pytest
import torch

import fxstream
from fxstream.budget import format_bytes
from fxstream.module import StreamedModule
from fxstream.report import SHOWN_HOLDERS, Plan
from fxstream.tools.measure import measure_peak
from tests.passes.programs import Network, example

# Networks and budgets: loops side by side, loops in one outer loop, in two, and none.
CASES = {
    "flat": (("temporal", "feedforward", "shuffle"), 0.7),
    "nested": (("spatial", "temporal", "feedforward"), "min"),
    "nested, by a share": (("frames", "feedforward"), 0.1),
    "thrice": (("feedforward", "shuffle", "temporal"), "min"),
    "none": (("spatial", "skip"), "1MiB"),
}


@pytest.fixture(scope="module", params=CASES)
def streamed(request) -> StreamedModule:
    names, budget = CASES[request.param]
    return fxstream.optimize(Network(names, 0), budget, (example(0),))


@pytest.fixture(scope="module")
def plan(streamed) -> Plan:
    return streamed.plans[0]


@pytest.fixture(scope="module")
def nested() -> Plan:
    names, budget = CASES["nested"]
    return fxstream.plan(Network(names, 0), (example(0),), memory_budget=budget)


def test_the_cases_are_what_they_are_called(streamed, plan, request):
    depths = {group.depth for group in plan.groups}
    case = request.node.callspec.params["streamed"]
    least = {"flat": {0}, "thrice": {0, 1, 2}, "none": set()}.get(case, {0, 1})
    assert depths == least if case in ("flat", "none") else depths >= least


def test_groups(plan):
    for group in plan.groups:
        positions = [position for first, last in group.spans for position in range(first, last + 1)]
        assert positions == sorted({*positions})
        assert {plan.before.nodes.index(group.first), plan.before.nodes.index(group.last)} <= {*positions}
        assert group.slices == len(group.lengths) > 1
        assert sum(group.lengths) == group.extent
        assert max(group.lengths) - min(group.lengths) <= 1
        assert str(group.extent) in group.axis
        assert 0 < group.bytes_after <= plan.after.peak_bytes
        assert group.bytes_after <= group.bytes_before
        assert "def forward(self" in group.code
        if group.depth == 0:
            assert group.bytes_before <= plan.before.peak_bytes
    assert not plan.groups or any(group.bytes_after < group.bytes_before for group in plan.groups)


def test_an_inner_group_follows_its_outer_one(plan):
    """And holds no more, counted with what lies around the outer loop."""
    around = []
    for group in plan.groups:
        del around[group.depth :]
        assert len(around) == group.depth
        for outer in around:
            assert group.bytes_after <= outer.bytes_after
            assert all(any(a <= first and last <= b for a, b in outer.spans) for first, last in group.spans)
            assert group.name.startswith(f"{outer.name}/")
        around.append(group)


def test_the_unfolded_profile_is_as_measured(streamed, plan):
    with torch.no_grad():
        measured = measure_peak(streamed, example(0))
    assert measured.peak_bytes == pytest.approx(plan.after.peak_bytes, rel=0.01, abs=2048)


def test_the_profiles_are_whole(plan):
    for profile in (plan.before, plan.after):
        assert len(profile.nodes) == len(profile.module_paths) == len(profile.live_bytes)
        assert len(set(profile.nodes)) == len(profile.nodes)
        assert sum(holder.bytes for holder in profile.holders) + profile.transient_bytes == profile.peak_bytes
        sizes = [holder.bytes for holder in profile.holders]
        assert sizes == sorted(sizes, reverse=True)
    assert (plan.before.weight_bytes, plan.before.input_bytes) == (plan.weight_bytes, plan.input_bytes)
    assert (plan.after.weight_bytes, plan.after.input_bytes) == (plan.weight_bytes, plan.input_bytes)


def test_holders_inside_an_outer_loop_are_named(nested):
    """Not as one lump: the node of the body, and the module that it came from."""
    peak = nested.after
    where = peak.nodes[peak.peak_index]
    assert re.fullmatch(r"loop_0/\w+", where)
    inside = [holder for holder in peak.holders if holder.node in nested.before.nodes and holder.module_path]
    assert any(holder.module_path.startswith("blocks.") for holder in inside)
    assert any(holder.node == "loop_0" for holder in peak.holders)
    printed = nested.holders_table(peak)
    assert all(holder.node in printed for holder in peak.holders[:SHOWN_HOLDERS])
    assert f"inside {where}" in printed


def test_printed_tables(plan):
    printed = str(plan)
    for table in (plan.summary(), plan.holders_table(plan.after)):
        assert table in printed
    assert (plan.groups_table() in printed) == bool(plan.groups)
    assert ("No groups" in printed) == (not plan.groups)
    for group in plan.groups:
        assert f"{group.first} .. {group.last}" in printed
        assert group.axis in printed


def test_the_summary_adds_up(plan):
    held = plan.weight_bytes + plan.input_bytes
    rows = {line.split("  ")[0]: line for line in map(str.strip, plan.summary().splitlines()[2:])}
    before, after = plan.launches
    assert list(rows) == [
        *("activation peak", "weights", "inputs", "all", ""),
        f"Kernels launched: {before:,} before, {after:,} after",
    ]
    assert (before == after) == (not plan.groups)
    assert format_bytes(plan.before.peak_bytes) in rows["activation peak"]
    assert format_bytes(plan.after.peak_bytes) in rows["activation peak"]
    assert format_bytes(plan.before.peak_bytes + held) in rows["all"]
    assert format_bytes(plan.after.peak_bytes + held) in rows["all"]


def test_holders_beyond_the_shown_are_summed():
    """Eight live values of 4 KiB at once: six are listed, the others in one line."""

    class Wide(torch.nn.Module):
        def forward(self, x):
            return tuple(x + number for number in range(8))

    plan = fxstream.plan(Wide(), (torch.randn(1024),))
    lines = plan.holders_table(plan.after).splitlines()[2:]
    assert len(plan.after.holders) == 8
    assert len(lines) == SHOWN_HOLDERS + 1
    assert "2 more" in lines[-1] and "8.00 KiB" in lines[-1]
    assert all("4.00 KiB" in line and "1024" in line and "float32" in line for line in lines[:-1])


def test_inner_groups_are_indented(nested):
    lines = nested.groups_table().splitlines()[2:]
    assert [len(line) - len(line.lstrip()) for line in lines] == [2 * group.depth for group in nested.groups]
