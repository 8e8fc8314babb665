import torch

from fxstream.budget import Budget
from fxstream.planned import compile_call
from fxstream.tools.estimate import estimated_seconds, steps
from tests.tools.targets import feedforward


def test_steps_have_the_memory_of_the_plan(nested):
    found = steps(nested.compiled.graph_module)

    def most(of):
        return max(
            max(step.live_bytes, most([s for body in step.slices for s in body])) if step.slices else step.live_bytes
            for step in of
        )

    assert most(found) == nested.compiled.plan.after.peak_bytes
    loops = [step for step in found if step.slices]
    assert [(loop.name, len(loop.slices)) for loop in loops] == [
        (group.name, group.slices) for group in nested.compiled.plan.groups if group.depth == 0
    ]


def test_what_a_loop_takes_is_more_than_its_bodies(nested):
    (loop, *_) = (step for step in steps(nested.compiled.graph_module) if step.slices)
    assert loop.seconds > sum(step.seconds for body in loop.slices for step in body) > 0


def test_views_take_no_time_and_more_traffic_more():
    def seconds(rows):
        model, args, kwargs = feedforward(rows)
        with torch.no_grad():
            return estimated_seconds(compile_call(model, args, kwargs, Budget.parse("1GiB")).graph_module)

    assert seconds(64) < seconds(6400)
