"""Grouping: budgets are respected, the lowest can be reached, and more memory never costs more time."""

from __future__ import annotations

from itertools import accumulate, pairwise
from typing import NamedTuple

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from fxstream.passes.graph.capture import capture
from fxstream.passes.graph.normalize import normalize
from fxstream.passes.machine.cost import CPU
from fxstream.passes.planning.candidates import find_candidates
from fxstream.passes.planning.grouping import Grouping, lengths_of
from fxstream.passes.planning.program import Program
from fxstream.passes.planning.runs import find_runs
from tests.passes.programs import BLOCKS, Network, example

NAMES = st.lists(st.sampled_from(sorted(BLOCKS)), min_size=1, max_size=3)


def grouping_of(names, seed=0):
    program = Program(normalize(capture(Network(names, seed), (example(seed),)).graph_module))
    runs = find_runs(program, range(len(program)))
    return Grouping(program, find_candidates(program, runs), CPU)


class Option(NamedTuple):
    """A candidate in slices of some lengths, as it is estimated."""

    seconds: float
    lengths: tuple[int, ...]
    peak_bytes: float


def options(grouping, candidate):
    """All that a candidate may be used as."""
    return [
        Option(grouping._price(candidate, slices), grouping._lengths(candidate, slices), peak)
        for slices, peak in grouping._options(candidate)
    ]


def option_of(grouping, group):
    """What a group is estimated to take."""
    return next(option for option in options(grouping, group.candidate) if option.lengths == group.lengths)


def outside(groups, values):
    """The values of the nodes that are in no group."""
    inside = {index for group in groups for index in range(group.start, group.end + 1)}
    return [value for index, value in enumerate(values) if index not in inside]


def seconds(grouping, groups):
    """The estimated time of the whole schedule."""
    return sum([*outside(groups, grouping._single), *(option_of(grouping, group).seconds for group in groups)])


def highest(grouping, groups):
    """The estimated peak of the schedule."""
    alone = outside(groups, grouping.program.live_bytes)
    return max([*alone, *(option_of(grouping, group).peak_bytes for group in groups)])


@given(extent=st.integers(1, 200), data=st.data())
def test_lengths_sum_and_differ_by_at_most_one(extent, data):
    slices = data.draw(st.integers(1, extent))
    lengths = lengths_of(extent, slices)
    assert len(lengths) == slices and sum(lengths) == extent
    assert lengths[0] - lengths[-1] in (0, 1) and list(lengths) == sorted(lengths, reverse=True)
    assert lengths[-1] >= 1


@settings(max_examples=8, derandomize=True, phases=[Phase.explicit, Phase.generate])
@given(names=NAMES, shares=st.lists(st.floats(0, 1), min_size=2, max_size=6))
def test_budgets_are_met_and_more_never_costs_more(names, shares):
    grouping = grouping_of(names)
    peak, lowest = max(grouping.program.live_bytes), grouping.lowest_bytes()
    assert grouping.floor_bytes() <= lowest <= peak
    before = float("inf")
    for share in [0.0, *sorted(shares), 1.0]:
        budget = lowest + share * (peak - lowest)
        groups = grouping.choose(budget)
        assert groups is not None
        assert highest(grouping, groups) <= budget
        assert all(first.end < second.start for first, second in pairwise(groups))
        assert all(sum(group.lengths) == group.run.extent for group in groups)
        assert seconds(grouping, groups) <= before * (1 + 1e-9)
        before = seconds(grouping, groups)
    assert grouping.choose(lowest - 1) is None


def test_the_choice_is_the_fastest_of_all_divisions():
    grouping = grouping_of(["feedforward"])
    lowest, peak = grouping.lowest_bytes(), max(grouping.program.live_bytes)
    live = grouping.program.live_bytes

    def fastest(start, budget, known):
        """By trying each first segment."""
        if start == len(live):
            return 0.0
        if start not in known:
            times = [grouping._single[start] + fastest(start + 1, budget, known)] if live[start] <= budget else []
            for candidate in (candidate for ends in grouping._by_end for candidate in ends):
                found = [o.seconds for o in options(grouping, candidate) if o.peak_bytes <= budget]
                if candidate.start == start and found:
                    times.append(min(found) + fastest(candidate.end + 1, budget, known))
            known[start] = min(times, default=float("inf"))
        return known[start]

    for budget in torch.linspace(lowest, peak, 9).tolist():
        budget = max(budget, lowest)
        assert seconds(grouping, grouping.choose(budget)) == pytest.approx(fastest(0, budget, {}))


def only_with(grouping, *candidates):
    return Grouping(grouping.program, candidates, CPU)


def test_a_candidate_that_was_too_hopeful_is_given_up():
    every = grouping_of(["feedforward"])
    group = max(every.choose(every.lowest_bytes()), key=lambda group: group.end - group.start)
    grouping, peak = only_with(every, group.candidate), max(every.program.live_bytes)
    lowest = grouping.lowest_bytes()
    assert lowest < peak
    assert grouping.choose(lowest)[0].candidate is group.candidate
    grouping.learn(group, max(group.lengths), peak)
    assert grouping.lowest_bytes() == peak
    assert grouping.choose(lowest) is None and grouping.choose(peak) is not None


def test_a_fixed_group_is_used_as_it_is():
    every = grouping_of(["feedforward"])
    group = max(every.choose(every.lowest_bytes()), key=lambda group: group.end - group.start)
    grouping, peak = only_with(every), max(every.program.live_bytes)
    assert grouping.lowest_bytes() == peak
    grouping.fix(group, 64)
    assert grouping.lowest_bytes() < peak
    assert grouping.choose(grouping.lowest_bytes()) == [group]
    grouping.learn(group, max(group.lengths), peak)
    assert grouping.choose(grouping.lowest_bytes()) == [group]


def test_each_slice_stores_something_of_every_output():
    for stored in ({2044}, {1024, 2047}, {7}, {2048, 4096}):
        lengths = lengths_of(2048, min(stored), stored) if min(stored) < 2048 else lengths_of(2048, 2048, stored)
        ends = list(accumulate(lengths, initial=0))
        assert sum(lengths) == 2048
        for extent in stored:
            assert all(a * extent // 2048 < b * extent // 2048 for a, b in pairwise(ends))
    assert max(lengths_of(2048, 2044, {2044})) == 2
